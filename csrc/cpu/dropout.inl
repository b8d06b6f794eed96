// The mask of em3/ops/_dropout.py, which says what each number is for. A function of where a number stands, so that it is
// drawn again rather than kept, and does not depend on tiles, parts or threads.

EM3_INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// What to multiply rows r0 .. r0 + width of a token with, [width].
static void draw(const Dropout& drop, int m, int64_t token, int64_t r0, int64_t width, float* factors) {
  const uint32_t place =
      mixed(static_cast<uint32_t>(token) * 0x85EBCA77u + static_cast<uint32_t>(m) * 0xC2B2AE3Du + drop.seed_low);
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t row = static_cast<uint32_t>(r0 + i) * 0x9E3779B9u + drop.seed_high;
    factors[i] = mixed(place ^ row) >> 8 < drop.threshold ? 0.0f : drop.factor;
  }
}
