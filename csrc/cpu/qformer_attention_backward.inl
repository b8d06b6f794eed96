// The backward pass; of qformer_attention_kernel.inl.

constexpr int64_t kWeighed = 32;  // rows of y that dw takes at a time: those of 128 floats fill half a level-1 cache

struct BackwardState {
  TileScratch tiles;
  Halves halves;
  float** dx;                        // [tokens] rows
  float* w;                          // [tokens, 2 * block]: s then ds on the left, dp then p on the right; see Weights
  const float** pair;                // [2 * kBlock] rows of u, then of dy
  float* w_rounded;                  // [tokens, block]: ds, then p, in bf16
  float* joined_u[kMaxStreams];      // [(K + 1) / 2, C]: rows 2 i and 2 i + 1 of u as pairs, for dx
  float* joined_dy[kMaxStreams];     // the same of dy
  float* lse;                        // [K]
  float* delta;                      // [K]
  float* row;                        // [K] a temporary
  float* factors;                    // [kBlock] of dropout
  float* bias[kMaxStreams];          // [K] c
  float* shift[kMaxStreams];         // [K] dmass - delta
  float* dc[kMaxStreams];            // [K]
  float* packed_u[kMaxStreams];      // transposed, when it differs from item to item
  float* packed_dy[kMaxStreams];     // transposed
  float* both[kMaxStreams];          // u and dy transposed side by side, where K fits one vector
  float* dy_rows[kMaxStreams];       // [H, items_together * Q, C padded]
  const float** y_rows;              // [kWeighed]
  float** dw_rows;                   // [E]
  float* y_packed;                   // [kWeighed, C]
  float* y_joined;                   // [kWeighed / 2, C] pairs
  float* dout;                       // [items_together * Q or kWeighed, E] in pairs of one kind or the other
  const float** u[kMaxStreams];      // [K] rows
  const float** dy[kMaxStreams];     // [K] rows
  float** du[kMaxStreams];           // [K] rows
  bool touched[kMaxStreams];         // du holds something
};

EM3_INLINE bool wanted(const BackwardStream& s) {
  return s.du != nullptr || s.dc != nullptr || s.dx != nullptr || s.dbias != nullptr;
}

static BackwardState backward_state(const BackwardJob& job, Arena& arena) {
  BackwardState st{};
  const int64_t K = job.shape.K(), padded = round_up(K, kVec);
  st.tiles = make_tile_scratch(arena, job.shape, job.streams, job.M);
  st.halves = make_halves(arena, job.shape, job.streams, job.M);
  st.dx = arena.array<float*>(st.tiles.tile.n);
  st.w = arena.floats(st.tiles.tile.n * 2 * smaller(kBlock, padded));
  st.pair = arena.array<const float*>(2 * kBlock);
  st.w_rounded = arena.floats(job.shape.pairs ? st.tiles.tile.n * smaller(kBlock, padded) : 0);
  st.lse = arena.floats(padded);
  st.delta = arena.floats(padded);
  st.row = arena.floats(padded);
  st.factors = arena.floats(kBlock);
  const int64_t together = items_together(job.shape, job.streams, job.M);
  st.y_rows = arena.array<const float*>(kWeighed);
  st.dw_rows = arena.array<float*>(job.shape.E);
  const int64_t C = widest(job.streams, job.M);
  st.y_packed = arena.floats(kWeighed * C);
  st.y_joined = arena.floats(job.shape.pairs ? kWeighed / 2 * C : 0);
  st.dout = arena.floats(job.shape.pairs ? (kWeighed > together * job.shape.Q ? kWeighed : together * job.shape.Q) * job.shape.E : 0);
  for (int m = 0; m < job.M; ++m) {
    const int64_t C = job.streams[m].tokens.C;
    st.bias[m] = arena.floats(padded);
    st.shift[m] = arena.floats(padded);
    st.dc[m] = arena.floats(padded);
    st.dy_rows[m] = arena.floats(together * K * round_up(C, kVec));
    st.u[m] = arena.array<const float*>(K);
    st.dy[m] = arena.array<const float*>(K);
    st.du[m] = arena.array<float*>(K);
    const int64_t joined = job.shape.pairs && job.streams[m].dx != nullptr ? (K + 1) / 2 * C : 0;
    st.joined_u[m] = arena.floats(joined);
    st.joined_dy[m] = arena.floats(joined);
    if (few(job.shape)) continue;
    if (padded == kVec) {
      st.both[m] = arena.floats(kPanel * C);
    } else {
      st.packed_dy[m] = arena.floats(padded * C);
      if (!job.shape.shared_u) st.packed_u[m] = arena.floats(padded * C);
    }
  }
  return st;
}

// How w lies: the numbers of a token are `ld` floats behind those of the one before, dp is `second` floats behind s. With few
// rows (narrow_width) all of s comes before all of dp.
struct Weights {
  int64_t ld, second;
};

// w holds s and dp of few rows; leaves ds and p, and adds ds to dc.
static void gradient_narrow(BackwardState& st, int m, int64_t floats, const Weights& at) {
  const V offset = load(st.bias[m]) - load(st.lse), shift = load(st.shift[m]);
  V total = zero();
  for (int64_t i = 0; i < floats; i += kVec) {
    float* const w = st.w + i;
    const V p = vexp(load(w) + offset);
    const V ds = p * (load(w + at.second) + shift);
    store(w, ds);
    store(w + at.second, p);
    total = total + ds;
  }
  store(st.dc[m], load(st.dc[m]) + fold_sum(total, at.ld));
}

// The same of a block, a vector of rows after the other.
static void gradient_block(BackwardState& st, int m, int64_t r0, int64_t n, int64_t width) {
  for (int64_t v = 0; v < width; v += kVec) {
    float* w = st.w + v;
    const int64_t r = r0 + v;
    const V offset = load(st.bias[m] + r) - load(st.lse + r), shift = load(st.shift[m] + r);
    V total = zero();
    for (int64_t t = 0; t < n; ++t, w += 2 * width) {
      const V p = vexp(load(w) + offset);
      const V ds = p * (load(w + width) + shift);
      store(w, ds);
      store(w + width, p);
      total = total + ds;
    }
    store(st.dc[m] + r, load(st.dc[m] + r) + total);
  }
}

// The same of weights that are sigmoids: nothing but its own score moves one.
static void sigmoid_gradient_block(BackwardState& st, int m, int64_t r0, int64_t n, int64_t width) {
  for (int64_t v = 0; v < width; v += kVec) {
    float* w = st.w + v;
    const V bias = load(st.bias[m] + r0 + v);
    for (int64_t t = 0; t < n; ++t, w += 2 * width) {
      V rest;
      const V p = sigmoid(load(w) + bias, rest);
      store(w, load(w + width) * p * rest);
      store(w + width, p);
    }
  }
}

// The same with dropout: the gradient reaches p through its factor, and what multiplies dy is p times that.
static void gradient_block(const Dropout& drop, BackwardState& st, int m, int64_t first_token, int64_t r0, int64_t width) {
  const Tile& tile = st.tiles.tile;
  for (int64_t t = 0; t < tile.n; ++t) {
    draw(drop, m, first_token + tile.index[t], r0, width, st.factors);
    for (int64_t v = 0; v < width; v += kVec) {
      float* w = st.w + t * 2 * width + v;
      const int64_t r = r0 + v;
      const V factor = load(st.factors + v), delta = load(st.delta + r), dmass = load(st.shift[m] + r) + delta;
      const V p = vexp(load(w) + load(st.bias[m] + r) - load(st.lse + r));
      const V ds = p * (factor * (load(w + width) + dmass) - delta);
      store(w, ds);
      store(w + width, p * factor);
      store(st.dc[m] + r, load(st.dc[m] + r) + ds);
    }
  }
}

// s and dp of a block's rows into w.
template <bool PAIRS>
static void score_block(const BackwardJob& job, BackwardState& st, int m, const float* packed_u, int64_t r0, int64_t width) {
  const Tile& tile = st.tiles.tile;
  const int64_t k = width_of(job.shape, job.streams[m].tokens.C);
  if (round_up(job.shape.K(), kVec) == kVec) {
    scores<PAIRS>({tile.x, tile.stride, st.both[m], k, st.w, kPanel}, tile.n, kPanel);
  } else {
    scores<PAIRS>({tile.x, tile.stride, packed_u + r0 * k, k, st.w, 2 * width}, tile.n, width);
    scores<PAIRS>({tile.x, tile.stride, st.packed_dy[m] + r0 * k, k, st.w + width, 2 * width}, tile.n, width);
  }
}

// What a block's rows add to dx.
static void token_gradient(const BackwardJob& job, BackwardState& st, int m, int64_t r0, int64_t width, int64_t rows,
                           const Weights& at) {
  const int64_t C = job.streams[m].tokens.C, n = st.tiles.tile.n;
  if (!job.shape.pairs) {
    for (int64_t r = 0; r < rows; ++r) {
      st.pair[r] = st.u[m][r0 + r];
      st.pair[rows + r] = st.dy[m][r0 + r];
    }
    return outer({st.w, at.ld, at.second, rows, st.pair, st.dx, r0 != 0}, n, C);
  }
  round_row(st.w, n * 2 * width, reinterpret_cast<Half*>(st.w_rounded));
  const int64_t depth = (rows + 1) / 2;
  for (int64_t i = 0; i < depth; ++i) {
    st.pair[i] = st.joined_u[m] + (r0 / 2 + i) * C;
    st.pair[depth + i] = st.joined_dy[m] + (r0 / 2 + i) * C;
  }
  outer<true>({st.w_rounded, width, width / 2, depth, st.pair, st.dx, r0 != 0}, n, C);
}

static void backward_tile(const BackwardJob& job, BackwardState& st, int m, const Tokens& tokens) {
  const BackwardStream& s = job.streams[m];
  Tile& tile = st.tiles.tile;
  const int64_t K = job.shape.K(), padded = round_up(K, kVec), C = s.tokens.C, narrow = narrow_width(job.shape);
  if (job.shape.pairs && s.du != nullptr) join_tokens(tile, C, st.tiles.joined);
  const float* packed_u = job.shape.shared_u ? job.packed_u[m] : st.packed_u[m];
  if (s.dx != nullptr) {
    for (int64_t t = 0; t < tile.n; ++t) st.dx[t] = s.dx + (tokens.first + tile.index[t]) * C;
  }
  for (int64_t r0 = 0; r0 < K; r0 += kBlock) {
    const int64_t width = smaller(kBlock, padded - r0), rows = smaller(kBlock, K - r0);
    const int64_t scored = round_up(tile.n * narrow, kVec);
    const Weights at = narrow != 0 ? Weights{narrow, scored} : Weights{2 * width, width};
    if (few(job.shape)) {
      if (narrow == 0 && K < width) fill(st.w, tile.n * 2 * width, 0.0f);
      for (int64_t i = tile.n * narrow; i < scored; ++i) st.w[i] = kLowest, st.w[scored + i] = 0.0f;
      dots({tile.rows, st.u[m], C, st.w, at.ld, !tile.copied}, tile.n, K);
      dots({tile.rows, st.dy[m], C, st.w + at.second, at.ld, false}, tile.n, K);
    } else if (job.shape.pairs) {
      score_block<true>(job, st, m, packed_u, r0, width);
    } else {
      score_block<false>(job, st, m, packed_u, r0, width);
    }
    if (tokens.bias != nullptr) add_bias(job.shape, tokens, tile, r0, rows, st.w, at.ld);
    if (narrow != 0) {
      gradient_narrow(st, m, scored, at);
    } else if (job.shape.sigmoid) {
      sigmoid_gradient_block(st, m, r0, tile.n, width);
    } else if (job.shape.drop.threshold > 0) {
      gradient_block(job.shape.drop, st, m, tokens.first, r0, width);
    } else {
      gradient_block(st, m, r0, tile.n, width);
    }
    if (s.dbias != nullptr) {
      add_to_bias(job.shape, tile, r0, rows, st.w, at.ld, s.dbias + tokens.first * job.shape.H);
    }
    if (s.dx != nullptr) token_gradient(job, st, m, r0, width, rows, at);
    if (s.du == nullptr) continue;
    const Ahead ahead = r0 == 0 ? tile.ahead : Ahead{};
    Update g{st.w, at.ld, tile.n, tile.rows, st.du[m] + r0, nullptr, nullptr, st.touched[m], nullptr, {},
             r0 == 0 && tile.looked_up ? tile.next : nullptr, bytes_of(tokens.storage)};
    if (job.shape.pairs) {
      join_floats(st.w, tile.n, 2 * width, width, st.w);
      g.k = (tile.n + 1) / 2;
      g.b = tile.joined;
      update<true>(g, rows, C, ahead);
    } else {
      update(g, rows, C, ahead);
    }
  }
  st.touched[m] = true;
}

// Rows of as_read two by two.
static void join_halves(const Shape& shape, const float* const* halves, int64_t C, float* to) {
  for (int64_t r = 0; r < shape.K(); r += 2) {
    const auto* second = r + 1 < shape.K() ? reinterpret_cast<const Half*>(halves[r + 1]) : nullptr;
    join_rows(reinterpret_cast<const Half*>(halves[r]), second, C, to + r / 2 * C);
  }
}

// The rows of dy, and those of u that are not shared, transposed.
static void pack_item(const BackwardJob& job, BackwardState& st, int m) {
  const int64_t K = job.shape.K(), C = job.streams[m].tokens.C, k = width_of(job.shape, C);
  const bool narrow = round_up(K, kVec) == kVec;
  const float* const* const dy = as_read(job.shape, st.halves, st.dy[m], C);
  if (narrow) {
    transpose_rows(dy, K, kVec, k, kPanel, st.both[m] + kVec);
  } else {
    pack_transposed(dy, K, k, st.packed_dy[m]);
  }
  const bool joined = job.shape.pairs && job.streams[m].dx != nullptr;
  if (joined) join_halves(job.shape, dy, C, st.joined_dy[m]);
  if (job.shape.shared_u) return;
  const float* const* const u = as_read(job.shape, st.halves, st.u[m], C);
  if (narrow) {
    transpose_rows(u, K, kVec, k, kPanel, st.both[m]);
  } else {
    pack_transposed(u, K, k, st.packed_u[m]);
  }
  if (joined) join_halves(job.shape, u, C, st.joined_u[m]);
}

// dy . y of every row, with dy as the products with tokens have it: in a short item that is what dp must cancel with, and of
// a single token to the last bit. dout . o is as near for long ones only.
static void add_rounded_delta(const BackwardJob& job, BackwardState& st, int m, int64_t b) {
  const Shape& shape = job.shape;
  const int64_t Q = shape.Q, C = job.streams[m].tokens.C;
  const float* const* const dy = as_read(shape, st.halves, st.dy[m], C);
  for (int64_t r = 0; r < shape.K(); ++r) {
    const auto* const half = reinterpret_cast<const Half*>(dy[r]);
    const float* const y = job.streams[m].y + ((r / Q * shape.B + b) * Q + r % Q) * C;
    V sums = zero();
    int64_t c = 0;
    for (; c + kVec <= C; c += kVec) sums = fma(load_bf16(reinterpret_cast<const uint16_t*>(half + c)), load(y + c), sums);
    float tail = 0.0f;
    for (; c < C; ++c) tail += bf16_value(half[c]) * y[c];
    st.delta[r] += sum(sums) + tail;
  }
}

// delta, the rows of dy and everything else that belongs to item b alone. first: the item that dy_rows begin with.
static void prepare_item(const BackwardJob& job, BackwardState& st, int64_t b, int64_t first, int64_t items,
                         const Tokens* tokens) {
  const Shape& shape = job.shape;
  const int64_t B = shape.B, H = shape.H, Q = shape.Q, K = shape.K(), E = shape.E;
  const int64_t narrow = narrow_width(shape);
  gather_rows(job.lse, B, b, H, Q, st.lse);
  for (int64_t r = 0; r < K; ++r) {
    const int64_t at = ((r / Q * B + b) * Q + r % Q) * E;
    st.lse[r] = st.lse[r] == -INFINITY ? 0.0f : st.lse[r];
    st.delta[r] = dot(job.dout + at, job.o + at, E);
  }
  if (narrow != 0) repeat(st.lse, narrow);
  bool rounded = shape.pairs && !shape.parts;
  for (int m = 0; m < job.M; ++m) rounded = rounded && wanted(job.streams[m]);  // of the others dy is not there
  if (rounded) fill(st.delta, K, 0.0f);
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    row_table<const float>(st.dy_rows[m], items, b - first, H, Q, round_up(s.tokens.C, kVec), st.dy[m]);
    if (rounded) add_rounded_delta(job, st, m, b);
    gather_rows(s.dmass, B, b, H, Q, st.shift[m]);
    if (s.dmass == nullptr) continue;
    gather_rows(s.mass, B, b, H, Q, st.row);
    for (int64_t r = 0; r < K; ++r) st.delta[r] += st.shift[m][r] * st.row[r];
  }
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    for (int64_t r = 0; r < K; ++r) st.shift[m][r] -= st.delta[r];
    row_table(s.u, shape.shared_u ? 1 : B, shape.shared_u ? 0 : b, H, Q, s.tokens.C, st.u[m]);
    if (tokens[m].present == 0 || !wanted(s)) continue;
    if (!few(shape)) pack_item(job, st, m);
    if (!shape.shared_u) gather_rows(s.c, B, b, H, Q, st.bias[m]);
    if (narrow == 0) continue;
    repeat(st.shift[m], narrow);
    repeat(st.bias[m], narrow);
  }
}

// Points du at where the sums go: this part's [K, C], or the item's own rows of the output.
static void start_sums(const BackwardJob& job, BackwardState& st, int64_t items, int64_t b, const Gradients& to) {
  const Shape& shape = job.shape;
  for (int m = 0; m < job.M; ++m) {
    st.touched[m] = false;
    fill(st.dc[m], round_up(shape.K(), kVec), 0.0f);
    if (to.du[m] != nullptr) row_table(to.du[m], items, b, shape.H, shape.Q, job.streams[m].tokens.C, st.du[m]);
  }
}

static void finish_sums(const BackwardJob& job, BackwardState& st, int64_t items, int64_t b, const Gradients& to) {
  const Shape& shape = job.shape;
  for (int m = 0; m < job.M; ++m) {
    if (to.dc[m] != nullptr) scatter_rows(st.dc[m], items, b, shape.H, shape.Q, to.dc[m]);
    if (to.du[m] == nullptr || st.touched[m]) continue;
    for (int64_t r = 0; r < shape.K(); ++r) fill(st.du[m][r], job.streams[m].tokens.C, 0.0f);
  }
}

static void backward_item(const BackwardJob& job, BackwardState& st, int64_t b, int64_t first, int64_t items) {
  Tokens tokens[kMaxStreams];
  bool any = false;
  for (int m = 0; m < job.M; ++m) {
    tokens[m] = item_tokens(job.streams[m].tokens, b, job.shape);
    any = any || (tokens[m].present > 0 && wanted(job.streams[m]));
  }
  if (any) prepare_item(job, st, b, first, items, tokens);
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    const Tokens& t = tokens[m];
    if (s.dx != nullptr && !t.all_present()) {
      for (int64_t i = 0; i < t.n; ++i) {
        if (!t.has(i)) fill(s.dx + (t.first + i) * t.C, t.C, 0.0f);
      }
    }
    if (!wanted(s)) continue;
    const int64_t limit = tile_limit(t.C), tiles = (t.present + limit - 1) / limit;
    int64_t at = 0, left = t.present;
    for (int64_t i = 0; i < tiles; ++i) {
      at = next_tile(t, at, (left + tiles - i - 1) / (tiles - i), few(job.shape), st.tiles.copy,
                     st.tiles.tile);
      left -= st.tiles.tile.n;
      backward_tile(job, st, m, t);
    }
  }
}

static int64_t backward_scratch(const BackwardJob& job) {
  Arena arena{nullptr, 0};
  backward_state(job, arena);
  return arena.used;
}

// dy = dout w of items begin .. end.
static void read_back(const BackwardJob& job, BackwardState& st, int64_t begin, int64_t end) {
  const Shape& shape = job.shape;
  const int64_t E = shape.E, rows = (end - begin) * shape.Q;
  if (rows == 0) return;
  for (int m = 0; m < job.M; ++m) {
    if (!wanted(job.streams[m])) continue;
    const int64_t ld = round_up(job.streams[m].tokens.C, kVec);
    for (int64_t h = 0; h < shape.H; ++h) {
      const float* dout = job.dout + (h * shape.B + begin) * shape.Q * E;
      float* const dy = st.dy_rows[m] + h * rows * ld;
      if (shape.pairs) {
        round_row(dout, rows * E, reinterpret_cast<Half*>(st.dout));
        scores<true>({st.dout, E / 2, job.packed_w[m] + h * E / 2 * ld, E / 2, dy, ld}, rows, ld);
      } else {
        scores({dout, E, job.packed_w[m] + h * E * ld, E, dy, ld}, rows, ld);
      }
    }
  }
}

// dw = dout^T y of items begin .. end: one head of a stream after the other, whose y, which nothing else reads, comes from
// memory in its order.
static void weigh(const BackwardJob& job, BackwardState& st, int m, int64_t begin, int64_t end, float* dw) {
  const Shape& shape = job.shape;
  const int64_t E = shape.E, C = job.streams[m].tokens.C, rows = (end - begin) * shape.Q;
  if (rows == 0 || E == 0) return fill(dw, shape.H * E * C, 0.0f);
  for (int64_t h = 0; h < shape.H; ++h) {
    for (int64_t e = 0; e < E; ++e) st.dw_rows[e] = dw + (h * E + e) * C;
    for (int64_t i = 0; i < rows; i += kWeighed) {
      const int64_t first = (h * shape.B + begin) * shape.Q + i, n = smaller(kWeighed, rows - i);
      const float *y = job.streams[m].y + first * C, *dout = job.dout + first * E;
      const int64_t depth = shape.pairs ? (n + 1) / 2 : n, row = C * static_cast<int64_t>(sizeof(float));
      const Ahead next{reinterpret_cast<uintptr_t>(y + n * C), row, smaller(kWeighed, rows - i - n), sizeof(float)};
      if (shape.pairs) {
        join_floats(y, n, C, C, st.y_joined);
        join_floats(dout, n, E, E, st.dout);
        y = st.y_joined;
        dout = st.dout;
      }
      for (int64_t k = 0; k < depth; ++k) st.y_rows[k] = y + k * C;
      pack_panels(y, depth, C, st.y_packed);
      const Update g{dout, E, depth, st.y_rows, st.dw_rows, nullptr, nullptr, i > 0, st.y_packed, {}};
      if (shape.pairs) {
        update<true>(g, E, C, next);
      } else {
        update(g, E, C, next);
      }
    }
  }
}

static void start_part(const BackwardJob& job, BackwardState& st) {
  const Shape& shape = job.shape;
  const int64_t padded = round_up(shape.K(), kVec);
  fill(st.lse, padded, 0.0f);
  fill(st.delta, padded, 0.0f);
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    fill(st.bias[m], padded, 0.0f);
    fill(st.shift[m], padded, 0.0f);
    if (!shape.shared_u) continue;
    gather_rows(s.c, 1, 0, shape.H, shape.Q, st.bias[m]);
    row_table(s.u, 1, 0, shape.H, shape.Q, s.tokens.C, st.u[m]);
    if (few(shape)) continue;
    const float* const* const u = as_read(shape, st.halves, st.u[m], s.tokens.C);
    if (padded == kVec) transpose_rows(u, shape.K(), kVec, width_of(shape, s.tokens.C), kPanel, st.both[m]);
    if (shape.pairs && s.dx != nullptr) join_halves(shape, u, s.tokens.C, st.joined_u[m]);
  }
}

// to: where this part's sums go; du and dc the outputs themselves where u is not shared.
static void backward_items(const BackwardJob& job, int64_t begin, int64_t end, const Gradients& to, float* scratch) {
  Arena arena{scratch, 0};
  BackwardState st = backward_state(job, arena);
  const Shape& shape = job.shape;
  start_part(job, st);
  if (shape.shared_u) start_sums(job, st, 1, 0, to);
  const int64_t together = items_together(shape, job.streams, job.M);
  for (int64_t first = begin; first < end; first += together) {
    const int64_t stop = smaller(first + together, end);
    read_back(job, st, first, stop);
    for (int64_t b = first; b < stop; ++b) {
      if (!shape.shared_u) start_sums(job, st, shape.B, b, to);
      backward_item(job, st, b, first, stop - first);
      if (!shape.shared_u) finish_sums(job, st, shape.B, b, to);
    }
  }
  if (shape.shared_u) finish_sums(job, st, 1, 0, to);
  for (int m = 0; m < job.M; ++m) {
    if (to.dw[m] != nullptr) weigh(job, st, m, begin, end, to.dw[m]);
  }
}
