#include "isa.h"

#include <stdexcept>

#if EM3_HAVE_X86_PATHS
#include <cpuid.h>
#endif

namespace em3 {
namespace {

#if EM3_HAVE_X86_PATHS
// Not __builtin_cpu_supports("f16c"): Clang before 18 and GCC before 11 do not know the name and do not compile it. The
// operating system's part is that of AVX2.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
std::string missing_avx2() {
  __builtin_cpu_init();
  std::string lacks;
  if (!__builtin_cpu_supports("avx2")) lacks += " avx2";
  if (!__builtin_cpu_supports("fma")) lacks += " fma";
  if (!has_f16c()) lacks += " f16c";
  return lacks;
}

std::string missing_avx512() {
  std::string lacks = missing_avx2();
  if (!__builtin_cpu_supports("avx512f")) lacks += " avx512f";
  if (!__builtin_cpu_supports("avx512vl")) lacks += " avx512vl";
  if (!__builtin_cpu_supports("avx512bw")) lacks += " avx512bw";
  if (!__builtin_cpu_supports("avx512dq")) lacks += " avx512dq";
  return lacks;
}

// avx512_bf16 is bit 5 of EAX of leaf 7, subleaf 1.
bool has_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}

std::string missing(Isa isa) {
  if (isa == Isa::avx2) return missing_avx2();
  if (isa == Isa::avx512) return missing_avx512();
#if EM3_HAVE_BF16_PATH
  return missing_avx512() + (has_bf16() ? "" : " avx512_bf16");
#else
  return " a compiler with it when this was built (GCC 10 or Clang 9)";
#endif
}
#endif

IsaInfo describe(Isa isa) {
  IsaInfo info{isa, isa_name(isa), true, ""};
  if (isa == Isa::baseline) return info;
#if EM3_HAVE_X86_PATHS
  const std::string lacks = missing(isa);
  if (!lacks.empty()) info.reason = "this processor or operating system lacks" + lacks;
#else
  info.reason = "this build has only the baseline path (not x86-64, or not GCC/Clang)";
#endif
  info.usable = info.reason.empty();
  return info;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

const std::vector<IsaInfo>& isa_table() {
  static const std::vector<IsaInfo> table = {describe(Isa::baseline), describe(Isa::avx2), describe(Isa::avx512),
                                             describe(Isa::avx512_bf16)};
  return table;
}

Isa resolve_isa(const std::string& name) {
  const std::vector<IsaInfo>& table = isa_table();
  if (name.empty()) {
    Isa best = Isa::baseline;
    for (const IsaInfo& info : table) {
      if (info.usable) best = info.isa;
    }
    return best;
  }
  for (const IsaInfo& info : table) {
    if (info.name != name) continue;
    if (!info.usable) throw std::invalid_argument("isa '" + name + "' cannot be used: " + info.reason);
    return info.isa;
  }
  throw std::invalid_argument("isa '" + name + "' is unknown: it must be '', 'baseline', 'avx2', 'avx512' or 'avx512_bf16'");
}

}  // namespace em3
