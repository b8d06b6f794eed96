// The mean of each segment's rows: of the tokens of an item, or of what a history names in the bank.
#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace em3 {

struct MeanRows {
  const void* x;  // [n, C], rows of numbers that lie side by side, `stride` elements from one to the next
  Storage storage;
  std::int64_t n, C, stride;
  const std::int64_t* places;   // the row of each place of a segment; null = row i stands at place i
  std::int64_t T;               // places there are, or n
  const std::int64_t* offsets;  // [B + 1], from 0, never falling, at most T
  std::int64_t B;
};

// mean [B, C], zeros for a segment without rows; sums are in float32, in the order of the places. Throws
// std::invalid_argument for offsets that lead outside, and for a row that is not there.
void mean_rows(const MeanRows& given, float* mean, int threads, Isa isa);

}  // namespace em3
