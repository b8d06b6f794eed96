// The forward pass; of qformer_attention_kernel.inl.

// What one worker holds for the rows of an item. [K] means padded to a multiple of kVec.
struct ForwardState {
  TileScratch tiles;
  Halves halves;
  float* s;                         // [tokens, kBlock]
  float* reference;                 // [K] what is subtracted in exp: within kSlack below the row maximum seen so far
  float* inverse;                   // [K] 1 / sum of exp
  float* bias[kMaxStreams];         // [K] c
  float* sum[kMaxStreams];          // [K] sum of exp over the tokens of the stream
  float* kept[kMaxStreams];         // [K] the same after dropout
  float* factors;                   // [kBlock] of dropout
  float* owed[kMaxStreams];         // [K] factor that y has still to be multiplied by
  float* packed[kMaxStreams];       // u transposed, when it differs from item to item
  float** y[kMaxStreams];           // [K] rows
  const float** u[kMaxStreams];     // [K] rows
  float* values;                    // [items_together * Q, E] of one head and stream
  float* rounded;                   // [items_together * Q, C / 2], y in bf16
};

// y and the sums are rescaled only when a row's maximum has grown by more than this, since exp(8) loses nothing in
// float32. Most items then never rescale.
constexpr float kSlack = 8.0f;
constexpr float kLowest = -1.0e38f;

static ForwardState forward_state(const ForwardJob& job, Arena& arena) {
  ForwardState st{};
  const int64_t K = job.shape.K(), padded = round_up(K, kVec);
  st.tiles = make_tile_scratch(arena, job.shape, job.streams, job.M);
  st.halves = make_halves(arena, job.shape, job.streams, job.M);
  st.s = arena.floats(st.tiles.tile.n * smaller(kBlock, padded));
  st.reference = arena.floats(padded);
  st.inverse = arena.floats(padded);
  st.factors = arena.floats(kBlock);
  const int64_t rows = items_together(job.shape, job.streams, job.M) * job.shape.Q;
  st.values = arena.floats(rows * round_up(job.shape.E, kVec));
  st.rounded = arena.floats(job.shape.pairs ? rows * widest(job.streams, job.M) / 2 : 0);
  for (int m = 0; m < job.M; ++m) {
    st.bias[m] = arena.floats(padded);
    st.sum[m] = arena.floats(padded);
    st.kept[m] = arena.floats(padded);
    st.owed[m] = arena.floats(padded);
    st.y[m] = arena.array<float*>(K);
    st.u[m] = arena.array<const float*>(K);
    if (!job.shape.shared_u && !few(job.shape)) st.packed[m] = arena.floats(padded * job.streams[m].tokens.C);
  }
  return st;
}

// s[n, ld] -> exp(s + bias - reference), with the sums brought up to date. r0: the block's first row. narrow: vectors are of
// several tokens (narrow_width), n counts them and ld is kVec.
static void softmax_block(ForwardState& st, int M, int m, int64_t r0, int64_t n, int64_t ld, int64_t narrow) {
  for (int64_t v = 0; v < ld; v += kVec) {
    float* s = st.s + v;
    const int64_t r = r0 + v;
    const V bias = load(st.bias[m] + r), old = load(st.reference + r);
    V top = splat(kLowest);
    for (int64_t t = 0; t < n; ++t) top = vmax(top, load(s + t * ld) + bias);
    if (narrow != 0) top = fold_max(top, narrow);
    V now = old;
    if (any_greater(top, old + splat(kSlack))) {
      now = where_greater(top, old + splat(kSlack), top, old);
      const V factor = vexp(old - now);
      store(st.reference + r, now);
      for (int i = 0; i < M; ++i) {
        store(st.sum[i] + r, load(st.sum[i] + r) * factor);
        store(st.kept[i] + r, load(st.kept[i] + r) * factor);
        store(st.owed[i] + r, load(st.owed[i] + r) * factor);
      }
    }
    const V shift = bias - now;
    V sum = zero();
    for (int64_t t = 0; t < n; ++t) {
      const V p = vexp(load(s + t * ld) + shift);
      store(s + t * ld, p);
      sum = sum + p;
    }
    if (narrow != 0) sum = fold_sum(sum, narrow);
    store(st.sum[m] + r, load(st.sum[m] + r) + sum);
  }
}

// s[n, ld] -> sigmoid(s + bias), for weights that nothing divides.
static void sigmoid_block(ForwardState& st, int m, int64_t r0, int64_t n, int64_t ld) {
  for (int64_t v = 0; v < ld; v += kVec) {
    const V bias = load(st.bias[m] + r0 + v);
    for (int64_t t = 0; t < n; ++t) {
      V rest;
      store(st.s + t * ld + v, sigmoid(load(st.s + t * ld + v) + bias, rest));
    }
    store(st.sum[m] + r0 + v, splat(1.0f));
  }
}

// Multiplies s[n, ld], the weights of a block, with the factors of dropout. The softmax's denominator counts all of them.
static void drop_block(const Dropout& drop, ForwardState& st, int m, int64_t first_token, int64_t r0, int64_t ld) {
  const Tile& tile = st.tiles.tile;
  for (int64_t t = 0; t < tile.n; ++t) {
    draw(drop, m, first_token + tile.index[t], r0, ld, st.factors);
    for (int64_t v = 0; v < ld; v += kVec) {
      const V p = load(st.s + t * ld + v) * load(st.factors + v);
      store(st.s + t * ld + v, p);
      store(st.kept[m] + r0 + v, load(st.kept[m] + r0 + v) + p);
    }
  }
}

static void invert_sums(ForwardState& st, int M, int64_t r0, int64_t width) {
  for (int64_t r = r0; r < r0 + width; ++r) {
    float total = 0.0f;
    for (int m = 0; m < M; ++m) total += st.sum[m][r];
    st.inverse[r] = total == 0.0f ? 0.0f : 1.0f / total;
  }
}

static void forward_tile(const ForwardJob& job, ForwardState& st, int m, const Tokens& tokens, bool first, bool last) {
  Tile& tile = st.tiles.tile;
  const int64_t K = job.shape.K(), padded = round_up(K, kVec), C = job.streams[m].tokens.C;
  const bool pairs = job.shape.pairs;
  const int64_t narrow = narrow_width(job.shape);
  if (pairs) join_tokens(tile, C, st.tiles.joined);
  const float* packed = job.shape.shared_u ? job.packed_u[m] : st.packed[m];
  for (int64_t r0 = 0; r0 < K; r0 += kBlock) {
    const int64_t ld = narrow != 0 ? narrow : smaller(kBlock, padded - r0), scored = round_up(tile.n * ld, kVec);
    if (few(job.shape)) {
      if (round_up(K, 4) < ld) fill(st.s, tile.n * ld, 0.0f);
      for (int64_t i = tile.n * ld; i < scored; ++i) st.s[i] = kLowest;
      dots({tile.rows, st.u[m], C, st.s, ld, !tile.copied}, tile.n, K);
    } else if (pairs) {
      scores<true>({tile.x, tile.stride, packed + r0 * C / 2, C / 2, st.s, ld}, tile.n, ld);
    } else {
      scores({tile.x, tile.stride, packed + r0 * C, C, st.s, ld}, tile.n, ld);
    }
    if (tokens.bias != nullptr) add_bias(job.shape, tokens, tile, r0, smaller(kBlock, K - r0), st.s, ld);
    if (narrow != 0) {
      softmax_block(st, job.M, m, r0, scored / kVec, kVec, narrow);
    } else if (job.shape.sigmoid) {
      sigmoid_block(st, m, r0, tile.n, ld);
    } else {
      softmax_block(st, job.M, m, r0, tile.n, ld, 0);
    }
    if (job.shape.drop.threshold > 0) drop_block(job.shape.drop, st, m, tokens.first, r0, ld);
    if (last) invert_sums(st, job.M, r0, ld);
    // The same rows of the next item.
    const Soon soon{first ? st.y[m] + r0 : nullptr, job.shape.Q * C};
    const int64_t rows = smaller(kBlock, K - r0);
    const Ahead ahead = r0 == 0 ? tile.ahead : Ahead{};
    Update g{st.s, ld, tile.n, tile.rows, st.y[m] + r0, st.owed[m] + r0, last ? st.inverse + r0 : nullptr, !first, nullptr, soon,
             r0 == 0 && tile.looked_up ? tile.next : nullptr, bytes_of(tokens.storage)};
    if (pairs) {
      join_floats(st.s, tile.n, ld, ld, st.s);
      g.k = (tile.n + 1) / 2;
      g.b = tile.joined;
      update<true>(g, rows, C, ahead);
    } else {
      update(g, rows, C, ahead);
    }
    fill(st.owed[m] + r0, ld, 1.0f);
  }
}

// Streams that were finished before the softmax's denominator was known, and streams without tokens.
static void finish_y(const ForwardJob& job, ForwardState& st, const bool* touched, int last_stream) {
  for (int m = 0; m < job.M; ++m) {
    if (m == last_stream) continue;
    const int64_t C = job.streams[m].tokens.C;
    for (int64_t r = 0; r < job.shape.K(); ++r) {
      float* y = st.y[m][r];
      const float factor = st.owed[m][r] * st.inverse[r];
      if (!touched[m]) {
        fill(y, C, 0.0f);
      } else {
        for (int64_t c = 0; c < C; ++c) y[c] *= factor;
      }
    }
  }
}

static void finish_statistics(const ForwardJob& job, ForwardState& st, int64_t b) {
  const Shape& shape = job.shape;
  for (int m = 0; m < job.M; ++m) {
    if (job.streams[m].mass == nullptr) continue;
    const float* const sum = shape.drop.threshold > 0 ? st.kept[m] : st.sum[m];
    for (int64_t r = 0; r < shape.K(); ++r) st.owed[m][r] = sum[r] * st.inverse[r];
    scatter_rows(st.owed[m], shape.B, b, shape.H, shape.Q, job.streams[m].mass);
  }
  for (int64_t r = 0; r < shape.K(); ++r) {
    float total = 0.0f;
    for (int m = 0; m < job.M; ++m) total += st.sum[m][r];
    st.reference[r] += ::logf(total);  // no token: -inf
  }
  scatter_rows(st.reference, shape.B, b, shape.H, shape.Q, job.lse);
}

static void forward_item(const ForwardJob& job, ForwardState& st, int64_t b) {
  const Shape& shape = job.shape;
  const int64_t K = shape.K(), padded = round_up(K, kVec), narrow = narrow_width(shape);
  Tokens tokens[kMaxStreams];
  bool touched[kMaxStreams];
  int last_stream = -1;
  fill(st.reference, padded, shape.sigmoid ? 0.0f : kLowest);
  fill(st.inverse, padded, 0.0f);
  for (int m = 0; m < job.M; ++m) {
    const ForwardStream& s = job.streams[m];
    tokens[m] = item_tokens(s.tokens, b, shape);
    touched[m] = tokens[m].present > 0;
    if (touched[m]) last_stream = m;
    fill(st.sum[m], padded, 0.0f);
    fill(st.kept[m], padded, 0.0f);
    fill(st.owed[m], padded, 1.0f);
    row_table(s.y, shape.B, b, shape.H, shape.Q, s.tokens.C, st.y[m]);
    if (shape.shared_u || !touched[m]) continue;
    row_table(s.u, shape.B, b, shape.H, shape.Q, s.tokens.C, st.u[m]);
    if (!few(shape)) {
      const float* const* const u = as_read(shape, st.halves, st.u[m], s.tokens.C);
      pack_transposed(u, K, width_of(shape, s.tokens.C), st.packed[m]);
    }
    gather_rows(s.c, shape.B, b, shape.H, shape.Q, st.bias[m]);
    if (narrow != 0) repeat(st.bias[m], narrow);
  }
  for (int m = 0; m < job.M; ++m) {
    const int64_t limit = tile_limit(tokens[m].C), tiles = (tokens[m].present + limit - 1) / limit;
    int64_t at = 0, left = tokens[m].present;
    for (int64_t i = 0; i < tiles; ++i) {
      at = next_tile(tokens[m], at, (left + tiles - i - 1) / (tiles - i), few(job.shape), st.tiles.copy,
                     st.tiles.tile);
      left -= st.tiles.tile.n;
      forward_tile(job, st, m, tokens[m], i == 0, m == last_stream && i + 1 == tiles);
    }
  }
  finish_y(job, st, touched, last_stream);
  finish_statistics(job, st, b);
}
