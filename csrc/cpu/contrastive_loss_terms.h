// What several positives and label smoothing add to InfoNCE. It is linear in the logits, so that means of embeddings stand
// for sums over the matrix; all in double precision, since positives cancel each other.
#pragma once

#include <cstdint>
#include <vector>

#include "contrastive_loss_whole.h"

namespace em3 {

class LinearTerms {
 public:
  // The rows of content [B], and of the IDs and the negatives behind them [B + K]; `order` as of item_order(), null = every
  // row is an item of its own. All must outlive this.
  LinearTerms(const WholeContrast& given, const Embeddings& content, const Embeddings& ids, const std::int64_t* order,
              Isa isa);

  bool none() const { return terms_.empty(); }

  // Adds to losses [B].
  void add_losses(double* losses) const;

  // With share[i] what row i's loss, as a mean over the directions, counts in the whole: adds to dx and dy (and `more`) in
  // the form of ContrastGradients, and to dcorrection [B], the gradient to -log_q.
  void add_gradients(const double* share, const ContrastGradients& to, double* dcorrection) const;

 private:
  // A row's own logit less the mean of those of a set, times `amount`. The set is the row's item, or all that is not.
  struct Term {
    double amount;
    bool of_item;
  };
  struct Side {
    const Embeddings* of;
    std::int64_t V;
    Isa isa;
    mutable std::vector<float> room;  // [V]
    const float* row(std::int64_t i) const;
    void add(std::int64_t i, double times, double* to) const;
    double product(std::int64_t i, const double* with) const;
  };
  struct Pass;

  void run(const Term& term, bool content_to_id, const double* share, double* losses, const ContrastGradients* to,
           double* dcorrection) const;

  const WholeContrast& given_;
  Side content_, ids_;
  std::vector<Term> terms_;
  const std::int64_t* order_;
  std::vector<std::int64_t> begins_;  // where each item begins in that order
};

}  // namespace em3
