// One file an operation. Functions take tensors and read them through their Python attributes (tensor.h): no torch header
// is included, so one build works with every torch release.
#pragma once

#include <pybind11/pybind11.h>

namespace em3 {

void bind_qformer_attention(pybind11::module_& m);
void bind_lora_target_attention(pybind11::module_& m);
void bind_contrastive_loss(pybind11::module_& m);
void bind_lora_linear(pybind11::module_& m);
void bind_mean_rows(pybind11::module_& m);

}  // namespace em3
