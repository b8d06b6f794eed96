// Checks, division of the items among threads, and the choice of the instruction set. The mathematics is in
// qformer_attention_kernel.inl.
#include "qformer_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

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
  float* lse;
  const float* const* packed_u;  // one a stream when u is shared
};

struct BackwardJob {
  Shape shape;
  const BackwardStream* streams;
  int M;
  const float* lse;
  const float* const* packed_u;
};

struct KernelTable {
  std::int64_t (*padded_rows)(std::int64_t K);
  void (*pack)(const float* const* rows, std::int64_t K, std::int64_t C, float* out);
  std::int64_t (*forward_scratch)(const ForwardJob&);
  void (*forward_items)(const ForwardJob&, std::int64_t begin, std::int64_t end, float* scratch);
  std::int64_t (*backward_scratch)(const BackwardJob&);
  void (*backward_items)(const BackwardJob&, std::int64_t begin, std::int64_t end, float* const* du, float* const* dc,
                         float* scratch);
};

// Every standard header must be included above this line: what follows compiles for processors that the rest of the
// library must not assume, and an inline function or template of the standard library that first appeared in such a
// region could become the one copy the linker keeps for everybody.
using std::int32_t;
using std::int64_t;
using std::uint8_t;
using std::uintptr_t;

namespace baseline {
#define EM3_ISA 0
#include "simd.h"
#include "qformer_attention_kernel.inl"
#undef EM3_ISA
}  // namespace baseline

#if EM3_HAVE_X86_PATHS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define EM3_ISA 1
#include "simd.h"
#include "qformer_attention_kernel.inl"
#undef EM3_ISA
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")
#endif
namespace avx512 {
#define EM3_ISA 2
#include "simd.h"
#include "qformer_attention_kernel.inl"
#undef EM3_ISA
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // EM3_HAVE_X86_PATHS

const KernelTable& kernels(Isa isa) {
#if EM3_HAVE_X86_PATHS
  if (isa == Isa::avx512) return avx512::kTable;
  if (isa == Isa::avx2) return avx2::kTable;
#endif
  (void)isa;
  return baseline::kTable;
}

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(std::string("qformer_attention: ") + what);
}

template <class Stream>
void check(const Shape& shape, const std::vector<Stream>& streams) {
  require(shape.B >= 0 && shape.H >= 1 && shape.Q >= 0, "B and Q must be at least 0 and H at least 1");
  require(!streams.empty() && streams.size() <= kMaxStreams, "there must be 1 to 8 streams");
  for (const Stream& s : streams) {
    require(s.tokens.n >= 0 && s.tokens.C >= 1, "n must be at least 0 and C at least 1");
    const int64_t* offsets = s.tokens.offsets;
    if (offsets == nullptr) continue;
    require(offsets[0] == 0 && offsets[shape.B] <= s.tokens.n, "offsets must begin with 0 and end within the values");
    for (int64_t b = 0; b < shape.B; ++b) require(offsets[b] <= offsets[b + 1], "offsets must not decrease");
  }
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

// u transposed once for the whole call, when all items share it.
struct PackedU {
  std::vector<std::vector<float>> memory;
  std::vector<const float*> pointers;
};

template <class Stream>
PackedU pack_u(const Shape& shape, const std::vector<Stream>& streams, const KernelTable& table, int threads) {
  PackedU packed;
  if (!shape.shared_u) return packed;
  packed.memory.resize(streams.size());
  packed.pointers.resize(streams.size());
  parallel_for(threads, static_cast<int>(streams.size()), [&](int m) {
    const auto i = static_cast<std::size_t>(m);
    const int64_t C = streams[i].tokens.C, K = shape.K();
    std::vector<const float*> rows(static_cast<std::size_t>(K));
    for (int64_t r = 0; r < K; ++r) rows[static_cast<std::size_t>(r)] = streams[i].u + r * C;
    packed.memory[i].resize(static_cast<std::size_t>(table.padded_rows(K) * C));
    table.pack(rows.data(), K, C, packed.memory[i].data());
    packed.pointers[i] = packed.memory[i].data();
  });
  return packed;
}

// Rows of dx that no item owns (before the first offset and past the last), or all of them where nobody attends.
void clear_unowned(const Shape& shape, const BackwardStream& s) {
  if (s.dx == nullptr) return;
  const bool jagged = s.tokens.offsets != nullptr;
  const int64_t C = s.tokens.C;
  if (shape.K() == 0) std::fill(s.dx, s.dx + (jagged ? 1 : shape.B) * s.tokens.n * C, 0.0f);
  if (shape.K() == 0 || !jagged) return;
  const int64_t begin = s.tokens.offsets[0], end = s.tokens.offsets[shape.B];
  std::fill(s.dx, s.dx + begin * C, 0.0f);
  std::fill(s.dx + end * C, s.dx + s.tokens.n * C, 0.0f);
}

int part_count(const Shape& shape, int threads, int parts_per_thread) {
  if (threads <= 1) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(shape.B, int64_t{threads} * parts_per_thread)));
}

// The sums over items when u is shared: part 0 writes the outputs themselves, the others write partial sums that are
// then added in the order of the parts.
class SharedSums {
 public:
  SharedSums(const Shape& shape, const std::vector<BackwardStream>& streams, int parts)
      : streams_(streams), K_(shape.K()), parts_(parts) {
    for (const BackwardStream& s : streams) size_ += K_ * (s.tokens.C + 1);
    if (parts > 1) partial_.resize(static_cast<std::size_t>(size_ * (parts - 1)));
  }

  void pointers(int part, float** du, float** dc) {
    float* at = part == 0 ? nullptr : partial_.data() + size_ * (part - 1);
    for (const BackwardStream& s : streams_) {
      *du++ = s.du == nullptr || part == 0 ? s.du : at;
      *dc++ = s.dc == nullptr || part == 0 ? s.dc : at + K_ * s.tokens.C;
      if (part != 0) at += K_ * (s.tokens.C + 1);
    }
  }

  void reduce(int threads) {
    for (int part = 1; part < parts_; ++part) {
      float *du[kMaxStreams], *dc[kMaxStreams];
      pointers(part, du, dc);
      for (std::size_t m = 0; m < streams_.size(); ++m) {
        add(streams_[m].du, du[m], K_ * streams_[m].tokens.C, threads);
        add(streams_[m].dc, dc[m], K_, 1);
      }
    }
  }

 private:
  static void add(float* to, const float* from, int64_t n, int threads) {
    if (to == nullptr) return;
    constexpr int64_t kChunk = 1 << 15;  // waking a thread costs as much as adding this many
    const int chunks = static_cast<int>((n + kChunk - 1) / kChunk);
    parallel_for(threads, chunks, [&](int chunk) {
      const int64_t end = std::min(n, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; ++i) to[i] += from[i];
    });
  }

  const std::vector<BackwardStream>& streams_;
  int64_t K_, size_ = 0;
  int parts_;
  std::vector<float> partial_;
};

}  // namespace

void qformer_attention_forward(const Shape& shape, const std::vector<ForwardStream>& streams, float* lse, int threads,
                               Isa isa) {
  check(shape, streams);
  if (shape.B == 0 || shape.K() == 0) return;
  const KernelTable& table = kernels(isa);
  const PackedU packed = pack_u(shape, streams, table, threads);
  const ForwardJob job{shape, streams.data(), static_cast<int>(streams.size()), lse, packed.pointers.data()};
  const auto scratch = static_cast<std::size_t>(table.forward_scratch(job));
  // Several parts a thread: nothing is added up across items here, and a thread that was held up leaves the rest.
  const std::vector<int64_t> edges = cut(shape, streams, part_count(shape, threads, 4));
  parallel_for(threads, static_cast<int>(edges.size()) - 1, [&](int part) {
    const auto i = static_cast<std::size_t>(part);
    table.forward_items(job, edges[i], edges[i + 1], thread_scratch(scratch));
  });
}

void qformer_attention_backward(const Shape& shape, const std::vector<BackwardStream>& streams, const float* lse,
                                int threads, Isa isa) {
  check(shape, streams);
  for (const BackwardStream& s : streams) clear_unowned(shape, s);
  if (shape.K() == 0 || (shape.B == 0 && !shape.shared_u)) return;
  const KernelTable& table = kernels(isa);
  const PackedU packed = pack_u(shape, streams, table, threads);
  const BackwardJob job{shape, streams.data(), static_cast<int>(streams.size()), lse, packed.pointers.data()};
  const auto scratch = static_cast<std::size_t>(table.backward_scratch(job));
  const std::vector<int64_t> edges = cut(shape, streams, part_count(shape, threads, shape.shared_u ? 1 : 4));
  const int parts = static_cast<int>(edges.size()) - 1;
  SharedSums sums(shape, streams, shape.shared_u ? parts : 1);
  parallel_for(threads, parts, [&](int part) {
    const auto i = static_cast<std::size_t>(part);
    float *du[kMaxStreams], *dc[kMaxStreams];
    sums.pointers(shape.shared_u ? part : 0, du, dc);
    table.backward_items(job, edges[i], edges[i + 1], du, dc, thread_scratch(scratch));
  });
  if (shape.shared_u) sums.reduce(threads);
}

}  // namespace em3
