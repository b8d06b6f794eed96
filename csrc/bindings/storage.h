// What the attention kernels' tokens are stored in.
#pragma once

#include "../cpu/qformer_attention.h"
#include "../tensor.h"

namespace em3 {

inline Storage storage_of(const Tensor& x) {
  if (x.dtype() == "torch.float32") return Storage::f32;
  if (x.dtype() == "torch.bfloat16") return Storage::bf16;
  if (x.dtype() == "torch.float16") return Storage::f16;
  x.fail(x.dtype(), "torch.float32, torch.bfloat16 or torch.float16");
}

}  // namespace em3
