// What the contrast's products are made of: register tiles, and rows as they read them. Compiled once for each instruction
// set, as contrastive_loss_kernel.inl, which includes this file.

constexpr int kPanel = 2 * kVec;  // width of the register tile
// At most. Columns of the tile, y's panels in two forms and the gradient's share the level-2 cache while rows stream
// through it.
constexpr int kTileRows = 96, kTileCols = 192;
constexpr int kLd = kTileCols + 16;  // an odd number of cache lines: down a column, rows fall into different sets

// Whether rows in bf16 are multiplied as they are, two numbers at a time (pairs, simd.h).
constexpr bool kPairs = EM3_ISA == 3;

EM3_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- register tiles ------------------------------------------------------------------------------------------------

// A[i, k] is at i * kRow + k * kStep of its chunk, a row of C at i * kOut; a row of B always at k * kPanel. Of pairs, k
// counts these.
template <bool PAIRS>
struct Logits {
  static constexpr int kRow = kPanel, kStep = 1, kOut = kLd;
  static constexpr bool kAdd = false, kPaired = PAIRS;
};
template <bool PAIRS>
struct ToX {
  static constexpr int kRow = PAIRS ? kLd / 2 : kLd, kStep = 1, kOut = kPanel;
  static constexpr bool kAdd = false, kPaired = PAIRS;
};
template <bool PAIRS>
struct ToY {
  static constexpr int kRow = 1, kStep = kLd, kOut = kPanel;
  static constexpr bool kAdd = true, kPaired = PAIRS;
};

// The summed dimension: chunks of A that lie `stride` apart, `length` long, the last one `last`.
struct Depth {
  int64_t chunks, stride, length, last;
};

template <class Form, int M, int NV>
EM3_NOINLINE static void product_tile(const float* a, const Depth& depth, const float* b, float* c) {
  V acc[M][NV];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = Form::kAdd ? load(c + i * Form::kOut + j * kVec) : zero();
  for (int64_t chunk = 1; chunk <= depth.chunks; ++chunk, a += depth.stride) {
    const float* at = a;
    const int64_t length = chunk < depth.chunks ? depth.length : depth.last;
    for (int64_t k = 0; k < length; ++k, at += Form::kStep, b += kPanel) {
      V bv[NV];
      for (int j = 0; j < NV; ++j) bv[j] = load(b + j * kVec);
      for (int i = 0; i < M; ++i) {
        const V av = splat(at[i * Form::kRow]);
        for (int j = 0; j < NV; ++j) {
          if constexpr (Form::kPaired) {
            acc[i][j] = fma_pairs(av, bv[j], acc[i][j]);
          } else {
            acc[i][j] = fma(av, bv[j], acc[i][j]);
          }
        }
      }
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * Form::kOut + j * kVec, acc[i][j]);
}

template <class Form, int M>
EM3_INLINE void product_rows(int m, bool wide, const float* a, const Depth& depth, const float* b, float* c) {
  if (m == M) {
    if (wide) {
      product_tile<Form, M, 2>(a, depth, b, c);
    } else {
      product_tile<Form, M, 1>(a, depth, b, c);
    }
  } else if constexpr (M > 1) {
    product_rows<Form, M - 1>(m, wide, a, depth, b, c);
  }
}

// n rows of one panel of C, in the fewest register tiles, of nearly equal height; not wide: only its first half counts.
template <class Form>
static void product(int64_t n, bool wide, const float* a, const Depth& depth, const float* b, float* c) {
  const int64_t blocks = (n + kRows - 1) / kRows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int m = static_cast<int>(n / blocks + (i < n % blocks));
    product_rows<Form, kRows>(m, wide, a, depth, b, c);
    a += m * Form::kRow;
    c += m * Form::kOut;
  }
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// Sixteen sums, which the compiler keeps in vectors.
static double dot(const float* a, const float* b, int64_t n) {
  double sums[16] = {0.0};
  int64_t v = 0;
  for (; v + 16 <= n; v += 16)
    for (int k = 0; k < 16; ++k) sums[k] += static_cast<double>(a[v + k]) * b[v + k];
  for (; v < n; ++v) sums[v % 16] += static_cast<double>(a[v]) * b[v];
  for (int width = 8; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
  return sums[0];
}

EM3_INLINE V load_up_to(Storage storage, uintptr_t row, int64_t v, int64_t left) {
  if (left >= kVec) return load_as(storage, row, v);
  return left > 0 ? load_part_as(storage, row, v, left) : zero();
}

static void read_row(Storage storage, uintptr_t row, int64_t V, float* to) { copy_row(storage, row, V, to); }
static void write_row(Storage storage, const float* from, int64_t V, uintptr_t row) { store_row(storage, from, V, row); }

// The largest squared length of rows begin to end, NaN if one is.
static float longest(const Source& from, const Range& rows) {
  float most = 0.0f;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const uintptr_t row = from.row(i);
    const float factor = from.factor_of(i);
    V squares = zero();
    for (int64_t v = 0; v < from.V; v += kVec) {
      const V value = splat(factor) * load_up_to(from.storage, row, v, from.V - v);
      squares = fma(value, value, squares);
    }
    most = larger(most, sum(squares));
  }
  return most;
}

// The gradient to a row of V numbers as it came, from that to the row times its factor, which is its inverse length (null:
// 1, and no length); both times scale. Returns the product of the row and the gradient before the scale. May be in place.
static double finish_row(const float* row, const float* factor, float scale, int64_t V, const float* gradient, float* to) {
  const float by = factor == nullptr ? 1.0f : *factor;
  const double along = dot(row, gradient, V) * by;
  const float out = factor == nullptr ? 0.0f : static_cast<float>(along) * by, both = by * scale;
  for (int64_t v = 0; v < V; ++v) to[v] = (gradient[v] - row[v] * out) * both;
  return along;
}

// ---- packing -------------------------------------------------------------------------------------------------------

// kVec numbers of a row from the v-th on as floats or, of pairs, as many pairs from the v-th on as they are; zeros behind
// the row's end.
template <bool PAIRS>
EM3_INLINE V load_packed(const Source& from, uintptr_t row, int64_t v) {
  if constexpr (PAIRS) {
    const int64_t left = from.V - 2 * v;
    if (left >= 2 * kVec) {  // a row of odd width may begin between two floats
      V pairs;
      std::memcpy(&pairs, reinterpret_cast<const Half*>(row) + 2 * v, sizeof pairs);
      return pairs;
    }
    Pair last[kVec] = {};
    for (int64_t k = 0; k < left; k += 2) {
      const auto* const both = reinterpret_cast<const Half*>(row) + 2 * v + k;
      last[k / 2] = pair_of(both[0], k + 1 < left ? both[1] : 0);
    }
    return load(last);
  } else {
    return load_up_to(from.storage, row, v, from.V - v);
  }
}

// How many floats a row takes where it is multiplied along.
EM3_INLINE int64_t packed_width(const Sheet& sheet) { return sheet.pairs ? (sheet.V + 1) / 2 : sheet.V; }

// Rows of `places`, times scale unless they are pairs -> panels [width / kPanel][places][kPanel], zero behind the width and
// behind the last row.
template <bool PAIRS>
static void pack(const Source& from, float scale, const Range& places, float* out) {
  const int64_t height = places.end - places.begin, width = PAIRS ? (from.V + 1) / 2 : from.V;
  for (int64_t i = 0; i < height; ++i) {
    const bool there = places.begin + i < from.total;
    const uintptr_t row = there ? from.row(places.begin + i) : 0;
    const V factor = splat(there ? from.factor_of(places.begin + i) * scale : 0.0f);
    for (int64_t v = 0; v < width; v += kVec) {
      const V value = there ? load_packed<PAIRS>(from, row, v) : zero();
      store(out + (v / kPanel * height + i) * kPanel + v % kPanel, PAIRS ? value : factor * value);
    }
  }
}

EM3_INLINE void turn(V (&v)[kVec]) {
#if EM3_ISA >= 1
  transpose(v);
#else
  float rows[kVec][kVec], columns[kVec][kVec];
  for (int i = 0; i < kVec; ++i) store(rows[i], v[i]);
  for (int i = 0; i < kVec; ++i)
    for (int j = 0; j < kVec; ++j) columns[j][i] = rows[i][j];
  for (int i = 0; i < kVec; ++i) v[i] = load(columns[i]);
#endif
}

// Rows of `places`, whole panels of them -> [places / kPanel][width][kPanel], zero behind the last row, times their factors
// unless they are pairs.
template <bool PAIRS>
static void pack_transposed(const Source& from, const Range& places, float* out) {
  const int64_t width = PAIRS ? (from.V + 1) / 2 : from.V;
  for (int64_t j = places.begin; j < places.end; j += kVec) {
    float* const to = out + (j - places.begin) / kPanel * kPanel * width + (j - places.begin) % kPanel;
    const int have = static_cast<int>(smaller(kVec, from.total - j));
    uintptr_t rows[kVec];
    float factors[kVec];
    for (int i = 0; i < have; ++i) rows[i] = from.row(j + i), factors[i] = from.factor_of(j + i);
    for (int64_t v = 0; v < width; v += kVec) {
      V square[kVec];
      for (int i = 0; i < kVec; ++i) {
        if (i >= have) {
          square[i] = zero();
        } else {
          const V value = load_packed<PAIRS>(from, rows[i], v);
          square[i] = PAIRS ? value : splat(factors[i]) * value;
        }
      }
      turn(square);
      const int64_t columns = smaller(kVec, width - v);
      for (int64_t c = 0; c < columns; ++c) store(to + (v + c) * kPanel, square[c]);
    }
  }
}

// Rows of `places` in bf16, one and the next -> panels of pairs [V / kPanel][places / 2][kPanel], zero where one is missing.
static void pack_joined(const Source& from, const Range& places, float* out) {
  const int64_t half = (places.end - places.begin + 1) / 2;
  const auto row_of = [&](int64_t i) {
    return reinterpret_cast<const Half*>(i < places.end && i < from.total ? from.row(i) : 0);
  };
  for (int64_t p = 0; p < half; ++p) {
    const Half *const first = row_of(places.begin + 2 * p), *const second = row_of(places.begin + 2 * p + 1);
    for (int64_t v = 0; v < from.V; v += kPanel) {
      float* const to = out + (v * half + p * kPanel);
      const int64_t n = smaller(kPanel, from.V - v);
      if (n < kPanel || first == nullptr) {
        for (int k = 0; k < kPanel; k += kVec) store(to + k, zero());
      }
      if (first != nullptr) join_rows(first + v, second == nullptr ? nullptr : second + v, n, to);
    }
  }
}

// Adds panels [V / kPanel][places][kPanel], times scale, to the gradients of these rows before `end`.
static void add_panels(const float* panels, const Source& of, float scale, const Range& places, int64_t end,
                       const Gradient& to) {
  const int64_t height = places.end - places.begin;
  for (int64_t i = 0; i < height && places.begin + i < end; ++i) {
    float* row = to.row(of.place(places.begin + i));
    for (int64_t v = 0; v < of.V; v += kVec) {
      const V value = splat(scale) * load(panels + (v / kPanel * height + i) * kPanel + v % kPanel);
      const int64_t left = smaller(kVec, of.V - v);
      if (left == kVec) {
        store(row + v, load(row + v) + value);
      } else {
        store_part(row + v, load_part(row + v, static_cast<int>(left)) + value, static_cast<int>(left));
      }
    }
  }
}
