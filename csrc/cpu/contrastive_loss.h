// What the contrastive losses need of S = scale x y^T, of which no more than a tile a thread has to be there.
//
// B rows of x, M = N + K candidates in the rows of y, all of width V. Row i's candidates are the j that are neither i
// (where the first N are the rows' own batch) nor of i's item (equal ids, for j < N):
//   infonce  row[i] = logsumexp_j (S[i,j] + across[j]), j < M     col[j] = logsumexp_i (S[i,j] + down[i]), i < B, for j < N
//   sigmoid  row[i] = sum_j softplus(S[i,j] + bias + across[j])   col[j] = sum_i softplus(S[i,j] + bias + down[i])
// -inf, and 0, where no candidate is left. With sigmoid_positive the others of i's item are candidates too, whose softplus
// is of the negated logit. The gradient to S is, with sigma and its sign in place of the exponentials for the sigmoids,
//   dS[i,j] = drow[i] exp(S[i,j] + across[j] - row[i]) + dcol[j] exp(S[i,j] + down[i] - col[j])
// and gives dx = scale dS y, dy = scale dS^T x, dscale = sum dS (x y^T), dbias = sum dS, and to the offsets the shares of
// each candidate.
#pragma once

#include <cstdint>

#include "isa.h"
#include "storage.h"

namespace em3 {

enum class ContrastKind { infonce, sigmoid, sigmoid_positive };

// Rows of embeddings in two pieces of one type, of which the second may be empty.
struct Embeddings {
  const void* rows;
  std::int64_t stride;  // in elements
  std::int64_t count;   // of the first piece
  const void* more;     // the rest, side by side
  const float* factor;  // what each row is multiplied by before all else, its inverse length; null = 1
  Storage storage;
};

struct Contrast {
  ContrastKind kind;
  std::int64_t B, N, M, V;
  bool own;         // row i is column i: N = B, and the columns' ids and first offsets are the rows'
  Embeddings x, y;  // [B, V], [M, V]
  double scale, bias;
  const std::int64_t *row_ids, *col_ids;  // [B], [N]; null = every row and column is an item of its own
  const float *down, *across;             // [B], [M], offsets of rows and columns as candidates; null = 0
  const std::int64_t* order;  // [B], what item_order() makes of the ids of an own batch; null = to be made
  const float* longest;       // what longest_product() finds; null = to be found
};

// When one exponential a logit, exp(S - shift) with a single shift, serves rows and columns (exponents of e): logits
// within largest_logit and offsets within largest_spread of each other, shifted to `top` at most; no sum may be under
// `low`. Otherwise, or if a sum is, each row and column has a running maximum of its own.
struct ShiftLimits {
  float top, low, largest_logit, largest_spread;
};

// The logits of a matrix that is small enough, kept from the forward for the backward: [B, stride], stride at least M
// rounded up to kKeptUnit. Null = the backward makes them again.
constexpr std::int64_t kKeptUnit = 32;
struct Kept {
  float* logits;
  std::int64_t stride;
};

// Everything but the rows is float32 unless it says otherwise, outputs are contiguous and null where they are not wanted. row
// and col are in double precision: what float32 cuts off a logsumexp near 1,000 would be in all of its row's gradient. They are
// those of the scale as the matrix has it, rounded_scale().
// Beside them there are some numbers a row, and a tile and the rows that it meets a thread. `threads` is an upper bound; the
// same inputs and bound give the same bits. Both throw std::invalid_argument for sizes they cannot serve.
void contrastive_loss_forward(const Contrast& given, const ShiftLimits& limits, double* row, double* col, const Kept& kept,
                              int threads, Isa isa);

// Those to x and y are added to what is there, which is part of the gradient too: of x before the scale, of y behind
// it. What comes out are gradients to the rows times their factors, of which finish_gradients() makes those to the rows.
struct ContrastGradients {
  float* dx;        // [B, V]
  float* dy;        // [M, V], of which the rows of the first piece
  float* more;      // and those of the rest; null = none of these
  double* dbias;    // one number
  float* doffset;   // [M] for a batch's own columns, else [B + M]: of rows, then of columns
};

// row and col as the forward wrote them, which the sigmoids do not need; one that is null has no gradient, nor has one
// whose drow or dcol is null.
void contrastive_loss_backward(const Contrast& given, const ShiftLimits& limits, const double* row, const double* col,
                               const float* drow, const float* dcol, const Kept& kept, const ContrastGradients& to,
                               int threads, Isa isa);

// The gradients to rows begin to end as they came, times scale, from those to the rows times their factors: from [end -
// begin, V] to the same of the rows' type, which may be `from` itself; null = not wanted. Returns the sum of the products of
// rows and gradients before the scale, which is the gradient to it where the rows are those of x.
double finish_gradients(const Embeddings& of, std::int64_t begin, std::int64_t end, std::int64_t V, double scale,
                        const float* from, void* to, int threads, Isa isa);

// The rows in the order of their ids.
void item_order(const std::int64_t* ids, std::int64_t n, std::int64_t* order);

// No product of a row of x and one of y, before the scale, is larger; NaN if one may be NaN.
float longest_product(const Contrast& given, int threads, Isa isa);

// What a row's products count as logits, as the matrix has it, where rounding to float32 has moved the scale.
double rounded_scale(double scale, const float* factor);

// The products of n rows of a and b, or the inverse lengths of n rows: 0 for one no longer than 1e-12, NaN for one of
// infinite length.
void row_products(const Embeddings& a, const Embeddings& b, std::int64_t n, std::int64_t V, double* to, int threads, Isa isa);
void inverse_lengths(const Embeddings& of, std::int64_t n, std::int64_t V, float* to, int threads, Isa isa);

// Row i as floats: where it lies, or copied to `room` [V].
const float* row_as_floats(const Embeddings& of, std::int64_t i, std::int64_t V, float* room, Isa isa);

}  // namespace em3
