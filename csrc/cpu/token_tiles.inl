// The tokens of one item, tile by tile, and the memory that a worker holds them in; of qformer_attention_kernel.inl.

struct Tokens {
  uintptr_t x;
  Storage storage;
  int64_t stride, n, C;  // stride in bytes
  bool pairs;            // rows are left in bf16, and taken for C / 2 floats
  const uint8_t* mask;
  const int64_t* lookup;
  int64_t places;  // from here on to the end of the history of all items
  int64_t x_rows;
  int64_t present;
  int64_t first;  // row of token 0 in a contiguous x (where dx goes)
  const float* bias;  // [n, H] or null

  bool has(int64_t i) const {
    if (lookup != nullptr) return lookup[i] >= 0 && lookup[i] < x_rows;
    return mask == nullptr || mask[i] != 0;
  }
  bool all_present() const { return lookup == nullptr && mask == nullptr; }
  uintptr_t row(int64_t i) const { return x + static_cast<uintptr_t>((lookup != nullptr ? lookup[i] : i) * stride); }
};

static Tokens item_tokens(const TokenStream& s, int64_t b, const Shape& shape) {
  Tokens t{};
  t.pairs = shape.pairs;
  const int64_t begin = s.offsets != nullptr ? s.offsets[b] : b * s.n;
  t.n = s.offsets != nullptr ? s.offsets[b + 1] - begin : s.n;
  t.x = reinterpret_cast<uintptr_t>(s.x);
  t.storage = s.storage;
  t.stride = s.token_stride * bytes_of(s.storage);
  t.C = s.C;
  t.first = begin;
  t.bias = s.bias == nullptr ? nullptr : s.bias + begin * shape.H;
  if (s.lookup != nullptr) {
    t.lookup = s.lookup + begin;
    t.places = (s.offsets != nullptr ? s.n : shape.B * s.n) - begin;
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
  const float** joined;  // [(n + 1) / 2] rows of pairs: column c of tokens 2 i and 2 i + 1
  Ahead ahead;         // where the next tile probably is
  uintptr_t* next;     // [n] its rows, of tokens that are looked up
  bool looked_up;
};

// The most tokens a tile may hold: its rows take a quarter of a 1 MB level-2 cache.
EM3_INLINE int64_t tile_limit(int64_t C) {
  const int64_t rows = (int64_t{1} << 16) / C / kRows * kRows;
  return rows < kRows ? kRows : rows > 256 ? 256 / kRows * kRows : rows;
}

// s[t, i] of rows r0 + i, `rows` of them, += bias[t, head of the row].
static void add_bias(const Shape& shape, const Tokens& tokens, const Tile& tile, int64_t r0, int64_t rows, float* s,
                     int64_t ld) {
  for (int64_t t = 0; t < tile.n; ++t, s += ld) {
    const float* const bias = tokens.bias + tile.index[t] * shape.H;
    for (int64_t i = 0, h = r0 / shape.Q, q = r0 % shape.Q; i < rows; ++i) {
      s[i] += bias[h];
      if (++q == shape.Q) q = 0, ++h;
    }
  }
}

// The way back: dbias[t, head of the row] += ds[t, i]. An item's places are its own, so no other worker writes there.
static void add_to_bias(const Shape& shape, const Tile& tile, int64_t r0, int64_t rows, const float* ds, int64_t ld,
                        float* dbias) {
  for (int64_t t = 0; t < tile.n; ++t, ds += ld) {
    float* const to = dbias + tile.index[t] * shape.H;
    for (int64_t i = 0, h = r0 / shape.Q, q = r0 % shape.Q; i < rows; ++i) {
      to[h] += ds[i];
      if (++q == shape.Q) q = 0, ++h;
    }
  }
}

// Whether the rows are few enough to be multiplied with the tokens where both lie. Against packing and copying, AVX2, two
// threads, forward / backward: history looked up, B=64, N=200, C=256, K=4: 1.7 / 1.5 times as fast; B=64, N=1000, C=128:
// 1.65 / 1.6; B=2048, N=21, C=64: 1.3 / 1.35; B=32, N=200, C=512, K=8: 1.2 / 1.06. Tokens side by side, B=64, N=256, C=256,
// K=8: 1.17 / 1.08; B=32, N=256, C=512, K=8: 1.0 / 0.93.
static bool few(const Shape& shape) { return shape.K() <= kFew; }

// So few rows leave most of a vector empty. Under a softmax without dropout, which draws vector by vector, the scores of a
// token then take only 4 or 8 floats, `ld`, and the softmax works on several tokens at a time; what holds a number a row,
// [K] padded to kVec, holds it again and again, every ld floats. 0 = not. One thread, forward / backward, AVX-512 (together
// with store_sums of four tokens) and AVX2: B=2048, N=60, C=64, K=4: 1.16 / 1.12 and 1.05 / 1.06 times as fast; B=64, N=1000,
// C=128: 1.14 / 1.12 and 1.05 / 1.04; B=32, N=200, C=512, K=8: no difference.
static int64_t narrow_width(const Shape& shape) {
  const int64_t ld = round_up(shape.K(), 4);
  return few(shape) && ld < kVec && shape.drop.threshold == 0 && !shape.sigmoid ? ld : 0;
}

static void repeat(float* row, int64_t ld) {
  for (int64_t i = ld; i < kVec; i += 4) std::memcpy(row + i, row + i - ld, 4 * sizeof(float));
}

// The sum, or the largest, of each of ld rows over the tokens that lie side by side in v; repeated like v.
EM3_INLINE V fold_sum(V v, int64_t ld) {
  for (int width = kVec / 2; width >= ld; width /= 2) v = v + swapped(v, width);
  return v;
}
EM3_INLINE V fold_max(V v, int64_t ld) {
  for (int width = kVec / 2; width >= ld; width /= 2) v = vmax(v, swapped(v, width));
  return v;
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
  tile.looked_up = t.lookup != nullptr;
  if (n == 0) return from;
  for (int64_t i = 0; tile.looked_up && i < n; ++i) {  // of this item or of the next
    const int64_t row = from + i < t.places ? t.lookup[from + i] : -1;
    tile.next[i] = row >= 0 && row < t.x_rows ? t.x + static_cast<uintptr_t>(row * t.stride) : t.x;
  }
  const bool run = t.lookup == nullptr && tile.index[n - 1] - tile.index[0] == n - 1;
  if (run) tile.ahead = {t.row(tile.index[0]) + static_cast<uintptr_t>(n * t.stride), t.stride, n, bytes_of(t.storage)};
  const bool floats = t.pairs || t.storage == Storage::f32;
  const int64_t width = t.pairs ? t.C / 2 : t.C;
  tile.copied = !floats || (!one_by_one && (!run || t.stride % 4096 == 0));
  tile.x = tile.copied ? copy : tile.rows[0];
  tile.stride = tile.copied ? round_up(width, 16) + 16 : t.stride / 4;
  for (int64_t i = 0; tile.copied && i < n; ++i) {
    copy_row(floats ? Storage::f32 : t.storage, reinterpret_cast<uintptr_t>(tile.rows[i]), width, copy + i * tile.stride);
    tile.rows[i] = copy + i * tile.stride;
  }
  return from;
}

// The tile's rows two by two, which is how a product over tokens reads them.
static void join_tokens(Tile& tile, int64_t C, float* memory) {
  const int64_t ld = round_up(C, 16) + 16;
  for (int64_t t = 0; t < tile.n; t += 2) {
    const auto* second = t + 1 < tile.n ? reinterpret_cast<const Half*>(tile.rows[t + 1]) : nullptr;
    join_rows(reinterpret_cast<const Half*>(tile.rows[t]), second, C, memory + t / 2 * ld);
    tile.joined[t / 2] = memory + t / 2 * ld;
  }
}

// n rows of floats, ld apart -> rows of pairs, of one row and the next; as far apart, and perhaps in the same place.
static void join_floats(const float* rows, int64_t n, int64_t ld, int64_t width, float* out) {
  for (int64_t t = 0; t < n; t += 2) {
    const float *first = rows + t * ld, *second = first + ld;
    float* const to = out + t / 2 * ld;
    const bool both = t + 1 < n;
    int64_t v = 0;
    for (; v + kVec <= width; v += kVec) store(to + v, round_pairs(load(first + v), both ? load(second + v) : zero()));
    for (; v < width; ++v) to[v] = pair_of(bf16_bits(first[v]), both ? bf16_bits(second[v]) : 0);
  }
}

// How many floats a row of C numbers takes where it is multiplied with tokens.
EM3_INLINE int64_t width_of(const Shape& shape, int64_t C) { return shape.pairs ? C / 2 : C; }

struct TileScratch {
  float* copy;
  float* joined;
  Tile tile;
};

template <class Stream>
static TileScratch make_tile_scratch(Arena& arena, const Shape& shape, const Stream* streams, int M) {
  int64_t rows = 0, floats = 0, joined = 0;
  for (int m = 0; m < M; ++m) {
    const int64_t C = streams[m].tokens.C, limit = tile_limit(C);
    rows = limit > rows ? limit : rows;
    if (few(shape) && streams[m].tokens.storage == Storage::f32) continue;  // never copied
    const int64_t need = limit * (round_up(C, 16) + 16);
    floats = need > floats ? need : floats;
    if (shape.pairs) joined = need / 2 > joined ? need / 2 : joined;
  }
  TileScratch s{};
  s.copy = arena.floats(floats);
  s.joined = arena.floats(joined);
  s.tile.joined = arena.array<const float*>(shape.pairs ? (rows + 1) / 2 : 0);
  s.tile.rows = arena.array<const float*>(rows);
  s.tile.index = arena.array<int64_t>(rows);
  s.tile.next = arena.array<uintptr_t>(rows);
  s.tile.n = rows;
  return s;
}

template <class Stream>
static int64_t widest(const Stream* streams, int M) {
  int64_t C = 0;
  for (int m = 0; m < M; ++m) C = streams[m].tokens.C > C ? streams[m].tokens.C : C;
  return C;
}

// Rows of queries as they are multiplied with tokens: themselves, or rounded to bf16.
struct Halves {
  float* memory;       // [K, C / 2]
  const float** rows;  // [K]
};

template <class Stream>
static Halves make_halves(Arena& arena, const Shape& shape, const Stream* streams, int M) {
  const int64_t K = shape.pairs ? shape.K() : 0;
  return {arena.floats(K * widest(streams, M) / 2), arena.array<const float*>(K)};
}

static const float* const* as_read(const Shape& shape, const Halves& halves, const float* const* rows, int64_t C) {
  if (!shape.pairs) return rows;
  for (int64_t r = 0; r < shape.K(); ++r) {
    float* const to = halves.memory + r * (C / 2);
    round_row(rows[r], C, reinterpret_cast<Half*>(to));
    halves.rows[r] = to;
  }
  return halves.rows;
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
