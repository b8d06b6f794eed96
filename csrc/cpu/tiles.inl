// Register tiles: the products of the attention kernels; packing.inl makes what they read packed. Compiled once for each
// instruction set, as qformer_attention_kernel.inl, which includes this file.
//   scores   c[i, j]  = a[i, k] * b[k, j]         a = rows in place, b packed in panels
//   dots     the same with b's few columns as rows in place, which are not packed
//   update   c[i, j] += a[k, i] * b[k, j]         b, c = rows in place
//   outer    c[i, j]  = a[i, k] * b[k, j] + a'[i, k] * b'[k, j]
// Scores, update and outer also take pairs (simd.h): then k counts pairs of numbers in bf16, and c is as it was.

constexpr int kPanel = 2 * kVec;  // width of the register tile

EM3_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
EM3_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <bool PAIRS>
EM3_INLINE V madd(V a, V b, V c) {
  if constexpr (PAIRS) return fma_pairs(a, b, c);
  return fma(a, b, c);
}

struct Scores {
  const float* a;  // token rows
  int64_t lda;
  const float* b;  // panel [k, vectors * kVec]
  int64_t k;
  float* c;
  int64_t ldc;
};

template <bool PAIRS, int M, int NV>
EM3_NOINLINE static void scores_tile(const Scores& g, int64_t row, const float* b, float* c) {
  V acc[M][NV];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = zero();
  const float* a = g.a + row * g.lda;
  const int64_t lda = g.lda;
  for (int64_t k = 0; k < g.k; ++k) {
    V bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = load(b + (k * NV + j) * kVec);
    for (int i = 0; i < M; ++i) {
      const V av = splat(a[i * lda + k]);
      for (int j = 0; j < NV; ++j) acc[i][j] = madd<PAIRS>(av, bv[j], acc[i][j]);
    }
  }
  c += row * g.ldc;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * g.ldc + j * kVec, acc[i][j]);
}

template <bool PAIRS, int M, int NV>
EM3_INLINE void scores_rows(int m, const Scores& g, int64_t row, const float* b, float* c) {
  if (m == M) {
    scores_tile<PAIRS, M, NV>(g, row, b, c);
  } else if constexpr (M > 1) {
    scores_rows<PAIRS, M - 1, NV>(m, g, row, b, c);
  }
}

// Splits n rows into the fewest register tiles, of nearly equal height.
struct RowSplit {
  int64_t blocks, base, extra;
};
EM3_INLINE RowSplit split_rows(int64_t n, int64_t most) {
  const int64_t blocks = (n + most - 1) / most;
  return {blocks, n / blocks, n % blocks};
}

// One panel: c[n, NV * kVec] = a[n, k] * b[k, NV * kVec]. A panel of one vector has registers for twice the rows.
template <bool PAIRS, int NV>
EM3_INLINE void scores_panel(const Scores& g, int64_t n, int64_t col) {
  constexpr int kTall = NV == 2 ? kRows : 2 * kRows;
  const RowSplit rows = split_rows(n, kTall);
  int64_t row = 0;
  for (int64_t i = 0; i < rows.blocks; ++i) {
    const int m = static_cast<int>(rows.base + (i < rows.extra));
    scores_rows<PAIRS, kTall, NV>(m, g, row, g.b + col * g.k, g.c + col);
    row += m;
  }
}

// c[n, width] = a[n, k] * packed[k, width], width a multiple of kVec, packed in panels of kPanel.
template <bool PAIRS = false>
static void scores(const Scores& g, int64_t n, int64_t width) {
  for (int64_t col = 0; col < width; col += kPanel) {
    if (width - col >= kPanel) {
      scores_panel<PAIRS, 2>(g, n, col);
    } else {
      scores_panel<PAIRS, 1>(g, n, col);
    }
  }
}

// c[t * ldc + r] = sum_k x[t][k] * u[r][k] for t < n and r < rows, at most kFew of them; r is rounded up to 4 with zeros.
struct Dots {
  const float* const* x;
  const float* const* u;
  int64_t k;
  float* c;
  int64_t ldc;
  bool fetch;  // x comes from memory, from rows that are not side by side: it is asked for some rows ahead
};

constexpr int kFew = kVec < 8 ? kVec : 8;
constexpr int kTokens = kVec == 16 ? 4 : 3;  // with 4 rows, as many accumulators as the register file has room for

template <int M, int N>
EM3_NOINLINE static void dots_tile(const Dots& g, int64_t t, int64_t r) {
  V acc[N][4];
  for (int j = 0; j < N; ++j)
    for (int i = 0; i < 4; ++i) acc[j][i] = zero();
  const float* const* x = g.x + t;
  const float* const* u = g.u + r;
  int64_t k = 0;
  for (; k + kVec <= g.k; k += kVec) {
    V xv[N];
    for (int j = 0; j < N; ++j) xv[j] = load(x[j] + k);
    for (int i = 0; i < M; ++i) {
      const V uv = load(u[i] + k);
      for (int j = 0; j < N; ++j) acc[j][i] = fma(uv, xv[j], acc[j][i]);
    }
  }
  if (k < g.k) {
    const int tail = static_cast<int>(g.k - k);
    for (int i = 0; i < M; ++i) {
      const V uv = load_part(u[i] + k, tail);
      for (int j = 0; j < N; ++j) acc[j][i] = fma(uv, load_part(x[j] + k, tail), acc[j][i]);
    }
  }
  float* const c = g.c + t * g.ldc + r;
  if constexpr (kVec == 16 && N == 4) {
    store_sums(c, g.ldc, acc);
  } else {
    for (int j = 0; j < N; ++j) store_sums(c + j * g.ldc, acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
  }
}

template <int M>
EM3_INLINE void dots_rows(const Dots& g, int64_t t, int64_t r, int64_t left) {
  if (left >= kTokens) {
    dots_tile<M, kTokens>(g, t, r);
  } else if (left == 3) {
    dots_tile<M, 3>(g, t, r);
  } else if (left == 2) {
    dots_tile<M, 2>(g, t, r);
  } else {
    dots_tile<M, 1>(g, t, r);
  }
}

EM3_INLINE void fetch_rows(const Dots& g, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    for (int64_t k = 0; k < g.k; k += 16) EM3_PREFETCH(reinterpret_cast<uintptr_t>(g.x[t] + k));
  }
}

constexpr int kAhead = 2 * kTokens;

// Token t and those after it, kTokens of them or as many as there are until n.
EM3_INLINE void dots_tokens(const Dots& g, int64_t t, int64_t n, int64_t rows) {
  for (int64_t r = 0; r < rows; r += 4) {
    switch (rows - r) {
      case 1: dots_rows<1>(g, t, r, n - t); break;
      case 2: dots_rows<2>(g, t, r, n - t); break;
      case 3: dots_rows<3>(g, t, r, n - t); break;
      default: dots_rows<4>(g, t, r, n - t);
    }
  }
}

static void dots(const Dots& g, int64_t n, int64_t rows) {
  if (g.fetch) fetch_rows(g, 0, smaller(kAhead, n));
  for (int64_t t = 0; t < n; t += kTokens) {
    if (g.fetch) fetch_rows(g, smaller(t + kAhead, n), smaller(t + kAhead + kTokens, n));
    dots_tokens(g, t, n, rows);
  }
}

// As many rows as a product has, of the same length, that will be read or written after it: brought into the level-2 cache
// while it computes. They lie `step` floats behind `rows`; null = none.
struct Soon {
  const float* const* rows;
  int64_t step;
};

// c[i][col..] = (load ? c * pre[i] : 0) + sum_k a[k * lda + i] * b[k][col..], then * post[i]. pre, post: null = 1.
struct Update {
  const float* a;
  int64_t lda, k;
  const float* const* b;
  float* const* c;
  const float* pre;
  const float* post;
  bool load;
  const float* packed;  // the full panels of b, [k, kPanel] each, or null
  Soon soon;
  const uintptr_t* next;  // [k] rows that b will be next, brought into the level-2 cache meanwhile; null = none
  int64_t next_size;      // bytes of their elements
};

// The columns of one register tile: both vectors of a panel in place, or from g.packed; one vector, or `tail` floats of it.
enum class Strip { panel, packed, vector, part };

template <bool PAIRS, int M, Strip S>
EM3_NOINLINE static void update_tile(const Update& g, int64_t row, int64_t col, int tail) {
  constexpr int NV = S == Strip::panel || S == Strip::packed ? 2 : 1;
  V acc[M][NV];
  float* const* c = g.c + row;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = zero();
  if (g.load) {
    for (int i = 0; i < M; ++i) {
      const V pre = splat(g.pre != nullptr ? g.pre[row + i] : 1.0f);
      for (int j = 0; j < NV; ++j)
        acc[i][j] = pre * (S == Strip::part ? load_part(c[i] + col, tail) : load(c[i] + col + j * kVec));
    }
  }
  const float* a = g.a + row;
  const uintptr_t* const next = row == 0 ? g.next : nullptr;
  const uintptr_t at = static_cast<uintptr_t>(col * g.next_size);
  for (int64_t k = 0; k < g.k; ++k, a += g.lda) {
    if (next != nullptr) {  // one by one: memory answers as many at a time as it is asked
      for (int byte = 0; byte < kPanel * 4; byte += 64) EM3_PREFETCH(next[k] + at + static_cast<uintptr_t>(byte));
    }
    const float* b = S == Strip::packed ? g.packed + col * g.k + k * kPanel : g.b[k] + col;
    V bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = S == Strip::part ? load_part(b, tail) : load(b + j * kVec);
    for (int i = 0; i < M; ++i) {
      const V av = splat(a[i]);
      for (int j = 0; j < NV; ++j) acc[i][j] = madd<PAIRS>(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < M; ++i) {
    const V post = splat(g.post != nullptr ? g.post[row + i] : 1.0f);
    for (int j = 0; j < NV; ++j) {
      if (S == Strip::part) {
        store_part(c[i] + col, acc[i][j] * post, tail);
      } else {
        store(c[i] + col + j * kVec, acc[i][j] * post);
      }
    }
  }
}

template <bool PAIRS, int M>
EM3_INLINE void update_rows(int m, const Update& g, int64_t row, int64_t col, int64_t left) {
  if (m == M) {
    if (left >= kPanel && g.packed != nullptr) {
      update_tile<PAIRS, M, Strip::packed>(g, row, col, 0);
    } else if (left >= kPanel) {
      update_tile<PAIRS, M, Strip::panel>(g, row, col, 0);
    } else if (left >= kVec) {
      update_tile<PAIRS, M, Strip::vector>(g, row, col, 0);
    } else {
      update_tile<PAIRS, M, Strip::part>(g, row, col, static_cast<int>(left));
    }
  } else if constexpr (M > 1) {
    update_rows<PAIRS, M - 1>(m, g, row, col, left);
  }
}

// Bytes that will be wanted next, brought into the level-2 cache while this product computes.
struct Ahead {
  uintptr_t address;
  int64_t stride;  // in bytes
  int64_t rows;
  int64_t size;  // bytes of an element
};

EM3_INLINE void fetch_ahead(const Ahead& ahead, int64_t col, int64_t width) {
  for (int64_t t = 0; t < ahead.rows; ++t) {
    const uintptr_t row = ahead.address + static_cast<uintptr_t>(t * ahead.stride);
    for (int64_t at = col; at < col + width; at += 16) EM3_PREFETCH(row + static_cast<uintptr_t>(at * ahead.size));
  }
}

EM3_INLINE void fetch_soon(const Soon& soon, int64_t n, int64_t col, int64_t width) {
  for (int64_t i = 0; soon.rows != nullptr && i < n; ++i) {
    const uintptr_t row = reinterpret_cast<uintptr_t>(soon.rows[i]);
    for (int64_t at = soon.step + col; at < soon.step + col + width; at += 16) EM3_PREFETCH(row + static_cast<uintptr_t>(at * 4));
  }
}

EM3_INLINE int64_t strip_width(int64_t left) { return left >= kPanel ? kPanel : left >= kVec ? kVec : left; }

// n rows of c, all C columns.
template <bool PAIRS = false>
static void update(const Update& g, int64_t n, int64_t C, const Ahead& ahead) {
  const RowSplit rows = split_rows(n, kRows);
  for (int64_t col = 0, width; col < C; col += width) {
    width = strip_width(C - col);
    fetch_ahead(ahead, col, width);
    fetch_soon(g.soon, n, col, width);
    int64_t row = 0;
    for (int64_t i = 0; i < rows.blocks; ++i) {
      const int m = static_cast<int>(rows.base + (i < rows.extra));
      update_rows<PAIRS, kRows>(m, g, row, col, C - col);
      row += m;
    }
  }
}

// c[i][col..] (+)= sum_k a[i * lda + k] * b[k][col..] + sum_k a[i * lda + second + k] * b[depth + k][col..]
struct Outer {
  const float* a;
  int64_t lda, second, depth;
  const float* const* b;  // 2 * depth row pointers
  float* const* c;
  bool load;
};

template <bool PAIRS, int M, int NV, bool PART>
EM3_NOINLINE static void outer_tile(const Outer& g, int64_t row, int64_t col, int tail) {
  V acc[M][NV];
  float* const* c = g.c + row;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j)
      acc[i][j] = !g.load ? zero() : PART ? load_part(c[i] + col, tail) : load(c[i] + col + j * kVec);
  const float* const* b_row = g.b;
  const int64_t lda = g.lda;
  for (int half = 0; half < 2; ++half) {
    const float* a = g.a + row * lda + half * g.second;
    for (int64_t k = 0; k < g.depth; ++k) {
      const float* b = *b_row++ + col;
      V bv[NV];
      for (int j = 0; j < NV; ++j) bv[j] = PART ? load_part(b, tail) : load(b + j * kVec);
      for (int i = 0; i < M; ++i) {
        const V av = splat(a[i * lda + k]);
        for (int j = 0; j < NV; ++j) acc[i][j] = madd<PAIRS>(av, bv[j], acc[i][j]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < NV; ++j) {
      if (PART) {
        store_part(c[i] + col, acc[i][j], tail);
      } else {
        store(c[i] + col + j * kVec, acc[i][j]);
      }
    }
  }
}

template <bool PAIRS, int M>
EM3_INLINE void outer_rows(int m, const Outer& g, int64_t row, int64_t col, int64_t left) {
  if (m == M) {
    if (left >= kPanel) {
      outer_tile<PAIRS, M, 2, false>(g, row, col, 0);
    } else if (left >= kVec) {
      outer_tile<PAIRS, M, 1, false>(g, row, col, 0);
    } else {
      outer_tile<PAIRS, M, 1, true>(g, row, col, static_cast<int>(left));
    }
  } else if constexpr (M > 1) {
    outer_rows<PAIRS, M - 1>(m, g, row, col, left);
  }
}

template <bool PAIRS = false>
static void outer(const Outer& g, int64_t n, int64_t C) {
  const RowSplit rows = split_rows(n, kRows);
  for (int64_t col = 0, width; col < C; col += width) {
    width = strip_width(C - col);
    int64_t row = 0;
    for (int64_t i = 0; i < rows.blocks; ++i) {
      const int m = static_cast<int>(rows.base + (i < rows.extra));
      outer_rows<PAIRS, kRows>(m, g, row, col, C - col);
      row += m;
    }
  }
}
