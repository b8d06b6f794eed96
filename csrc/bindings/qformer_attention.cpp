// Lists hold one entry a stream, None where there is none.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/qformer_attention.h"
#include "../tensor.h"
#include "bindings.h"
#include "storage.h"

namespace py = pybind11;

namespace em3 {
namespace {

py::list one_each(const py::list& given, std::size_t count, const std::string& name) {
    if (given.size() == count) return given;
    throw std::invalid_argument("qformer_attention: " + name + ": held " + std::to_string(given.size()) +
                                " entries, must hold one for each of the " + std::to_string(count) + " streams");
}

Tensor tensor(const py::handle& given, const std::string& name) { return {given, "qformer_attention: " + name}; }

Tensor tensor(const py::handle& given, const std::string& name, std::size_t m) {
    return tensor(given, name + "[" + std::to_string(m) + "]");
}

// One contiguous float tensor a stream, all of them [outer..., C_m].
struct PerStream {
    py::list given;
    std::string name;
    Sizes outer;

    float* operator()(std::size_t m, std::int64_t C) const {
        Sizes shape = outer;
        shape.push_back(C);
        return tensor(given[m], name, m).block<float>(shape);
    }
};

// [M, H, items, Q] in one block, or null for None: the part of stream m.
struct Stacked {
    float* first = nullptr;
    std::int64_t step = 0;

    Stacked(const py::object& given, const std::string& name, const Sizes& shape) {
        if (given.is_none()) return;
        first = tensor(given, name).block<float>(shape);
        step = shape[1] * shape[2] * shape[3];
    }
    float* operator[](std::size_t m) const {
        return first == nullptr ? nullptr : first + static_cast<std::int64_t>(m) * step;
    }
};

// What forward and backward have in common: the sizes, which lse, u and o fix, and the tokens.
struct QformerCall {
    Shape shape;
    std::int64_t M, Bu;
    float *o, *lse;
    std::vector<TokenStream> tokens;

    QformerCall(const py::list& u, const py::list& values, const py::list& offsets, const py::list& masks,
                const py::object& o_given, const py::object& lse_given, const py::object& drop, bool pairs, bool parts) {
        const Tensor lse_tensor = tensor(lse_given, "lse");
        lse_tensor.require_shape({-1, -1, -1});
        const Sizes sizes = lse_tensor.shape();  // [H, B, Q]
        lse = lse_tensor.block<float>(sizes);
        M = static_cast<std::int64_t>(values.size());
        one_each(u, values.size(), "u");
        one_each(offsets, values.size(), "offsets");
        one_each(masks, values.size(), "masks");
        if (M == 0) throw std::invalid_argument("qformer_attention: values: was empty, must hold at least one stream");
        const Tensor first = tensor(u[0], "u", 0);
        first.require_shape({sizes[0], -1, sizes[2], -1});
        const bool shared = first.shape()[1] == 1 && sizes[1] != 1;
        const Tensor o_tensor = tensor(o_given, "o");
        o_tensor.require_shape({sizes[0], sizes[1], sizes[2], -1});
        o = o_tensor.block<float>(o_tensor.shape());
        shape = {sizes[1], sizes[0], sizes[2], o_tensor.shape()[3], shared};
        shape.drop = dropout_of(drop);
        shape.pairs = pairs;
        shape.parts = parts;
        Bu = shared ? 1 : shape.B;
        for (std::size_t m = 0; m < values.size(); ++m) tokens.push_back(stream(m, values[m], offsets[m], masks[m]));
    }

    Sizes by_item() const { return {shape.H, shape.B, shape.Q}; }
    Sizes by_query() const { return {shape.H, Bu, shape.Q}; }
    Sizes by_value() const { return {shape.H, shape.E}; }
    Sizes stacked(const Sizes& of_one) const { return {M, of_one[0], of_one[1], of_one[2]}; }

 private:
    TokenStream stream(std::size_t m, const py::handle& values, const py::handle& offsets,
                            const py::handle& mask) const {
        const Tensor x = tensor(values, "values", m);
        const bool padded = offsets.is_none();
        x.require_shape(padded ? Sizes{shape.B, -1, -1} : Sizes{-1, -1});
        const Sizes& sizes = x.shape();
        TokenStream s{};
        s.storage = storage_of(x);
        s.x = x.rows_of_any(sizes);
        s.item_stride = padded ? x.stride(0) : 0;
        s.token_stride = x.stride(sizes.size() - 2);
        s.n = sizes[sizes.size() - 2];
        s.C = sizes.back();
        if (!padded) s.offsets = tensor(offsets, "offsets", m).block<const std::int64_t>({shape.B + 1});
        if (mask.is_none()) return s;
        const Sizes places(sizes.begin(), sizes.end() - 1);
        s.mask = tensor(mask, "masks", m).block<const std::uint8_t>(places);
        s.mask_item_stride = padded ? s.n : 0;
        return s;
    }
};

constexpr const char* kQformerForward = R"(The forward of em3::qformer_attention, on float32 CPU tensors; the values may be
bfloat16 or float16.

u: [H, Bu, Q, C_m] each, Bu = 1 where all B items share them. c: [M, H, Bu, Q] or None. w: [H, E, C_m] each. values:
[B, n, C_m] each, or [T, C_m] with offsets [B + 1] int64. masks: [B, n] or [T] bool each, or None. Writes y
[H, B, Q, C_m] each, o [H, B, Q, E], mass [M, H, B, Q] and lse [H, B, Q]. Everything is contiguous but values, which only
have their rows in one piece. drop: None, or below which of 2^24 a weight is dropped, what the others are multiplied with,
and a seed. isa: "" for the widest instruction set of this processor. pairs: whether the products with tokens multiply
numbers in bf16; then all values are bfloat16, with even widths and strides. parts: whether items are parts of others.)";

void qformer_forward(const py::list& u, const py::object& c, const py::list& w, const py::list& values,
                     const py::list& offsets, const py::list& masks, const py::list& y, const py::object& o,
                     const py::object& mass, const py::object& lse, int threads, const std::string& isa,
                     const py::object& drop, bool pairs, bool parts) {
    const Isa path = resolve_isa(isa);
    const QformerCall call(u, values, offsets, masks, o, lse, drop, pairs, parts);
    const PerStream queries{u, "u", call.by_query()}, weights{one_each(w, values.size(), "w"), "w", call.by_value()};
    const PerStream read{one_each(y, values.size(), "y"), "y", call.by_item()};
    const Stacked bias(c, "c", call.stacked(call.by_query())), masses(mass, "mass", call.stacked(call.by_item()));
    std::vector<ForwardStream> streams;
    for (std::size_t m = 0; m < values.size(); ++m) {
        const std::int64_t C = call.tokens[m].C;
        streams.push_back({call.tokens[m], queries(m, C), bias[m], weights(m, C), read(m, C), masses[m]});
    }
    py::gil_scoped_release release;
    qformer_attention_forward(call.shape, streams, call.o, call.lse, threads, path);
}

constexpr const char* kQformerBackward = R"(The backward of em3::qformer_attention, on float32 CPU tensors.

dout as o, dmass as mass or None, and what the forward read and wrote. Writes du as u, dc as c, dw as w and dx as values,
but contiguous, dx in float32, bfloat16 or float16. du and dc are wanted or None together; dw and dx hold None for each stream where it is not wanted.)";

void qformer_backward(const py::object& dout, const py::object& dmass, const py::list& u, const py::object& c,
                      const py::list& w, const py::list& values, const py::list& offsets, const py::list& masks,
                      const py::list& y, const py::object& o, const py::object& mass, const py::object& lse,
                      const py::object& du, const py::object& dc, const py::list& dw, const py::list& dx,
                      int threads, const std::string& isa, const py::object& drop, bool pairs, bool parts) {
    const Isa path = resolve_isa(isa);
    const QformerCall call(u, values, offsets, masks, o, lse, drop, pairs, parts);
    const std::size_t count = values.size();
    const Sizes by_item = call.by_item(), by_query = call.by_query();
    const PerStream queries{u, "u", by_query}, weights{one_each(w, count, "w"), "w", call.by_value()};
    const PerStream read{one_each(y, count, "y"), "y", by_item}, to_w{one_each(dw, count, "dw"), "dw", call.by_value()};
    const bool need_u = !du.is_none();
    const PerStream to_u{need_u ? one_each(du.cast<py::list>(), count, "du") : py::list(), "du", by_query};
    const Stacked bias(c, "c", call.stacked(by_query)), masses(mass, "mass", call.stacked(by_item));
    const Stacked to_mass(dmass, "dmass", call.stacked(by_item)), to_bias(dc, "dc", call.stacked(by_query));
    const float* const to_o = tensor(dout, "dout").block<float>({call.shape.H, call.shape.B, call.shape.Q, call.shape.E});
    one_each(dx, count, "dx");
    std::vector<BackwardStream> streams;
    for (std::size_t m = 0; m < count; ++m) {
        const std::int64_t C = call.tokens[m].C;
        const Sizes shape = Tensor(values[m], "values").shape();
        void* to_x = nullptr;
        Storage stored = Storage::f32;
        if (!dx[m].is_none()) {
            const Tensor given = tensor(dx[m], "dx", m);
            to_x = given.block_of_any(shape);
            stored = storage_of(given);
        }
        streams.push_back({call.tokens[m], queries(m, C), bias[m], weights(m, C), read(m, C), masses[m], to_mass[m],
                           need_u ? to_u(m, C) : nullptr, to_bias[m], dw[m].is_none() ? nullptr : to_w(m, C), to_x, stored});
    }
    py::gil_scoped_release release;
    qformer_attention_backward(call.shape, streams, to_o, call.o, call.lse, threads, path);
}

}  // namespace

void bind_qformer_attention(py::module_& m) {
    m.def("qformer_attention_forward", &qformer_forward, py::arg("u"), py::arg("c"), py::arg("w"), py::arg("values"),
          py::arg("offsets"), py::arg("masks"), py::arg("y"), py::arg("o"), py::arg("mass"), py::arg("lse"),
          py::arg("threads"), py::arg("isa") = "", py::arg("drop") = py::none(), py::arg("pairs") = false, py::arg("parts") = false,
          kQformerForward);
    m.def("qformer_attention_backward", &qformer_backward, py::arg("dout"), py::arg("dmass"), py::arg("u"),
          py::arg("c"), py::arg("w"), py::arg("values"), py::arg("offsets"), py::arg("masks"), py::arg("y"),
          py::arg("o"), py::arg("mass"), py::arg("lse"), py::arg("du"), py::arg("dc"), py::arg("dw"), py::arg("dx"),
          py::arg("threads"), py::arg("isa") = "", py::arg("drop") = py::none(), py::arg("pairs") = false, py::arg("parts") = false,
          kQformerBackward);
}

}  // namespace em3
