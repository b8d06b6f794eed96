// The kernels of qformer_attention, written once and compiled once per instruction set: qformer_attention.cpp includes
// this file inside a namespace and a target region of its own, after simd.h.
//
// No standard-library function or template may be instantiated here. The linker keeps one copy of an inline function,
// and if it kept one compiled with wide instructions, the baseline path would crash on an older processor.
//
// A tile is up to a few hundred tokens of one item and stream, chosen so that its rows stay in the level-2 cache: x
// comes from memory once and is used by every product. Rows r = (h, q) come in blocks of kBlock; within a block the
// scores are kept as [token, row], rows adjacent, which makes the softmax elementwise over vectors and gives all
// three products the one shape a register tile likes: C[i, j] += A[i, k] * B[k, j] with A broadcast and B a row.
//   scores   s[t, r]  = x[t, c]      * uT[c, r]   A = token rows in place, B = packed transpose of u (or dy)
//   update   y[r, c] += p[t, r]      * x[t, c]    A = p, B = token rows in place         (du likewise with ds)
//   outer    dx[t, c] = ds[t, r]     * u[r, c] + p[t, r] * dy[r, c]
// Up to kFew rows read the tokens where they lie instead, see dots: packing the rows, and copying looked-up tokens side
// by side, would cost as much as the products.
// The products with the value weights, o = w y, dy = dout w and dw = dout^T y, take a few items at a time: of one head's
// rows these lie side by side, and what they share stays in the level-2 cache.

#include "tiles.inl"

constexpr int kBlock = 4 * kVec > 32 ? 4 * kVec : 32;

// ---- small elementwise pieces --------------------------------------------------------------------------------------

static float dot(const float* a, const float* b, int64_t n) {
  V s0 = zero(), s1 = zero();
  int64_t i = 0;
  for (; i + kPanel <= n; i += kPanel) {
    s0 = fma(load(a + i), load(b + i), s0);
    s1 = fma(load(a + i + kVec), load(b + i + kVec), s1);
  }
  for (; i < n; i += kVec) {
    const int left = static_cast<int>(smaller(kVec, n - i));
    s0 = left == kVec ? fma(load(a + i), load(b + i), s0) : fma(load_part(a + i, left), load_part(b + i, left), s0);
  }
  return sum(s0 + s1);
}

static void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// rows[(h, q)] = base + ((h * items + item) * Q + q) * C for a tensor [H, items, Q, C].
template <class T>
static void row_table(T* base, int64_t items, int64_t item, int64_t H, int64_t Q, int64_t C, T** rows) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t q = 0; q < Q; ++q) *rows++ = base + ((h * items + item) * Q + q) * C;
}

// out[K] from a tensor [H, items, Q]; null = zeros.
static void gather_rows(const float* base, int64_t items, int64_t item, int64_t H, int64_t Q, float* out) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t q = 0; q < Q; ++q) *out++ = base == nullptr ? 0.0f : base[(h * items + item) * Q + q];
}

static void scatter_rows(const float* from, int64_t items, int64_t item, int64_t H, int64_t Q, float* base) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t q = 0; q < Q; ++q) base[(h * items + item) * Q + q] = *from++;
}

// ---- the tokens of one item, tile by tile --------------------------------------------------------------------------

struct Tokens {
  uintptr_t x;
  Storage storage;
  int64_t stride, n, C;  // stride in bytes
  const uint8_t* mask;
  const int64_t* lookup;
  int64_t x_rows;
  int64_t present;
  int64_t first;  // row of token 0 in a contiguous x (where dx goes)

  bool has(int64_t i) const {
    if (lookup != nullptr) return lookup[i] >= 0 && lookup[i] < x_rows;
    return mask == nullptr || mask[i] != 0;
  }
  bool all_present() const { return lookup == nullptr && mask == nullptr; }
  uintptr_t row(int64_t i) const { return x + static_cast<uintptr_t>((lookup != nullptr ? lookup[i] : i) * stride); }
};

static Tokens item_tokens(const TokenStream& s, int64_t b) {
  Tokens t{};
  const int64_t begin = s.offsets != nullptr ? s.offsets[b] : b * s.n;
  t.n = s.offsets != nullptr ? s.offsets[b + 1] - begin : s.n;
  t.x = reinterpret_cast<uintptr_t>(s.x);
  t.storage = s.storage;
  t.stride = s.token_stride * bytes_of(s.storage);
  t.C = s.C;
  t.first = begin;
  if (s.lookup != nullptr) {
    t.lookup = s.lookup + begin;
    t.x_rows = s.x_rows;
  } else {
    const int64_t item = b * s.item_stride * bytes_of(s.storage);
    t.x += static_cast<uintptr_t>(s.offsets != nullptr ? begin * t.stride : item);
    t.mask = s.mask == nullptr ? nullptr : s.offsets != nullptr ? s.mask + begin : s.mask + b * s.mask_item_stride;
  }
  t.present = t.n;
  if (!t.all_present()) {
    t.present = 0;
    for (int64_t i = 0; i < t.n; ++i) t.present += t.has(i);
  }
  return t;
}

struct Tile {
  const float* x;      // first row
  int64_t stride, n;   // stride in floats
  const float** rows;  // [n] row pointers
  bool copied;         // rows are in a tile's memory, not the caller's
  int64_t* index;      // [n] token numbers within the item
  Ahead ahead;         // where the next tile probably is
};

// The most tokens a tile may hold: its rows take a quarter of a 1 MB level-2 cache.
EM3_INLINE int64_t tile_limit(int64_t C) {
  const int64_t rows = (int64_t{1} << 16) / C / kRows * kRows;
  return rows < kRows ? kRows : rows > 256 ? 256 / kRows * kRows : rows;
}

// Whether the rows are few enough to be multiplied with the tokens where both lie. Against packing and copying, AVX2, two
// threads, forward / backward: history looked up, B=64, N=200, C=256, K=4: 1.7 / 1.5 times as fast; B=64, N=1000, C=128:
// 1.65 / 1.6; B=2048, N=21, C=64: 1.3 / 1.35; B=32, N=200, C=512, K=8: 1.2 / 1.06. Tokens side by side, B=64, N=256, C=256,
// K=8: 1.17 / 1.08; B=32, N=256, C=512, K=8: 1.0 / 0.93.
static bool few(const Shape& shape) { return shape.K() <= kFew; }

// [i] of a row of C numbers as floats.
EM3_INLINE V load_as(Storage storage, uintptr_t row, int64_t i) {
  if (storage == Storage::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
  if (storage == Storage::f16) return load_f16(reinterpret_cast<const uint16_t*>(row) + i);
  return load(reinterpret_cast<const float*>(row) + i);
}

static void copy_row(Storage storage, uintptr_t row, int64_t C, float* to) {
  int64_t c = 0;
  for (; c + kVec <= C; c += kVec) store(to + c, load_as(storage, row, c));
  if (c == C) return;
  const int tail = static_cast<int>(C - c);
  const int64_t size = bytes_of(storage);
  float last[kVec] = {};  // of either width
  const auto* from = reinterpret_cast<const unsigned char*>(row) + c * size;
  for (int64_t i = 0; i < tail * size; ++i) reinterpret_cast<unsigned char*>(last)[i] = from[i];
  store_part(to + c, load_as(storage, reinterpret_cast<uintptr_t>(last), 0), tail);
}

// Absent tokens are never read (they may hold anything). A run of present tokens is used in place. Otherwise, and
// when the row stride maps all rows to few sets of the level-1 cache, the rows are copied side by side; but not for
// products that take them one by one. Half precision becomes floats by being copied.
static int64_t next_tile(const Tokens& t, int64_t from, int64_t want, bool one_by_one, float* copy, Tile& tile) {
  int64_t n = 0;
  for (; from < t.n && n < want; ++from) {
    if (!t.has(from)) continue;
    tile.rows[n] = reinterpret_cast<const float*>(t.row(from));
    tile.index[n++] = from;
  }
  tile.n = n;
  tile.ahead = {};
  if (n == 0) return from;
  const bool run = t.lookup == nullptr && tile.index[n - 1] - tile.index[0] == n - 1;
  if (run) tile.ahead = {t.row(tile.index[0]) + static_cast<uintptr_t>(n * t.stride), t.stride, n, bytes_of(t.storage)};
  tile.copied = t.storage != Storage::f32 || (!one_by_one && (!run || t.stride % 4096 == 0));
  tile.x = tile.copied ? copy : tile.rows[0];
  tile.stride = tile.copied ? round_up(t.C, 16) + 16 : t.stride / 4;
  for (int64_t i = 0; tile.copied && i < n; ++i) {
    copy_row(t.storage, reinterpret_cast<uintptr_t>(tile.rows[i]), t.C, copy + i * tile.stride);
    tile.rows[i] = copy + i * tile.stride;
  }
  return from;
}

// Hands out a worker's scratch memory. Built twice: once from null to learn the size.
struct Arena {
  float* at;
  int64_t used;
  float* floats(int64_t n) {
    float* p = at == nullptr ? nullptr : at + used;
    used += round_up(n, 16);
    return p;
  }
  template <class T>
  T* array(int64_t n) {
    return reinterpret_cast<T*>(floats((n * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  }
};

struct TileScratch {
  float* copy;
  Tile tile;
};

template <class Stream>
static TileScratch make_tile_scratch(Arena& arena, const Shape& shape, const Stream* streams, int M) {
  int64_t rows = 0, floats = 0;
  for (int m = 0; m < M; ++m) {
    const int64_t C = streams[m].tokens.C, limit = tile_limit(C);
    rows = limit > rows ? limit : rows;
    if (few(shape) && streams[m].tokens.storage == Storage::f32) continue;  // never copied
    const int64_t need = limit * (round_up(C, 16) + 16);
    floats = need > floats ? need : floats;
  }
  TileScratch s{};
  s.copy = arena.floats(floats);
  s.tile.rows = arena.array<const float*>(rows);
  s.tile.index = arena.array<int64_t>(rows);
  s.tile.n = rows;
  return s;
}

// Items whose products with the value weights are done together: their rows of y, or of dy, take up to a quarter of a
// 512 KB level-2 cache, but there are enough of them that reading the weights again each time costs little.
template <class Stream>
static int64_t items_together(const Shape& shape, const Stream* streams, int M) {
  constexpr int64_t kFloats = 1 << 15, kLeastRows = 32, kMost = 64;
  int64_t floats = 1;
  for (int m = 0; m < M; ++m) floats += shape.K() * round_up(streams[m].tokens.C, kVec);
  const int64_t fit = kFloats / floats, least = (kLeastRows + shape.Q - 1) / (shape.Q > 0 ? shape.Q : 1);
  return smaller(fit > least ? fit : least, kMost);
}

// ---- forward -------------------------------------------------------------------------------------------------------

// What one worker holds for the rows of an item. [K] means padded to a multiple of kVec.
struct ForwardState {
  TileScratch tiles;
  float* s;                         // [tokens, kBlock]
  float* reference;                 // [K] what is subtracted in exp: within kSlack below the row maximum seen so far
  float* inverse;                   // [K] 1 / sum of exp
  float* bias[kMaxStreams];         // [K] c
  float* sum[kMaxStreams];          // [K] sum of exp over the tokens of the stream
  float* owed[kMaxStreams];         // [K] factor that y has still to be multiplied by
  float* packed[kMaxStreams];       // u transposed, when it differs from item to item
  float** y[kMaxStreams];           // [K] rows
  const float** u[kMaxStreams];     // [K] rows
  float* values;                    // [items_together * Q, E] of one head and stream
};

// y and the sums are rescaled only when a row's maximum has grown by more than this, since exp(8) loses nothing in
// float32. Most items then never rescale.
constexpr float kSlack = 8.0f;
constexpr float kLowest = -1.0e38f;

static ForwardState forward_state(const ForwardJob& job, Arena& arena) {
  ForwardState st{};
  const int64_t K = job.shape.K(), padded = round_up(K, kVec);
  st.tiles = make_tile_scratch(arena, job.shape, job.streams, job.M);
  st.s = arena.floats(st.tiles.tile.n * smaller(kBlock, padded));
  st.reference = arena.floats(padded);
  st.inverse = arena.floats(padded);
  st.values = arena.floats(items_together(job.shape, job.streams, job.M) * job.shape.Q * round_up(job.shape.E, kVec));
  for (int m = 0; m < job.M; ++m) {
    st.bias[m] = arena.floats(padded);
    st.sum[m] = arena.floats(padded);
    st.owed[m] = arena.floats(padded);
    st.y[m] = arena.array<float*>(K);
    st.u[m] = arena.array<const float*>(K);
    if (!job.shape.shared_u && !few(job.shape)) st.packed[m] = arena.floats(padded * job.streams[m].tokens.C);
  }
  return st;
}

// s[n, ld] -> exp(s + bias - reference), with the sums brought up to date. r0: the block's first row.
static void softmax_block(ForwardState& st, int M, int m, int64_t r0, int64_t n, int64_t ld) {
  for (int64_t v = 0; v < ld; v += kVec) {
    float* s = st.s + v;
    const int64_t r = r0 + v;
    const V bias = load(st.bias[m] + r), old = load(st.reference + r);
    V top = splat(kLowest);
    for (int64_t t = 0; t < n; ++t) top = vmax(top, load(s + t * ld) + bias);
    V now = old;
    if (any_greater(top, old + splat(kSlack))) {
      now = where_greater(top, old + splat(kSlack), top, old);
      const V factor = vexp(old - now);
      store(st.reference + r, now);
      for (int i = 0; i < M; ++i) {
        store(st.sum[i] + r, load(st.sum[i] + r) * factor);
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
    store(st.sum[m] + r, load(st.sum[m] + r) + sum);
  }
}

static void invert_sums(ForwardState& st, int M, int64_t r0, int64_t width) {
  for (int64_t r = r0; r < r0 + width; ++r) {
    float total = 0.0f;
    for (int m = 0; m < M; ++m) total += st.sum[m][r];
    st.inverse[r] = total == 0.0f ? 0.0f : 1.0f / total;
  }
}

static void forward_tile(const ForwardJob& job, ForwardState& st, int m, bool first, bool last) {
  const Tile& tile = st.tiles.tile;
  const int64_t K = job.shape.K(), padded = round_up(K, kVec), C = job.streams[m].tokens.C;
  const float* packed = job.shape.shared_u ? job.packed_u[m] : st.packed[m];
  for (int64_t r0 = 0; r0 < K; r0 += kBlock) {
    const int64_t ld = smaller(kBlock, padded - r0);
    if (few(job.shape)) {
      if (K < ld) fill(st.s, tile.n * ld, 0.0f);
      dots({tile.rows, st.u[m], C, st.s, ld, !tile.copied}, tile.n, K);
    } else {
      scores({tile.x, tile.stride, packed + r0 * C, C, st.s, ld}, tile.n, ld);
    }
    softmax_block(st, job.M, m, r0, tile.n, ld);
    if (last) invert_sums(st, job.M, r0, ld);
    const Update g{st.s, ld, tile.n, tile.rows, st.y[m] + r0, st.owed[m] + r0, last ? st.inverse + r0 : nullptr, !first};
    update(g, smaller(kBlock, K - r0), C, r0 == 0 ? tile.ahead : Ahead{});
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
    for (int64_t r = 0; r < shape.K(); ++r) st.owed[m][r] = st.sum[m][r] * st.inverse[r];
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
  const int64_t K = shape.K(), padded = round_up(K, kVec);
  Tokens tokens[kMaxStreams];
  bool touched[kMaxStreams];
  int last_stream = -1;
  fill(st.reference, padded, kLowest);
  fill(st.inverse, padded, 0.0f);
  for (int m = 0; m < job.M; ++m) {
    const ForwardStream& s = job.streams[m];
    tokens[m] = item_tokens(s.tokens, b);
    touched[m] = tokens[m].present > 0;
    if (touched[m]) last_stream = m;
    fill(st.sum[m], padded, 0.0f);
    fill(st.owed[m], padded, 1.0f);
    row_table(s.y, shape.B, b, shape.H, shape.Q, s.tokens.C, st.y[m]);
    if (shape.shared_u || !touched[m]) continue;
    row_table(s.u, shape.B, b, shape.H, shape.Q, s.tokens.C, st.u[m]);
    if (!few(shape)) pack_transposed(st.u[m], K, s.tokens.C, st.packed[m]);
    gather_rows(s.c, shape.B, b, shape.H, shape.Q, st.bias[m]);
  }
  for (int m = 0; m < job.M; ++m) {
    const int64_t limit = tile_limit(tokens[m].C), tiles = (tokens[m].present + limit - 1) / limit;
    int64_t at = 0, left = tokens[m].present;
    for (int64_t i = 0; i < tiles; ++i) {
      at = next_tile(tokens[m], at, (left + tiles - i - 1) / (tiles - i), few(job.shape), st.tiles.copy,
                     st.tiles.tile);
      left -= st.tiles.tile.n;
      forward_tile(job, st, m, i == 0, m == last_stream && i + 1 == tiles);
    }
  }
  finish_y(job, st, touched, last_stream);
  finish_statistics(job, st, b);
}

// o of items begin .. end from their y.
static void project_items(const ForwardJob& job, ForwardState& st, int64_t begin, int64_t end) {
  const Shape& shape = job.shape;
  const int64_t E = shape.E, ld = round_up(E, kVec), rows = (end - begin) * shape.Q;
  if (rows == 0 || E == 0) return;
  for (int64_t h = 0; h < shape.H; ++h) {
    const int64_t first = (h * shape.B + begin) * shape.Q;
    for (int m = 0; m < job.M; ++m) {
      const int64_t C = job.streams[m].tokens.C;
      scores({job.streams[m].y + first * C, C, job.packed_w[m] + h * ld * C, C, st.values, ld}, rows, ld);
      for (int64_t i = 0; i < rows; ++i) {
        float* o = job.o + (first + i) * E;
        for (int64_t e = 0; e < E; ++e) o[e] = m == 0 ? st.values[i * ld + e] : o[e] + st.values[i * ld + e];
      }
    }
  }
}

static int64_t forward_scratch(const ForwardJob& job) {
  Arena arena{nullptr, 0};
  forward_state(job, arena);
  return arena.used;
}

static void forward_items(const ForwardJob& job, int64_t begin, int64_t end, float* scratch) {
  Arena arena{scratch, 0};
  ForwardState st = forward_state(job, arena);
  const Shape& shape = job.shape;
  for (int m = 0; m < job.M; ++m) {
    fill(st.bias[m], round_up(shape.K(), kVec), 0.0f);
    if (!shape.shared_u) continue;
    gather_rows(job.streams[m].c, 1, 0, shape.H, shape.Q, st.bias[m]);
    row_table(job.streams[m].u, 1, 0, shape.H, shape.Q, job.streams[m].tokens.C, st.u[m]);
  }
  const int64_t together = items_together(shape, job.streams, job.M);
  for (int64_t b = begin; b < end; b += together) {
    const int64_t stop = smaller(b + together, end);
    for (int64_t i = b; i < stop; ++i) forward_item(job, st, i);
    project_items(job, st, b, stop);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct BackwardState {
  TileScratch tiles;
  float** dx;                        // [tokens] rows
  float* w;                          // [tokens, 2 * block]: s then ds on the left, dp then p on the right
  const float** pair;                // [2 * kBlock] rows of u, then of dy
  float* lse;                        // [K]
  float* delta;                      // [K]
  float* row;                        // [K] a temporary
  float* bias[kMaxStreams];          // [K] c
  float* shift[kMaxStreams];         // [K] dmass - delta
  float* dc[kMaxStreams];            // [K]
  float* packed_u[kMaxStreams];      // transposed, when it differs from item to item
  float* packed_dy[kMaxStreams];     // transposed
  float* both[kMaxStreams];          // u and dy transposed side by side, where K fits one vector
  float* dy_rows[kMaxStreams];       // [H, items_together * Q, C padded]
  const float** y_rows;              // [items_together * Q]
  float** dw_rows;                   // [E]
  bool dw_started;                   // dw holds something
  const float** u[kMaxStreams];      // [K] rows
  const float** dy[kMaxStreams];     // [K] rows
  float** du[kMaxStreams];           // [K] rows
  bool touched[kMaxStreams];         // du holds something
};

EM3_INLINE bool wanted(const BackwardStream& s) { return s.du != nullptr || s.dc != nullptr || s.dx != nullptr; }

static BackwardState backward_state(const BackwardJob& job, Arena& arena) {
  BackwardState st{};
  const int64_t K = job.shape.K(), padded = round_up(K, kVec);
  st.tiles = make_tile_scratch(arena, job.shape, job.streams, job.M);
  st.dx = arena.array<float*>(st.tiles.tile.n);
  st.w = arena.floats(st.tiles.tile.n * 2 * smaller(kBlock, padded));
  st.pair = arena.array<const float*>(2 * kBlock);
  st.lse = arena.floats(padded);
  st.delta = arena.floats(padded);
  st.row = arena.floats(padded);
  const int64_t together = items_together(job.shape, job.streams, job.M);
  st.y_rows = arena.array<const float*>(together * job.shape.Q);
  st.dw_rows = arena.array<float*>(job.shape.E);
  for (int m = 0; m < job.M; ++m) {
    const int64_t C = job.streams[m].tokens.C;
    st.bias[m] = arena.floats(padded);
    st.shift[m] = arena.floats(padded);
    st.dc[m] = arena.floats(padded);
    st.dy_rows[m] = arena.floats(together * K * round_up(C, kVec));
    st.u[m] = arena.array<const float*>(K);
    st.dy[m] = arena.array<const float*>(K);
    st.du[m] = arena.array<float*>(K);
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

// w holds s and dp of a block; leaves ds and p, and adds ds to dc.
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

static void backward_tile(const BackwardJob& job, BackwardState& st, int m, const Tokens& tokens) {
  const BackwardStream& s = job.streams[m];
  const Tile& tile = st.tiles.tile;
  const int64_t K = job.shape.K(), padded = round_up(K, kVec), C = s.tokens.C;
  const float* packed_u = job.shape.shared_u ? job.packed_u[m] : st.packed_u[m];
  if (s.dx != nullptr) {
    for (int64_t t = 0; t < tile.n; ++t) st.dx[t] = s.dx + (tokens.first + tile.index[t]) * C;
  }
  for (int64_t r0 = 0; r0 < K; r0 += kBlock) {
    const int64_t width = smaller(kBlock, padded - r0), rows = smaller(kBlock, K - r0);
    if (few(job.shape)) {
      if (K < width) fill(st.w, tile.n * 2 * width, 0.0f);
      dots({tile.rows, st.u[m], C, st.w, 2 * width, !tile.copied}, tile.n, K);
      dots({tile.rows, st.dy[m], C, st.w + width, 2 * width, false}, tile.n, K);
    } else if (padded == kVec) {
      scores({tile.x, tile.stride, st.both[m], C, st.w, kPanel}, tile.n, kPanel);
    } else {
      scores({tile.x, tile.stride, packed_u + r0 * C, C, st.w, 2 * width}, tile.n, width);
      scores({tile.x, tile.stride, st.packed_dy[m] + r0 * C, C, st.w + width, 2 * width}, tile.n, width);
    }
    gradient_block(st, m, r0, tile.n, width);
    if (s.du != nullptr) {
      const Update g{st.w, 2 * width, tile.n, tile.rows, st.du[m] + r0, nullptr, nullptr, st.touched[m]};
      update(g, rows, C, r0 == 0 ? tile.ahead : Ahead{});
    }
    if (s.dx == nullptr) continue;
    for (int64_t r = 0; r < rows; ++r) {
      st.pair[r] = st.u[m][r0 + r];
      st.pair[rows + r] = st.dy[m][r0 + r];
    }
    outer({st.w, 2 * width, width, rows, st.pair, st.dx, r0 != 0}, tile.n, C);
  }
  st.touched[m] = true;
}

// The rows of dy, and those of u that are not shared, transposed.
static void pack_item(const BackwardJob& job, BackwardState& st, int m) {
  const int64_t K = job.shape.K(), C = job.streams[m].tokens.C;
  if (round_up(K, kVec) == kVec) {
    transpose_rows(st.dy[m], K, kVec, C, kPanel, st.both[m] + kVec);
    if (!job.shape.shared_u) transpose_rows(st.u[m], K, kVec, C, kPanel, st.both[m]);
  } else {
    pack_transposed(st.dy[m], K, C, st.packed_dy[m]);
    if (!job.shape.shared_u) pack_transposed(st.u[m], K, C, st.packed_u[m]);
  }
}

// delta, the rows of dy and everything else that belongs to item b alone. first: the item that dy_rows begin with.
static void prepare_item(const BackwardJob& job, BackwardState& st, int64_t b, int64_t first, int64_t items,
                         const Tokens* tokens) {
  const Shape& shape = job.shape;
  const int64_t B = shape.B, H = shape.H, Q = shape.Q, K = shape.K(), E = shape.E;
  gather_rows(job.lse, B, b, H, Q, st.lse);
  for (int64_t r = 0; r < K; ++r) {
    const int64_t at = ((r / Q * B + b) * Q + r % Q) * E;
    st.lse[r] = st.lse[r] == -INFINITY ? 0.0f : st.lse[r];
    st.delta[r] = dot(job.dout + at, job.o + at, E);
  }
  for (int m = 0; m < job.M; ++m) {
    const BackwardStream& s = job.streams[m];
    row_table<const float>(st.dy_rows[m], items, b - first, H, Q, round_up(s.tokens.C, kVec), st.dy[m]);
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
    tokens[m] = item_tokens(job.streams[m].tokens, b);
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
      scores({dout, E, job.packed_w[m] + h * E * ld, E, st.dy_rows[m] + h * rows * ld, ld}, rows, ld);
    }
  }
}

// dw += dout^T y of items begin .. end.
static void weigh(const BackwardJob& job, BackwardState& st, int64_t begin, int64_t end, const Gradients& to) {
  const Shape& shape = job.shape;
  const int64_t E = shape.E, rows = (end - begin) * shape.Q;
  if (rows == 0 || E == 0) return;
  for (int m = 0; m < job.M; ++m) {
    if (to.dw[m] == nullptr) continue;
    const int64_t C = job.streams[m].tokens.C;
    for (int64_t h = 0; h < shape.H; ++h) {
      const int64_t first = (h * shape.B + begin) * shape.Q;
      for (int64_t i = 0; i < rows; ++i) st.y_rows[i] = job.streams[m].y + (first + i) * C;
      for (int64_t e = 0; e < E; ++e) st.dw_rows[e] = to.dw[m] + (h * E + e) * C;
      update({job.dout + first * E, E, rows, st.y_rows, st.dw_rows, nullptr, nullptr, st.dw_started}, E, C, Ahead{});
    }
  }
  st.dw_started = true;
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
    if (padded == kVec && !few(shape)) transpose_rows(st.u[m], shape.K(), kVec, s.tokens.C, kPanel, st.both[m]);
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
    weigh(job, st, first, stop, to);
  }
  if (shape.shared_u) finish_sums(job, st, 1, 0, to);
  for (int m = 0; m < job.M; ++m) {
    if (to.dw[m] != nullptr && !st.dw_started) fill(to.dw[m], shape.H * shape.E * job.streams[m].tokens.C, 0.0f);
  }
}

// ---- what the dispatcher sees --------------------------------------------------------------------------------------

static int64_t padded_rows(int64_t K) { return round_up(K, kVec); }

static const KernelTable kTable = {padded_rows,     few,           pack_transposed,  pack_wide,
                                   forward_scratch, forward_items, backward_scratch, backward_items};
