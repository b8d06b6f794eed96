// The tokens of one item, tile by tile, and the memory that a worker holds them in; of qformer_attention_kernel.inl.

struct Tokens {
  uintptr_t x;
  Storage storage;
  int64_t stride, n, C;  // stride in bytes
  const uint8_t* mask;
  const int64_t* lookup;
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

static Tokens item_tokens(const TokenStream& s, int64_t b, int64_t H) {
  Tokens t{};
  const int64_t begin = s.offsets != nullptr ? s.offsets[b] : b * s.n;
  t.n = s.offsets != nullptr ? s.offsets[b + 1] - begin : s.n;
  t.x = reinterpret_cast<uintptr_t>(s.x);
  t.storage = s.storage;
  t.stride = s.token_stride * bytes_of(s.storage);
  t.C = s.C;
  t.first = begin;
  t.bias = s.bias == nullptr ? nullptr : s.bias + begin * H;
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
