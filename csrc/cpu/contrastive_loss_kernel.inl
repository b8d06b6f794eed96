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
//   to x     dx[i, v]  = dS[i, j]   * y[j, v]       A = tile, B = panel of y
//   to y     dy[j, v] += dS^T[j, i] * x[i, v]       A = tile, down its columns, B = panel of x
// Rows are packed for the tile that they meet, anew for each: a pass over 96 rows is a hundredth of three products with
// 192 columns, and nothing of the size of the embeddings has to lie packed in memory.

constexpr int kPanel = 2 * kVec;  // width of the register tile
// At most. Columns of the tile, y's panels in two forms and the gradient's share the level-2 cache while rows stream
// through it.
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
  static constexpr bool kAdd = false;
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

// ---- rows and panels -----------------------------------------------------------------------------------------------

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

// The largest squared length of rows begin to end, NaN if one is.
static float longest(const Source& from, const Range& rows) {
  float most = 0.0f;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float *row = from.row(i), factor = from.factor_of(i);
    V squares = zero();
    for (int64_t v = 0; v < from.V; v += kVec) {
      const int64_t left = smaller(kVec, from.V - v);
      const V value = splat(factor) * (left == kVec ? load(row + v) : load_part(row + v, static_cast<int>(left)));
      squares = fma(value, value, squares);
    }
    most = larger(most, sum(squares));
  }
  return most;
}

// Rows of `places`, times scale -> panels [V / kPanel][places][kPanel], zero behind V and behind the last row.
static void pack(const Source& from, float scale, const Range& places, float* out) {
  const int64_t height = places.end - places.begin;
  for (int64_t i = 0; i < height; ++i) {
    const bool there = places.begin + i < from.total;
    const float* row = there ? from.row(places.begin + i) : nullptr;
    const V factor = splat(there ? from.factor_of(places.begin + i) * scale : 0.0f);
    for (int64_t v = 0; v < from.V; v += kVec) {
      const int64_t left = smaller(kVec, from.V - v);
      const V value = !there ? zero() : left == kVec ? load(row + v) : load_part(row + v, static_cast<int>(left));
      store(out + (v / kPanel * height + i) * kPanel + v % kPanel, factor * value);
    }
  }
}

// Rows of `places`, whole panels of them -> [places / kPanel][V][kPanel], zero behind the last row. Four at a time, so
// that memory is read in its order and a line of the panel is written in few pieces.
static void pack_transposed(const Source& from, const Range& places, float* out) {
  for (int64_t j = places.begin; j < places.end; j += 4) {
    float* to = out + (j - places.begin) / kPanel * kPanel * from.V + (j - places.begin) % kPanel;
    const float* rows[4];
    float factors[4];
    for (int64_t k = 0; k < 4; ++k) {
      const bool there = j + k < from.total;
      rows[k] = there ? from.row(j + k) : nullptr;
      factors[k] = there ? from.factor_of(j + k) : 0.0f;
    }
    if (rows[3] != nullptr) {
      const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
      const float f0 = factors[0], f1 = factors[1], f2 = factors[2], f3 = factors[3];
      for (int64_t v = 0; v < from.V; ++v, to += kPanel) {
        to[0] = r0[v] * f0, to[1] = r1[v] * f1, to[2] = r2[v] * f2, to[3] = r3[v] * f3;
      }
    } else {
      for (int64_t v = 0; v < from.V; ++v, to += kPanel)
        for (int k = 0; k < 4; ++k) to[k] = rows[k] == nullptr ? 0.0f : rows[k][v] * factors[k];
    }
  }
}

// Adds panels [V / kPanel][places][kPanel], times scale, to the gradients of these rows.
static void add_panels(const float* panels, const Source& of, float scale, const Range& places, const Gradient& to) {
  const int64_t height = places.end - places.begin;
  for (int64_t i = 0; i < height && places.begin + i < of.total; ++i) {
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

// The gradients to rows as they came, from those to rows times their factors, which are inverse lengths; both times
// scale. Returns the sum of the products of rows and gradients before the scale. `rows` are places of the caller.
static double finish(const Source& of, float scale, const Range& rows, const Gradient& to) {
  double total = 0.0;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float *row = of.at(i), factor = of.factor == nullptr ? 1.0f : of.factor[i];
    float* gradient = to.row(i);
    const double along = dot(row, gradient, of.V) * factor;
    total += along;
    const float out = of.factor == nullptr ? 0.0f : static_cast<float>(along) * factor, both = factor * scale;
    for (int64_t v = 0; v < of.V; ++v) gradient[v] = (gradient[v] - row[v] * out) * both;
  }
  return total;
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

// The columns of row i's item that a tile meets, from the tile's first one on; empty if begin >= end.
EM3_INLINE Range met(const Sheet& sheet, int64_t i, const Range& cols) {
  const int64_t begin = sheet.item[i].begin > cols.begin ? sheet.item[i].begin : cols.begin;
  return {begin - cols.begin, smaller(sheet.item[i].end, cols.end) - cols.begin};
}

// The logits of a tile, -inf where there is no pair.
static void logits(const Sheet& sheet, const Range& rows, const Range& cols, const Workspace& space) {
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  const int64_t panels = (sheet.V + kPanel - 1) / kPanel;
  const Depth depth{panels, height * kPanel, kPanel, sheet.V - (panels - 1) * kPanel};
  for (int64_t j = 0; j < width; j += kPanel) {
    product<Logits>(height, true, space.x, depth, space.y_transposed + j * sheet.V, space.tile + j);
  }
  for (int64_t i = 0; i < height; ++i) {
    float* const row = space.tile + i * kLd;
    if (sheet.positive) {  // other rows of the item are pairs too, but no row is one with itself
      const int64_t itself = rows.begin + i - cols.begin;
      if (sheet.own && itself >= 0 && itself < width) row[itself] = -INFINITY;
    } else {
      const Range out = met(sheet, rows.begin + i, cols);
      for (int64_t j = out.begin; j < out.end; ++j) row[j] = -INFINITY;
    }
    for (int64_t j = sheet.M - cols.begin; j < width; ++j) row[j] = -INFINITY;
  }
}

// A tile's rows to or from the matrix of logits, where a small one is kept.
EM3_INLINE void copy_tile(float* kept, int64_t kept_stride, const Range& rows, const Range& cols, float* tile, bool out) {
  for (int64_t i = rows.begin; i < rows.end; ++i, tile += kLd) {
    float* const at = kept + i * kept_stride;
    for (int64_t j = cols.begin; j < cols.end; j += kVec) {
      if (out) {
        store(at + j, load(tile + (j - cols.begin)));
      } else {
        store(tile + (j - cols.begin), load(at + j));
      }
    }
  }
}

static void add_to(float* to, const float* from, int64_t n) {
  for (int64_t j = 0; j < n; j += kVec) store(to + j, load(to + j) + load(from + j));
}

// ---- infonce, forward ----------------------------------------------------------------------------------------------

static void add_exponentials(const ForwardJob& job, const Range& rows, const Range& cols, const float* tile) {
  const V shift = splat(job.sheet.shift);
  const float* weight = job.sheet.across_weight + cols.begin;
  float col[kTileCols] = {0.0f};  // sums of sums lose fewer digits than one long sum
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
  add_to(job.col_sum + cols.begin, col, width);
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

// ---- sigmoid -------------------------------------------------------------------------------------------------------

// log(1 + t) for t from 0 to 1, relative error below 2e-7.
EM3_INLINE V vlog1p(V t) {
  V y = fma(splat(-3.25637848e-3f), t, splat(1.99071609e-2f));
  y = fma(y, t, splat(-5.70642008e-2f));
  y = fma(y, t, splat(1.06142647e-1f));
  y = fma(y, t, splat(-1.53118631e-1f));
  y = fma(y, t, splat(1.96781173e-1f));
  y = fma(y, t, splat(-2.49545589e-1f));
  y = fma(y, t, splat(3.3330004e-1f));
  y = fma(y, t, splat(-4.9999904e-1f));
  return fma(y, t, splat(1.0f)) * t;
}

// log(1 + 2^z); exactly 0 for -inf.
EM3_INLINE V softplus2(V z) {
  const V size = vmax(zero() - z, z);
  return fma(splat(0.693147181f), vmax(zero(), z), vlog1p(vexp2(zero() - size)));
}

// 2^z / (1 + 2^z); exactly 0 for -inf.
EM3_INLINE V sigmoid2(V z) {
  const V size = vmax(zero() - z, z);
  const V t = vexp2(zero() - size);
  return where_greater(z, zero(), splat(1.0f), t) / (splat(1.0f) + t);
}

// -1 for the columns of the other rows of row i's item where these are positive, else 1.
struct Signs {
  float of[kTileCols];
  Range last{0, 0};

  Signs() {
    for (float& sign : of) sign = 1.0f;
  }
  void turn(const Sheet& sheet, int64_t i, const Range& cols) {
    if (!sheet.positive) return;
    for (int64_t j = last.begin; j < last.end; ++j) of[j] = 1.0f;
    last = met(sheet, i, cols);
    for (int64_t j = last.begin; j < last.end; ++j) of[j] = sheet.own && cols.begin + j == i ? 1.0f : -1.0f;
  }
};

template <bool Offset>
static void add_softplus(const ForwardJob& job, const Range& rows, const Range& cols, const float* tile) {
  const Sheet& sheet = job.sheet;
  const float* const across = sheet.across + cols.begin;
  const int64_t width = cols.end - cols.begin;
  const V bias = splat(sheet.bias);
  float col[kTileCols] = {0.0f};
  Signs signs;
  for (int64_t i = rows.begin; i < rows.end; ++i, tile += kLd) {
    signs.turn(sheet, i, cols);
    const V down = splat(sheet.down[i]);
    V total = zero();
    for (int64_t j = 0; j < width; j += kVec) {
      const V logit = load(tile + j) + bias, sign = load(signs.of + j);
      const V by_row = softplus2(sign * (Offset ? logit + load(across + j) : logit));
      total = total + by_row;
      store(col + j, load(col + j) + (Offset ? softplus2(sign * (logit + down)) : by_row));
    }
    job.row_sum[i] += sum(total);
  }
  add_to(job.col_sum + cols.begin, col, width);
}

// The logits of a tile become the gradient to them.
template <bool Offset>
static void slopes(const BackwardJob& job, const Range& rows, const Range& cols, float* tile) {
  const Sheet& sheet = job.sheet;
  const float *const across = sheet.across + cols.begin, *const dcol = job.dcol + cols.begin;
  const int64_t width = cols.end - cols.begin;
  const V bias = splat(sheet.bias);
  Signs signs;
  for (int64_t i = rows.begin; i < rows.end; ++i, tile += kLd) {
    signs.turn(sheet, i, cols);
    const V down = splat(sheet.down[i]), drow = splat(job.drow[i]);
    V shares = zero(), all = zero();
    for (int64_t j = 0; j < width; j += kVec) {
      const V logit = load(tile + j) + bias, sign = load(signs.of + j);
      V both;
      if (Offset) {
        const V by_row = drow * sign * sigmoid2(sign * (logit + load(across + j)));
        const V by_col = load(dcol + j) * sign * sigmoid2(sign * (logit + down));
        both = by_row + by_col;
        if (job.offset_across != nullptr) {
          float* const to = job.offset_across + cols.begin + j;
          store(to, load(to) + by_row);
          shares = shares + by_col;
        }
      } else {
        both = (drow + load(dcol + j)) * sign * sigmoid2(sign * logit);
      }
      store(tile + j, both);
      all = all + both;
    }
    if (Offset) job.offset_down[i] += sum(shares);
    job.bias[i] += sum(all);
  }
}

// ---- blocks --------------------------------------------------------------------------------------------------------

static void forward_block(const ForwardJob& job, const Range& rows, const Range& cols, const Workspace& space) {
  const Sheet& sheet = job.sheet;
  each_run(cols, kPanel, space.cols, [&](const Range& c) {
    pack_transposed(sheet.y, c, space.y_transposed);
    each_run(rows, 1, space.rows, [&](const Range& r) {
      pack(sheet.x, sheet.scale, r, space.x);
      logits(sheet, r, c, space);
      if (job.kept != nullptr) copy_tile(job.kept, job.kept_stride, r, c, space.tile, true);
      if (sheet.sigmoid) {
        (sheet.offsets ? add_softplus<true> : add_softplus<false>)(job, r, c, space.tile);
      } else if (sheet.one_shift) {
        add_exponentials(job, r, c, space.tile);
      } else {
        add_logsumexps(job, r, c, space.tile);
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

static void gradient_to_logits(const BackwardJob& job, const Range& rows, const Range& cols, float* tile) {
  const bool offset = job.offset_across != nullptr;
  if (job.sheet.sigmoid) {
    (job.sheet.offsets ? slopes<true> : slopes<false>)(job, rows, cols, tile);
  } else if (job.sheet.one_shift) {
    (offset ? softmaxes<true, true> : softmaxes<true, false>)(job, rows, cols, tile);
  } else {
    (offset ? softmaxes<false, true> : softmaxes<false, false>)(job, rows, cols, tile);
  }
}

static void backward_tile(const BackwardJob& job, const Range& rows, const Range& cols, const Workspace& space) {
  const Sheet& sheet = job.sheet;
  if (job.kept == nullptr || job.dy.rows != nullptr) pack(sheet.x, sheet.scale, rows, space.x);
  if (job.kept == nullptr) {
    logits(sheet, rows, cols, space);
  } else {
    copy_tile(job.kept, job.kept_stride, rows, cols, space.tile, false);
  }
  gradient_to_logits(job, rows, cols, space.tile);
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  for (int64_t v = 0; v < sheet.V; v += kPanel) {
    const bool wide = sheet.V - v > kVec;
    const int64_t of_x = v * height, of_y = v * width;  // panels of kPanel columns
    if (job.dx.rows != nullptr) {
      product<ToX>(height, wide, space.tile, {1, 0, width, width}, space.y + of_y, space.dx + of_x);
    }
    if (job.dy.rows != nullptr) {
      product<ToY>(width, wide, space.tile, {1, 0, height, height}, space.x + of_x, space.dy + of_y);
    }
  }
  if (job.dx.rows != nullptr) add_panels(space.dx, sheet.x, 1.0f, rows, job.dx);
}

static void backward_block(const BackwardJob& job, const Range& rows, const Range& cols, const Workspace& space) {
  const Sheet& sheet = job.sheet;
  each_run(cols, kPanel, space.cols, [&](const Range& c) {
    if (job.kept == nullptr) pack_transposed(sheet.y, c, space.y_transposed);
    if (job.dx.rows != nullptr) pack(sheet.y, 1.0f, c, space.y);
    const int64_t floats = (sheet.V + kPanel - 1) / kPanel * kPanel * (c.end - c.begin);
    for (int64_t k = 0; k < floats && job.dy.rows != nullptr; k += kVec) store(space.dy + k, zero());
    each_run(rows, 1, space.rows, [&](const Range& r) { backward_tile(job, r, c, space); });
    // The packed x holds log2(e), as logits to base 2 must.
    if (job.dy.rows != nullptr) add_panels(space.dy, sheet.y, 0.693147181f, c, job.dy);
  });
}

static const KernelTable kTable = {kPanel, kTileRows, kTileCols, kLd, dot, longest, finish, forward_block, backward_block};
