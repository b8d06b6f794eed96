// contrastive_loss from the embeddings to the loss and its gradients in one call, for batches so small that calls cost
// more than arithmetic.
#pragma once

#include <cstdint>

#include "contrastive_loss.h"

namespace em3 {

// B rows, M = B + K candidates. InfoNCE with masked duplicates; a sum of the rows' losses or their mean, each by weight.
struct WholeContrast {
  std::int64_t B, K, V;
  const float *content, *ids, *negatives;  // [B, V], [B, V], [K, V], one block each
  double scale;
  const std::int64_t* item_ids;  // [B]; null = every row is an item of its own
  const float *log_q, *weight;   // [B]; null = 0 and 1
  bool rows, cols;               // content to ID, ID to content: at least one
  bool mean, normalize;
};

// Null where not wanted, uninitialised where they are.
struct WholeGradients {
  float *content, *ids, *negatives;  // like the embeddings
  double* scale;
  float *log_q, *weight;  // [B]
};

// The loss; `to` gets its gradients.
double contrastive_loss_whole(const WholeContrast& given, const ShiftLimits& limits, const WholeGradients& to,
                              int threads, Isa isa);

}  // namespace em3
