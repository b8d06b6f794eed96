// What the contrastive loss needs of S = scale x y^T, of which no more than a tile a thread is ever there.
//
// B rows of x, M = N + K candidates in the rows of y, all of width V. Row i's candidates are the j that are neither i
// (where the first N are the rows' own batch) nor of i's item (equal ids, for j < N):
//   row[i] = logsumexp_j (S[i,j] + across[j]), j < M        col[j] = logsumexp_i (S[i,j] + down[i]), i < B, for j < N
// -inf where no candidate is left. The gradient to S is
//   dS[i,j] = drow[i] exp(S[i,j] + across[j] - row[i]) + dcol[j] exp(S[i,j] + down[i] - col[j])
// and gives dx = scale dS y, dy = scale dS^T x, dscale = sum dS (x y^T), and to the offsets the shares of each
// candidate.
#pragma once

#include <cstdint>

#include "isa.h"

namespace em3 {

struct Contrast {
  std::int64_t B, N, M, V;
  bool own;        // row i is column i: N = B, and the columns' ids and first offsets are the rows'
  const float* x;  // [B, V], rows x_stride apart
  std::int64_t x_stride;
  const float* y;  // [M, V], rows y_stride apart
  std::int64_t y_stride;
  float scale;
  const std::int64_t *row_ids, *col_ids;  // [B], [N]; null = every row and column is an item of its own
  const float *down, *across;             // [B], [M], offsets of rows and columns as candidates; null = 0
};

// When one exponential a logit, exp(S - shift) with a single shift, serves rows and columns (exponents of e): logits
// within largest_logit and offsets within largest_spread of each other, shifted to `top` at most; no sum may be under
// `low`. Otherwise, or if a sum is, each row and column has a running maximum of its own.
struct ShiftLimits {
  float top, low, largest_logit, largest_spread;
};

// Everything is float32 unless it says otherwise, outputs are contiguous and may be uninitialised, and null where they
// are not wanted. Temporaries are a few times the size of x and y, and a tile a thread. `threads` is an upper bound;
// the same inputs and bound give the same bits. Both throw std::invalid_argument for sizes they cannot serve.
void contrastive_loss_forward(const Contrast& given, const ShiftLimits& limits, float* row, float* col, int threads,
                              Isa isa);

struct ContrastGradients {
  float* dx;       // [B, V]
  float* dy;       // [M, V]
  double* dscale;  // one number, a sum that may cancel
  float* doffset;  // [M] for a batch's own columns, else [B + M]: of rows, then of columns
};

// row and col as the forward wrote them; one that is null has no gradient, nor has one whose drow or dcol is null.
void contrastive_loss_backward(const Contrast& given, const ShiftLimits& limits, const float* row, const float* col,
                               const float* drow, const float* dcol, const ContrastGradients& to, int threads, Isa isa);

}  // namespace em3
