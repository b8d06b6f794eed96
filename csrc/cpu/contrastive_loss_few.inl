// Of few rows each candidate is read for a handful of products: to pack it would take longer than these. So it is
// multiplied where it lies. Compiled once for each instruction set, as contrastive_loss_kernel.inl, which includes this
// file.

constexpr int kFew = kRows < 8 ? kRows : 8;
// Rows and candidates of a register tile of logits, each a sum in a vector.
constexpr int kFewRows = kVec == 16 ? 4 : 2, kFewColumns = 4;

// tile[i][0 .. 3] = the products of x's rows, [width up to whole vectors] each, with four candidates.
template <Storage S, int M>
EM3_NOINLINE static void few_tile(const float* x, int64_t ldx, const uintptr_t* y, int64_t width, float* tile) {
  V acc[M][kFewColumns];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < kFewColumns; ++j) acc[i][j] = zero();
  for (int64_t v = 0; v < width; v += kVec) {
    V yv[kFewColumns];
    for (int j = 0; j < kFewColumns; ++j) yv[j] = load_up_to(S, y[j], v, width - v);
    for (int i = 0; i < M; ++i) {
      const V xv = load(x + i * ldx + v);
      for (int j = 0; j < kFewColumns; ++j) acc[i][j] = fma(xv, yv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < M; ++i) store_sums(tile + i * kLd, acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

template <Storage S, int M>
EM3_INLINE void few_rows(int m, const float* x, int64_t ldx, const uintptr_t* y, int64_t width, float* tile) {
  if (m == M) {
    few_tile<S, M>(x, ldx, y, width, tile);
  } else if constexpr (M > 1) {
    few_rows<S, M - 1>(m, x, ldx, y, width, tile);
  }
}

// Where the candidates of a tile lie, and their factors; those behind the last one are the first one, times 0.
struct Candidates {
  uintptr_t row[kTileCols];
  float factor[kTileCols];

  Candidates(const Source& y, const Range& cols) {
    for (int64_t j = cols.begin; j < cols.end; ++j) {
      const bool there = j < y.total;
      row[j - cols.begin] = y.row(there ? j : cols.begin);
      factor[j - cols.begin] = there ? y.factor_of(j) : 0.0f;
    }
  }
};

// The factors of whole vectors of candidates times n rows of a tile.
static void scale_columns(const float* factor, int64_t n, int64_t width, float* tile) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < width; j += kVec) store(tile + i * kLd + j, load(tile + i * kLd + j) * load(factor + j));
}

// Rows times scale -> [rows][V up to whole panels], zeros behind V.
static void few_pack(const Source& x, float scale, const Range& rows, int64_t ld, float* out) {
  for (int64_t i = rows.begin; i < rows.end; ++i, out += ld) {
    const V factor = splat(x.factor_of(i) * scale);
    for (int64_t v = 0; v < ld; v += kVec) store(out + v, factor * load_up_to(x.storage, x.row(i), v, x.V - v));
  }
}

template <Storage S>
static void few_logits(const Sheet& sheet, const Range& rows, const Range& cols, const float* x, int64_t ld, float* tile) {
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  const Candidates candidates(sheet.y, cols);
  for (int64_t j = 0; j < width; j += kFewColumns) {
    for (int64_t i = 0; i < height; i += kFewRows) {
      const int m = static_cast<int>(smaller(kFewRows, height - i));
      few_rows<S, kFewRows>(m, x + i * ld, ld, candidates.row + j, sheet.V, tile + i * kLd + j);
    }
  }
  scale_columns(candidates.factor, height, width, tile);
}

// c[i][0 .. NV vectors] = sum_j tile[i][j] * y[j], of `left` numbers from column v on.
template <Storage S, int M, int NV>
EM3_NOINLINE static void few_to_x_tile(const float* tile, const uintptr_t* y, int64_t n, int64_t v, int64_t left, float* c) {
  V acc[M][NV];
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < NV; ++k) acc[i][k] = zero();
  for (int64_t j = 0; j < n; ++j) {
    V yv[NV];
    for (int k = 0; k < NV; ++k) yv[k] = load_up_to(S, y[j], v + k * kVec, left - k * kVec);
    for (int i = 0; i < M; ++i) {
      const V a = splat(tile[i * kLd + j]);
      for (int k = 0; k < NV; ++k) acc[i][k] = fma(a, yv[k], acc[i][k]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < NV; ++k) store(c + i * kPanel + k * kVec, acc[i][k]);
}

template <Storage S, int M>
EM3_INLINE void few_to_x_rows(int m, const float* tile, const uintptr_t* y, int64_t n, int64_t v, int64_t left, float* c) {
  if (m == M) {
    if (left > kVec) {
      few_to_x_tile<S, M, 2>(tile, y, n, v, left, c);
    } else {
      few_to_x_tile<S, M, 1>(tile, y, n, v, left, c);
    }
  } else if constexpr (M > 1) {
    few_to_x_rows<S, M - 1>(m, tile, y, n, v, left, c);
  }
}

// The gradient to rows times their factors, as panels [V / kPanel][rows][kPanel]; the tile of gradients to the logits is
// multiplied by the candidates' factors on the way.
template <Storage S>
static void few_to_x(const Sheet& sheet, const Range& rows, const Range& cols, float* tile, float* panels) {
  const int64_t height = rows.end - rows.begin, n = smaller(cols.end, sheet.M) - cols.begin;
  const Candidates candidates(sheet.y, cols);
  scale_columns(candidates.factor, height, cols.end - cols.begin, tile);
  for (int64_t v = 0; v < sheet.V; v += kPanel) {
    few_to_x_rows<S, kFew>(static_cast<int>(height), tile, candidates.row, n, v, sheet.V - v, panels + v * height);
  }
}

// fn<S>() for the type that rows are stored in.
#define EM3_BY_STORAGE(storage, fn, ...)                                              \
  switch (storage) {                                                                  \
    case Storage::bf16: fn<Storage::bf16>(__VA_ARGS__); break;                        \
    case Storage::f16: fn<Storage::f16>(__VA_ARGS__); break;                          \
    default: fn<Storage::f32>(__VA_ARGS__);                                           \
  }
