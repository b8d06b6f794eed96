// The operator em3::contrastive_loss for float32 on the CPU.
#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "../cpu/contrastive_loss.h"
#include "../cpu/contrastive_loss_whole.h"
#include "../tensor.h"
#include "bindings.h"

namespace py = pybind11;

namespace em3 {
namespace {

Tensor tensor(const py::handle& given, const std::string& name) { return {given, "contrastive_loss: " + name}; }

template <class T>
T* block_or_null(const py::object& given, const std::string& name, const Sizes& shape) {
    return given.is_none() ? nullptr : tensor(given, name).block<T>(shape);
}

Contrast contrast(const py::object& x, const py::object& y, const py::object& scale, const py::object& item_ids,
                  const py::object& offset, const std::optional<std::int64_t>& apart) {
    const Tensor rows = tensor(x, "x"), candidates = tensor(y, "y");
    const auto* const first_x = rows.rows<const float>({-1, -1});
    const std::int64_t b = rows.shape()[0], v = rows.shape()[1];
    const auto* const first_y = candidates.rows<const float>({-1, v});
    const std::int64_t m = candidates.shape()[0];
    const bool own = !apart.has_value();
    const std::int64_t n = apart.value_or(b);
    if (m < n || n < 0) {
        candidates.fail(std::to_string(m) + " rows", "at least the " + std::to_string(n) + (own ? " of x" : " of apart"));
    }
    const double factor = *tensor(scale, "scale").block<const double>({});
    const auto* const ids = block_or_null<const std::int64_t>(item_ids, "item_ids", {own ? b : b + n});
    const auto* const offsets = block_or_null<const float>(offset, "offset", {own ? m : b + m});
    const std::int64_t first = own ? 0 : b;  // where the ids and offsets of columns begin
    return {b, n, m, v, own, first_x, rows.stride(0), first_y, candidates.stride(0), static_cast<float>(factor),
            ids, ids == nullptr ? nullptr : ids + first, offsets, offsets == nullptr ? nullptr : offsets + first};
}

ShiftLimits shift_limits(const std::array<float, 4>& limits) { return {limits[0], limits[1], limits[2], limits[3]}; }

constexpr const char* kForward = R"(The forward of em3::contrastive_loss, on float32 CPU tensors.

x: [B, V], y: [M, V], M >= N, their rows in one piece each. scale: float64 []. apart: None where row i is column i, and
then N = B; else N. item_ids: int64 [B], or [B + N] of rows and columns, or None. offset: [M], or [B + M] of rows and
columns, or None. limits: TOP, LOW, LARGEST_LOGIT, LARGEST_SPREAD of the torch backend. Writes row [B] and col [N], None
where not wanted.
isa: "" for the widest instruction set of this processor.)";

void forward(const py::object& x, const py::object& y, const py::object& scale, const py::object& item_ids,
             const py::object& offset, const std::array<float, 4>& limits, const py::object& row, const py::object& col,
             int threads, const std::string& isa, const std::optional<std::int64_t>& apart) {
    const Isa path = resolve_isa(isa);
    const Contrast given = contrast(x, y, scale, item_ids, offset, apart);
    float* const to_row = block_or_null<float>(row, "row", {given.B});
    float* const to_col = block_or_null<float>(col, "col", {given.N});
    py::gil_scoped_release release;
    contrastive_loss_forward(given, shift_limits(limits), to_row, to_col, threads, path);
}

constexpr const char* kBackward = R"(The backward of em3::contrastive_loss, on float32 CPU tensors.

drow [B] and dcol [N], None = 0; what the forward read and wrote. Writes dx [B, V], dy [M, V], dscale
float64 [] and doffset like offset; each is None where it is not wanted.)";

void backward(const py::object& drow, const py::object& dcol, const py::object& x, const py::object& y,
              const py::object& scale, const py::object& item_ids, const py::object& offset,
              const std::array<float, 4>& limits, const py::object& row, const py::object& col, const py::object& dx,
              const py::object& dy, const py::object& dscale, const py::object& doffset, int threads,
              const std::string& isa, const std::optional<std::int64_t>& apart) {
    const Isa path = resolve_isa(isa);
    const Contrast given = contrast(x, y, scale, item_ids, offset, apart);
    const Sizes of_rows{given.B}, of_cols{given.N};
    const ContrastGradients to{
        block_or_null<float>(dx, "dx", {given.B, given.V}), block_or_null<float>(dy, "dy", {given.M, given.V}),
        block_or_null<double>(dscale, "dscale", {}), block_or_null<float>(doffset, "doffset", {given.own ? given.M : given.B + given.M})};
    const auto *const of_row = block_or_null<const float>(row, "row", of_rows),
               *const of_col = block_or_null<const float>(col, "col", of_cols);
    const auto *const from_row = block_or_null<const float>(drow, "drow", of_rows),
               *const from_col = block_or_null<const float>(dcol, "dcol", of_cols);
    py::gil_scoped_release release;
    contrastive_loss_backward(given, shift_limits(limits), of_row, of_col, from_row, from_col, to, threads, path);
}

constexpr const char* kWhole = R"(contrastive_loss of a small batch, float32 on the CPU: the loss, and its gradients.

content, ids_embedding: [B, V], negatives: [K, V] or None. item_ids: int64 [B] of masked duplicates, or None. log_q, weight:
[B] or None. Writes the gradients dcontent, dids, dnegatives, dscale (float64 []), dlog_q and dweight, None where not
wanted. mean: sum(w l) / sum(w), else sum(w l).)";

double whole(const py::object& content, const py::object& ids_embedding, const py::object& negatives, double scale,
             const py::object& item_ids, const py::object& log_q, const py::object& weight,
             const std::array<float, 4>& limits, bool rows, bool cols, bool mean, bool normalize,
             const py::object& dcontent, const py::object& dids, const py::object& dnegatives, const py::object& dscale,
             const py::object& dlog_q, const py::object& dweight, int threads, const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const Tensor x = tensor(content, "content");
    const auto* const first_x = x.block<const float>({-1, -1});
    const std::int64_t b = x.shape()[0], v = x.shape()[1];
    const auto* const first_y = tensor(ids_embedding, "ids_embedding").block<const float>({b, v});
    std::int64_t k = 0;
    const float* extra = nullptr;
    if (!negatives.is_none()) {
        const Tensor further = tensor(negatives, "negatives");
        extra = further.block<const float>({-1, v});
        k = further.shape()[0];
    }
    const WholeContrast given{
        b, k, v, first_x, first_y, extra, scale, block_or_null<const std::int64_t>(item_ids, "item_ids", {b}),
        block_or_null<const float>(log_q, "log_q", {b}), block_or_null<const float>(weight, "weight", {b}), rows, cols, mean,
        normalize};
    const WholeGradients to{
        block_or_null<float>(dcontent, "dcontent", {b, v}), block_or_null<float>(dids, "dids", {b, v}),
        block_or_null<float>(dnegatives, "dnegatives", {k, v}), block_or_null<double>(dscale, "dscale", {}),
        block_or_null<float>(dlog_q, "dlog_q", {b}), block_or_null<float>(dweight, "dweight", {b})};
    py::gil_scoped_release release;
    return contrastive_loss_whole(given, shift_limits(limits), to, threads, path);
}

}  // namespace

void bind_contrastive_loss(py::module_& m) {
    m.def("contrastive_loss_forward", &forward, py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("item_ids"),
          py::arg("offset"), py::arg("limits"), py::arg("row"), py::arg("col"), py::arg("threads"), py::arg("isa") = "",
          py::arg("apart") = py::none(), kForward);
    m.def("contrastive_loss_backward", &backward, py::arg("drow"), py::arg("dcol"), py::arg("x"), py::arg("y"),
          py::arg("scale"), py::arg("item_ids"), py::arg("offset"), py::arg("limits"), py::arg("row"), py::arg("col"),
          py::arg("dx"), py::arg("dy"), py::arg("dscale"), py::arg("doffset"), py::arg("threads"), py::arg("isa") = "",
          py::arg("apart") = py::none(), kBackward);
    m.def("contrastive_loss_whole", &whole, py::arg("content"), py::arg("ids_embedding"), py::arg("negatives"),
          py::arg("scale"), py::arg("item_ids"), py::arg("log_q"), py::arg("weight"), py::arg("limits"), py::arg("rows"),
          py::arg("cols"), py::arg("mean"), py::arg("normalize"), py::arg("dcontent"), py::arg("dids"),
          py::arg("dnegatives"), py::arg("dscale"), py::arg("dlog_q"), py::arg("dweight"), py::arg("threads"),
          py::arg("isa") = "", kWhole);
}

}  // namespace em3
