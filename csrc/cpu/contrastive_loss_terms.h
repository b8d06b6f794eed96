// What several positives and label smoothing add to InfoNCE. It is linear in the logits, so that means of embeddings stand
// for sums over the matrix; all in double precision, since positives cancel each other.
#pragma once

#include <cstdint>
#include <vector>

#include "contrastive_loss_whole.h"

namespace em3 {

class LinearTerms {
 public:
  // factors: of the rows, as in Embeddings; [B] of content, [B + K] of the IDs and the negatives behind them.
  LinearTerms(const WholeContrast& given, const float* of_content, const float* of_ids);

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
    const float *rows, *factor;
    std::int64_t V;
    void add(std::int64_t i, double times, double* to) const;
    double product(std::int64_t i, const double* with) const;
  };
  struct Pass;

  void run(const Term& term, bool content_to_id, const double* share, double* losses, const ContrastGradients* to,
           double* dcorrection) const;

  const WholeContrast& given_;
  Side content_, ids_, negatives_;
  std::vector<Term> terms_;
  std::vector<std::int64_t> order_, begins_;  // rows in the order of their items, and where each item begins
};

}  // namespace em3
