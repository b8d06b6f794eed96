// contrastive_loss from the embeddings to the loss, and from its gradient to theirs, in a call each: what lies around the
// matrix of logits then takes no tensors of the size of the embeddings, and few calls where there are few logits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contrastive_loss.h"

namespace em3 {

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

enum class Duplicates { mask, positive, keep };
enum class Reduction { mean, sum, none };

// B rows, M = B + K candidates.
struct WholeContrast {
  bool sigmoid;
  Duplicates duplicates;
  Reduction reduction;
  bool rows, cols;  // content to ID, ID to content: at least one
  bool normalize;
  std::int64_t B, K, V;
  Storage storage;                        // of the embeddings
  const void *content, *ids, *negatives;  // [B, V], [B, V], [K, V], one block each
  double scale, bias, smoothing;
  const std::int64_t* item_ids;  // [B]; null = every row is an item of its own
  const float *log_q, *weight;   // [B]; null = 0 and 1
};

// What the forward leaves for the backward.
struct WholeState {
  double* losses;       // [B], of the rows, without their weights
  double* similarity;   // [B], of the positives, times the scale
  std::int64_t* order;  // [B], of rows by their items; null where these make no difference
  double *row, *col;    // [B], null where the direction is not asked for
  float *inverse;       // lengths, [B] of content and [B + K] of the IDs and negatives; null unless they are normalised
  float* longest;       // one number, see longest_product()
  Kept kept;
};

// It is one block of so many doubles, of which the losses are the first. Only sizes, options and whether there are item ids
// are read.
std::int64_t whole_state_size(const WholeContrast& given, bool keep);
WholeState whole_state(const WholeContrast& given, bool keep, double* memory);

// Null where not wanted, uninitialised where they are.
struct WholeGradients {
  void *content, *ids, *negatives;  // like the embeddings
  double *scale, *bias;
  float *log_q, *weight;  // [B]
};

// Fills the state and returns the loss; for Reduction::none 0, as each row's is its weight times state.losses.
double contrastive_loss_whole_forward(const WholeContrast& given, const ShiftLimits& limits, const WholeState& state,
                                      int threads, Isa isa);

// `upstream` is the gradient to the loss, one number, or one a row for Reduction::none. In half precision two float32
// gradients of the embeddings' shape are there meanwhile.
void contrastive_loss_whole_backward(const WholeContrast& given, const ShiftLimits& limits, const WholeState& state,
                                     const double* upstream, const WholeGradients& to, int threads, Isa isa);

}  // namespace em3
