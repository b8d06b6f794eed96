// The low-rank part of the operator em3::lora_linear on the CPU.
#include <cstdint>
#include <string>

#include "../cpu/isa.h"
#include "../cpu/lora_linear.h"
#include "../tensor.h"
#include "bindings.h"
#include "storage.h"

namespace py = pybind11;

namespace em3 {
namespace {

Tensor tensor(const py::handle& given, const std::string& name) { return {given, "lora_linear: " + name}; }

template <class T>
T* block_or_null(const py::object& given, const std::string& name, const Sizes& shape) {
    return given.is_none() ? nullptr : tensor(given, name).block<T>(shape);
}

Rows rows_of(const Tensor& t, const Sizes& shape) {
    void* const first = t.rows_of_any(shape);
    return {first, storage_of(t), t.stride(0)};
}

Rows rows(const py::object& given, const std::string& name, const Sizes& shape) {
    return given.is_none() ? Rows{} : rows_of(tensor(given, name), shape);
}

// Of a shape [G, ., .], or of one adapter without the first dimension.
void* factors(const Tensor& t, Sizes shape, Storage storage) {
    if (shape[0] == 1 && t.shape().size() == 2) shape.erase(shape.begin());
    t.require_shape(shape);
    if (storage_of(t) != storage) t.fail(t.dtype(), "of the dtype of a");
    return t.block_of_any(shape);
}

void* factors_or_null(const py::object& given, const std::string& name, const Sizes& shape, Storage storage) {
    return given.is_none() ? nullptr : factors(tensor(given, name), shape, storage);
}

LoraLinear lora_linear(const py::object& a, const py::object& b, float scaling, const py::object& scalings,
                       const py::object& adapter, const py::object& offsets, const py::object& drop, std::int64_t T) {
    const Tensor of_a = tensor(a, "a"), of_b = tensor(b, "b");
    const bool one = of_a.shape().size() == 2;  // [R, C] and [D, R]
    of_a.require_shape(one ? Sizes{-1, -1} : Sizes{-1, -1, -1});
    const std::int64_t G = one ? 1 : of_a.shape()[0], R = *(of_a.shape().end() - 2), C = of_a.shape().back();
    of_b.require_shape(one ? Sizes{-1, R} : Sizes{G, -1, R});
    const std::int64_t D = *(of_b.shape().end() - 2);
    const Storage storage = storage_of(of_a);
    if (!adapter.is_none() && !offsets.is_none()) tensor(adapter, "adapter").fail("given with offsets", "one of the two");
    if (adapter.is_none() && offsets.is_none() && G != 1) of_a.fail(std::to_string(G) + " adapters", "1 when all rows share it");
    return {T, C, D, G, R, factors(of_a, {G, R, C}, storage), factors(of_b, {G, D, R}, storage), storage, scaling,
            block_or_null<const float>(scalings, "scalings", {G}), block_or_null<const std::int64_t>(adapter, "adapter", {T}),
            block_or_null<const std::int64_t>(offsets, "offsets", {G + 1}), dropout_of(drop)};
}

// Of a tensor [T, width].
std::int64_t count(const Tensor& t) {
    t.require_shape({-1, -1});
    return t.shape()[0];
}

constexpr const char* kForward = R"(Adds to y [T, D] what adapters make of x [T, C].

a: [G, R, C] and b: [G, D, R], or [R, C] and [D, R], both float32, bfloat16 or float16, contiguous. scalings: float32 [G] or
None. adapter: int64 [T], or offsets: int64 [G + 1], or both None, when G must be 1. x and y: float32, bfloat16 or float16,
their rows in one piece each. drop: None or (threshold, factor, seed). isa: "" for the widest instruction set of this processor.)";

void forward(const py::object& x, const py::object& a, const py::object& b, float scaling, const py::object& scalings,
             const py::object& adapter, const py::object& offsets, const py::object& y, const py::object& drop, int threads,
             const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const Tensor of_x = tensor(x, "x");
    const LoraLinear given = lora_linear(a, b, scaling, scalings, adapter, offsets, drop, count(of_x));
    const Rows from = rows_of(of_x, {given.T, given.C}), to = rows(y, "y", {given.T, given.D});
    py::gil_scoped_release release;
    lora_linear_forward(given, from, to, threads, path);
}

constexpr const char* kBackward = R"(The gradients of the same, from dy [T, D].

Adds to dx [T, C], and writes da and db, which are like a and b; each is None where it is not wanted. x may be None where
neither da nor db is wanted.)";

void backward(const py::object& dy, const py::object& x, const py::object& a, const py::object& b, float scaling,
              const py::object& scalings, const py::object& adapter, const py::object& offsets, const py::object& dx,
              const py::object& da, const py::object& db, const py::object& drop, int threads, const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const Tensor of_dy = tensor(dy, "dy");
    const LoraLinear given = lora_linear(a, b, scaling, scalings, adapter, offsets, drop, count(of_dy));
    const Sizes wide{given.T, given.C};
    const Rows from = rows_of(of_dy, {given.T, given.D}), input = rows(x, "x", wide);
    const LoraGradients to{rows(dx, "dx", wide), factors_or_null(da, "da", {given.G, given.R, given.C}, given.factors),
                           factors_or_null(db, "db", {given.G, given.D, given.R}, given.factors)};
    if (x.is_none() && (to.da != nullptr || to.db != nullptr)) {
        throw std::invalid_argument("lora_linear: x: was None, must be given for da or db");
    }
    py::gil_scoped_release release;
    lora_linear_backward(given, from, input, to, threads, path);
}

}  // namespace

void bind_lora_linear(py::module_& m) {
    m.def("lora_linear_forward", &forward, py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scaling"), py::arg("scalings"),
          py::arg("adapter"), py::arg("offsets"), py::arg("y"), py::arg("drop"), py::arg("threads"), py::arg("isa") = "",
          kForward);
    m.def("lora_linear_backward", &backward, py::arg("dy"), py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scaling"),
          py::arg("scalings"), py::arg("adapter"), py::arg("offsets"), py::arg("dx"), py::arg("da"), py::arg("db"),
          py::arg("drop"), py::arg("threads"), py::arg("isa") = "", kBackward);
}

}  // namespace em3
