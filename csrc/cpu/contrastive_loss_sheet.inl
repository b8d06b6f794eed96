// What the kernels of the contrast are told: included once by contrastive_loss.cpp, in its anonymous namespace.

struct Range {
  std::int64_t begin, end;
};

// The caller's rows in the order of the sheet: its first `ordered` places hold the rows that `order` names.
struct Source : Embeddings {
  std::int64_t total, V;
  std::int64_t places;  // with those behind the last row that fill its panel
  const std::int64_t* order;
  std::int64_t ordered;

  std::int64_t place(std::int64_t i) const { return i < ordered ? order[i] : i; }
  std::uintptr_t at(std::int64_t p) const {
    const bool first = p < count;
    const std::int64_t elements = first ? p * stride : (p - count) * V;
    return reinterpret_cast<std::uintptr_t>(first ? rows : more) + static_cast<std::uintptr_t>(elements * bytes_of(storage));
  }
  std::uintptr_t row(std::int64_t i) const { return at(place(i)); }
  float factor_of(std::int64_t i) const { return factor == nullptr ? 1.0f : factor[place(i)]; }
};

// The gradients to the caller's rows times their factors, in the same two pieces; rows = null: not wanted.
struct Gradient {
  float *rows, *more;
  std::int64_t count, V;

  float* row(std::int64_t p) const { return p < count ? rows + p * V : more + (p - count) * V; }
};

// The matrix of logits that is never formed, rows and columns in the order of their items: equal ids side by side, so
// that what a row must not meet is one run of columns. Logits, bias, offsets and shift are to base 2, which costs nothing
// here (it is in the packed rows of x) and saves a third of each exponential.
struct Sheet {
  std::int64_t B, M, V, padded_M;  // columns come in whole panels; those behind M have weight 0, offset -inf
  bool own, sigmoid, positive, offsets;
  bool few;    // rows: candidates are multiplied where they lie
  bool pairs;  // rows are multiplied in bf16, as they are
  const Range* item;               // [B], the columns of row i's item
  Source x, y;
  float scale;                     // times log2(e): packed rows of x have it
  float bias;
  const float *across, *across_weight;  // [padded_M], of columns; weight = exp(offset - the largest one of both)
  const float *down, *down_weight;      // [B], of rows
  bool one_shift;
  float shift;
};

struct ForwardJob {
  Sheet sheet;
  float *row_sum, *row_max;  // [B]
  float *col_sum, *col_max;  // [padded_M]
  float* kept;
  std::int64_t kept_stride;
};

// With one shift, row and col are the gradient times exp(shift + largest offset - logsumexp), and drow, dcol unused.
struct BackwardJob {
  Sheet sheet;
  const float *row, *drow;  // [B]
  const float *col, *dcol;  // [padded_M]
  Gradient dx, dy;
  std::int64_t dy_end;      // columns from here on need no gradient
  float* offset_down;       // [B], what a candidate's offset gets as a row, and [padded_M] as a column
  float* offset_across;
  float* bias;              // [B], the sums of the rows of the gradient to the logits
  float* kept;
  std::int64_t kept_stride;
};

// What a thread works in: a tile, of at most so many rows and columns, and in panels the rows that it meets.
struct Workspace {
  std::int64_t rows, cols;
  float *tile, *x, *y, *y_transposed, *dx, *dy;
  float *factors, *across, *down;  // of pairs: the columns' factors, and a tile rounded along and down
};

// NaN if one is.
inline float larger(float a, float b) { return b <= a || a != a ? a : b; }

struct KernelTable {
  std::int64_t panel, tile_rows, tile_cols, tile_stride, few;
  bool pairs;
  double (*dot)(const float* a, const float* b, std::int64_t n);
  float (*longest)(const Source&, const Range& rows);
  void (*read_row)(Storage storage, std::uintptr_t row, std::int64_t V, float* to);
  void (*write_row)(Storage storage, const float* from, std::int64_t V, std::uintptr_t row);
  double (*finish_row)(const float* row, const float* factor, float scale, std::int64_t V, const float* gradient, float* to);
  void (*forward_block)(const ForwardJob&, const Range& rows, const Range& cols, const Workspace&);
  void (*backward_block)(const BackwardJob&, const Range& rows, const Range& cols, const Workspace&);
};
