// What the products of tiles.inl read packed, made of rows in place; of qformer_attention_kernel.inl.

#include "transpose.inl"

// rows[have] of length C -> columns 0 .. width of out [C, ld], those of missing rows 0; width is a multiple of kVec. Squares
// take a fifth of the time of the loop below, which had been an eighth of a backward with 31 tokens an item.
static void transpose_rows(const float* const* rows, int64_t have, int64_t width, int64_t C, int64_t ld, float* out) {
  int64_t done = 0;
#if EM3_ISA >= 1
  done = C / kVec * kVec;
  for (int64_t r = 0; r < width; r += kVec) {
    for (int64_t c = 0; c < done; c += kVec) {
      V v[kVec];
      for (int i = 0; i < kVec; ++i) v[i] = r + i < have ? load(rows[r + i] + c) : zero();
      transpose(v);
      for (int i = 0; i < kVec; ++i) store(out + (c + i) * ld + r, v[i]);
    }
  }
#endif
  for (int64_t r = 0; r < width; r += 4) {
    if (have - r >= 4) {  // four rows at a time keeps the reads sequential
      const float *p0 = rows[r], *p1 = rows[r + 1], *p2 = rows[r + 2], *p3 = rows[r + 3];
      for (int64_t c = done; c < C; ++c) {
        float* to = out + c * ld + r;
        to[0] = p0[c], to[1] = p1[c], to[2] = p2[c], to[3] = p3[c];
      }
    } else {
      for (int64_t c = done; c < C; ++c)
        for (int64_t i = 0; i < 4; ++i) out[c * ld + r + i] = r + i < have ? rows[r + i][c] : 0.0f;
    }
  }
}

// rows[K] of length C -> panels [C, kPanel] (the last one may be kVec wide), missing rows 0.
static void pack_transposed(const float* const* rows, int64_t K, int64_t C, float* out) {
  const int64_t padded = round_up(K, kVec);
  for (int64_t r0 = 0; r0 < padded; r0 += kPanel) {
    const int64_t width = smaller(kPanel, padded - r0);
    transpose_rows(rows + r0, K - r0, width, C, width, out + r0 * C);
  }
}

// [E, C] -> panels [E, kPanel] (the last one may be kVec wide), missing columns 0.
static void pack_wide(const float* rows, int64_t E, int64_t C, float* out) {
  const int64_t padded = round_up(C, kVec);
  for (int64_t c0 = 0; c0 < padded; c0 += kPanel) {
    const int64_t width = smaller(kPanel, padded - c0);
    float* to = out + c0 * E;
    for (int64_t e = 0; e < E; ++e)
      for (int64_t c = c0; c < c0 + width; ++c) *to++ = c < C ? rows[e * C + c] : 0.0f;
  }
}

// rows [k, C] -> the full panels of Update.packed. Memory is read in its order, which is what the processor expects.
static void pack_panels(const float* rows, int64_t k, int64_t C, float* out) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t c = 0; c + kPanel <= C; c += kPanel)
      for (int j = 0; j < 2; ++j) store(out + c * k + i * kPanel + j * kVec, load(rows + i * C + c + j * kVec));
}
