// What lies around the matrix of logits: lengths, the positives, the rows' losses and their reduction, in double
// precision where it is one number a row. The matrix itself is that of contrastive_loss.cpp.
#include "contrastive_loss_whole.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "contrastive_loss_terms.h"
#include "parallel.h"

namespace em3 {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

float* pointer(Floats& numbers) { return numbers.empty() ? nullptr : numbers.data(); }

// At the threshold log(1 + e^40) is 40 in double precision.
double softplus(double x) { return x > 40.0 ? x : std::log1p(std::exp(x)); }
double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Whether it makes a difference which rows are of one item.
bool by_item(const WholeContrast& given) { return given.item_ids != nullptr && given.duplicates != Duplicates::keep; }

// Memory for a gradient that is not written where it is wanted: uninitialised, and given back to the system as soon as it is
// read, for where it is wanted is written then. malloc would keep it.
class Room {
 public:
  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { reset(); }

  float* get(std::int64_t floats) {
    const std::size_t bytes = size(floats) * sizeof(float);
#if defined(__linux__)
    if (bytes >= kPages) {
      void* const pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) throw std::bad_alloc();
      mapped_ = bytes;
      return first_ = static_cast<float*>(pages);
    }
#endif
    return first_ = static_cast<float*>(::operator new(bytes));
  }

  bool pages() const { return mapped_ > 0; }

  // The first `floats` have been read for the last time.
  void give_back(std::int64_t floats) {
#if defined(__linux__)
    static const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    if (mapped_ > 0) madvise(first_, size(floats) * sizeof(float) / page * page, MADV_DONTNEED);
#else
    (void)floats;
#endif
  }

  void reset() {
#if defined(__linux__)
    if (mapped_ > 0) {
      munmap(first_, mapped_);
      first_ = nullptr;
      mapped_ = 0;
    }
#endif
    ::operator delete(first_);
    first_ = nullptr;
  }

 private:
  static constexpr std::size_t kPages = std::size_t{1} << 18;  // fewer bytes are not worth a call of the system
  float* first_ = nullptr;
  std::size_t mapped_ = 0;
};

struct Whole {
  const WholeContrast& given;
  const ShiftLimits& limits;
  const WholeState& state;
  const int threads;
  const Isa isa;
  const std::int64_t B = given.B, V = given.V, M = given.B + given.K;
  Floats offset;  // [M]
  Contrast contrast{};

  Whole(const WholeContrast& whole, const ShiftLimits& shift_limits, const WholeState& kept, int at_most, Isa path)
      : given(whole), limits(shift_limits), state(kept), threads(at_most), isa(path) {
    if (given.log_q != nullptr) {
      offset.resize(size(M));
      for (std::int64_t i = 0; i < B; ++i) offset[size(i)] = -given.log_q[i];
    }
    const bool positive = given.duplicates == Duplicates::positive;
    contrast.kind = !given.sigmoid ? ContrastKind::infonce
                    : positive     ? ContrastKind::sigmoid_positive
                                   : ContrastKind::sigmoid;
    contrast.B = contrast.N = B;
    contrast.M = M;
    contrast.V = V;
    contrast.own = true;
    contrast.x = {given.content, V, B, nullptr, of_content(), given.storage};
    contrast.y = {given.ids, V, B, given.negatives, of_ids(), given.storage};
    contrast.scale = given.scale;
    contrast.bias = given.bias;
    // Several positives of InfoNCE are candidates like any other row.
    const bool apart = given.duplicates == Duplicates::mask || (given.sigmoid && positive);
    contrast.row_ids = contrast.col_ids = apart ? given.item_ids : nullptr;
    contrast.order = state.order;
    contrast.longest = state.longest;
    contrast.down = contrast.across = given.log_q == nullptr ? nullptr : offset.data();
  }

  // What both passes need and the forward finds out.
  void prepare() const {
    if (state.order != nullptr) item_order(given.item_ids, B, state.order);
    if (given.normalize) {
      inverse_lengths(contrast.x, B, V, state.inverse, threads, isa);
      inverse_lengths(contrast.y, M, V, state.inverse + B, threads, isa);
    }
    *state.longest = given.sigmoid ? 0.0f : longest_product(contrast, threads, isa);
    row_products(contrast.x, contrast.y, B, V, state.similarity, threads, isa);
    // With the scale as it is in the matrix: near 1,000 its rounding would be between the positive and the others.
    for (std::int64_t i = 0; i < B; ++i) {
      const double scale = rounded_scale(given.scale, given.normalize ? of_content() + i : nullptr);
      state.similarity[i] *= scale * (given.normalize ? of_ids()[i] : 1.0f);
    }
  }

  double forward() const {
    contrastive_loss_forward(contrast, limits, state.row, state.col, state.kept, threads, isa);
    for (std::int64_t i = 0; i < B; ++i) {
      double& loss = state.losses[i];
      loss = given.sigmoid ? softplus(-positive(i)) : 0.0;
      for (const double* others : {state.row, state.col}) {
        if (others == nullptr) continue;
        loss += (given.sigmoid ? others[i] : softplus(margin(others, i))) / ways();
      }
    }
    const LinearTerms terms(given, contrast.x, contrast.y, state.order, isa);
    if (!terms.none()) terms.add_losses(state.losses);
    return given.reduction == Reduction::none ? 0.0 : reduced();
  }

  void backward(const double* upstream, const WholeGradients& to) const {
    // What a row's loss counts in the whole, a mean over the directions; what each direction's sum and the positive get.
    Doubles share(size(B)), dpositive(size(B));
    Floats drow(size(state.row == nullptr ? 0 : B)), dcol(size(state.col == nullptr ? 0 : B));
    const double per_loss = given.reduction == Reduction::mean ? inverse_mass() : 1.0;
    const double mean = given.reduction == Reduction::mean && to.weight != nullptr ? reduced() : 0.0;
    double dbias = 0.0;
    for (std::int64_t i = 0; i < B; ++i) {
      const double above = upstream[given.reduction == Reduction::none ? i : 0] * per_loss;
      if (to.weight != nullptr) to.weight[i] = static_cast<float>(above * (state.losses[i] - mean));
      share[size(i)] = above * weight(i) / ways();
      if (given.sigmoid) {
        dpositive[size(i)] = -above * weight(i) * sigmoid(-positive(i));
        dbias += dpositive[size(i)];
      }
      pass_on(state.row, i, share[size(i)], drow, dpositive);
      pass_on(state.col, i, share[size(i)], dcol, dpositive);
    }
    Doubles dcorrection = dpositive;  // to -log_q
    Floats doffset(size(to.log_q == nullptr ? 0 : M));
    Room room_x, room_y, room_more;
    double from_matrix = 0.0;
    ContrastGradients inner{nullptr, nullptr, nullptr, to.bias == nullptr ? nullptr : &from_matrix, pointer(doffset)};
    const LinearTerms terms(given, contrast.x, contrast.y, state.order, isa);
    const bool need_x = to.content != nullptr || to.scale != nullptr, need_y = to.ids != nullptr || to.negatives != nullptr;
    // What other terms add, they add to both sides.
    if (need_x || (need_y && !terms.none())) inner.dx = place(to.content, B, room_x);
    if (need_y || (need_x && !terms.none())) inner.dy = place(to.ids, B, room_y);
    if (to.negatives != nullptr) {
      inner.more = place(to.negatives, given.K, room_more);
      std::fill(inner.more, inner.more + given.K * V, 0.0f);
    }
    from_positives(dpositive, inner);
    if (!terms.none()) terms.add_gradients(share.data(), inner, dcorrection.data());
    if (!need_x) inner.dx = nullptr;
    if (!need_y) inner.dy = nullptr;
    contrastive_loss_backward(contrast, limits, state.row, state.col, drow.data(), dcol.data(), state.kept, inner, threads,
                              isa);
    if (need_x) {
      const double along = finish(contrast.x, 0, B, given.scale, inner.dx, to.content, room_x);
      if (to.scale != nullptr) *to.scale = along;
    }
    if (to.ids != nullptr) finish(contrast.y, 0, B, 1.0, inner.dy, to.ids, room_y);
    if (to.negatives != nullptr) finish(contrast.y, B, M, 1.0, inner.more, to.negatives, room_more);
    if (to.bias != nullptr) *to.bias = dbias + from_matrix;
    for (std::int64_t i = 0; to.log_q != nullptr && i < B; ++i) {
      to.log_q[i] = -static_cast<float>(doffset[size(i)] + dcorrection[size(i)]);
    }
  }

 private:
  const float* of_content() const { return state.inverse; }
  const float* of_ids() const { return given.normalize ? state.inverse + B : nullptr; }
  double ways() const { return given.rows && given.cols ? 2.0 : 1.0; }
  double weight(std::int64_t i) const { return given.weight == nullptr ? 1.0 : given.weight[i]; }

  // The positive's logit.
  double positive(std::int64_t i) const {
    return state.similarity[i] + given.bias - (given.log_q == nullptr ? 0.0 : given.log_q[i]);
  }

  // The logsumexp over the others less the positive's logit.
  double margin(const double* others, std::int64_t i) const { return others[i] - positive(i); }

  double inverse_mass() const {
    double mass = 0.0;
    for (std::int64_t i = 0; i < B; ++i) mass += weight(i);
    return mass == 0.0 ? 0.0 : 1.0 / mass;
  }

  double reduced() const {
    double total = 0.0;
    for (std::int64_t i = 0; i < B; ++i) total += weight(i) * state.losses[i];
    return given.reduction == Reduction::mean ? total * inverse_mass() : total;
  }

  void pass_on(const double* others, std::int64_t i, double share, Floats& gradient, Doubles& dpositive) const {
    if (others == nullptr) return;
    const double slope = given.sigmoid ? share : share * sigmoid(margin(others, i));
    gradient[size(i)] = static_cast<float>(slope);
    if (!given.sigmoid) dpositive[size(i)] -= slope;
  }

  // Where a gradient is added up: where it is wanted, if that is in float32.
  float* place(void* wanted, std::int64_t rows, Room& own) const {
    if (wanted != nullptr && given.storage == Storage::f32) return static_cast<float*>(wanted);
    return own.get(rows * V);
  }

  // finish_gradients(); of much memory in a few steps, after each of which what has been read is given back.
  double finish(const Embeddings& of, std::int64_t begin, std::int64_t end, double scale, const float* from, void* to,
                Room& room) const {
    const std::int64_t steps = room.pages() ? 8 : 1, step = (end - begin + steps - 1) / steps;
    double along = 0.0;
    for (std::int64_t first = begin; first < end; first += step) {
      const std::int64_t last = std::min(first + step, end), done = (first - begin) * V;
      char* const there = to == nullptr ? nullptr : static_cast<char*>(to) + done * bytes_of(given.storage);
      along += finish_gradients(of, first, last, V, scale, from + done, there, threads, isa);
      room.give_back((last - begin) * V);
    }
    room.reset();
    return along;
  }

  // The positives' part of the gradients; it is what the rest is added to.
  void from_positives(const Doubles& dpositive, const ContrastGradients& to) const {
    const int parts = static_cast<int>(std::min<std::int64_t>(threads, 1 + B * V / 100000));
    parallel_for(threads, parts, [&](int part) {
      Floats room(size(V));
      for (std::int64_t i = B * part / parts; i < B * (part + 1) / parts; ++i) {
        const double to_x = dpositive[size(i)] * (given.normalize ? of_ids()[i] : 1.0f);
        const double to_y = dpositive[size(i)] * given.scale * (given.normalize ? of_content()[i] : 1.0f);
        const auto set = [&](const Embeddings& from, double times, float* to_row) {
          const float* const row = row_as_floats(from, i, V, room.data(), isa);
          const float by = static_cast<float>(times);
          for (std::int64_t v = 0; v < V; ++v) to_row[v] = by * row[v];
        };
        if (to.dx != nullptr) set(contrast.y, to_x, to.dx + i * V);
        if (to.dy != nullptr) set(contrast.x, to_y, to.dy + i * V);
      }
    });
  }
};

}  // namespace

std::int64_t whole_state_size(const WholeContrast& given, bool keep) {
  const std::int64_t B = given.B, M = given.B + given.K;
  const std::int64_t doubles = 2 * B + (by_item(given) ? B : 0) + (given.rows ? B : 0) + (given.cols ? B : 0);
  const std::int64_t logits = keep ? B * ((M + kKeptUnit - 1) / kKeptUnit * kKeptUnit) : 0;
  return doubles + (logits + (given.normalize ? B + M : 0) + 1 + 1) / 2;
}

WholeState whole_state(const WholeContrast& given, bool keep, double* memory) {
  const std::int64_t B = given.B, M = given.B + given.K;
  WholeState state{};
  state.losses = memory;
  state.similarity = memory + B;
  memory += 2 * B;
  if (by_item(given)) {
    state.order = reinterpret_cast<std::int64_t*>(memory);
    memory += B;
  }
  const auto take = [](auto*& at, bool wanted, std::int64_t n) {
    auto* const first = wanted ? at : nullptr;
    if (wanted) at += n;
    return first;
  };
  state.row = take(memory, given.rows, B);
  state.col = take(memory, given.cols, B);
  float* at = reinterpret_cast<float*>(memory);
  const std::int64_t stride = (M + kKeptUnit - 1) / kKeptUnit * kKeptUnit;
  state.kept = {take(at, keep, B * stride), stride};
  state.inverse = take(at, given.normalize, B + M);
  state.longest = take(at, true, 1);
  return state;
}

double contrastive_loss_whole_forward(const WholeContrast& given, const ShiftLimits& limits, const WholeState& state,
                                      int threads, Isa isa) {
  const Whole whole(given, limits, state, threads, isa);
  whole.prepare();
  return whole.forward();
}

void contrastive_loss_whole_backward(const WholeContrast& given, const ShiftLimits& limits, const WholeState& state,
                                     const double* upstream, const WholeGradients& to, int threads, Isa isa) {
  Whole(given, limits, state, threads, isa).backward(upstream, to);
}

}  // namespace em3
