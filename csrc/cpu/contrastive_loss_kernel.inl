// The kernels of contrastive_loss, written once and compiled once per instruction set: contrastive_loss.cpp includes
// this file inside a namespace and a target region of its own, after simd.h.
//
// No standard-library function or template may be instantiated here. The linker keeps one copy of an inline function,
// and if it kept one compiled with wide instructions, the baseline path would crash on an older processor.
//
// A tile of S is made, turned into exponentials and, in the backward, multiplied into both gradients before the next
// one overwrites it. All three products have the one shape a register tile likes, C[i, j] += A[i, k] * B[k, j] with A
// broadcast and B a row, and all operands lie in panels of kPanel columns, so that every stride is known to the
// compiler:
//   logits   S[i, j]   = x[i, v]    * y^T[v, j]     A = panel of x, B = panel of the transposed y
//   to x     dx[i, v] += dS[i, j]   * y[j, v]       A = tile, B = panel of y
//   to y     dy[j, v] += dS^T[j, i] * x[i, v]       A = tile, down its columns, B = panel of x

constexpr int kPanel = 2 * kVec;  // width of the register tile
// Columns of the tile, y's panels in two forms and the gradient's share the level-2 cache while rows stream through it.
constexpr int kTileRows = 96, kTileCols = 192;
constexpr int kLd = kTileCols + 16;  // an odd number of cache lines: down a column, rows fall into different sets

EM3_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

EM3_INLINE float first(V v) {
  float lanes[kVec];
  store(lanes, v);
  return lanes[0];
}

EM3_INLINE float largest(V v) {
  float lanes[kVec];
  store(lanes, v);
  for (int i = 1; i < kVec; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

// ---- register tiles ------------------------------------------------------------------------------------------------

// A[i, k] is at i * kRow + k * kStep of its chunk, a row of C at i * kOut; a row of B always at k * kPanel.
struct Logits {
  static constexpr int kRow = kPanel, kStep = 1, kOut = kLd;
  static constexpr bool kAdd = false;
};
struct ToX {
  static constexpr int kRow = kLd, kStep = 1, kOut = kPanel;
  static constexpr bool kAdd = true;
};
struct ToY {
  static constexpr int kRow = 1, kStep = kLd, kOut = kPanel;
  static constexpr bool kAdd = true;
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
        for (int j = 0; j < NV; ++j) acc[i][j] = fma(av, bv[j], acc[i][j]);
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

// ---- packing -------------------------------------------------------------------------------------------------------

// Source rows of places begin to end -> panels [V / kPanel][places][kPanel], times scale, zero behind V; null = not
// wanted. Returns the largest squared length of the packed rows, NaN if one is.
static float pack(const Source& from, float scale, int64_t begin, int64_t end, float* out) {
  float longest = 0.0f;
  for (int64_t i = begin; i < end; ++i) {
    const float* row = from.row(i);
    V squares = zero();
    for (int64_t v = 0; v < from.V; v += kVec) {
      const int64_t left = smaller(kVec, from.V - v);
      const V value = splat(scale) * (left == kVec ? load(row + v) : load_part(row + v, static_cast<int>(left)));
      if (out != nullptr) store(out + (v / kPanel * from.places + i) * kPanel + v % kPanel, value);
      squares = fma(value, value, squares);
    }
    longest = larger(longest, sum(squares));
  }
  return longest;
}

// Places begin to end, begin a multiple of kPanel -> [places / kPanel][V][kPanel], zero behind the last row.
static void pack_transposed(const Source& from, int64_t begin, int64_t end, float* out) {
  for (int64_t first = begin; first < end; first += kPanel) {
    float* panel = out + first * from.V;
    for (int64_t j = 0; j < kPanel; ++j) {
      const float* row = first + j < end ? from.row(first + j) : nullptr;
      for (int64_t v = 0; v < from.V; ++v) panel[v * kPanel + j] = row == nullptr ? 0.0f : row[v];
    }
  }
}

// Rows begin to end of panels -> the caller's rows, times scale. With `dot`, dot[i] = the packed row times the
// source's.
static void unpack(const float* panels, const Source& like, float scale, int64_t begin, int64_t end, float* out,
                   double* dot) {
  for (int64_t i = begin; i < end; ++i) {
    const float* source = like.row(i);
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    for (int64_t v = 0; v < like.V; v += kPanel) {
      const float* from = panels + (v / kPanel * like.places + i) * kPanel;
      const int64_t width = smaller(kPanel, like.V - v);
      if (dot != nullptr) {
        for (int64_t k = 0; k < width; ++k) sums[k % 4] += static_cast<double>(from[k]) * source[v + k];
      }
      if (out == nullptr) continue;
      for (int64_t k = 0; k < width; ++k) out[like.place(i) * like.V + v + k] = scale * from[k];
    }
    if (dot != nullptr) dot[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// ---- one tile ------------------------------------------------------------------------------------------------------

// Calls body(begin, end) for runs of `unit` places, nearly equal and at most `most` long.
template <class Body>
EM3_INLINE void each_run(const Range& range, int64_t unit, int64_t most, const Body& body) {
  const int64_t units = (range.end - range.begin + unit - 1) / unit;
  const int64_t runs = (units * unit + most - 1) / most;
  for (int64_t i = 0; i < runs; ++i) {
    body(Range{range.begin + units * i / runs * unit, range.begin + units * (i + 1) / runs * unit});
  }
}

// The logits of a tile, -inf where a row meets its own item.
static void logits(const Sheet& sheet, const Range& rows, const Range& cols, float* tile) {
  const int64_t panels = (sheet.V + kPanel - 1) / kPanel;
  const Depth depth{panels, sheet.B * kPanel, kPanel, sheet.V - (panels - 1) * kPanel};
  for (int64_t j = cols.begin; j < cols.end; j += kPanel) {
    product<Logits>(rows.end - rows.begin, true, sheet.x + rows.begin * kPanel, depth, sheet.y_transposed + j * sheet.V,
                    tile + (j - cols.begin));
  }
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t begin = sheet.item[i].begin > cols.begin ? sheet.item[i].begin : cols.begin;
    const int64_t end = smaller(sheet.item[i].end, cols.end);
    for (int64_t j = begin; j < end; ++j) tile[(i - rows.begin) * kLd + (j - cols.begin)] = -INFINITY;
  }
}

static void add_exponentials(const ForwardJob& job, const Range& rows, const Range& cols, const float* tile) {
  const V shift = splat(job.sheet.shift);
  const float* weight = job.sheet.across_weight + cols.begin;
  float* col = job.col_sum + cols.begin;
  const int64_t width = cols.end - cols.begin;  // the compiler cannot know that no store below changes it
  for (int64_t i = rows.begin; i < rows.end; ++i, tile += kLd) {
    const V own = splat(job.sheet.down_weight[i]);
    V total = zero();
    for (int64_t j = 0; j < width; j += kVec) {
      const V e = vexp2(load(tile + j) - shift);
      total = fma(e, load(weight + j), total);
      store(col + j, fma(e, own, load(col + j)));
    }
    job.row_sum[i] += sum(total);
  }
}

// Running maxima and sums. Maxima start at the lowest finite number, so that rows of -inf alone sum to 0 and not NaN.
static void add_logsumexps(const ForwardJob& job, const Range& rows, const Range& cols, const float* tile) {
  const float *across = job.sheet.across + cols.begin, *down = job.sheet.down;
  const int64_t width = cols.end - cols.begin;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* logit = tile + (i - rows.begin) * kLd;
    V top = splat(job.row_max[i]), total = zero();
    for (int64_t j = 0; j < width; j += kVec) top = vmax(load(logit + j) + load(across + j), top);
    const float most = largest(top);
    for (int64_t j = 0; j < width; j += kVec) total = total + vexp2(load(logit + j) + load(across + j) - splat(most));
    job.row_sum[i] = job.row_sum[i] * first(vexp2(splat(job.row_max[i] - most))) + sum(total);
    job.row_max[i] = most;
  }
  for (int64_t j = 0; j < width; j += kVec) {
    float *max = job.col_max + cols.begin + j, *to = job.col_sum + cols.begin + j;
    V top = load(max);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      top = vmax(load(tile + (i - rows.begin) * kLd + j) + splat(down[i]), top);
    }
    V total = load(to) * vexp2(load(max) - top);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      total = total + vexp2(load(tile + (i - rows.begin) * kLd + j) + splat(down[i]) - top);
    }
    store(max, top);
    store(to, total);
  }
}

static void forward_block(const ForwardJob& job, const Range& rows, const Range& cols, float* tile) {
  each_run(cols, kPanel, kTileCols, [&](const Range& c) {
    each_run(rows, 1, kTileRows, [&](const Range& r) {
      logits(job.sheet, r, c, tile);
      if (job.sheet.one_shift) {
        add_exponentials(job, r, c, tile);
      } else {
        add_logsumexps(job, r, c, tile);
      }
    });
  });
}

// The logits of a tile become the gradient to them. OneShift: row and col hold the factors of the exponential.
template <bool OneShift, bool Offset>
static void softmaxes(const BackwardJob& job, const Range& rows, const Range& cols, float* tile) {
  const Sheet& sheet = job.sheet;
  const float* const down = OneShift ? sheet.down_weight : sheet.down;
  const float* const across = (OneShift ? sheet.across_weight : sheet.across) + cols.begin;
  const float *const lse = job.col + cols.begin, *const dcol = job.dcol + cols.begin;
  const int64_t width = cols.end - cols.begin;
  const V shift = splat(sheet.shift);
  for (int64_t i = rows.begin; i < rows.end; ++i, tile += kLd) {
    const V own = splat(down[i]), row = splat(job.row[i]), drow = splat(job.drow[i]);
    V shares = zero();
    for (int64_t j = 0; j < width; j += kVec) {
      const V s = load(tile + j), other = load(across + j), col = load(lse + j);
      V by_row, by_col;
      if (OneShift) {
        const V e = vexp2(s - shift);
        if (!Offset) {
          store(tile + j, e * fma(row, other, col * own));
          continue;
        }
        by_row = e * (row * other);
        by_col = e * (col * own);
      } else {
        by_row = drow * vexp2(s + other - row);
        by_col = load(dcol + j) * vexp2(s + own - col);
      }
      store(tile + j, by_row + by_col);
      if (Offset) {
        float* const to = job.offset_across + cols.begin + j;
        store(to, load(to) + by_row);
        shares = shares + by_col;
      }
    }
    if (Offset) job.offset_down[i] += sum(shares);
  }
}

static void backward_tile(const BackwardJob& job, const Range& rows, const Range& cols, float* tile) {
  const Sheet& sheet = job.sheet;
  logits(sheet, rows, cols, tile);
  const bool offset = job.offset_across != nullptr;
  (sheet.one_shift ? offset ? softmaxes<true, true> : softmaxes<true, false>
                   : offset ? softmaxes<false, true> : softmaxes<false, false>)(job, rows, cols, tile);
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  for (int64_t v = 0; v < sheet.V; v += kPanel) {
    const bool wide = sheet.V - v > kVec;
    // Of a panel of x or y [places][kPanel], the first row that this tile meets.
    const int64_t of_x = (v / kPanel * sheet.B + rows.begin) * kPanel;
    const int64_t of_y = (v / kPanel * sheet.padded_M + cols.begin) * kPanel;
    if (job.dx != nullptr) product<ToX>(height, wide, tile, {1, 0, width, width}, sheet.y + of_y, job.dx + of_x);
    if (job.dy != nullptr) product<ToY>(width, wide, tile, {1, 0, height, height}, sheet.x + of_x, job.dy + of_y);
  }
}

static void backward_block(const BackwardJob& job, const Range& rows, const Range& cols, float* tile) {
  each_run(cols, kPanel, kTileCols, [&](const Range& c) {
    each_run(rows, 1, kTileRows, [&](const Range& r) { backward_tile(job, r, c, tile); });
  });
}

static const KernelTable kTable = {kPanel, kTileRows * kLd, pack,          pack_transposed,
                                    unpack, forward_block,    backward_block};
