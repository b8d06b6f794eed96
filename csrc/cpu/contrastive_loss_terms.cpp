// Means over items, and over all rows but an item's, in passes over the rows. With the anchors a and the others b of a
// direction, a row's set of m others with the sum O of them, and the count of its candidates n, which is m for the item
// and m + 1 for all else, where the row itself is one:
//   over_i = (scale a_i . (m b_i - O) - (m log_q_i - O_q)) / n
#include "contrastive_loss_terms.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace em3 {
namespace {

using Vector = std::vector<double>;

}  // namespace

const float* LinearTerms::Side::row(std::int64_t i) const { return row_as_floats(*of, i, V, room.data(), isa); }

void LinearTerms::Side::add(std::int64_t i, double times, double* to) const {
  const float* const numbers = row(i);
  const double both = of->factor == nullptr ? times : times * of->factor[i];
  for (std::int64_t v = 0; v < V; ++v) to[v] += both * numbers[v];
}

double LinearTerms::Side::product(std::int64_t i, const double* with) const {
  const float* const numbers = row(i);
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  for (std::int64_t v = 0; v < V; ++v) sums[v % 4] += numbers[v] * with[v];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) * (of->factor == nullptr ? 1.0 : of->factor[i]);
}

LinearTerms::LinearTerms(const WholeContrast& given, const Embeddings& content, const Embeddings& ids,
                         const std::int64_t* order, Isa isa)
    : given_(given),
      content_{&content, given.V, isa, std::vector<float>(size(given.V))},
      ids_{&ids, given.V, isa, content_.room},
      order_(order) {
  if (given.sigmoid) return;
  if (given.duplicates == Duplicates::positive) terms_.push_back({1.0 - given.smoothing, true});
  if (given.smoothing != 0.0) terms_.push_back({given.smoothing, false});
  if (terms_.empty() || order == nullptr) return;
  for (std::int64_t i = 0; i < given.B; ++i) {
    if (i == 0 || given.item_ids[order[i]] != given.item_ids[order[i - 1]]) begins_.push_back(i);
  }
  begins_.push_back(given.B);
}

// One term in one direction. Its sets are runs of rows: items, or single rows where a row shares its candidates with no
// other.
struct LinearTerms::Pass {
  const LinearTerms& all;
  const Term term;
  const Side &a, &b;
  const bool by_item;
  double candidates = 0.0, total_q = 0.0;
  Vector total, others, shares;  // [V]: sums over everything, over a run's others, and of what its rows' losses count
  double others_q = 0.0, m = 0.0, n = 0.0;

  Pass(const LinearTerms& of, const Term& what, bool content_to_id)
      : all(of), term(what), a(content_to_id ? of.content_ : of.ids_), b(content_to_id ? of.ids_ : of.content_),
        by_item(what.of_item || (of.given_.duplicates == Duplicates::mask && !of.begins_.empty())),
        total(size(of.given_.V)), others(total), shares(total) {
    if (term.of_item) return;
    const WholeContrast& given = all.given_;
    for (std::int64_t i = 0; i < given.B; ++i) {
      b.add(i, 1.0, total.data());
      total_q += log_q(i);
    }
    for (std::int64_t k = 0; content_to_id && k < given.K; ++k) b.add(given.B + k, 1.0, total.data());
    candidates = static_cast<double>(given.B + (content_to_id ? given.K : 0));
  }

  double log_q(std::int64_t i) const { return all.given_.log_q == nullptr ? 0.0 : all.given_.log_q[i]; }
  std::int64_t runs() const { return by_item ? static_cast<std::int64_t>(all.begins_.size()) - 1 : all.given_.B; }
  std::int64_t begin(std::int64_t run) const { return by_item ? all.begins_[size(run)] : run; }
  std::int64_t row(std::int64_t place) const { return by_item ? all.order_[place] : place; }

  // Whether a run's rows have anything to be over; counts what.
  bool counted(std::int64_t run) {
    const double rows = static_cast<double>(begin(run + 1) - begin(run));
    m = term.of_item ? rows : candidates - rows;
    n = term.of_item ? rows : m + 1.0;
    return term.of_item ? rows > 1.0 : m > 0.0;
  }

  void sum_others(std::int64_t run) {
    const double sign = term.of_item ? 1.0 : -1.0;
    others = total;
    others_q = total_q;
    for (std::int64_t p = begin(run); p < begin(run + 1); ++p) {
      b.add(row(p), sign, others.data());
      others_q += sign * log_q(row(p));
    }
  }
};

void LinearTerms::run(const Term& term, bool content_to_id, const double* share, double* losses,
                      const ContrastGradients* to, double* dcorrection) const {
  Pass pass(*this, term, content_to_id);
  const double ways = given_.rows && given_.cols ? 2.0 : 1.0, scale = given_.scale;
  const std::int64_t V = given_.V;
  const auto counts = [&](std::int64_t i) { return term.amount * share[i] / pass.n; };
  Vector all_shares(size(V));  // Q, the sum of the rows' shares
  double all_count = 0.0;
  for (std::int64_t r = 0; to != nullptr && !term.of_item && r < pass.runs(); ++r) {
    for (std::int64_t p = pass.begin(r); pass.counted(r) && p < pass.begin(r + 1); ++p) {
      pass.a.add(pass.row(p), counts(pass.row(p)), all_shares.data());
      all_count += counts(pass.row(p));
    }
  }
  float *const da = to == nullptr ? nullptr : content_to_id ? to->dx : to->dy;
  float *const db = to == nullptr ? nullptr : content_to_id ? to->dy : to->dx;
  const double gain_a = content_to_id ? 1.0 : scale, gain_b = content_to_id ? scale : 1.0;
  Vector row_a(size(V)), row_b(size(V));
  for (std::int64_t r = 0; r < pass.runs(); ++r) {
    if (!pass.counted(r)) continue;
    pass.sum_others(r);
    const double sign = term.of_item ? 1.0 : -1.0;
    pass.shares = all_shares;
    double count = all_count;
    for (std::int64_t p = pass.begin(r); to != nullptr && p < pass.begin(r + 1); ++p) {
      pass.a.add(pass.row(p), sign * counts(pass.row(p)), pass.shares.data());
      count += sign * counts(pass.row(p));
    }
    for (std::int64_t p = pass.begin(r); p < pass.begin(r + 1); ++p) {
      const std::int64_t i = pass.row(p);
      std::fill(row_b.begin(), row_b.end(), 0.0);
      pass.b.add(i, pass.m, row_b.data());
      for (std::size_t v = 0; v < row_b.size(); ++v) row_b[v] -= pass.others[v];  // m b - O
      if (to == nullptr) {
        const double over = scale * pass.a.product(i, row_b.data()) - (pass.m * pass.log_q(i) - pass.others_q);
        losses[i] += term.amount * over / (pass.n * ways);
        continue;
      }
      dcorrection[i] += counts(i) * pass.m - count;
      if (da == nullptr) continue;
      std::fill(row_a.begin(), row_a.end(), 0.0);
      pass.a.add(i, counts(i) * pass.m, row_a.data());
      for (std::int64_t v = 0; v < V; ++v) {
        da[i * V + v] += static_cast<float>(gain_a * counts(i) * row_b[size(v)]);
        db[i * V + v] += static_cast<float>(gain_b * (row_a[size(v)] - pass.shares[size(v)]));
      }
    }
  }
  // Extra negatives are everybody's others.
  const bool onto_negatives = to != nullptr && to->more != nullptr && content_to_id && !term.of_item;
  for (std::int64_t k = 0; onto_negatives && k < given_.K * V; ++k) {
    to->more[k] -= static_cast<float>(gain_b * all_shares[size(k % V)]);
  }
}

void LinearTerms::add_losses(double* losses) const {
  for (const Term& term : terms_) {
    if (given_.rows) run(term, true, nullptr, losses, nullptr, nullptr);
    if (given_.cols) run(term, false, nullptr, losses, nullptr, nullptr);
  }
}

void LinearTerms::add_gradients(const double* share, const ContrastGradients& to, double* dcorrection) const {
  for (const Term& term : terms_) {
    if (given_.rows) run(term, true, share, nullptr, &to, dcorrection);
    if (given_.cols) run(term, false, share, nullptr, &to, dcorrection);
  }
}

}  // namespace em3
