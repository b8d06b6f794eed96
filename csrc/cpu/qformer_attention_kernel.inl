// The kernels of qformer_attention, written once and compiled once per instruction set: qformer_attention.cpp includes
// this file inside a namespace and a target region of its own, after simd.h.
//
// No standard-library function or template may be instantiated here. The linker keeps one copy of an inline function,
// and if it kept one compiled with wide instructions, the baseline path would crash on an older processor.
//
// A tile is up to a few hundred tokens of one item and stream, chosen so that its rows stay in the level-2 cache: x
// comes from memory once and is used by every product. Rows r = (h, q) come in blocks of kBlock; within a block the
// scores are kept as [token, row], rows adjacent, which makes the softmax elementwise over vectors and gives all
// three products the one shape a register tile likes: C[i, j] += A[i, k] * B[k, j] with A broadcast and B a row.
//   scores   s[t, r]  = x[t, c]      * uT[c, r]   A = token rows in place, B = packed transpose of u (or dy)
//   update   y[r, c] += p[t, r]      * x[t, c]    A = p, B = token rows in place         (du likewise with ds)
//   outer    dx[t, c] = ds[t, r]     * u[r, c] + p[t, r] * dy[r, c]
// Up to kFew rows read the tokens where they lie instead, see dots: packing the rows, and copying looked-up tokens side
// by side, would cost as much as the products.
// The products with the value weights, o = w y and dy = dout w, take a few items at a time: of one head's rows these lie
// side by side, and what they share stays in the level-2 cache. dw = dout^T y reads all of y once, a head after the other.

#include "tiles.inl"
#include "packing.inl"

constexpr int kBlock = 4 * kVec > 32 ? 4 * kVec : 32;

// ---- small elementwise pieces --------------------------------------------------------------------------------------

static float dot(const float* a, const float* b, int64_t n) {
  V s0 = zero(), s1 = zero();
  int64_t i = 0;
  for (; i + kPanel <= n; i += kPanel) {
    s0 = fma(load(a + i), load(b + i), s0);
    s1 = fma(load(a + i + kVec), load(b + i + kVec), s1);
  }
  for (; i < n; i += kVec) {
    const int left = static_cast<int>(smaller(kVec, n - i));
    s0 = left == kVec ? fma(load(a + i), load(b + i), s0) : fma(load_part(a + i, left), load_part(b + i, left), s0);
  }
  return sum(s0 + s1);
}

// 1 / (1 + exp(-s)), and what is left to 1: as exact where that is small.
EM3_INLINE V sigmoid(V s, V& rest) {
  const V fall = vexp(zero() - vmax(splat(-87.0f), s));  // in this order a NaN stays a NaN
  const V p = splat(1.0f) / (splat(1.0f) + fall);
  rest = fall * p;
  return p;
}

static void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// rows[(h, q)] = base + ((h * items + item) * Q + q) * C for a tensor [H, items, Q, C].
template <class T>
static void row_table(T* base, int64_t items, int64_t item, int64_t H, int64_t Q, int64_t C, T** rows) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t q = 0; q < Q; ++q) *rows++ = base + ((h * items + item) * Q + q) * C;
}

// out[K] from a tensor [H, items, Q]; null = zeros.
static void gather_rows(const float* base, int64_t items, int64_t item, int64_t H, int64_t Q, float* out) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t q = 0; q < Q; ++q) *out++ = base == nullptr ? 0.0f : base[(h * items + item) * Q + q];
}

static void scatter_rows(const float* from, int64_t items, int64_t item, int64_t H, int64_t Q, float* base) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t q = 0; q < Q; ++q) base[(h * items + item) * Q + q] = *from++;
}

#include "arena.inl"
#include "storage.inl"
#include "token_tiles.inl"
#include "dropout.inl"
#include "qformer_attention_forward.inl"
#include "qformer_attention_state.inl"
#include "qformer_attention_backward.inl"
#include "qformer_attention_values.inl"
#include "qformer_attention_items.inl"

// ---- what the dispatcher sees --------------------------------------------------------------------------------------

static int64_t padded_rows(int64_t K) { return round_up(K, kVec); }

static void round_to_pairs(const float* from, int64_t n, Pair* to) { round_row(from, n, reinterpret_cast<Half*>(to)); }

static void join_rows_of(const float* rows, int64_t n, int64_t C, Pair* to) { join_floats(rows, n, C, C, to); }

static const KernelTable kTable = {padded_rows,     few,           pack_transposed,  pack_wide,     round_to_pairs,
                                   join_rows_of,    forward_scratch, forward_items, backward_scratch, backward_items};
