// Rows in one of the types of storage.h, read and written as floats. Compiled once for each instruction set.

// [i] of a row of C numbers as floats.
EM3_INLINE V load_as(Storage storage, uintptr_t row, int64_t i) {
  if (storage == Storage::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  if (storage == Storage::f16) return load_f16(reinterpret_cast<const uint16_t*>(row) + i);
  return load(reinterpret_cast<const float*>(row) + i);
}

// The same of the last numbers of a row, `left` of them, which are fewer than a vector holds; then zeros.
EM3_INLINE V load_part_as(Storage storage, uintptr_t row, int64_t i, int64_t left) {
  if (storage == Storage::f32) return load_part(reinterpret_cast<const float*>(row) + i, static_cast<int>(left));
  uint16_t last[kVec] = {};
  for (int64_t k = 0; k < left && k < kVec; ++k) last[k] = reinterpret_cast<const uint16_t*>(row)[i + k];
  return load_as(storage, reinterpret_cast<uintptr_t>(last), 0);
}

static void copy_row(Storage storage, uintptr_t row, int64_t C, float* to) {
  int64_t c = 0;
  for (; c + kVec <= C; c += kVec) store(to + c, load_as(storage, row, c));
  if (c < C) store_part(to + c, load_part_as(storage, row, c, C - c), static_cast<int>(C - c));
}

EM3_INLINE void store_as(Storage storage, uintptr_t row, int64_t i, V v) {
  if (storage == Storage::bf16) return store_bf16(reinterpret_cast<uint16_t*>(row) + i, v);
  if (storage == Storage::f16) return store_f16(reinterpret_cast<uint16_t*>(row) + i, v);
  store(reinterpret_cast<float*>(row) + i, v);
}

static void store_row(Storage storage, const float* from, int64_t C, uintptr_t row) {
  int64_t c = 0;
  for (; c + kVec <= C; c += kVec) store_as(storage, row, c, load(from + c));
  if (c == C) return;
  const int tail = static_cast<int>(C - c);
  const int64_t size = bytes_of(storage);
  float last[kVec];  // of either width
  store_as(storage, reinterpret_cast<uintptr_t>(last), 0, load_part(from + c, tail));
  auto* const to = reinterpret_cast<unsigned char*>(row) + c * size;
  for (int64_t i = 0; i < tail * size; ++i) to[i] = reinterpret_cast<unsigned char*>(last)[i];
}
