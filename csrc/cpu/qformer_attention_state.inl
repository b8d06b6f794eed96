// What the backward pass holds for one worker; of qformer_attention_kernel.inl.

constexpr int64_t kWeighed = 32;  // rows of y that dw takes at a time: those of 128 floats fill half a level-1 cache

// Of one stream. [K] means padded to a multiple of kVec.
struct BackwardRows {
  float *bias, *shift, *dc;  // [K] c, dmass - delta, the sums of ds
  const float** u;           // [K] rows
  const float** dy;          // [K] rows
  float** du;                // [K] rows
  bool touched;              // du holds something
  float* dy_rows;            // [H, items_together * Q, C padded]
  // Transposed for the products with tokens: u when it differs from item to item; u and dy side by side where K fits one vector.
  float *packed_u, *packed_dy, *both;
  float *joined_u, *joined_dy;  // [(K + 1) / 2, C]: rows 2 i and 2 i + 1 as pairs, for dx
};

// Of the product dw = dout^T y.
struct WeightSums {
  const float** y_rows;  // [kWeighed]
  float** dw_rows;       // [E]
  float* y_packed;       // [kWeighed, C]
  float* y_joined;       // [kWeighed / 2, C] pairs
};

struct BackwardState {
  TileScratch tiles;
  Halves halves;
  BackwardRows of[kMaxStreams];
  WeightSums sum_w;
  float *lse, *delta;  // [K]
  float* row;          // [K] a temporary
  float* w;            // [tokens, 2 * block]: s then ds on the left, dp then p on the right; see Weights
  float* factors;      // [kBlock] of dropout
  // For dx: its rows [tokens], in a tile's memory where they are stored in half precision; rows of u, then of dy [2 * kBlock];
  // ds, then p, in bf16 [tokens, block].
  float** dx;
  float* dx_tile;  // [tokens, C]
  const float** pair;
  float* w_rounded;
  float* dout_pairs;  // [items_together * Q or kWeighed, E] in pairs of one kind or the other
};

EM3_INLINE bool wanted(const BackwardStream& s) {
  return s.du != nullptr || s.dc != nullptr || s.dx != nullptr || s.dbias != nullptr;
}

static BackwardRows backward_rows(const BackwardJob& job, const BackwardStream& s, int64_t together, Arena& arena) {
  BackwardRows rows{};
  const int64_t K = job.shape.K(), padded = round_up(K, kVec), C = s.tokens.C;
  rows.bias = arena.floats(padded);
  rows.shift = arena.floats(padded);
  rows.dc = arena.floats(padded);
  rows.dy_rows = arena.floats(together * K * round_up(C, kVec));
  rows.u = arena.array<const float*>(K);
  rows.dy = arena.array<const float*>(K);
  rows.du = arena.array<float*>(K);
  const int64_t joined = job.shape.pairs && s.dx != nullptr ? (K + 1) / 2 * C : 0;
  rows.joined_u = arena.floats(joined);
  rows.joined_dy = arena.floats(joined);
  if (few(job.shape)) return rows;
  if (padded == kVec) {
    rows.both = arena.floats(kPanel * C);
  } else {
    rows.packed_dy = arena.floats(padded * C);
    if (!job.shape.shared_u) rows.packed_u = arena.floats(padded * C);
  }
  return rows;
}

static WeightSums weight_sums(const BackwardJob& job, Arena& arena) {
  const int64_t C = widest(job.streams, job.M);
  WeightSums sums{};
  sums.y_rows = arena.array<const float*>(kWeighed);
  sums.dw_rows = arena.array<float*>(job.shape.E);
  sums.y_packed = arena.floats(kWeighed * C);
  sums.y_joined = arena.floats(job.shape.pairs ? kWeighed / 2 * C : 0);
  return sums;
}

static BackwardState backward_state(const BackwardJob& job, Arena& arena) {
  BackwardState st{};
  const Shape& shape = job.shape;
  const int64_t padded = round_up(shape.K(), kVec), block = smaller(kBlock, padded);
  st.tiles = make_tile_scratch(arena, shape, job.streams, job.M);
  st.halves = make_halves(arena, shape, job.streams, job.M);
  st.dx = arena.array<float*>(st.tiles.tile.n);
  int64_t C = 0;  // of what is stored in half precision
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    if (s.dx != nullptr && s.dx_storage != Storage::f32 && s.tokens.C > C) C = s.tokens.C;
  }
  st.dx_tile = arena.floats(st.tiles.tile.n * C);
  st.w = arena.floats(st.tiles.tile.n * 2 * block);
  st.pair = arena.array<const float*>(2 * kBlock);
  st.w_rounded = arena.floats(shape.pairs ? st.tiles.tile.n * block : 0);
  st.lse = arena.floats(padded);
  st.delta = arena.floats(padded);
  st.row = arena.floats(padded);
  st.factors = arena.floats(kBlock);
  const int64_t together = items_together(shape, job.streams, job.M), rows = together * shape.Q;
  st.dout_pairs = arena.floats(shape.pairs ? (kWeighed > rows ? kWeighed : rows) * shape.E : 0);
  st.sum_w = weight_sums(job, arena);
  for (int m = 0; m < job.M; ++m) st.of[m] = backward_rows(job, job.streams[m], together, arena);
  return st;
}
