// One vector of floats and the few operations the kernels need, for the instruction set being compiled.
//
// No include guard on purpose: a kernel file is included once per instruction set, each time inside its own
// namespace with EM3_ISA set to 0 (baseline), 1 (AVX2 + FMA + F16C), 2 (AVX-512) or 3 (AVX-512 with bf16 dot products), and
// this file with it. Everything here has internal linkage. The caller includes <immintrin.h>, <cmath>, <cstdint> and <cstring> beforehand.
//
// Multiply-add goes through intrinsics because compilers fuse a*b+c only when told to (-std=c++17 tells GCC not to).

#if defined(__GNUC__) || defined(__clang__)
#define EM3_INLINE static inline __attribute__((always_inline))
#define EM3_NOINLINE __attribute__((noinline))
#define EM3_PREFETCH(address) __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2)
#define EM3_VECTOR_EXTENSIONS 1
#else
#define EM3_INLINE static inline
#define EM3_NOINLINE
#define EM3_PREFETCH(address) (void)(address)
#define EM3_VECTOR_EXTENSIONS 0
#endif

// kVec: floats a vector; kRows: rows of the register tile, so that kRows x 2 accumulators, two vectors of B and one
// broadcast fit the register file.
#if EM3_ISA >= 2
constexpr int kVec = 16, kRows = 14;
#elif EM3_ISA == 1
constexpr int kVec = 8, kRows = 6;
#elif defined(__aarch64__)
constexpr int kVec = 4, kRows = 12;
#else
constexpr int kVec = 4, kRows = 6;
#endif

#if EM3_VECTOR_EXTENSIONS

typedef float V __attribute__((vector_size(kVec * 4)));
typedef int32_t VI __attribute__((vector_size(kVec * 4)));
typedef float VU __attribute__((vector_size(kVec * 4), aligned(4), may_alias));

EM3_INLINE V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
EM3_INLINE void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
EM3_INLINE V zero() { return V{}; }

#if EM3_ISA >= 2
EM3_INLINE V splat(float x) { return _mm512_set1_ps(x); }
EM3_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// a > b ? a : b, and so b where one is NaN; spelled out, because GCC makes two operations of it where a is constant.
EM3_INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }
EM3_INLINE bool any_greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
EM3_INLINE V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
EM3_INLINE void store_part(float* p, V v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
#elif EM3_ISA == 1
alignas(32) static const int32_t kPartMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
EM3_INLINE __m256i part_mask(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPartMask + 8 - n)); }
EM3_INLINE V splat(float x) { return _mm256_set1_ps(x); }
EM3_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
EM3_INLINE V vmax(V a, V b) { return _mm256_max_ps(a, b); }
EM3_INLINE bool any_greater(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
EM3_INLINE V load_part(const float* p, int n) { return _mm256_maskload_ps(p, part_mask(n)); }
EM3_INLINE void store_part(float* p, V v, int n) { _mm256_maskstore_ps(p, part_mask(n), v); }
#else
EM3_INLINE V splat(float x) { return V{x, x, x, x}; }
#if defined(__aarch64__)
EM3_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
#else
EM3_INLINE V fma(V a, V b, V c) { return a * b + c; }
#endif
EM3_INLINE V vmax(V a, V b) { return a > b ? a : b; }
EM3_INLINE bool any_greater(V a, V b) {
  const VI m = a > b;
  return (m[0] | m[1] | m[2] | m[3]) != 0;
}
EM3_INLINE V load_part(const float* p, int n) {
  V v{};
  std::memcpy(&v, p, sizeof(float) * static_cast<unsigned>(n));
  return v;
}
EM3_INLINE void store_part(float* p, V v, int n) { std::memcpy(p, &v, sizeof(float) * static_cast<unsigned>(n)); }
#endif

EM3_INLINE V where_greater(V a, V b, V yes, V no) { return a > b ? yes : no; }

// exp(x) for x <= 88, relative error below 2e-7 where the result is a normal number; exactly 0 below -87.3, and so
// for -inf. Cephes' reduction and polynomial.
EM3_INLINE V vexp(V x) {
  const V lowest = splat(-87.3f);
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer left in the low bits
  const V clamped = vmax(lowest, x);  // in this order a NaN stays a NaN
  const V shifted = fma(clamped, splat(1.44269504f), magic);
  const V n = shifted - magic;
  const V r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  V y = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r + splat(1.0f));
  VI bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return where_greater(lowest, x, zero(), y * scale);
}

// 2^x for x < 128, relative error below 2e-7; exactly 0 below -126.5, and so for -inf. A third fewer operations than
// exp: for whoever can have logarithms to base 2 for nothing.
EM3_INLINE V vexp2(V x) {
  const V magic = splat(12582912.0f);  // as above
  const V clamped = vmax(splat(-127.0f), x);  // 2^-127 gets the exponent bits of 0; in this order a NaN stays a NaN
  const V shifted = clamped + magic;
  const V r = clamped - (shifted - magic);
  // Not Horner's: the chain of dependent operations, not their number, is what a loop over this waits for.
  const V r2 = r * r;
  const V low = fma(splat(6.931470037e-1f), r, splat(1.0f));
  const V middle = fma(splat(5.550733581e-2f), r, splat(2.402224243e-1f));
  const V high = fma(splat(1.326472731e-3f), r, splat(9.671512991e-3f));
  VI bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return fma(fma(high, r2, middle), r2, low) * scale;
}

#else  // no vector extensions: four floats and a compiler that may or may not vectorise them

struct V {
  float v[kVec];
};
#define EM3_LANES for (int i = 0; i < kVec; ++i)
EM3_INLINE V load(const float* p) { V r; EM3_LANES r.v[i] = p[i]; return r; }
EM3_INLINE void store(float* p, V a) { EM3_LANES p[i] = a.v[i]; }
EM3_INLINE V splat(float x) { V r; EM3_LANES r.v[i] = x; return r; }
EM3_INLINE V zero() { return splat(0.0f); }
EM3_INLINE V operator+(V a, V b) { EM3_LANES a.v[i] += b.v[i]; return a; }
EM3_INLINE V operator-(V a, V b) { EM3_LANES a.v[i] -= b.v[i]; return a; }
EM3_INLINE V operator*(V a, V b) { EM3_LANES a.v[i] *= b.v[i]; return a; }
EM3_INLINE V operator/(V a, V b) { EM3_LANES a.v[i] /= b.v[i]; return a; }
EM3_INLINE V fma(V a, V b, V c) { EM3_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
EM3_INLINE V vmax(V a, V b) { EM3_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
EM3_INLINE bool any_greater(V a, V b) { bool r = false; EM3_LANES r = r || a.v[i] > b.v[i]; return r; }
EM3_INLINE V where_greater(V a, V b, V yes, V no) { EM3_LANES yes.v[i] = a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; return yes; }
EM3_INLINE V load_part(const float* p, int n) { V r = zero(); for (int i = 0; i < n; ++i) r.v[i] = p[i]; return r; }
EM3_INLINE void store_part(float* p, V a, int n) { for (int i = 0; i < n; ++i) p[i] = a.v[i]; }
EM3_INLINE V vexp2(V x) { EM3_LANES x.v[i] = x.v[i] < -126.5f ? 0.0f : ::exp2f(x.v[i]); return x; }
EM3_INLINE V vexp(V x) { EM3_LANES x.v[i] = x.v[i] < -87.3f ? 0.0f : ::expf(x.v[i]); return x; }
#undef EM3_LANES

#endif

EM3_INLINE float sum(V v) {
  float lanes[kVec];
  store(lanes, v);
  for (int width = kVec / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// p[0..3] = the sums of a, b, c and d.
#if EM3_ISA >= 1
EM3_INLINE __m256 halved(__m256 v) { return v; }
#if EM3_ISA >= 2
EM3_INLINE __m256 halved(V v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
#endif
EM3_INLINE void store_sums(float* p, V a, V b, V c, V d) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(halved(a), halved(b)), _mm256_hadd_ps(halved(c), halved(d)));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
#else
EM3_INLINE void store_sums(float* p, V a, V b, V c, V d) { p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d); }
#endif

// kVec numbers of half precision as floats, exactly.
#if EM3_ISA >= 2
EM3_INLINE V load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
EM3_INLINE V load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif EM3_ISA == 1
EM3_INLINE V load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
EM3_INLINE V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#else
EM3_INLINE V load_bf16(const uint16_t* p) {
  float lanes[kVec];
  for (int i = 0; i < kVec; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(lanes + i, &bits, sizeof bits);
  }
  return load(lanes);
}
// Exponent and fraction moved to where a float has them are the number times 2^-112, also for subnormal ones; an
// exponent of all ones, infinity or NaN, has to stay one.
EM3_INLINE V load_f16(const uint16_t* p) {
  float lanes[kVec];
  for (int i = 0; i < kVec; ++i) {
    uint32_t bits = static_cast<uint32_t>(p[i] & 0x7fff) << 13;
    std::memcpy(lanes + i, &bits, sizeof bits);
    lanes[i] *= 5.192296858534828e33f;  // 2^112
    std::memcpy(&bits, lanes + i, sizeof bits);
    if ((p[i] & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= static_cast<uint32_t>(p[i] & 0x8000) << 16;
    std::memcpy(lanes + i, &bits, sizeof bits);
  }
  return load(lanes);
}
#endif

// Two numbers in bf16 take the place of one float, the first in its low half; such a float is only ever copied.
typedef float Pair;
#if EM3_VECTOR_EXTENSIONS
typedef uint16_t Half __attribute__((may_alias));
#else
typedef uint16_t Half;
#endif

// c + a.first * b.first + a.second * b.second, of kVec pairs.
#if EM3_ISA == 3
EM3_INLINE V fma_pairs(V a, V b, V c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#elif EM3_VECTOR_EXTENSIONS
EM3_INLINE V seconds(V a) {
  VI bits;
  std::memcpy(&bits, &a, sizeof bits);
  bits &= ~0xffff;
  std::memcpy(&a, &bits, sizeof bits);
  return a;
}
EM3_INLINE V firsts(V a) {
  VI bits;
  std::memcpy(&bits, &a, sizeof bits);
  bits <<= 16;
  std::memcpy(&a, &bits, sizeof bits);
  return a;
}
EM3_INLINE V fma_pairs(V a, V b, V c) { return fma(seconds(a), seconds(b), fma(firsts(a), firsts(b), c)); }
#else
EM3_INLINE V half_of(V a, int shift) {
  for (int i = 0; i < kVec; ++i) {
    uint32_t bits;
    std::memcpy(&bits, a.v + i, sizeof bits);
    bits = (bits >> shift) << 16;
    std::memcpy(a.v + i, &bits, sizeof bits);
  }
  return a;
}
EM3_INLINE V fma_pairs(V a, V b, V c) { return fma(half_of(a, 16), half_of(b, 16), fma(half_of(a, 0), half_of(b, 0), c)); }
#endif

// The bits of x in bf16, to the nearest, ties to even; a NaN stays one.
EM3_INLINE uint32_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

EM3_INLINE float bf16_value(uint32_t bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

EM3_INLINE Pair pair_of(uint32_t first, uint32_t second) {
  const uint32_t bits = first | second << 16;
  Pair pair;
  std::memcpy(&pair, &bits, sizeof pair);
  return pair;
}

// kVec pairs (a[i], b[i]).
#if EM3_ISA == 3
EM3_INLINE V round_pairs(V a, V b) {
  const __m512i first = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  const __m512i second = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b)));
  return _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
#else
EM3_INLINE V round_pairs(V a, V b) {
  float x[kVec], y[kVec];
  store(x, a);
  store(y, b);
  for (int i = 0; i < kVec; ++i) x[i] = pair_of(bf16_bits(x[i]), bf16_bits(y[i]));
  return load(x);
}
#endif

// n floats as bf16, side by side.
EM3_INLINE void round_row(const float* from, int64_t n, Half* to) {
  int64_t i = 0;
#if EM3_ISA == 3
  for (; i + kVec <= n; i += kVec)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(from + i))));
#endif
  for (; i < n; ++i) to[i] = static_cast<Half>(bf16_bits(from[i]));
}

// n pairs (first[i], second[i]) of two rows in bf16; second null = zeros.
EM3_INLINE void join_rows(const Half* first, const Half* second, int64_t n, Pair* to) {
  int64_t i = 0;
#if EM3_ISA >= 2
  for (; i + kVec <= n; i += kVec) {
    __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i)));
    if (second != nullptr) {
      const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + i));
      pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    store(to + i, _mm512_castsi512_ps(pairs));
  }
#endif
  for (; i < n; ++i) to[i] = pair_of(first[i], second == nullptr ? 0 : second[i]);
}

// The same numbers rounded to half precision, to the nearest and of two as near to the even one; a NaN stays one.
#if EM3_ISA >= 1
EM3_INLINE __m256i bf16_bits(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
}
EM3_INLINE __m128i narrow(__m256i wide) {  // of 32-bit integers below 2^16
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
  return _mm256_castsi256_si128(pairs);
}
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if EM3_ISA >= 2
EM3_INLINE void store_bf16(uint16_t* p, V v) {
  auto* const to = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(to, narrow(bf16_bits(_mm512_castps512_ps256(v))));
  _mm_storeu_si128(to + 1, narrow(bf16_bits(_mm512_extractf32x8_ps(v, 1))));
}
EM3_INLINE void store_f16(uint16_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, kNearest));
}
#else
EM3_INLINE void store_bf16(uint16_t* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(bf16_bits(v))); }
EM3_INLINE void store_f16(uint16_t* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, kNearest)); }
#endif
#else
EM3_INLINE void store_bf16(uint16_t* p, V v) {
  float lanes[kVec];
  store(lanes, v);
  for (int i = 0; i < kVec; ++i) p[i] = static_cast<uint16_t>(bf16_bits(lanes[i]));
}
EM3_INLINE void store_f16(uint16_t* p, V v) {
  float lanes[kVec];
  store(lanes, v);
  for (int i = 0; i < kVec; ++i) {
    uint32_t bits;
    std::memcpy(&bits, lanes + i, sizeof bits);
    const uint32_t sign = bits & 0x80000000;
    bits ^= sign;
    if (bits >= 0x47800000) {  // 65536 and more, infinity, NaN
      bits = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds to its last place and leaves the result in the low bits
      float shifted;
      std::memcpy(&shifted, &bits, sizeof bits);
      shifted += 0.5f;
      std::memcpy(&bits, &shifted, sizeof bits);
      bits -= 0x3f000000;
    } else {
      bits = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    p[i] = static_cast<uint16_t>(bits | sign >> 16);
  }
}
#endif
