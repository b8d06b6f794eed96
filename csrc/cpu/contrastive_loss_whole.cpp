// What lies around the matrix of logits: normalisation, the positives, the rows' losses and their reduction, in double
// precision where it is one number a row. The matrix itself is that of contrastive_loss.cpp.
#include "contrastive_loss_whole.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace em3 {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// Four sums, so that one addition need not wait for the one before it.
double dot(const float* a, const float* b, std::int64_t n) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  std::int64_t v = 0;
  for (; v + 4 <= n; v += 4) {
    for (int k = 0; k < 4; ++k) sums[k] += static_cast<double>(a[v + k]) * b[v + k];
  }
  for (; v < n; ++v) sums[0] += static_cast<double>(a[v]) * b[v];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rows of length 1, and what they were divided by, inverted: 0 for one no longer than 1e-12, which becomes zero.
void normalize(const float* from, std::int64_t n, std::int64_t V, bool wanted, float* to, float* inverse) {
  for (std::int64_t i = 0; i < n; ++i, from += V, to += V) {
    const double length = wanted ? std::sqrt(dot(from, from, V)) : 1.0;
    inverse[i] = length > 1e-12 ? static_cast<float>(1.0 / length) : 0.0f;
    for (std::int64_t v = 0; v < V; ++v) to[v] = from[v] * inverse[i];
  }
}

// The gradient to normalised rows becomes that to the rows before.
void denormalize(const float* rows, const float* inverse, const float* gradient, std::int64_t n, std::int64_t V,
                 bool wanted, float* to) {
  for (std::int64_t i = 0; i < n; ++i, rows += V, gradient += V, to += V) {
    const float along = wanted ? static_cast<float>(dot(rows, gradient, V)) : 0.0f;
    for (std::int64_t v = 0; v < V; ++v) to[v] = (gradient[v] - rows[v] * along) * inverse[i];
  }
}

double softplus(double x) { return x > 40.0 ? x : std::log1p(std::exp(x)); }

struct Whole {
  const WholeContrast& given;
  const ShiftLimits& limits;
  const int threads;
  const Isa isa;
  const std::int64_t B = given.B, V = given.V, M = given.B + given.K;
  Floats x = Floats(size(B * V)), y = Floats(size(M * V)), inverse_x = Floats(size(B)), inverse_y = Floats(size(M));
  Floats offset, row, col;
  Doubles similarity = Doubles(size(B)), losses = Doubles(size(B));  // of the positives; of the rows
  Contrast contrast{};
  double per_loss = 0.0;  // what a row's loss counts in the whole

  double forward() {
    normalize(given.content, B, V, given.normalize, x.data(), inverse_x.data());
    normalize(given.ids, B, V, given.normalize, y.data(), inverse_y.data());
    normalize(given.negatives, given.K, V, given.normalize, y.data() + B * V, inverse_y.data() + B);
    if (given.log_q != nullptr) {
      offset.resize(size(M));
      for (std::int64_t i = 0; i < B; ++i) offset[size(i)] = -given.log_q[i];
    }
    row.resize(size(given.rows ? B : 0));
    col.resize(size(given.cols ? B : 0));
    const float* const offsets = given.log_q == nullptr ? nullptr : offset.data();
    contrast = {B, B, M, V, true, x.data(), V, y.data(), V, static_cast<float>(given.scale), given.item_ids, given.item_ids,
                offsets, offsets};
    contrastive_loss_forward(contrast, limits, pointer(row), pointer(col), threads, isa);
    double total = 0.0, mass = given.mean ? 0.0 : 1.0;
    for (std::int64_t i = 0; i < B; ++i) {
      similarity[size(i)] = dot(x.data() + i * V, y.data() + i * V, V);
      for (const Floats* of : {&row, &col}) {
        if (!of->empty()) losses[size(i)] += softplus(margin(*of, i)) / ways();
      }
      total += weight(i) * losses[size(i)];
      if (given.mean) mass += weight(i);
    }
    per_loss = mass == 0.0 ? 0.0 : 1.0 / mass;
    return total * per_loss;
  }

  void backward(double loss, const WholeGradients& to) const {
    Floats drow(row.size()), dcol(col.size());
    Doubles dpositive(size(B));
    for (std::int64_t i = 0; i < B; ++i) {
      if (to.weight != nullptr) {
        to.weight[i] = static_cast<float>(per_loss * (losses[size(i)] - (given.mean ? loss : 0.0)));
      }
      const double factor = per_loss * weight(i) / ways();
      share(row, i, factor, drow, dpositive);
      share(col, i, factor, dcol, dpositive);
    }
    const bool vectors = to.content != nullptr || to.ids != nullptr || to.negatives != nullptr;
    if (!vectors && to.scale == nullptr && to.log_q == nullptr) return;
    Floats dx(size(vectors ? B * V : 0)), dy(size(vectors ? M * V : 0)), doffset(size(to.log_q == nullptr ? 0 : M));
    double dscale = 0.0;
    contrastive_loss_backward(contrast, limits, pointer(row), pointer(col), pointer(drow), pointer(dcol),
                              {pointer(dx), pointer(dy), to.scale == nullptr ? nullptr : &dscale, pointer(doffset)}, threads,
                              isa);
    for (std::int64_t i = 0; i < B; ++i) {
      const float own = static_cast<float>(dpositive[size(i)] * given.scale);
      for (std::int64_t v = i * V; vectors && v < (i + 1) * V; ++v) {
        dx[size(v)] += own * y[size(v)];
        dy[size(v)] += own * x[size(v)];
      }
      dscale += dpositive[size(i)] * similarity[size(i)];
      if (to.log_q != nullptr) to.log_q[i] = -static_cast<float>(doffset[size(i)] + dpositive[size(i)]);
    }
    if (to.scale != nullptr) *to.scale = dscale;
    const bool unit = given.normalize;
    if (to.content != nullptr) denormalize(x.data(), inverse_x.data(), dx.data(), B, V, unit, to.content);
    if (to.ids != nullptr) denormalize(y.data(), inverse_y.data(), dy.data(), B, V, unit, to.ids);
    if (to.negatives != nullptr) {
      denormalize(y.data() + B * V, inverse_y.data() + B, dy.data() + B * V, given.K, V, unit, to.negatives);
    }
  }

 private:
  static const float* pointer(const Floats& numbers) { return numbers.empty() ? nullptr : numbers.data(); }
  static float* pointer(Floats& numbers) { return numbers.empty() ? nullptr : numbers.data(); }
  double ways() const { return given.rows && given.cols ? 2.0 : 1.0; }
  double weight(std::int64_t i) const { return given.weight == nullptr ? 1.0 : given.weight[i]; }

  // The logsumexp over the other candidates less the positive's logit; the loss is its softplus.
  double margin(const Floats& others, std::int64_t i) const {
    const double correction = given.log_q == nullptr ? 0.0 : given.log_q[i];
    return others[size(i)] - (given.scale * similarity[size(i)] - correction);
  }

  void share(const Floats& others, std::int64_t i, double factor, Floats& gradient, Doubles& dpositive) const {
    if (others.empty()) return;
    const double slope = factor / (1.0 + std::exp(-margin(others, i)));
    gradient[size(i)] = static_cast<float>(slope);
    dpositive[size(i)] -= slope;
  }
};

}  // namespace

double contrastive_loss_whole(const WholeContrast& given, const ShiftLimits& limits, const WholeGradients& to,
                              int threads, Isa isa) {
  Whole whole{given, limits, threads, isa};
  const double loss = whole.forward();
  whole.backward(loss, to);
  return loss;
}

}  // namespace em3
