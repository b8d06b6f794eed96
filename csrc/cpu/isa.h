// Which instruction set a kernel runs on, decided at run time.
#pragma once

#include <string>
#include <vector>

// A wide path is compiled where the compiler can switch instruction sets inside one file; elsewhere (MSVC,
// other processors) only the baseline exists and everything still works.
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define EM3_HAVE_X86_PATHS 1
#else
#define EM3_HAVE_X86_PATHS 0
#endif
// bf16 dot products: intrinsics since GCC 10, and Clang 9.
#if EM3_HAVE_X86_PATHS && (defined(__clang__) || __GNUC__ >= 10)
#define EM3_HAVE_BF16_PATH 1
#else
#define EM3_HAVE_BF16_PATH 0
#endif

namespace em3 {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

struct IsaInfo {
  Isa isa;
  std::string name;
  bool usable;
  std::string reason;  // why it is not usable, empty when it is
};

// All paths, narrowest first; found once per process.
const std::vector<IsaInfo>& isa_table();

// "" is the best usable path. An unknown name, or a path this machine or build lacks, throws
// std::invalid_argument with the reason.
Isa resolve_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace em3
