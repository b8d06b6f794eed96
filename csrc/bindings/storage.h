// What rows are stored in, and dropout, as Python hands them over.
#pragma once

#include <cstdint>
#include <tuple>

#include "../cpu/dropout.h"
#include "../cpu/storage.h"
#include "../tensor.h"

namespace em3 {

inline Storage storage_of(const Tensor& x) {
  if (x.dtype() == "torch.float32") return Storage::f32;
  if (x.dtype() == "torch.bfloat16") return Storage::bf16;
  if (x.dtype() == "torch.float16") return Storage::f16;
  x.fail(x.dtype(), "torch.float32, torch.bfloat16 or torch.float16");
}

// (threshold, factor, seed), or None for no dropout.
inline Dropout dropout_of(const pybind11::object& given) {
  if (given.is_none()) return {};
  const auto [threshold, factor, seed] = given.cast<std::tuple<std::uint32_t, float, std::uint64_t>>();
  return {threshold, factor, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
}

}  // namespace em3
