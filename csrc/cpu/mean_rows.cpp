// Checks, the division of the segments among threads, and the choice of the instruction set.
#include "mean_rows.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "parallel.h"

#if EM3_HAVE_X86_PATHS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace em3 {
namespace {

struct KernelTable {
  bool (*segments)(const MeanRows& given, std::int64_t first, std::int64_t last, float* mean);
};

// Every standard header must be included above this line.
#define EM3_KERNEL "mean_rows_kernel.inl"
#include "every_isa.inl"

void check(const MeanRows& given) {
  if (given.B < 0 || given.C < 1 || given.offsets[0] != 0 || given.offsets[given.B] > given.T) {
    throw std::invalid_argument("mean_rows: C must be at least 1, offsets must begin with 0 and end within the places");
  }
  for (int64_t b = 0; b < given.B; ++b) {
    if (given.offsets[b] > given.offsets[b + 1]) throw std::invalid_argument("mean_rows: offsets must not decrease");
  }
}

}  // namespace

void mean_rows(const MeanRows& given, float* mean, int threads, Isa isa) {
  check(given);
  const KernelTable& table = kernels(isa);
  // Segments of like size in all: several parts a thread, so that one that was held up leaves the rest; but waking a thread
  // costs as much as adding some ten thousand numbers.
  constexpr int64_t kLeast = 1 << 15;
  const int64_t places = given.offsets[given.B], work = places * given.C;
  const int parts = static_cast<int>(std::min<int64_t>({4 * threads, work / kLeast + 1, std::max<int64_t>(given.B, 1)}));
  std::atomic<bool> found{true};
  const auto edge = [&](int64_t part) {
    if (part == parts) return given.B;  // with the empty segments behind the last row
    return std::lower_bound(given.offsets, given.offsets + given.B, places * part / parts) - given.offsets;
  };
  parallel_for(threads, parts, [&](int part) {
    if (!table.segments(given, edge(part), edge(part + 1), mean)) found = false;
  });
  if (!found) throw std::invalid_argument("mean_rows: a place named a row outside the rows that there are");
}

}  // namespace em3
