// What lies around the matrix of logits: lengths, the positives, the rows' losses and their reduction, in double
// precision where it is one number a row. The matrix itself is that of contrastive_loss.cpp.
#include "contrastive_loss_whole.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "contrastive_loss_terms.h"
#include "parallel.h"

namespace em3 {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

float* pointer(Floats& numbers) { return numbers.empty() ? nullptr : numbers.data(); }

// At the threshold log(1 + e^40) is 40 in double precision.
double softplus(double x) { return x > 40.0 ? x : std::log1p(std::exp(x)); }
double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

struct Whole {
  const WholeContrast& given;
  const ShiftLimits& limits;
  const WholeState& state;
  const int threads;
  const Isa isa;
  const std::int64_t B = given.B, V = given.V, M = given.B + given.K;
  Floats inverse, offset;  // [B + M] of content, then of IDs and negatives; [M]
  Doubles similarity;      // [B], of the positives, times the scale
  Contrast contrast{};

  Whole(const WholeContrast& whole, const ShiftLimits& shift_limits, const WholeState& kept, int at_most, Isa path)
      : given(whole), limits(shift_limits), state(kept), threads(at_most), isa(path) {
    if (given.normalize) {
      inverse.resize(size(B + M));
      inverse_lengths(given.content, B, V, inverse.data(), threads, isa);
      inverse_lengths(given.ids, B, V, inverse.data() + B, threads, isa);
      inverse_lengths(given.negatives, given.K, V, inverse.data() + 2 * B, threads, isa);
    }
    similarity.resize(size(B));
    row_products(given.content, given.ids, B, V, similarity.data(), threads, isa);
    // With the scale as it is in the matrix: near 1,000 its rounding would be between the positive and the others.
    for (std::int64_t i = 0; i < B; ++i) {
      const double scale = rounded_scale(given.scale, given.normalize ? &inverse[size(i)] : nullptr);
      similarity[size(i)] *= scale * (given.normalize ? inverse[size(B + i)] : 1.0f);
    }
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
    contrast.x = {given.content, V, B, nullptr, of_content()};
    contrast.y = {given.ids, V, B, given.negatives, of_ids()};
    contrast.scale = given.scale;
    contrast.bias = given.bias;
    contrast.base2 = !given.sigmoid;
    // Several positives of InfoNCE are candidates like any other row.
    const bool apart = given.duplicates == Duplicates::mask || (given.sigmoid && positive);
    contrast.row_ids = contrast.col_ids = apart ? given.item_ids : nullptr;
    contrast.down = contrast.across = given.log_q == nullptr ? nullptr : offset.data();
  }

  double forward() const {
    contrastive_loss_forward(contrast, limits, state.row, state.col, state.kept, threads, isa);
    for (std::int64_t i = 0; i < B; ++i) {
      double& loss = state.losses[i];
      loss = given.sigmoid ? softplus(-positive(i)) : 0.0;
      for (const float* others : {state.row, state.col}) {
        if (others == nullptr) continue;
        loss += (given.sigmoid ? others[i] : softplus(margin(others, i))) / ways();
      }
    }
    const LinearTerms terms(given, of_content(), of_ids());
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
    Floats dx, dy, dmore, doffset(size(to.log_q == nullptr ? 0 : M));
    double from_matrix = 0.0;
    ContrastGradients inner{nullptr, nullptr, nullptr, to.scale, to.bias == nullptr ? nullptr : &from_matrix, pointer(doffset)};
    if (to.content != nullptr || to.scale != nullptr || to.ids != nullptr || to.negatives != nullptr) {
      inner.dx = room(to.content, B, dx);
      inner.dy = room(to.ids, B, dy);
      inner.more = room(to.negatives, given.K, dmore);
      from_positives(dpositive, inner);
    }
    const LinearTerms terms(given, of_content(), of_ids());
    if (!terms.none()) terms.add_gradients(share.data(), inner, dcorrection.data());
    if (to.content == nullptr && to.scale == nullptr) inner.dx = nullptr;
    if (to.ids == nullptr && to.negatives == nullptr) inner.dy = nullptr;
    contrastive_loss_backward(contrast, limits, state.row, state.col, drow.data(), dcol.data(), state.kept, inner, threads, isa);
    if (to.bias != nullptr) *to.bias = dbias + from_matrix;
    for (std::int64_t i = 0; to.log_q != nullptr && i < B; ++i) {
      to.log_q[i] = -static_cast<float>(doffset[size(i)] + dcorrection[size(i)]);
    }
  }

 private:
  const float* of_content() const { return given.normalize ? inverse.data() : nullptr; }
  const float* of_ids() const { return given.normalize ? inverse.data() + B : nullptr; }
  double ways() const { return given.rows && given.cols ? 2.0 : 1.0; }
  double weight(std::int64_t i) const { return given.weight == nullptr ? 1.0 : given.weight[i]; }

  // The positive's logit.
  double positive(std::int64_t i) const {
    return similarity[size(i)] + given.bias - (given.log_q == nullptr ? 0.0 : given.log_q[i]);
  }

  // The logsumexp over the others less the positive's logit.
  double margin(const float* others, std::int64_t i) const { return others[i] * 0.6931471805599453 - positive(i); }

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

  void pass_on(const float* others, std::int64_t i, double share, Floats& gradient, Doubles& dpositive) const {
    if (others == nullptr) return;
    const double slope = given.sigmoid ? share : share * sigmoid(margin(others, i));
    gradient[size(i)] = static_cast<float>(slope);
    if (!given.sigmoid) dpositive[size(i)] -= slope;
  }

  // Where a gradient that is wanted goes, and one that is needed for another.
  float* room(float* wanted, std::int64_t rows, Floats& own) const {
    if (wanted != nullptr) return wanted;
    own.resize(size(rows * V));
    return pointer(own);
  }

  // The positives' part of the gradients; it is what the rest is added to.
  void from_positives(const Doubles& dpositive, const ContrastGradients& to) const {
    const int parts = static_cast<int>(std::min<std::int64_t>(threads, 1 + B * V / 100000));
    parallel_for(threads, parts, [&](int part) {
      for (std::int64_t i = B * part / parts; i < B * (part + 1) / parts; ++i) {
        const double to_x = dpositive[size(i)] * (given.normalize ? inverse[size(B + i)] : 1.0f);
        const double to_y = dpositive[size(i)] * given.scale * (given.normalize ? inverse[size(i)] : 1.0f);
        const float by_x = static_cast<float>(to_x), by_y = static_cast<float>(to_y);
        const float *const x = given.content + i * V, *const y = given.ids + i * V;
        float *const dx = to.dx + i * V, *const dy = to.dy + i * V;
        for (std::int64_t v = 0; v < V; ++v) dx[v] = by_x * y[v];
        for (std::int64_t v = 0; v < V; ++v) dy[v] = by_y * x[v];
      }
    });
    std::fill(to.more, to.more + given.K * V, 0.0f);
  }
};

}  // namespace

double contrastive_loss_whole_forward(const WholeContrast& given, const ShiftLimits& limits, const WholeState& state,
                                      int threads, Isa isa) {
  return Whole(given, limits, state, threads, isa).forward();
}

void contrastive_loss_whole_backward(const WholeContrast& given, const ShiftLimits& limits, const WholeState& state,
                                     const double* upstream, const WholeGradients& to, int threads, Isa isa) {
  Whole(given, limits, state, threads, isa).backward(upstream, to);
}

}  // namespace em3
