// Factors, 0 or 1 / (1 - probability), that a seed and a place determine; dropout.inl draws them.
#pragma once

#include <cstdint>

namespace em3 {

struct Dropout {
  std::uint32_t threshold = 0;  // below it, of 2^24, the factor is 0; 0 = no dropout
  float factor = 1.0f;
  std::uint32_t seed_low = 0, seed_high = 0;
};

}  // namespace em3
