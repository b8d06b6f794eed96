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
// 192 columns, and nothing of the size of the embeddings has to lie packed in memory. Rows of half precision become floats
// there. Where the processor multiplies pairs of numbers in bf16 and both sides come in bf16, the rows stay as they are:
// factors and scale are multiplied to the logits, which are then as exact as those of floats, and to their gradient, which
// is rounded to bf16.

#include "storage.inl"
#include "transpose.inl"
#include "contrastive_loss_products.inl"
#include "contrastive_loss_few.inl"

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

// The products of a tile's rows, times their factors and the scale; `space` holds the columns, packed, unless rows are few.
template <bool PAIRS>
static void packed_logits(const Sheet& sheet, const Range& rows, const Range& cols, const Workspace& space) {
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin, inner = packed_width(sheet);
  pack<PAIRS>(sheet.x, sheet.scale, rows, space.x);
  const int64_t panels = (inner + kPanel - 1) / kPanel;
  const Depth depth{panels, height * kPanel, kPanel, inner - (panels - 1) * kPanel};
  for (int64_t j = 0; j < width; j += kPanel) {
    product<Logits<PAIRS>>(height, true, space.x, depth, space.y_transposed + j * inner, space.tile + j);
  }
  if (!PAIRS) return;
  for (int64_t i = 0; i < height; ++i) {
    const V factor = splat(sheet.x.factor_of(rows.begin + i) * sheet.scale);
    float* const row = space.tile + i * kLd;
    for (int64_t j = 0; j < width; j += kVec) store(row + j, factor * load(space.factors + j) * load(row + j));
  }
}

// The logits of a tile, -inf where there is no pair.
static void logits(const Sheet& sheet, const Range& rows, const Range& cols, const Workspace& space) {
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  if (sheet.few) {
    const int64_t ld = (sheet.V + kPanel - 1) / kPanel * kPanel;
    few_pack(sheet.x, sheet.scale, rows, ld, space.x);
    EM3_BY_STORAGE(sheet.y.storage, few_logits, sheet, rows, cols, space.x, ld, space.tile)
  } else if (kPairs && sheet.pairs) {
    packed_logits<kPairs>(sheet, rows, cols, space);
  } else {
    packed_logits<false>(sheet, rows, cols, space);
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

// What the logits of a run of columns are made of.
static void pack_columns(const Sheet& sheet, const Range& cols, const Workspace& space) {
  if (sheet.few) return;
  if (!(kPairs && sheet.pairs)) return pack_transposed<false>(sheet.y, cols, space.y_transposed);
  pack_transposed<kPairs>(sheet.y, cols, space.y_transposed);
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

// ---- pairs ---------------------------------------------------------------------------------------------------------

static void column_factors(const Source& y, const Range& cols, float* out) {
  for (int64_t j = cols.begin; j < cols.end; ++j) *out++ = j < y.total ? y.factor_of(j) : 0.0f;
}

// A tile's rows times the factors of its columns, in bf16: [height][kLd] halves.
static void round_across(const float* factors, int64_t height, int64_t width, const float* tile, float* out) {
  float row[kTileCols];
  for (int64_t i = 0; i < height; ++i, tile += kLd, out += kLd / 2) {
    for (int64_t j = 0; j < width; j += kVec) store(row + j, load(tile + j) * load(factors + j));
    round_row(row, width, reinterpret_cast<Half*>(out));
  }
}

// A tile's rows times their factors and the scale, one and the next as pairs: [(height + 1) / 2][kLd].
static void round_down(const Sheet& sheet, const Range& rows, int64_t width, const float* tile, float* out) {
  for (int64_t i = rows.begin; i < rows.end; i += 2, tile += 2 * kLd, out += kLd) {
    const bool both = i + 1 < rows.end;
    const V first = splat(sheet.x.factor_of(i) * sheet.scale);
    const V second = splat(both ? sheet.x.factor_of(i + 1) * sheet.scale : 0.0f);
    for (int64_t j = 0; j < width; j += kVec) {
      store(out + j, round_pairs(first * load(tile + j), both ? second * load(tile + kLd + j) : zero()));
    }
  }
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
    pack_columns(sheet, c, space);
    if (sheet.pairs) column_factors(sheet.y, c, space.factors);
    each_run(rows, 1, space.rows, [&](const Range& r) {
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

// The gradients to a tile's rows, and to its columns before job.dy_end, from that to its logits.
template <bool PAIRS>
static void packed_gradients(const BackwardJob& job, const Range& rows, const Range& cols, const Workspace& space) {
  const Sheet& sheet = job.sheet;
  const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
  const int64_t to_y = smaller(job.dy_end, cols.end) - cols.begin;
  const float *of_x = space.tile, *of_y = space.tile;
  Depth along_x{1, 0, height, height}, along_y{1, 0, width, width};
  if (job.dy.rows != nullptr && to_y > 0) {
    if constexpr (PAIRS) {
      pack_joined(sheet.x, rows, space.x);
      round_down(sheet, rows, width, space.tile, space.down);
      of_x = space.down;
      along_x = {1, 0, (height + 1) / 2, (height + 1) / 2};
    } else {
      pack<false>(sheet.x, sheet.scale, rows, space.x);
    }
    for (int64_t v = 0; v < sheet.V; v += kPanel) {
      product<ToY<PAIRS>>(to_y, sheet.V - v > kVec, of_x, along_x, space.x + v * along_x.last, space.dy + v * width);
    }
  }
  if (job.dx.rows == nullptr) return;
  if (sheet.few) {
    EM3_BY_STORAGE(sheet.y.storage, few_to_x, sheet, rows, cols, space.tile, space.dx)
  } else {
    if constexpr (PAIRS) {
      round_across(space.factors, height, width, space.tile, space.across);
      of_y = space.across;
      along_y = {1, 0, width / 2, width / 2};
    }
    for (int64_t v = 0; v < sheet.V; v += kPanel) {
      product<ToX<PAIRS>>(height, sheet.V - v > kVec, of_y, along_y, space.y + v * along_y.last, space.dx + v * height);
    }
  }
  add_panels(space.dx, sheet.x, 1.0f, rows, rows.end, job.dx);
}

static void backward_tile(const BackwardJob& job, const Range& rows, const Range& cols, const Workspace& space) {
  if (job.kept == nullptr) {
    logits(job.sheet, rows, cols, space);
  } else {
    copy_tile(job.kept, job.kept_stride, rows, cols, space.tile, false);
  }
  gradient_to_logits(job, rows, cols, space.tile);
  if (kPairs && job.sheet.pairs) {
    packed_gradients<kPairs>(job, rows, cols, space);
  } else {
    packed_gradients<false>(job, rows, cols, space);
  }
}

static void backward_block(const BackwardJob& job, const Range& rows, const Range& cols, const Workspace& space) {
  const Sheet& sheet = job.sheet;
  each_run(cols, kPanel, space.cols, [&](const Range& c) {
    const bool to_y = job.dy.rows != nullptr && c.begin < job.dy_end;
    if (!to_y && job.dx.rows == nullptr && job.offset_across == nullptr && !sheet.sigmoid) return;  // frozen ones, for nobody
    if (job.kept == nullptr) pack_columns(sheet, c, space);
    if (sheet.pairs) column_factors(sheet.y, c, space.factors);
    if (job.dx.rows != nullptr && sheet.pairs) pack_joined(sheet.y, c, space.y);
    if (job.dx.rows != nullptr && !sheet.pairs && !sheet.few) pack<false>(sheet.y, 1.0f, c, space.y);
    const int64_t floats = (sheet.V + kPanel - 1) / kPanel * kPanel * (c.end - c.begin);
    for (int64_t k = 0; k < floats && to_y; k += kVec) store(space.dy + k, zero());
    each_run(rows, 1, space.rows, [&](const Range& r) { backward_tile(job, r, c, space); });
    // The gradient to packed rows of x holds log2(e), as logits to base 2 must.
    if (to_y) add_panels(space.dy, sheet.y, 0.693147181f, c, job.dy_end, job.dy);
  });
}

static const KernelTable kTable = {kPanel, kTileRows, kTileCols, kLd, kFew, kPairs, dot, longest, read_row, write_row,
                                   finish_row, forward_block, backward_block};
