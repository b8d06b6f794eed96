// Checks, division of the items among threads, and the choice of the instruction set. The mathematics is in
// qformer_attention_kernel.inl.
#include "qformer_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "parallel.h"

#if EM3_HAVE_X86_PATHS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace em3 {
namespace {

struct ForwardJob {
  Shape shape;
  const ForwardStream* streams;
  int M;
  float* o;
  float* lse;
  const float* const* packed_u;  // one a stream when u is shared
  const float* const* packed_w;  // one a stream
};

struct BackwardJob {
  Shape shape;
  const BackwardStream* streams;
  int M;
  const float* dout;
  const float* o;
  const float* lse;
  const float* const* packed_u;
  const float* const* packed_w;
};

// Where one part's gradients go: the outputs, or partial sums of them; null = not wanted. One entry a stream.
struct Gradients {
  float *du[kMaxStreams], *dc[kMaxStreams], *dw[kMaxStreams];
};

struct KernelTable {
  std::int64_t (*padded_rows)(std::int64_t K);
  bool (*few)(const Shape& shape);
  void (*pack)(const float* const* rows, std::int64_t K, std::int64_t C, float* out);
  void (*pack_wide)(const float* rows, std::int64_t E, std::int64_t C, float* out);
  void (*round)(const float* from, std::int64_t n, float* pairs);  // of neighbours
  void (*join)(const float* rows, std::int64_t n, std::int64_t C, float* pairs);  // of a row and the next
  std::int64_t (*forward_scratch)(const ForwardJob&);
  void (*forward_items)(const ForwardJob&, std::int64_t begin, std::int64_t end, float* scratch);
  std::int64_t (*backward_scratch)(const BackwardJob&);
  void (*backward_items)(const BackwardJob&, std::int64_t begin, std::int64_t end, const Gradients&, float* scratch);
};

// Every standard header must be included above this line.
#define EM3_KERNEL "qformer_attention_kernel.inl"
#define EM3_KERNEL_BF16
#include "every_isa.inl"

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(std::string("qformer_attention: ") + what);
}

template <class Stream>
void check(const Shape& shape, const std::vector<Stream>& streams) {
  require(shape.B >= 0 && shape.H >= 1 && shape.Q >= 0 && shape.E >= 0, "B, Q and E must be at least 0, H at least 1");
  require(!shape.pairs || shape.E % 2 == 0, "pairs need an even E");
  require(!streams.empty() && streams.size() <= kMaxStreams, "there must be 1 to 8 streams");
  require(!shape.sigmoid || (streams.size() == 1 && streams[0].mass == nullptr && shape.drop.threshold == 0),
          "the sigmoid is of one stream, without mass and dropout");
  for (const Stream& s : streams) {
    require(s.tokens.n >= 0 && s.tokens.C >= 1, "n must be at least 0 and C at least 1");
    const bool even = s.tokens.C % 2 == 0 && s.tokens.item_stride % 2 == 0 && s.tokens.token_stride % 2 == 0;
    require(!shape.pairs || (even && s.tokens.storage == Storage::bf16), "pairs are of tokens in bf16 of even width and strides");
    const int64_t* offsets = s.tokens.offsets;
    if (offsets == nullptr) continue;
    require(offsets[0] == 0 && offsets[shape.B] <= s.tokens.n, "offsets must begin with 0 and end within the values");
    for (int64_t b = 0; b < shape.B; ++b) require(offsets[b] <= offsets[b + 1], "offsets must not decrease");
  }
}

// Few rows are multiplied with tokens where they lie, which has no form for pairs.
Shape served(Shape shape, const KernelTable& table) {
  shape.pairs = shape.pairs && !table.few(shape);
  return shape;
}

int64_t rows_of(const TokenStream& s, int64_t b) { return s.offsets == nullptr ? s.n : s.offsets[b + 1] - s.offsets[b]; }

// Cuts the items into `parts` consecutive runs with about the same number of tokens. An item costs a little even
// without tokens (its rows of u, y and dy are read, packed and written).
template <class Stream>
std::vector<int64_t> cut(const Shape& shape, const std::vector<Stream>& streams, int parts) {
  constexpr int64_t kItem = 8;
  int64_t total = 0;
  for (const Stream& s : streams) {
    total += s.tokens.offsets == nullptr ? shape.B * s.tokens.n : s.tokens.offsets[shape.B] - s.tokens.offsets[0];
  }
  total += shape.B * kItem;
  std::vector<int64_t> edges(static_cast<std::size_t>(parts) + 1, shape.B);
  edges[0] = 0;
  int64_t done = 0;
  std::size_t next = 1;
  for (int64_t b = 0; b < shape.B; ++b) {
    int64_t weight = kItem;
    for (const Stream& s : streams) weight += rows_of(s.tokens, b);
    while (next < edges.size() - 1 && (done + weight / 2) * parts >= total * static_cast<int64_t>(next)) {
      edges[next++] = b;
    }
    done += weight;
  }
  return edges;
}

// Weights that every item reads, packed once for the whole call; one block a stream.
struct Packed {
  std::vector<std::vector<float>> memory;
  std::vector<const float*> pointers;

  explicit Packed(std::size_t streams) : memory(streams), pointers(streams) {}

  float* room(std::size_t m, int64_t floats) {
    memory[m].resize(static_cast<std::size_t>(floats));
    pointers[m] = memory[m].data();
    return memory[m].data();
  }
};

void pack_rows(const Shape& shape, const KernelTable& table, const float* first, int64_t rows, int64_t C, float* out) {
  std::vector<float> pairs;
  if (shape.pairs) {
    pairs.resize(static_cast<std::size_t>(rows * C / 2));
    table.round(first, rows * C, pairs.data());
    first = pairs.data();
    C /= 2;
  }
  std::vector<const float*> pointers(static_cast<std::size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) pointers[static_cast<std::size_t>(r)] = first + r * C;
  table.pack(pointers.data(), rows, C, out);
}

// u transposed, when all items share it and it is not read in place.
template <class Stream>
Packed pack_u(const Shape& shape, const std::vector<Stream>& streams, const KernelTable& table, int threads) {
  Packed packed(streams.size());
  if (!shape.shared_u || table.few(shape)) return packed;
  parallel_for(threads, static_cast<int>(streams.size()), [&](int m) {
    const auto i = static_cast<std::size_t>(m);
    const int64_t C = streams[i].tokens.C, K = shape.K();
    pack_rows(shape, table, streams[i].u, K, C, packed.room(i, table.padded_rows(K) * C));
  });
  return packed;
}

// [E, C] as it is, or in pairs of one row and the next.
void pack_wide(const Shape& shape, const KernelTable& table, const float* w, int64_t C, float* out) {
  if (!shape.pairs) return table.pack_wide(w, shape.E, C, out);
  std::vector<float> pairs(static_cast<std::size_t>(shape.E / 2 * C));
  table.join(w, shape.E, C, pairs.data());
  table.pack_wide(pairs.data(), shape.E / 2, C, out);
}

// w head by head: transposed, [C, E], for o = w y; as it is, [E, C], for dy = dout w.
template <class Stream>
Packed pack_w(const Shape& shape, const std::vector<Stream>& streams, const KernelTable& table, int threads) {
  constexpr bool kTransposed = std::is_same<Stream, ForwardStream>::value;
  Packed packed(streams.size());
  for (std::size_t m = 0; m < streams.size(); ++m) {
    const int64_t C = streams[m].tokens.C, E = shape.E;
    const int64_t step = (kTransposed ? table.padded_rows(E) * C : table.padded_rows(C) * E) / (shape.pairs ? 2 : 1);
    float* const out = packed.room(m, shape.H * step);
    parallel_for(threads, static_cast<int>(shape.H), [&](int h) {
      const float* const w = streams[m].w + h * E * C;
      if (kTransposed) {
        pack_rows(shape, table, w, E, C, out + h * step);
      } else {
        pack_wide(shape, table, w, C, out + h * step);
      }
    });
  }
  return packed;
}

// Rows of dx that no item owns (before the first offset and past the last), or all of them where nobody attends.
void clear_unowned(const Shape& shape, const BackwardStream& s) {
  if (s.dx == nullptr) return;
  const bool jagged = s.tokens.offsets != nullptr;
  const int64_t row = s.tokens.C * bytes_of(s.dx_storage);
  auto* const dx = static_cast<unsigned char*>(s.dx);
  if (shape.K() == 0) std::fill(dx, dx + (jagged ? 1 : shape.B) * s.tokens.n * row, uint8_t{0});
  if (shape.K() == 0 || !jagged) return;
  const int64_t begin = s.tokens.offsets[0], end = s.tokens.offsets[shape.B];
  std::fill(dx, dx + begin * row, uint8_t{0});
  std::fill(dx + end * row, dx + s.tokens.n * row, uint8_t{0});
}

// Up to so many floats of sums a part, a thread that is held up leaves parts to the others; the backward of 2,048 short
// histories, C=64, sums 4,096, and on two threads the layer around it took 0.80 to 0.96 of the time beside other work, 1.0 to
// 1.03 alone. With 20,480 it took 1.07 times as long alone.
constexpr int64_t kSummed = 1 << 13;

int part_count(const Shape& shape, int threads, int parts_per_thread) {
  if (threads <= 1) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(shape.B, int64_t{threads} * parts_per_thread)));
}

// Sums over items: part 0 writes the outputs themselves, the others write partial sums that are then added in the
// order of the parts.
class Sums {
 public:
  explicit Sums(int parts) : parts_(parts) {}

  // An output of n floats that every part adds to; null = not wanted.
  void add(float* out, int64_t n) {
    entries_.push_back({out, n, size_});
    if (out != nullptr) size_ += n;
  }

  void allocate() { partial_.resize(static_cast<std::size_t>(size_ * (parts_ - 1))); }

  float* of(int part, std::size_t entry) {
    const Entry& e = entries_[entry];
    return e.out == nullptr || part == 0 ? e.out : partial_.data() + size_ * (part - 1) + e.at;
  }

  void reduce(int threads) {
    constexpr int64_t kChunk = 1 << 15;  // waking a thread costs as much as adding this many
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const Entry& e = entries_[i];
      if (e.out == nullptr) continue;
      parallel_for(threads, static_cast<int>((e.n + kChunk - 1) / kChunk), [&](int chunk) {
        const int64_t end = std::min(e.n, (chunk + 1) * kChunk);
        for (int part = 1; part < parts_; ++part) {
          const float* from = of(part, i);
          for (int64_t k = chunk * kChunk; k < end; ++k) e.out[k] += from[k];
        }
      });
    }
  }

 private:
  struct Entry {
    float* out;
    int64_t n, at;
  };
  int parts_;
  int64_t size_ = 0;
  std::vector<Entry> entries_;
  std::vector<float> partial_;
};

}  // namespace

void qformer_attention_forward(const Shape& given, const std::vector<ForwardStream>& streams, float* o, float* lse,
                               int threads, Isa isa) {
  check(given, streams);
  if (given.B == 0 || given.K() == 0) return;
  const KernelTable& table = kernels(isa);
  const Shape shape = served(given, table);
  const Packed packed_u = pack_u(shape, streams, table, threads), packed_w = pack_w(shape, streams, table, threads);
  const ForwardJob job{shape, streams.data(), static_cast<int>(streams.size()), o, lse, packed_u.pointers.data(),
                       packed_w.pointers.data()};
  const auto scratch = static_cast<std::size_t>(table.forward_scratch(job));
  // Several parts a thread: nothing is added up across items here, and a thread that was held up leaves the rest.
  const std::vector<int64_t> edges = cut(shape, streams, part_count(shape, threads, 4));
  parallel_for(threads, static_cast<int>(edges.size()) - 1, [&](int part) {
    const auto i = static_cast<std::size_t>(part);
    table.forward_items(job, edges[i], edges[i + 1], thread_scratch(scratch));
  });
}

void qformer_attention_backward(const Shape& given, const std::vector<BackwardStream>& streams, const float* dout,
                                const float* o, const float* lse, int threads, Isa isa) {
  check(given, streams);
  for (const BackwardStream& s : streams) clear_unowned(given, s);
  const KernelTable& table = kernels(isa);
  const Shape shape = served(given, table);
  const Packed packed_u = pack_u(shape, streams, table, threads), packed_w = pack_w(shape, streams, table, threads);
  const BackwardJob job{shape, streams.data(), static_cast<int>(streams.size()), dout, o, lse,
                        packed_u.pointers.data(), packed_w.pointers.data()};
  const auto scratch = static_cast<std::size_t>(table.backward_scratch(job));
  int64_t summed = 0;  // floats that every part adds up on its own
  for (const BackwardStream& s : streams) {
    summed += (shape.shared_u ? shape.K() * s.tokens.C : 0) + (s.dw != nullptr ? shape.H * shape.E * s.tokens.C : 0);
  }
  const std::vector<int64_t> edges = cut(shape, streams, part_count(shape, threads, summed > kSummed ? 1 : 4));
  const int parts = static_cast<int>(edges.size()) - 1;
  Sums sums(parts);
  for (const BackwardStream& s : streams) {
    const int64_t C = s.tokens.C;
    sums.add(shape.shared_u ? s.du : nullptr, shape.K() * C);
    sums.add(shape.shared_u ? s.dc : nullptr, shape.K());
    sums.add(s.dw, shape.H * shape.E * C);
  }
  sums.allocate();
  parallel_for(threads, parts, [&](int part) {
    Gradients to{};
    for (std::size_t m = 0; m < streams.size(); ++m) {
      to.du[m] = shape.shared_u ? sums.of(part, 3 * m) : streams[m].du;
      to.dc[m] = shape.shared_u ? sums.of(part, 3 * m + 1) : streams[m].dc;
      to.dw[m] = sums.of(part, 3 * m + 2);
    }
    const auto i = static_cast<std::size_t>(part);
    table.backward_items(job, edges[i], edges[i + 1], to, thread_scratch(scratch));
  });
  sums.reduce(threads);
}

}  // namespace em3
