// The kernel is that of qformer_attention: one stream whose tokens are rows of the bank, looked up.
#include <cstdint>
#include <string>

#include "../cpu/isa.h"
#include "../cpu/qformer_attention.h"
#include "../tensor.h"
#include "bindings.h"
#include "storage.h"

namespace py = pybind11;

namespace em3 {
namespace {

Tensor tensor(const py::handle& given, const std::string& name) { return {given, "lora_target_attention: " + name}; }

// What forward and backward have in common; u and w fix the sizes.
struct TargetCall {
    Sizes by_user;   // [H, B, M, C]
    Sizes by_value;  // [H, E, C]
    Sizes of_out;    // [H, B, M, E]
    Sizes by_place;  // [B, N, H] or [T, H]
    Shape shape;
    const float *u, *w;
    float *y, *o, *lse;
    TokenStream tokens;

    TargetCall(const py::object& u_given, const py::object& w_given, const py::object& history, const py::object& offsets,
               const py::object& bank, const py::object& bias, const py::object& y_given, const py::object& o_given,
               const py::object& lse_given, bool sigmoid) {
        const Tensor u_tensor = tensor(u_given, "u");
        u_tensor.require_shape({-1, -1, -1, -1});
        by_user = u_tensor.shape();
        const Tensor w_tensor = tensor(w_given, "w");
        w_tensor.require_shape({by_user[0], -1, by_user[3]});
        by_value = w_tensor.shape();
        shape = {by_user[1], by_user[0], by_user[2], by_value[1], false};
        shape.sigmoid = sigmoid;
        of_out = {shape.H, shape.B, shape.Q, shape.E};
        w = w_tensor.block<const float>(by_value);
        o = tensor(o_given, "o").block<float>(of_out);
        u = u_tensor.block<const float>(by_user);
        y = tensor(y_given, "y").block<float>(by_user);
        lse = tensor(lse_given, "lse").block<float>({shape.H, shape.B, shape.Q});
        const Tensor rows = tensor(bank, "bank"), places = tensor(history, "history");
        rows.require_shape({-1, by_user[3]});
        const bool padded = offsets.is_none();
        places.require_shape(padded ? Sizes{shape.B, -1} : Sizes{-1});
        tokens = {};
        tokens.storage = storage_of(rows);
        tokens.x = rows.rows_of_any(rows.shape());
        tokens.x_rows = rows.shape()[0];
        tokens.token_stride = rows.stride(0);
        tokens.C = by_user[3];
        tokens.n = places.shape().back();
        tokens.lookup = places.block<const std::int64_t>(places.shape());
        if (!padded) tokens.offsets = tensor(offsets, "offsets").block<const std::int64_t>({shape.B + 1});
        by_place = places.shape();
        by_place.push_back(shape.H);
        if (!bias.is_none()) tokens.bias = tensor(bias, "bias").block<const float>(by_place);
    }
};

constexpr const char* kForward = R"(The forward of em3::lora_target_attention, on float32 CPU tensors; the bank may be
bfloat16 or float16.

u: [H, B, M, C]. w: [H, E, C]. history: int64 row numbers [B, N], or [T] with offsets [B + 1] int64; one outside the bank
is no item. bank: [n, C], its rows in one piece each. bias: [B, N, H] or [T, H], added to scores, or None. Writes y [H, B, M, C], o [H, B, M, E] and lse [H, B, M]. Everything
else is contiguous. isa: "" for the widest instruction set of this processor. sigmoid: weights are sigmoids of the scores,
not their softmax; lse is then 0.)";

void forward(const py::object& u, const py::object& w, const py::object& history, const py::object& offsets,
             const py::object& bank, const py::object& bias, const py::object& y, const py::object& o, const py::object& lse,
             int threads, const std::string& isa, bool sigmoid) {
    const Isa path = resolve_isa(isa);
    const TargetCall call(u, w, history, offsets, bank, bias, y, o, lse, sigmoid);
    py::gil_scoped_release release;
    qformer_attention_forward(call.shape, {{call.tokens, call.u, nullptr, call.w, call.y, nullptr}}, call.o, call.lse,
                              threads, path);
}

constexpr const char* kBackward = R"(The backward of em3::lora_target_attention, on float32 CPU tensors.

dout as o, and what the forward read and wrote. Writes du [H, B, M, C], dw [H, E, C] and dx [B, N, C] or [T, C], the
gradient of what each place of the history read, zeros where there is no item; each is None where it is not wanted. Adds to
dbias, as bias, the gradient of what was added to the scores; None where it is not wanted.)";

void backward(const py::object& dout, const py::object& u, const py::object& w, const py::object& history,
              const py::object& offsets, const py::object& bank, const py::object& bias, const py::object& y,
              const py::object& o, const py::object& lse, const py::object& du, const py::object& dw, const py::object& dx,
              const py::object& dbias, int threads, const std::string& isa, bool sigmoid) {
    const Isa path = resolve_isa(isa);
    const TargetCall call(u, w, history, offsets, bank, bias, y, o, lse, sigmoid);
    const float* const to_o = tensor(dout, "dout").block<const float>(call.of_out);
    float* const to_u = du.is_none() ? nullptr : tensor(du, "du").block<float>(call.by_user);
    float* const to_w = dw.is_none() ? nullptr : tensor(dw, "dw").block<float>(call.by_value);
    float* to_x = nullptr;
    if (!dx.is_none()) {
        Sizes shape = tensor(history, "history").shape();
        shape.push_back(call.tokens.C);
        to_x = tensor(dx, "dx").block<float>(shape);
    }
    float* const to_bias = dbias.is_none() ? nullptr : tensor(dbias, "dbias").block<float>(call.by_place);
    const BackwardStream stream{call.tokens, call.u,  nullptr, call.w, call.y, nullptr,
                                nullptr,     to_u,    nullptr, to_w,   to_x,   Storage::f32, to_bias};
    py::gil_scoped_release release;
    qformer_attention_backward(call.shape, {stream}, to_o, call.o, call.lse, threads, path);
}

}  // namespace

void bind_lora_target_attention(py::module_& m) {
    m.def("lora_target_attention_forward", &forward, py::arg("u"), py::arg("w"), py::arg("history"), py::arg("offsets"),
          py::arg("bank"), py::arg("bias"), py::arg("y"), py::arg("o"), py::arg("lse"), py::arg("threads"),
          py::arg("isa") = "", py::arg("sigmoid") = false, kForward);
    m.def("lora_target_attention_backward", &backward, py::arg("dout"), py::arg("u"), py::arg("w"), py::arg("history"),
          py::arg("offsets"), py::arg("bank"), py::arg("bias"), py::arg("y"), py::arg("o"), py::arg("lse"), py::arg("du"),
          py::arg("dw"), py::arg("dx"), py::arg("dbias"), py::arg("threads"), py::arg("isa") = "",
          py::arg("sigmoid") = false, kBackward);
}

}  // namespace em3
