// The kernels of lora_linear, written once and compiled once per instruction set: lora_linear.cpp includes this file inside
// a namespace and a target region of its own, after simd.h.
//
// No standard-library function or template may be instantiated here. The linker keeps one copy of an inline function,
// and if it kept one compiled with wide instructions, the baseline path would crash on an older processor.
//
// A part is a run of rows of one adapter. It is taken a tile at a time, chosen so that its rows of x and dy stay in the
// level-2 cache: both come from memory once, wherever they lie, and serve every product.
//   shrink   low[t, r]  = x[t, c] * A[r, c]        rows times rows, where both lie
//   expand   y[t, d]   += low[t, r] * Bt[r, d]     Bt = s B^T, packed for each part
//   collect  dA[r, c]  += dlow[t, r] * x[t, c]
// The backward is the same with other operands: dlow shrinks dy by Bt, dx expands dlow by A, dB^T collects dy by low.

#include "tiles.inl"
#include "arena.inl"
#include "storage.inl"
#include "dropout.inl"

struct LoraState {
  int64_t rank, ldb, ld;     // rank: behind it the rows of A and columns of B are zero; ld: of low and dlow
  const float** a;           // [R] rows of A
  const float** b;           // [R] rows of Bt
  float* bt;                 // [R, ldb]
  float *a_copy, *b_copy;    // [R, C], [D, R]: of factors that are not float32, and of their gradients
  const float **x, **dy;     // [n] rows of a tile
  float** y;                 // [n] rows that are added to
  uintptr_t *x_at, *y_at, *dy_at;  // [n] where these rows lie
  uintptr_t *x_next, *dy_next;     // [n] those of the next tile; the last one again where it has fewer
  float *low, *dlow;         // [n, ld]
  float* turned;             // [R, n], low or dlow transposed
  float *x_copy, *y_copy, *dy_copy;  // [n, width]: of rows that are not float32, or dropped
  float* factors;            // [n, C] of dropout
  float **da, **db;          // [R] rows of sums
  float *da_sums, *db_sums;  // [R, C], [R, D]
};

// The most rows a tile may hold: those of x and y take a quarter of a 1 MB level-2 cache.
EM3_INLINE int64_t lora_tile(const LoraJob& job) {
  const int64_t rows = (int64_t{1} << 16) / (job.given.C + job.given.D) / kTokens * kTokens;
  return rows < 2 * kTokens ? 2 * kTokens : rows > 128 ? 128 : rows;
}

EM3_INLINE bool dropped(const LoraJob& job) { return job.given.drop.threshold > 0; }
EM3_INLINE bool copied(const LoraJob& job, const Rows& rows) { return rows.storage != Storage::f32 || dropped(job); }
EM3_INLINE int64_t padded_width(int64_t width) { return round_up(width, 16) + 16; }

static LoraState lora_state(const LoraJob& job, Arena& arena) {
  const LoraLinear& given = job.given;
  const int64_t n = lora_tile(job), C = given.C, D = given.D, R = given.R;
  LoraState st{};
  st.ld = round_up(R, 4);
  st.ldb = padded_width(D);  // a power of two between rows would map them all to few sets of the level-1 cache
  st.bt = arena.floats(R * st.ldb);
  if (given.factors != Storage::f32) {
    st.a_copy = arena.floats(R * C);
    st.b_copy = arena.floats(D * R);
  }
  st.low = arena.floats(n * st.ld);
  st.turned = arena.floats(R * n);
  st.a = arena.array<const float*>(R);
  st.b = arena.array<const float*>(R);
  st.x = arena.array<const float*>(n);
  st.y = arena.array<float*>(n);
  st.x_at = arena.array<uintptr_t>(n);
  st.y_at = arena.array<uintptr_t>(n);
  if (copied(job, job.x)) st.x_copy = arena.floats(n * padded_width(C));
  if (dropped(job)) st.factors = arena.floats(n * C);
  if (!job.backward) {
    if (job.y.storage != Storage::f32) st.y_copy = arena.floats(n * padded_width(D));
    return st;
  }
  st.dlow = arena.floats(n * st.ld);
  st.dy = arena.array<const float*>(n);
  st.dy_at = arena.array<uintptr_t>(n);
  st.x_next = arena.array<uintptr_t>(n);
  st.dy_next = arena.array<uintptr_t>(n);
  st.da = arena.array<float*>(R);
  st.db = arena.array<float*>(R);
  if (given.factors != Storage::f32) st.da_sums = arena.floats(R * C);
  st.db_sums = arena.floats(R * D);
  if (job.y.storage != Storage::f32) st.dy_copy = arena.floats(n * padded_width(D));
  if (copied(job, job.to.dx)) st.y_copy = arena.floats(n * padded_width(C));
  return st;
}

static int64_t lora_scratch(const LoraJob& job) {
  Arena arena{nullptr, 0};
  lora_state(job, arena);
  return arena.used;
}

static bool all_zero(const float* p, int64_t n, int64_t step) {
  for (int64_t i = 0; i < n; ++i) {
    if (!(p[i * step] == 0.0f)) return false;
  }
  return true;
}

// Points a and b at the adapter's factors. Adapters of small rank among larger ones are padded with zeros: what is
// behind the last row that is not zero takes part in nothing, and its gradient is zero.
static void take_adapter(const LoraJob& job, int64_t adapter, LoraState& st) {
  const LoraLinear& given = job.given;
  const int64_t C = given.C, D = given.D, R = given.R;
  const uintptr_t a_at = place_of(given.a, given.factors, adapter * R * C);
  const uintptr_t b_at = place_of(given.b, given.factors, adapter * D * R);
  const float *a = reinterpret_cast<const float*>(a_at), *b = reinterpret_cast<const float*>(b_at);
  if (given.factors != Storage::f32) {
    copy_row(given.factors, a_at, R * C, st.a_copy);
    copy_row(given.factors, b_at, D * R, st.b_copy);
    a = st.a_copy;
    b = st.b_copy;
  }
  int64_t rank = R;
  while (rank > 0 && all_zero(b + rank - 1, D, R) && all_zero(a + (rank - 1) * C, C, 1)) --rank;
  st.rank = rank;
  const float s = scaling_of(given, adapter);
  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < rank; ++r) st.bt[r * st.ldb + d] = s * b[d * R + r];
  for (int64_t r = 0; r < rank; ++r) {
    st.a[r] = a + r * C;
    st.b[r] = st.bt + r * st.ldb;
  }
}

EM3_INLINE int64_t row_of(const LoraJob& job, int64_t i) { return job.order == nullptr ? i : job.order[i]; }
EM3_INLINE uintptr_t address(const Rows& rows, int64_t i) { return place_of(rows.first, rows.storage, i * rows.stride); }

static void locate(const LoraJob& job, const Rows& rows, int64_t first, int64_t n, uintptr_t* at) {
  for (int64_t i = 0; i < n; ++i) at[i] = address(rows, row_of(job, first + i));
}

// The rows as floats: where they lie, or in `copy`.
static void as_floats(Storage storage, const uintptr_t* at, int64_t n, int64_t width, float* copy, const float** rows) {
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = reinterpret_cast<const float*>(at[i]);
    if (storage == Storage::f32) continue;
    rows[i] = copy + i * padded_width(width);
    copy_row(storage, at[i], width, copy + i * padded_width(width));
  }
}

// The rows of x that the adapter sees.
static void adapter_input(const LoraJob& job, LoraState& st, int64_t first, int64_t n) {
  const int64_t C = job.given.C;
  as_floats(job.x.storage, st.x_at, n, C, st.x_copy, st.x);
  if (!dropped(job)) return;
  for (int64_t i = 0; i < n; ++i) {
    float *const to = st.x_copy + i * padded_width(C), *const factors = st.factors + i * C;
    const float* const from = st.x[i];
    for (int64_t c = 0; c < C; ++c) to[c] = from[c] * factors[c];
    st.x[i] = to;
  }
}

static void draw_factors(const LoraJob& job, LoraState& st, int64_t first, int64_t n) {
  const int64_t C = job.given.C;
  for (int64_t i = 0; dropped(job) && i < n; ++i) {
    draw(job.given.drop, 0, row_of(job, first + i), 0, C, st.factors + i * C);
  }
}

// low = rows times factors, of n rows; `fetch`: they come from memory, and are asked for ahead. `soon`: other rows that will
// be wanted next, as many, brought into the level-2 cache meanwhile; null = none.
static void shrink(const float* const* rows, int64_t n, int64_t width, const float* const* factors, const LoraState& st,
                   float* low, bool fetch, const uintptr_t* soon, int64_t soon_bytes) {
  const Dots g{rows, factors, width, low, st.ld, fetch};
  if (fetch) fetch_rows(g, 0, smaller(kAhead, n));
  for (int64_t t = 0; t < n; t += kTokens) {
    if (fetch) fetch_rows(g, smaller(t + kAhead, n), smaller(t + kAhead + kTokens, n));
    for (int64_t i = t; soon != nullptr && i < smaller(t + kTokens, n); ++i) {
      for (int64_t byte = 0; byte < soon_bytes; byte += 64) EM3_PREFETCH(soon[i] + static_cast<uintptr_t>(byte));
    }
    dots_tokens(g, t, n, st.rank);
  }
}

// row += added * factors, of C numbers; factors: null = 1. Rounded once.
static void add_to_row(Storage storage, uintptr_t row, int64_t C, const float* added, const float* factors) {
  const V one = splat(1.0f);
  int64_t c = 0;
  for (; c + kVec <= C; c += kVec) {
    const V factor = factors == nullptr ? one : load(factors + c);
    store_as(storage, row, c, fma(load(added + c), factor, load_as(storage, row, c)));
  }
  if (c == C) return;
  const int tail = static_cast<int>(C - c);
  const int64_t size = bytes_of(storage);
  float last[kVec] = {};  // of either width
  auto* const from = reinterpret_cast<unsigned char*>(row) + c * size;
  auto* const bytes = reinterpret_cast<unsigned char*>(last);
  for (int64_t i = 0; i < tail * size; ++i) bytes[i] = from[i];
  const uintptr_t whole = reinterpret_cast<uintptr_t>(last);
  const V factor = factors == nullptr ? one : load_part(factors + c, tail);
  store_as(storage, whole, 0, fma(load_part(added + c, tail), factor, load_as(storage, whole, 0)));
  for (int64_t i = 0; i < tail * size; ++i) from[i] = bytes[i];
}

// c[i][col..] = (Add ? c : 0) + sum_k a[k * lda + i] * b[k][col..] for the columns of one register tile: two vectors, one,
// or `tail` floats of it.
struct Expand {
  const float* a;
  int64_t lda, k;
  const float* const* b;
  float* const* c;
};

template <int M, Strip S, bool Add>
EM3_NOINLINE static void expand_tile(const Expand& g, int64_t row, int64_t col, int tail) {
  constexpr int NV = S == Strip::panel ? 2 : 1;
  V acc[M][NV];
  float* const* c = g.c + row;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j)
      acc[i][j] = !Add ? zero() : S == Strip::part ? load_part(c[i] + col, tail) : load(c[i] + col + j * kVec);
  const float* a = g.a + row;
  for (int64_t k = 0; k < g.k; ++k, a += g.lda) {
    const float* b = g.b[k] + col;
    V bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = S == Strip::part ? load_part(b, tail) : load(b + j * kVec);
    for (int i = 0; i < M; ++i) {
      const V av = splat(a[i]);
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < NV; ++j) {
      if (S == Strip::part) {
        store_part(c[i] + col, acc[i][j], tail);
      } else {
        store(c[i] + col + j * kVec, acc[i][j]);
      }
    }
  }
}

template <int M, bool Add>
EM3_INLINE void expand_rows(int m, const Expand& g, int64_t row, int64_t width) {
  if (m == M) {
    for (int64_t col = 0, step; col < width; col += step) {
      step = strip_width(width - col);
      if (step == kPanel) {
        expand_tile<M, Strip::panel, Add>(g, row, col, 0);
      } else if (step == kVec) {
        expand_tile<M, Strip::vector, Add>(g, row, col, 0);
      } else {
        expand_tile<M, Strip::part, Add>(g, row, col, static_cast<int>(step));
      }
    }
  } else if constexpr (M > 1) {
    expand_rows<M - 1, Add>(m, g, row, width);
  }
}

template <bool Add>
static void expand_all(const Expand& g, int64_t n, int64_t width) {
  const RowSplit rows = split_rows(n, kRows);
  int64_t row = 0;
  for (int64_t i = 0; i < rows.blocks; ++i) {
    const int m = static_cast<int>(rows.base + (i < rows.extra));
    expand_rows<kRows, Add>(m, g, row, width);
    row += m;
  }
}

// The rows at `at` += low times factors; drop: times the tile's dropout factors.
static void expand(const LoraState& st, const float* low, const float* const* factors, const Rows& rows, const uintptr_t* at,
                   int64_t n, int64_t width, bool drop) {
  const bool in_place = rows.storage == Storage::f32 && !drop;
  for (int64_t i = 0; i < n; ++i) {
    st.y[i] = in_place ? reinterpret_cast<float*>(at[i]) : st.y_copy + i * padded_width(width);
  }
  for (int64_t r = 0; r < st.rank; ++r)
    for (int64_t i = 0; i < n; ++i) st.turned[r * n + i] = low[i * st.ld + r];
  const Expand g{st.turned, n, st.rank, factors, st.y};
  if (in_place) return expand_all<true>(g, n, width);
  expand_all<false>(g, n, width);
  for (int64_t i = 0; i < n; ++i) add_to_row(rows.storage, at[i], width, st.y[i], drop ? st.factors + i * width : nullptr);
}

// Calls body(first, n) for tiles of nearly equal height.
template <class Body>
EM3_INLINE void each_tile(const LoraJob& job, const LoraPart& part, const Body& body) {
  const int64_t rows = part.end - part.begin, limit = lora_tile(job), tiles = (rows + limit - 1) / limit;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = part.begin + rows * i / tiles;
    body(first, part.begin + rows * (i + 1) / tiles - first);
  }
}

static void forward_part(const LoraJob& job, const LoraPart& part, float* scratch) {
  Arena arena{scratch, 0};
  LoraState st = lora_state(job, arena);
  const LoraLinear& given = job.given;
  take_adapter(job, part.adapter, st);
  if (st.rank == 0) return;
  each_tile(job, part, [&](int64_t first, int64_t n) {
    locate(job, job.x, first, n, st.x_at);
    locate(job, job.y, first, n, st.y_at);
    draw_factors(job, st, first, n);
    adapter_input(job, st, first, n);
    shrink(st.x, n, given.C, st.a, st, st.low, !copied(job, job.x), st.y_at, given.D * bytes_of(job.y.storage));
    expand(st, st.low, st.b, job.y, st.y_at, n, given.D, false);
  });
}

// Where the n rows behind a tile of the part lie, in `at`; null where it is the last.
static const uintptr_t* following(const LoraJob& job, const Rows& rows, const LoraPart& part, int64_t first, int64_t n,
                                  uintptr_t* at) {
  const int64_t there = smaller(n, part.end - first);
  if (there <= 0) return nullptr;
  locate(job, rows, first, there, at);
  for (int64_t i = there; i < n; ++i) at[i] = at[there - 1];
  return at;
}

// sums (+)= low^T rows. `next`: n rows that will be wanted next, brought into the level-2 cache meanwhile; null = none.
static void collect(const LoraState& st, const float* low, const float* const* rows, int64_t n, float* const* sums,
                    int64_t width, bool first, const uintptr_t* next, const Rows& from) {
  update({low, st.ld, n, rows, sums, nullptr, nullptr, !first, nullptr, {}, next, bytes_of(from.storage)}, st.rank, width, {});
}

static void backward_tile(const LoraJob& job, LoraState& st, const LoraPart& part, int64_t first, int64_t n) {
  const LoraLinear& given = job.given;
  const int64_t C = given.C, D = given.D;
  const Rows& dx = job.to.dx;
  const bool need_x = dx.first != nullptr, need_a = job.to.da != nullptr, need_b = job.to.db != nullptr, start = first == part.begin;
  locate(job, job.y, first, n, st.dy_at);
  as_floats(job.y.storage, st.dy_at, n, D, st.dy_copy, st.dy);
  if (job.x.first != nullptr) locate(job, job.x, first, n, st.x_at);
  if (need_x) locate(job, dx, first, n, st.y_at);
  draw_factors(job, st, first, n);
  const int64_t x_bytes = C * bytes_of(job.x.first != nullptr ? job.x.storage : dx.storage);
  if (need_x || need_a) {
    // With both sums wanted, what follows the first tile was asked for by the tile before.
    const bool asked = !start && need_a && need_b;
    const uintptr_t* const soon = job.x.first == nullptr ? st.y_at : asked ? nullptr : st.x_at;
    shrink(st.dy, n, D, st.b, st, st.dlow, job.y.storage == Storage::f32 && !asked, soon, x_bytes);
  }
  if (job.x.first != nullptr) adapter_input(job, st, first, n);
  if (need_b) {
    const bool fetch = !need_x && !need_a && !copied(job, job.x);  // else it was asked for above
    shrink(st.x, n, C, st.a, st, st.low, fetch, need_x ? st.y_at : nullptr, x_bytes);
    collect(st, st.low, st.dy, n, st.db, D, start, following(job, job.y, part, first + n, n, st.dy_next), job.y);
  }
  if (need_a) {
    collect(st, st.dlow, st.x, n, st.da, C, start, following(job, job.x, part, first + n, n, st.x_next), job.x);
  }
  if (need_x) expand(st, st.dlow, st.a, dx, st.y_at, n, C, dropped(job));
}

static void zeros(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

// Where a whole part sums dA: in the gradient itself, if that is float32.
static float* sums_of_a(const LoraJob& job, const LoraPart& part, const LoraState& st) {
  if (job.given.factors != Storage::f32 || job.to.da == nullptr) return st.da_sums;
  return static_cast<float*>(job.to.da) + part.adapter * job.given.R * job.given.C;
}

// An adapter's gradients, rounded once, from da [R, C] and db [R, D], which is turned and scaled.
static void write_sums(const LoraJob& job, int64_t adapter, const float* da, const float* db, const LoraState& st) {
  const LoraLinear& given = job.given;
  const int64_t C = given.C, D = given.D, R = given.R;
  if (job.to.da != nullptr) {
    const uintptr_t to = place_of(job.to.da, given.factors, adapter * R * C);
    if (reinterpret_cast<uintptr_t>(da) != to) store_row(given.factors, da, R * C, to);
  }
  if (job.to.db == nullptr) return;
  const uintptr_t at = place_of(job.to.db, given.factors, adapter * D * R);
  float* const to = given.factors == Storage::f32 ? reinterpret_cast<float*>(at) : st.b_copy;
  const float s = scaling_of(given, adapter);
  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < R; ++r) to[d * R + r] = s * db[r * D + d];
  if (given.factors != Storage::f32) store_row(given.factors, to, D * R, at);
}

// Sums behind the adapter's rank, and those of a part without rows, are zero.
static void backward_part(const LoraJob& job, const LoraPart& part, float* scratch) {
  Arena arena{scratch, 0};
  LoraState st = lora_state(job, arena);
  const LoraLinear& given = job.given;
  const int64_t C = given.C, D = given.D, R = given.R;
  if (part.begin < part.end) take_adapter(job, part.adapter, st);
  float* const da = part.whole ? sums_of_a(job, part, st) : part.da;
  float* const db = part.whole ? st.db_sums : part.db;
  for (int64_t r = 0; r < R; ++r) {
    if (job.to.da != nullptr) st.da[r] = da + r * C;
    if (job.to.db != nullptr) st.db[r] = db + r * D;
    if (r < st.rank) continue;
    if (job.to.da != nullptr) zeros(st.da[r], C);
    if (job.to.db != nullptr) zeros(st.db[r], D);
  }
  if (st.rank > 0) {
    each_tile(job, part, [&](int64_t first, int64_t n) { backward_tile(job, st, part, first, n); });
  }
  if (part.whole) write_sums(job, part.adapter, da, db, st);
}

static void write_part(const LoraJob& job, const LoraPart& part, float* scratch) {
  Arena arena{scratch, 0};
  write_sums(job, part.adapter, part.da, part.db, lora_state(job, arena));
}

static const KernelTable kTable = {lora_scratch, forward_part, backward_part, write_part};
