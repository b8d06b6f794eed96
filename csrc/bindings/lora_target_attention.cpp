// The kernel is that of qformer_attention: one stream whose tokens are rows of the bank, looked up.
#include <cstdint>
#include <string>

#include "../cpu/isa.h"
#include "../cpu/qformer_attention.h"
#include "../tensor.h"
#include "bindings.h"

namespace py = pybind11;

namespace em3 {
namespace {

Tensor tensor(const py::handle& given, const std::string& name) { return {given, "lora_target_attention: " + name}; }

// What forward and backward have in common; u fixes the sizes.
struct TargetCall {
    Sizes by_user;  // [H, B, M, C]
    Shape shape;
    const float* u;
    float *y, *lse;
    TokenStream tokens;

    TargetCall(const py::object& u_given, const py::object& history, const py::object& offsets, const py::object& bank,
               const py::object& y_given, const py::object& lse_given) {
        const Tensor u_tensor = tensor(u_given, "u");
        u_tensor.require_shape({-1, -1, -1, -1});
        by_user = u_tensor.shape();
        shape = {by_user[1], by_user[0], by_user[2], false};
        u = u_tensor.block<const float>(by_user);
        y = tensor(y_given, "y").block<float>(by_user);
        lse = tensor(lse_given, "lse").block<float>({shape.H, shape.B, shape.Q});
        const Tensor rows = tensor(bank, "bank"), places = tensor(history, "history");
        rows.require_shape({-1, by_user[3]});
        const bool padded = offsets.is_none();
        places.require_shape(padded ? Sizes{shape.B, -1} : Sizes{-1});
        tokens = {};
        tokens.x = rows.rows<const float>(rows.shape());
        tokens.x_rows = rows.shape()[0];
        tokens.token_stride = rows.stride(0);
        tokens.C = by_user[3];
        tokens.n = places.shape().back();
        tokens.lookup = places.block<const std::int64_t>(places.shape());
        if (!padded) tokens.offsets = tensor(offsets, "offsets").block<const std::int64_t>({shape.B + 1});
    }
};

constexpr const char* kForward = R"(The forward of em3::lora_target_attention, on float32 CPU tensors.

u: [H, B, M, C]. history: int64 row numbers [B, N], or [T] with offsets [B + 1] int64; one outside the bank is no item.
bank: [n, C], its rows in one piece each. Writes y [H, B, M, C] and lse [H, B, M]. Everything else is contiguous.
isa: "" for the widest instruction set of this processor.)";

void forward(const py::object& u, const py::object& history, const py::object& offsets, const py::object& bank,
             const py::object& y, const py::object& lse, int threads, const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const TargetCall call(u, history, offsets, bank, y, lse);
    py::gil_scoped_release release;
    qformer_attention_forward(call.shape, {{call.tokens, call.u, nullptr, call.y, nullptr}}, call.lse, threads, path);
}

constexpr const char* kBackward = R"(The backward of em3::lora_target_attention, on float32 CPU tensors.

dy as y, and what the forward read and wrote. Writes du [H, B, M, C] and dx [N or T..., C], the gradient of what each
place of the history read, zeros where there is no item; each is None where it is not wanted.)";

void backward(const py::object& dy, const py::object& u, const py::object& history, const py::object& offsets,
              const py::object& bank, const py::object& y, const py::object& lse, const py::object& du,
              const py::object& dx, int threads, const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const TargetCall call(u, history, offsets, bank, y, lse);
    const float* const read = tensor(dy, "dy").block<const float>(call.by_user);
    float* const to_u = du.is_none() ? nullptr : tensor(du, "du").block<float>(call.by_user);
    float* to_x = nullptr;
    if (!dx.is_none()) {
        Sizes shape = tensor(history, "history").shape();
        shape.push_back(call.tokens.C);
        to_x = tensor(dx, "dx").block<float>(shape);
    }
    py::gil_scoped_release release;
    qformer_attention_backward(
        call.shape, {{call.tokens, call.u, nullptr, call.y, nullptr, read, nullptr, to_u, nullptr, to_x}}, call.lse,
        threads, path);
}

}  // namespace

void bind_lora_target_attention(py::module_& m) {
    m.def("lora_target_attention_forward", &forward, py::arg("u"), py::arg("history"), py::arg("offsets"),
          py::arg("bank"), py::arg("y"), py::arg("lse"), py::arg("threads"), py::arg("isa") = "", kForward);
    m.def("lora_target_attention_backward", &backward, py::arg("dy"), py::arg("u"), py::arg("history"),
          py::arg("offsets"), py::arg("bank"), py::arg("y"), py::arg("lse"), py::arg("du"), py::arg("dx"),
          py::arg("threads"), py::arg("isa") = "", kBackward);
}

}  // namespace em3
