// Squares of registers turned around. Compiled once for each instruction set.

// kVec rows of kVec numbers become columns: first two by two, then four by four within 128 bits, then the 128 bits among
// each other.
#if EM3_ISA >= 2
EM3_INLINE void transpose(V (&v)[kVec]) {
  V a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // b[i + 4 g]: columns i, i + 4, i + 8 and i + 12 of rows 4 g .. 4 g + 3
    const V even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    const V more_even = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    const V more_odd = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    v[i] = _mm512_shuffle_f32x4(even, more_even, 0x88);
    v[i + 4] = _mm512_shuffle_f32x4(odd, more_odd, 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(even, more_even, 0xdd);
    v[i + 12] = _mm512_shuffle_f32x4(odd, more_odd, 0xdd);
  }
}
#elif EM3_ISA == 1
EM3_INLINE void transpose(V (&v)[kVec]) {
  V a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#endif
