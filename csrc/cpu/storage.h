// What rows are stored in that the kernels compute with in float32; storage.inl reads and writes them.
#pragma once

#include <cstdint>

namespace em3 {

enum class Storage : std::uint8_t { f32, bf16, f16 };
constexpr std::int64_t bytes_of(Storage storage) { return storage == Storage::f32 ? 4 : 2; }

}  // namespace em3
