// The low-rank part of a linear layer with adapters, added to what the layer itself gave; the layer's own products are
// others' work.
//
// T rows of x (C wide) and y (D wide), G adapters of rank R. For row i with adapter g, s = scaling scalings[g] and xd = x_i
// times the dropout factors of its places (token i, row c):
//   y_i += s (xd A_g^T) B_g^T
// and with d = s dy_i B_g:   dx_i += (d A_g) times the factors   dA_g = sum_i d^T xd   dB_g = s sum_i dy_i^T (xd A_g^T)
// A row without an adapter is left as it is.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "isa.h"
#include "storage.h"

namespace em3 {

// Rows of numbers that lie side by side, `stride` elements from one row to the next.
struct Rows {
  void* first;
  Storage storage;
  std::int64_t stride;
};

struct LoraLinear {
  std::int64_t T, C, D, G, R;
  const void *a, *b;  // [G, R, C], [G, D, R]
  Storage factors;    // of both, and of their gradients; an adapter becomes floats where it has rows
  float scaling;
  const float* scalings;  // [G], null = 1
  // At most one of them: the adapter of each row, [T], outside 0 .. G - 1 for none; or [G + 1], from 0, never falling, at
  // most T: rows offsets[g] .. offsets[g + 1] - 1 are adapter g's, and the rows behind nobody's. Neither: adapter 0's.
  const std::int64_t *adapter, *offsets;
  Dropout drop;
};

struct LoraGradients {
  Rows dx;        // [T, C], to be added to; first is null where it is not wanted
  void *da, *db;  // like a and b, and may be uninitialised; null where not wanted
};

// Both throw std::invalid_argument for sizes they cannot serve and offsets that lead outside. Sums over an adapter's rows
// are cut where the sizes alone say, so that any number of threads gives the same bits; they take at most half of what x
// and dy take, and 64 times what one adapter does. x is read where da or db is wanted, and may be null otherwise.
void lora_linear_forward(const LoraLinear& given, const Rows& x, const Rows& y, int threads, Isa isa);
void lora_linear_backward(const LoraLinear& given, const Rows& dy, const Rows& x, const LoraGradients& to, int threads,
                          Isa isa);

}  // namespace em3
