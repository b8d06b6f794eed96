// The backward pass: a tile, and an item with what belongs to it alone; of qformer_attention_kernel.inl.

// How w lies: the numbers of a token are `ld` floats behind those of the one before, dp is `second` floats behind s. With few
// rows (narrow_width) all of s comes before all of dp.
struct Weights {
  int64_t ld, second;
};

// w holds s and dp of few rows; leaves ds and p, and adds ds to dc.
static void gradient_narrow(BackwardState& st, int m, int64_t floats, const Weights& at) {
  const V offset = load(st.of[m].bias) - load(st.lse), shift = load(st.of[m].shift);
  V total = zero();
  for (int64_t i = 0; i < floats; i += kVec) {
    float* const w = st.w + i;
    const V p = vexp(load(w) + offset);
    const V ds = p * (load(w + at.second) + shift);
    store(w, ds);
    store(w + at.second, p);
    total = total + ds;
  }
  store(st.of[m].dc, load(st.of[m].dc) + fold_sum(total, at.ld));
}

// The same of a block, a vector of rows after the other.
static void gradient_block(BackwardState& st, int m, int64_t r0, int64_t n, int64_t width) {
  for (int64_t v = 0; v < width; v += kVec) {
    float* w = st.w + v;
    const int64_t r = r0 + v;
    const V offset = load(st.of[m].bias + r) - load(st.lse + r), shift = load(st.of[m].shift + r);
    V total = zero();
    for (int64_t t = 0; t < n; ++t, w += 2 * width) {
      const V p = vexp(load(w) + offset);
      const V ds = p * (load(w + width) + shift);
      store(w, ds);
      store(w + width, p);
      total = total + ds;
    }
    store(st.of[m].dc + r, load(st.of[m].dc + r) + total);
  }
}

// The same of weights that are sigmoids: nothing but its own score moves one.
static void sigmoid_gradient_block(BackwardState& st, int m, int64_t r0, int64_t n, int64_t width) {
  for (int64_t v = 0; v < width; v += kVec) {
    float* w = st.w + v;
    const V bias = load(st.of[m].bias + r0 + v);
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
      const V factor = load(st.factors + v), delta = load(st.delta + r), dmass = load(st.of[m].shift + r) + delta;
      const V p = vexp(load(w) + load(st.of[m].bias + r) - load(st.lse + r));
      const V ds = p * (factor * (load(w + width) + dmass) - delta);
      store(w, ds);
      store(w + width, p * factor);
      store(st.of[m].dc + r, load(st.of[m].dc + r) + ds);
    }
  }
}

// s and dp of a block's rows into w.
template <bool PAIRS>
static void score_block(const BackwardJob& job, BackwardState& st, int m, const float* packed_u, int64_t r0, int64_t width) {
  const Tile& tile = st.tiles.tile;
  const int64_t k = width_of(job.shape, job.streams[m].tokens.C);
  if (round_up(job.shape.K(), kVec) == kVec) {
    scores<PAIRS>({tile.x, tile.stride, st.of[m].both, k, st.w, kPanel}, tile.n, kPanel);
  } else {
    scores<PAIRS>({tile.x, tile.stride, packed_u + r0 * k, k, st.w, 2 * width}, tile.n, width);
    scores<PAIRS>({tile.x, tile.stride, st.of[m].packed_dy + r0 * k, k, st.w + width, 2 * width}, tile.n, width);
  }
}

// What a block's rows add to dx.
static void token_gradient(const BackwardJob& job, BackwardState& st, int m, int64_t r0, int64_t width, int64_t rows,
                           const Weights& at) {
  const int64_t C = job.streams[m].tokens.C, n = st.tiles.tile.n;
  if (!job.shape.pairs) {
    for (int64_t r = 0; r < rows; ++r) {
      st.pair[r] = st.of[m].u[r0 + r];
      st.pair[rows + r] = st.of[m].dy[r0 + r];
    }
    return outer({st.w, at.ld, at.second, rows, st.pair, st.dx, r0 != 0}, n, C);
  }
  round_row(st.w, n * 2 * width, reinterpret_cast<Half*>(st.w_rounded));
  const int64_t depth = (rows + 1) / 2;
  for (int64_t i = 0; i < depth; ++i) {
    st.pair[i] = st.of[m].joined_u + (r0 / 2 + i) * C;
    st.pair[depth + i] = st.of[m].joined_dy + (r0 / 2 + i) * C;
  }
  outer<true>({st.w_rounded, width, width / 2, depth, st.pair, st.dx, r0 != 0}, n, C);
}

EM3_INLINE uintptr_t dx_row(const BackwardStream& s, int64_t row) {
  return reinterpret_cast<uintptr_t>(s.dx) + static_cast<uintptr_t>(row * s.tokens.C * bytes_of(s.dx_storage));
}

static void point_at_dx(BackwardState& st, const BackwardStream& s, const Tokens& tokens) {
  const Tile& tile = st.tiles.tile;
  for (int64_t t = 0; t < tile.n; ++t) {
    const bool here = s.dx_storage == Storage::f32;
    st.dx[t] = here ? reinterpret_cast<float*>(dx_row(s, tokens.first + tile.index[t])) : st.dx_tile + t * s.tokens.C;
  }
}

static void backward_tile(const BackwardJob& job, BackwardState& st, int m, const Tokens& tokens) {
  const BackwardStream& s = job.streams[m];
  Tile& tile = st.tiles.tile;
  const int64_t K = job.shape.K(), padded = round_up(K, kVec), C = s.tokens.C, narrow = narrow_width(job.shape);
  if (job.shape.pairs && s.du != nullptr) join_tokens(tile, C, st.tiles.joined);
  const float* packed_u = job.shape.shared_u ? job.packed_u[m] : st.of[m].packed_u;
  if (s.dx != nullptr) point_at_dx(st, s, tokens);
  for (int64_t r0 = 0; r0 < K; r0 += kBlock) {
    const int64_t width = smaller(kBlock, padded - r0), rows = smaller(kBlock, K - r0);
    const int64_t scored = round_up(tile.n * narrow, kVec);
    const Weights at = narrow != 0 ? Weights{narrow, scored} : Weights{2 * width, width};
    if (few(job.shape)) {
      if (narrow == 0 && K < width) fill(st.w, tile.n * 2 * width, 0.0f);
      for (int64_t i = tile.n * narrow; i < scored; ++i) st.w[i] = kLowest, st.w[scored + i] = 0.0f;
      dots({tile.rows, st.of[m].u, C, st.w, at.ld, !tile.copied}, tile.n, K);
      dots({tile.rows, st.of[m].dy, C, st.w + at.second, at.ld, false}, tile.n, K);
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
    Update g{st.w, at.ld, tile.n, tile.rows, st.of[m].du + r0, nullptr, nullptr, st.of[m].touched, nullptr, {},
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
  st.of[m].touched = true;
  for (int64_t t = 0; s.dx != nullptr && s.dx_storage != Storage::f32 && t < tile.n; ++t) {
    store_row(s.dx_storage, st.dx[t], C, dx_row(s, tokens.first + tile.index[t]));
  }
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
  const float* const* const dy = as_read(job.shape, st.halves, st.of[m].dy, C);
  if (narrow) {
    transpose_rows(dy, K, kVec, k, kPanel, st.of[m].both + kVec);
  } else {
    pack_transposed(dy, K, k, st.of[m].packed_dy);
  }
  const bool joined = job.shape.pairs && job.streams[m].dx != nullptr;
  if (joined) join_halves(job.shape, dy, C, st.of[m].joined_dy);
  if (job.shape.shared_u) return;
  const float* const* const u = as_read(job.shape, st.halves, st.of[m].u, C);
  if (narrow) {
    transpose_rows(u, K, kVec, k, kPanel, st.of[m].both);
  } else {
    pack_transposed(u, K, k, st.of[m].packed_u);
  }
  if (joined) join_halves(job.shape, u, C, st.of[m].joined_u);
}

// dy . y of every row, with dy as the products with tokens have it: in a short item that is what dp must cancel with, and of
// a single token to the last bit. dout . o is as near for long ones only.
static void add_rounded_delta(const BackwardJob& job, BackwardState& st, int m, int64_t b) {
  const Shape& shape = job.shape;
  const int64_t Q = shape.Q, C = job.streams[m].tokens.C;
  const float* const* const dy = as_read(shape, st.halves, st.of[m].dy, C);
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
    row_table<const float>(st.of[m].dy_rows, items, b - first, H, Q, round_up(s.tokens.C, kVec), st.of[m].dy);
    if (rounded) add_rounded_delta(job, st, m, b);
    gather_rows(s.dmass, B, b, H, Q, st.of[m].shift);
    if (s.dmass == nullptr) continue;
    gather_rows(s.mass, B, b, H, Q, st.row);
    for (int64_t r = 0; r < K; ++r) st.delta[r] += st.of[m].shift[r] * st.row[r];
  }
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    for (int64_t r = 0; r < K; ++r) st.of[m].shift[r] -= st.delta[r];
    row_table(s.u, shape.shared_u ? 1 : B, shape.shared_u ? 0 : b, H, Q, s.tokens.C, st.of[m].u);
    if (tokens[m].present == 0 || !wanted(s)) continue;
    if (!few(shape)) pack_item(job, st, m);
    if (!shape.shared_u) gather_rows(s.c, B, b, H, Q, st.of[m].bias);
    if (narrow == 0) continue;
    repeat(st.of[m].shift, narrow);
    repeat(st.of[m].bias, narrow);
  }
}

// Points du at where the sums go: this part's [K, C], or the item's own rows of the output.
static void start_sums(const BackwardJob& job, BackwardState& st, int64_t items, int64_t b, const Gradients& to) {
  const Shape& shape = job.shape;
  for (int m = 0; m < job.M; ++m) {
    st.of[m].touched = false;
    fill(st.of[m].dc, round_up(shape.K(), kVec), 0.0f);
    if (to.du[m] != nullptr) row_table(to.du[m], items, b, shape.H, shape.Q, job.streams[m].tokens.C, st.of[m].du);
  }
}

static void finish_sums(const BackwardJob& job, BackwardState& st, int64_t items, int64_t b, const Gradients& to) {
  const Shape& shape = job.shape;
  for (int m = 0; m < job.M; ++m) {
    if (to.dc[m] != nullptr) scatter_rows(st.of[m].dc, items, b, shape.H, shape.Q, to.dc[m]);
    if (to.du[m] == nullptr || st.of[m].touched) continue;
    for (int64_t r = 0; r < shape.K(); ++r) fill(st.of[m].du[r], job.streams[m].tokens.C, 0.0f);
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
        if (t.has(i)) continue;
        auto* const row = reinterpret_cast<unsigned char*>(dx_row(s, t.first + i));
        for (int64_t k = 0; k < t.C * bytes_of(s.dx_storage); ++k) row[k] = 0;
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

static void start_part(const BackwardJob& job, BackwardState& st) {
  const Shape& shape = job.shape;
  const int64_t padded = round_up(shape.K(), kVec);
  fill(st.lse, padded, 0.0f);
  fill(st.delta, padded, 0.0f);
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    fill(st.of[m].bias, padded, 0.0f);
    fill(st.of[m].shift, padded, 0.0f);
    if (!shape.shared_u) continue;
    gather_rows(s.c, 1, 0, shape.H, shape.Q, st.of[m].bias);
    row_table(s.u, 1, 0, shape.H, shape.Q, s.tokens.C, st.of[m].u);
    if (few(shape)) continue;
    const float* const* const u = as_read(shape, st.halves, st.of[m].u, s.tokens.C);
    if (padded == kVec) transpose_rows(u, shape.K(), kVec, width_of(shape, s.tokens.C), kPanel, st.of[m].both);
    if (shape.pairs && s.dx != nullptr) join_halves(shape, u, s.tokens.C, st.of[m].joined_u);
  }
}
