// Compiles the kernel file that EM3_KERNEL names once for each instruction set, each time in a namespace of its own, and
// chooses among their tables; the one with bf16 dot products only for a kernel that has them, which says so by
// EM3_KERNEL_BF16. Included once, inside the anonymous namespace of an operation that has declared KernelTable.
//
// Every standard header must be included before this file: what follows compiles for processors that the rest of the
// library must not assume, and an inline function or template of the standard library that first appeared in such a
// region could become the one copy the linker keeps for everybody.
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;
using std::uintptr_t;

namespace baseline {
#define EM3_ISA 0
#include "simd.h"
#include EM3_KERNEL
#undef EM3_ISA
}  // namespace baseline

#if EM3_HAVE_X86_PATHS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define EM3_ISA 1
#include "simd.h"
#include EM3_KERNEL
#undef EM3_ISA
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")
#endif
namespace avx512 {
#define EM3_ISA 2
#include "simd.h"
#include EM3_KERNEL
#undef EM3_ISA
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if EM3_HAVE_BF16_PATH && defined(EM3_KERNEL_BF16)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")
#endif
namespace avx512_bf16 {
#define EM3_ISA 3
#include "simd.h"
#include EM3_KERNEL
#undef EM3_ISA
}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#endif  // EM3_HAVE_X86_PATHS

const KernelTable& kernels(Isa isa) {
#if EM3_HAVE_X86_PATHS
#if EM3_HAVE_BF16_PATH && defined(EM3_KERNEL_BF16)
  if (isa == Isa::avx512_bf16) return avx512_bf16::kTable;
#endif
  if (isa >= Isa::avx512) return avx512::kTable;
  if (isa == Isa::avx2) return avx2::kTable;
#endif
  (void)isa;
  return baseline::kTable;
}

#undef EM3_KERNEL
