// The kernel of mean_rows, written once and compiled once per instruction set: mean_rows.cpp includes this file inside a
// namespace and a target region of its own, after simd.h. No standard-library function or template may be instantiated here.

#include "storage.inl"

EM3_INLINE uintptr_t mean_row(const MeanRows& given, int64_t place) {
  const int64_t row = given.places == nullptr ? place : given.places[place];
  return reinterpret_cast<uintptr_t>(given.x) + static_cast<uintptr_t>(row * given.stride * bytes_of(given.storage));
}

// Columns c .. c + NV * kVec of places begin .. end; of the last vector `left` numbers where PART.
template <Storage S, int NV, bool PART>
EM3_INLINE void mean_strip(const MeanRows& given, int64_t begin, int64_t end, int64_t c, int64_t left, float* to) {
  V total[NV];
  for (int j = 0; j < NV; ++j) total[j] = zero();
  for (int64_t t = begin; t < end; ++t) {
    const uintptr_t row = mean_row(given, t);
    for (int j = 0; j < NV; ++j) {
      total[j] = total[j] + (PART ? load_part_as(S, row, c, left) : load_as(S, row, c + j * kVec));
    }
  }
  const V share = splat(end > begin ? 1.0f / static_cast<float>(end - begin) : 0.0f);
  for (int j = 0; j < NV; ++j) {
    if (PART) {
      store_part(to + c, total[j] * share, static_cast<int>(left));
    } else {
      store(to + c + j * kVec, total[j] * share);
    }
  }
}

template <Storage S>
static void mean_segment(const MeanRows& given, int64_t begin, int64_t end, float* to) {
  int64_t c = 0;  // many vectors of a row at a time: a long segment is read from memory once
  for (; c + 8 * kVec <= given.C; c += 8 * kVec) mean_strip<S, 8, false>(given, begin, end, c, 0, to);
  for (; c + 4 * kVec <= given.C; c += 4 * kVec) mean_strip<S, 4, false>(given, begin, end, c, 0, to);
  for (; c + kVec <= given.C; c += kVec) mean_strip<S, 1, false>(given, begin, end, c, 0, to);
  if (c < given.C) mean_strip<S, 1, true>(given, begin, end, c, given.C - c, to);
}

// Segments first .. last; false = a place names a row that is not there.
static bool mean_segments(const MeanRows& given, int64_t first, int64_t last, float* mean) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = given.offsets[b], end = given.offsets[b + 1];
    for (int64_t t = begin; given.places != nullptr && t < end; ++t) {
      if (given.places[t] < 0 || given.places[t] >= given.n) return false;
    }
    float* const to = mean + b * given.C;
    if (given.storage == Storage::f32) {
      mean_segment<Storage::f32>(given, begin, end, to);
    } else if (given.storage == Storage::bf16) {
      mean_segment<Storage::bf16>(given, begin, end, to);
    } else {
      mean_segment<Storage::f16>(given, begin, end, to);
    }
  }
  return true;
}

static const KernelTable kTable = {mean_segments};
