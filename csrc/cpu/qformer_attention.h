// The core of attention where few queries read many tokens. The key and value projections are absorbed into the
// queries, so keys = values = the raw token rows x.
//
// B items, Q queries a head, H heads, K = H*Q rows r = (h, q), M streams of tokens, C_m the width of stream m. For
// item b, over every present token t of every stream m (one softmax for all streams):
//   s[r,t] = dot(u_m[r], x_m[t]) + c_m[r] + bias_m[t,h]        p = softmax_t(s)        lse[r] = logsumexp_t(s[r,t])
//   y_m[r] = sum_t p[r,t] x_m[t]                 mass_m[r] = sum_t p[r,t]
//   o[r] = sum_m w_m,h y_m[r], the values of head h, E wide
// An item with no present token has y = 0, o = 0, mass = 0, lse = -inf and zero gradients.
//
// Everything is float32, except that tokens may be stored in half precision, and contiguous unless a stride is named. With
// `pairs` the products with tokens multiply numbers in bf16: u, dy, p and ds are rounded to it, sums are float32.
// Outputs may be uninitialised: every element is written.
#pragma once

#include <cstdint>
#include <vector>

#include "dropout.h"
#include "isa.h"
#include "storage.h"

namespace em3 {

constexpr int kMaxStreams = 8;

// Padded (offsets == nullptr): item b has n tokens, token t at x + b*item_stride + t*token_stride.
// Jagged: x has n rows in all, item b owns rows offsets[b] .. offsets[b+1].
// With a lookup those are places in it, and token t is row lookup[t] of x, which has x_rows rows; one outside is absent.
struct TokenStream {
  const void* x;
  Storage storage;
  std::int64_t item_stride;   // in elements; unused when jagged or looked up
  std::int64_t token_stride;  // in elements; the C numbers of a token are adjacent
  std::int64_t n;
  std::int64_t C;
  const std::int64_t* offsets;   // [B+1], from 0, never falling, at most n; or null
  const std::uint8_t* mask;      // 1 = present: [B, n] with mask_item_stride, jagged [n]; null = all present
  std::int64_t mask_item_stride;
  const std::int64_t* lookup;  // [B, n], jagged [n]; null = tokens in place. Not together with a mask
  std::int64_t x_rows;
  const float* bias;  // [B, n, H], jagged [n, H]: added to the scores of a token's head; null = 0
};

struct Shape {
  std::int64_t B, H, Q, E;
  bool shared_u;  // u and c have no item dimension: Bu = 1, else Bu = B
  Dropout drop = {};  // y and mass take p times the factor of its place
  bool pairs = false;  // only where every stream is stored in bf16 with an even C and even strides
  bool parts = false;  // items are parts of others, whose y is not theirs
  bool sigmoid = false;  // p = sigmoid(s), which no sum divides, and lse = 0; of one stream, without mass and dropout
  std::int64_t K() const { return H * Q; }
};

struct ForwardStream {
  TokenStream tokens;
  const float* u;  // [H, Bu, Q, C]
  const float* c;  // [H, Bu, Q], null = 0
  const float* w;  // [H, E, C]
  float* y;        // [H, B, Q, C]
  float* mass;     // [H, B, Q], null = not wanted
};

struct BackwardStream {
  TokenStream tokens;
  const float* u;
  const float* c;
  const float* w;
  const float* y;      // [H, B, Q, C], read only with dw or pairs
  const float* mass;   // [H, B, Q], read only with dmass
  const float* dmass;  // [H, B, Q], null = 0
  float* du;           // [H, Bu, Q, C], null = not wanted
  float* dc;           // [H, Bu, Q], null = not wanted
  float* dw;           // [H, E, C], null = not wanted
  void* dx;            // [B, n, C] or [n, C] (looked up: a row for each place), contiguous, null = not wanted
  Storage dx_storage;  // sums are float32 before they are stored
  float* dbias;        // as bias, all zeros at first; null = not wanted
};

// Both throw std::invalid_argument for sizes they cannot serve and offsets that would lead outside x. `threads` is an
// upper bound. The same inputs and thread count give the same bits. o and dout, the gradient to it, are [H, B, Q, E].
void qformer_attention_forward(const Shape& shape, const std::vector<ForwardStream>& streams, float* o, float* lse,
                               int threads, Isa isa);
void qformer_attention_backward(const Shape& shape, const std::vector<BackwardStream>& streams, const float* dout,
                                const float* o, const float* lse, int threads, Isa isa);

}  // namespace em3
