// The operator em3::contrastive_loss for float32 on the CPU.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/contrastive_loss.h"
#include "../cpu/contrastive_loss_whole.h"
#include "../tensor.h"
#include "bindings.h"
#include "storage.h"

namespace py = pybind11;

namespace em3 {
namespace {

Tensor tensor(const py::handle& given, const std::string& name) { return {given, "contrastive_loss: " + name}; }

template <class T>
T* block_or_null(const py::object& given, const std::string& name, const Sizes& shape) {
    return given.is_none() ? nullptr : tensor(given, name).block<T>(shape);
}

template <class T, std::size_t N>
T word(const std::string& given, const char* name, const std::array<std::pair<const char*, T>, N>& words) {
    std::string all;
    for (const auto& [text, value] : words) {
        if (given == text) return value;
        all += std::string(all.empty() ? "" : ", ") + text;
    }
    throw std::invalid_argument("contrastive_loss: " + std::string(name) + ": was " + given + ", must be one of " + all);
}

ContrastKind contrast_kind(const std::string& given) {
    constexpr std::array<std::pair<const char*, ContrastKind>, 3> words{
        {{"infonce", ContrastKind::infonce}, {"sigmoid", ContrastKind::sigmoid}, {"sigmoid_positive", ContrastKind::sigmoid_positive}}};
    return word(given, "kind", words);
}

Contrast contrast(const py::object& x, const py::object& y, const py::object& scale, const py::object& bias,
                  const py::object& item_ids, const py::object& offset, const std::string& kind,
                  const std::optional<std::int64_t>& apart) {
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
    const auto* const added = block_or_null<const double>(bias, "bias", {});
    const auto* const ids = block_or_null<const std::int64_t>(item_ids, "item_ids", {own ? b : b + n});
    const auto* const offsets = block_or_null<const float>(offset, "offset", {own ? m : b + m});
    const std::int64_t first = own ? 0 : b;  // where the ids and offsets of columns begin
    return {contrast_kind(kind), b, n, m, v, own, {first_x, rows.stride(0), b, nullptr, nullptr, Storage::f32},
            {first_y, candidates.stride(0), m, nullptr, nullptr, Storage::f32}, factor, added == nullptr ? 0.0 : *added,
            ids, ids == nullptr ? nullptr : ids + first, offsets, offsets == nullptr ? nullptr : offsets + first, nullptr, nullptr};
}

// What the matrix has of the scale, as a share of it. A logsumexp is a mean of logits and at most log M beside it, so that
// it grows with the scale: near 1,000 what rounding the scale does to it is more than what float32 does, and is undone here.
double scale_in_matrix(double scale) { return scale == 0.0 ? 1.0 : rounded_scale(scale, nullptr) / scale; }

// Numbers [size] times gain; nothing of None.
std::optional<std::vector<double>> times(double gain, const py::object& given, const std::string& name, const Sizes& size) {
    const auto* const numbers = block_or_null<const double>(given, name, size);
    if (given.is_none()) return std::nullopt;
    std::vector<double> found(numbers, numbers + size[0]);
    for (double& number : found) number *= gain;
    return found;
}

ShiftLimits shift_limits(const std::array<float, 4>& limits) { return {limits[0], limits[1], limits[2], limits[3]}; }

constexpr const char* kForward = R"(The forward of em3::contrastive_loss and em3::contrastive_sigmoid, on float32 CPU tensors.

x: [B, V], y: [M, V], M >= N, their rows in one piece each. scale: float64 []. bias: float64 [], or None for kind
"infonce". apart: None where row i is column i, and then N = B; else N. item_ids: int64 [B], or [B + N] of rows and
columns, or None. offset: [M], or [B + M] of rows and columns, or None. kind: "infonce", "sigmoid" or "sigmoid_positive".
limits: TOP, LOW, LARGEST_LOGIT, LARGEST_SPREAD of the torch backend. Writes row [B] and col [N], float64, None where not
wanted.
isa: "" for the widest instruction set of this processor.)";

void forward(const py::object& x, const py::object& y, const py::object& scale, const py::object& bias,
             const py::object& item_ids, const py::object& offset, const std::string& kind,
             const std::array<float, 4>& limits, const py::object& row, const py::object& col, int threads,
             const std::string& isa, const std::optional<std::int64_t>& apart) {
    const Isa path = resolve_isa(isa);
    const Contrast given = contrast(x, y, scale, bias, item_ids, offset, kind, apart);
    auto* const to_row = block_or_null<double>(row, "row", {given.B});
    auto* const to_col = block_or_null<double>(col, "col", {given.N});
    py::gil_scoped_release release;
    contrastive_loss_forward(given, shift_limits(limits), to_row, to_col, {nullptr, 0}, threads, path);
    if (given.kind != ContrastKind::infonce) return;
    const double gain = 1.0 / scale_in_matrix(given.scale);
    for (std::int64_t i = 0; to_row != nullptr && i < given.B; ++i) to_row[i] *= gain;
    for (std::int64_t j = 0; to_col != nullptr && j < given.N; ++j) to_col[j] *= gain;
}

constexpr const char* kBackward = R"(The backward of the same, on float32 CPU tensors.

drow [B] and dcol [N], None = 0; what the forward read and, for "infonce", wrote. Writes dx [B, V], dy [M, V], dscale and
dbias, float64 [], and doffset like offset; each is None where it is not wanted. dscale takes dx.)";

void backward(const py::object& drow, const py::object& dcol, const py::object& x, const py::object& y,
              const py::object& scale, const py::object& bias, const py::object& item_ids, const py::object& offset,
              const std::string& kind, const std::array<float, 4>& limits, const py::object& row, const py::object& col,
              const py::object& dx, const py::object& dy, const py::object& dscale, const py::object& dbias,
              const py::object& doffset, int threads, const std::string& isa, const std::optional<std::int64_t>& apart) {
    const Isa path = resolve_isa(isa);
    const Contrast given = contrast(x, y, scale, bias, item_ids, offset, kind, apart);
    const Sizes of_rows{given.B}, of_cols{given.N};
    if (dx.is_none() && !dscale.is_none()) {
        throw std::invalid_argument("contrastive_loss: dx: was None, must be given where dscale is");
    }
    const ContrastGradients to{
        block_or_null<float>(dx, "dx", {given.B, given.V}), block_or_null<float>(dy, "dy", {given.M, given.V}), nullptr,
        block_or_null<double>(dbias, "dbias", {}),
        block_or_null<float>(doffset, "doffset", {given.own ? given.M : given.B + given.M})};
    auto* const to_scale = block_or_null<double>(dscale, "dscale", {});
    const double gain = scale_in_matrix(given.scale);
    const auto of_row = times(gain, row, "row", of_rows), of_col = times(gain, col, "col", of_cols);
    const auto *const from_row = block_or_null<const float>(drow, "drow", of_rows),
               *const from_col = block_or_null<const float>(dcol, "dcol", of_cols);
    py::gil_scoped_release release;
    if (to.dx != nullptr) std::fill(to.dx, to.dx + given.B * given.V, 0.0f);
    if (to.dy != nullptr) std::fill(to.dy, to.dy + given.M * given.V, 0.0f);
    contrastive_loss_backward(given, shift_limits(limits), of_row ? of_row->data() : nullptr, of_col ? of_col->data() : nullptr,
                              from_row, from_col, {nullptr, 0}, to, threads, path);
    if (to.dx != nullptr) {
        const double along = finish_gradients(given.x, 0, given.B, given.V, given.scale, to.dx, to.dx, threads, path);
        if (to_scale != nullptr) *to_scale = along;
    }
    if (to.dy != nullptr) finish_gradients(given.y, 0, given.M, given.V, 1.0, to.dy, to.dy, threads, path);
}

// Whether embeddings are normalised, and other options that both calls of the whole loss have.
void read_options(WholeContrast& given, const std::string& kind, const std::string& duplicates, const std::string& direction,
                  const std::string& reduction, double smoothing, bool normalize) {
    given.smoothing = smoothing;
    given.normalize = normalize;
    given.sigmoid = contrast_kind(kind) != ContrastKind::infonce;
    constexpr std::array<std::pair<const char*, Duplicates>, 3> of_duplicates{
        {{"mask", Duplicates::mask}, {"positive", Duplicates::positive}, {"keep", Duplicates::keep}}};
    given.duplicates = word(duplicates, "duplicates", of_duplicates);
    constexpr std::array<std::pair<const char*, Reduction>, 3> of_reduction{
        {{"mean", Reduction::mean}, {"sum", Reduction::sum}, {"none", Reduction::none}}};
    given.reduction = word(reduction, "reduction", of_reduction);
    constexpr std::array<std::pair<const char*, int>, 3> of_direction{{{"both", 3}, {"content_to_id", 1}, {"id_to_content", 2}}};
    const int ways = word(direction, "direction", of_direction);
    given.rows = (ways & 1) != 0;
    given.cols = (ways & 2) != 0;
}

// The arguments that both calls of the whole loss have.
struct WholeArguments {
    WholeContrast given{};
    WholeState state{};

    WholeArguments(const py::object& content, const py::object& ids_embedding, const py::object& negatives, double scale,
                   double bias, const py::object& item_ids, const py::object& log_q, const py::object& weight,
                   const std::string& kind, const std::string& duplicates, const std::string& direction,
                   const std::string& reduction, double smoothing, bool normalize, const py::object& memory) {
        const Tensor x = tensor(content, "content");
        given.storage = storage_of(x);
        given.content = x.block_of_any({-1, -1});
        const std::int64_t b = given.B = x.shape()[0], v = given.V = x.shape()[1];
        given.ids = like(ids_embedding, "ids_embedding", {b, v});
        if (!negatives.is_none()) {
            given.negatives = like(negatives, "negatives", {-1, v});
            given.K = tensor(negatives, "negatives").shape()[0];
        }
        given.scale = scale;
        given.bias = bias;
        read_options(given, kind, duplicates, direction, reduction, smoothing, normalize);
        given.item_ids = block_or_null<const std::int64_t>(item_ids, "item_ids", {b});
        given.log_q = block_or_null<const float>(log_q, "log_q", {b});
        given.weight = block_or_null<const float>(weight, "weight", {b});
        const Tensor held = tensor(memory, "state");
        auto* const first = held.block<double>({-1});
        const bool keep = held.shape()[0] == whole_state_size(given, true);
        if (!keep) held.require_shape({whole_state_size(given, false)});
        state = whole_state(given, keep, first);
    }

    // A tensor of the embeddings' dtype.
    void* like(const py::object& of, const std::string& name, const Sizes& shape) const {
        const Tensor found = tensor(of, name);
        if (storage_of(found) != given.storage) found.fail(found.dtype(), "of the dtype of content");
        return found.block_of_any(shape);
    }
    void* like_or_null(const py::object& of, const std::string& name, const Sizes& shape) const {
        return of.is_none() ? nullptr : like(of, name, shape);
    }
};

constexpr const char* kWholeState = R"(How many float64 contrastive_loss_whole_forward leaves for its backward.

Of B rows, K extra negatives; item_ids: whether there are any; keep: whether the logits are kept too.)";

std::int64_t whole_state_size_of(std::int64_t b, std::int64_t k, bool item_ids, const std::string& duplicates,
                                 const std::string& direction, bool normalize, bool keep) {
    WholeContrast given{};
    given.B = b;
    given.K = k;
    const std::int64_t any = 0;
    given.item_ids = item_ids ? &any : nullptr;
    read_options(given, "infonce", duplicates, direction, "mean", 0.0, normalize);
    return whole_state_size(given, keep);
}

constexpr const char* kWholeForward = R"(contrastive_loss on CPU tensors.

content, ids_embedding: [B, V], negatives: [K, V] or None, of one dtype: float32, bfloat16 or float16. item_ids: int64 [B] or
None. log_q, weight: float32 [B] or None. The options are those of em3.ops.contrastive_loss. Fills state, float64 of as many
numbers as contrastive_loss_whole_state says, of which the first B are the rows' losses without the weights. Returns the loss,
0 for reduction "none", or None without having computed anything if log_q holds more than most_log_q, NaN or -inf, or
weight something negative or not finite.)";

std::optional<double> whole_forward(
    const py::object& content, const py::object& ids_embedding, const py::object& negatives, double scale, double bias,
    const py::object& item_ids, const py::object& log_q, const py::object& weight, const std::string& kind,
    const std::string& duplicates, const std::string& direction, const std::string& reduction, double smoothing,
    bool normalize, const py::object& state, const std::array<float, 4>& limits, double most_log_q, int threads,
    const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const WholeArguments all(content, ids_embedding, negatives, scale, bias, item_ids, log_q, weight, kind, duplicates,
                             direction, reduction, smoothing, normalize, state);
    py::gil_scoped_release release;
    for (std::int64_t i = 0; all.given.log_q != nullptr && i < all.given.B; ++i) {
        if (!(all.given.log_q[i] <= most_log_q) || std::isinf(all.given.log_q[i])) return std::nullopt;
    }
    for (std::int64_t i = 0; all.given.weight != nullptr && i < all.given.B; ++i) {
        if (!(all.given.weight[i] >= 0.0f) || std::isinf(all.given.weight[i])) return std::nullopt;
    }
    return contrastive_loss_whole_forward(all.given, shift_limits(limits), all.state, threads, path);
}

// A gradient to a number, written in its own precision.
struct Number {
    double found = 0.0;
    double* wide = nullptr;
    float* narrow = nullptr;

    Number(const py::object& to, const std::string& name) {
        if (to.is_none()) return;
        const Tensor given = tensor(to, name);
        if (given.dtype() == kDtype<float>) {
            narrow = given.block<float>({});
        } else {
            wide = given.block<double>({});
        }
    }
    double* wanted() { return wide != nullptr || narrow != nullptr ? &found : nullptr; }
    void write() const {
        if (wide != nullptr) *wide = found;
        if (narrow != nullptr) *narrow = static_cast<float>(found);
    }
};

constexpr const char* kWholeBackward = R"(Its gradients, times upstream: a number, or float64 [B] for reduction "none".

What the forward read and wrote. Writes dcontent, dids, dnegatives of the embeddings' dtype, dscale and dbias (float64 or
float32 []), dlog_q and dweight (float32), each like what it is the gradient to, None where not wanted.)";

void whole_backward(const py::object& upstream, const py::object& content, const py::object& ids_embedding,
                    const py::object& negatives, double scale, double bias, const py::object& item_ids,
                    const py::object& log_q, const py::object& weight, const std::string& kind,
                    const std::string& duplicates, const std::string& direction, const std::string& reduction,
                    double smoothing, bool normalize, const py::object& state, const std::array<float, 4>& limits,
                    const py::object& dcontent, const py::object& dids, const py::object& dnegatives,
                    const py::object& dscale, const py::object& dbias, const py::object& dlog_q, const py::object& dweight,
                    int threads, const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const WholeArguments all(content, ids_embedding, negatives, scale, bias, item_ids, log_q, weight, kind, duplicates,
                             direction, reduction, smoothing, normalize, state);
    const WholeContrast& given = all.given;
    for (std::int64_t i = 0; all.state.order != nullptr && i < given.B; ++i) {  // which is read as places of rows
        if (all.state.order[i] < 0 || all.state.order[i] >= given.B) {
            throw std::invalid_argument("contrastive_loss: state: was not what the forward wrote, must be");
        }
    }
    const Sizes a_row{given.B};
    const bool one = given.reduction != Reduction::none;
    const double number = one ? upstream.cast<double>() : 0.0;
    const auto* const above = one ? &number : tensor(upstream, "upstream").block<const double>(a_row);
    Number to_scale(dscale, "dscale"), to_bias(dbias, "dbias");
    const WholeGradients to{
        all.like_or_null(dcontent, "dcontent", {given.B, given.V}), all.like_or_null(dids, "dids", {given.B, given.V}),
        all.like_or_null(dnegatives, "dnegatives", {given.K, given.V}), to_scale.wanted(), to_bias.wanted(),
        block_or_null<float>(dlog_q, "dlog_q", a_row), block_or_null<float>(dweight, "dweight", a_row)};
    py::gil_scoped_release release;
    contrastive_loss_whole_backward(given, shift_limits(limits), all.state, above, to, threads, path);
    to_scale.write();
    to_bias.write();
}

}  // namespace

void bind_contrastive_loss(py::module_& m) {
    m.def("contrastive_loss_forward", &forward, py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("bias"),
          py::arg("item_ids"), py::arg("offset"), py::arg("kind"), py::arg("limits"), py::arg("row"), py::arg("col"),
          py::arg("threads"), py::arg("isa") = "", py::arg("apart") = py::none(), kForward);
    m.def("contrastive_loss_backward", &backward, py::arg("drow"), py::arg("dcol"), py::arg("x"), py::arg("y"),
          py::arg("scale"), py::arg("bias"), py::arg("item_ids"), py::arg("offset"), py::arg("kind"), py::arg("limits"),
          py::arg("row"), py::arg("col"), py::arg("dx"), py::arg("dy"), py::arg("dscale"), py::arg("dbias"),
          py::arg("doffset"), py::arg("threads"), py::arg("isa") = "", py::arg("apart") = py::none(), kBackward);
    m.def("contrastive_loss_whole_state", &whole_state_size_of, py::arg("b"), py::arg("k"), py::arg("item_ids"),
          py::arg("duplicates"), py::arg("direction"), py::arg("normalize"), py::arg("keep"), kWholeState);
    m.def("contrastive_loss_whole_forward", &whole_forward, py::arg("content"), py::arg("ids_embedding"),
          py::arg("negatives"), py::arg("scale"), py::arg("bias"), py::arg("item_ids"), py::arg("log_q"),
          py::arg("weight"), py::arg("kind"), py::arg("duplicates"), py::arg("direction"), py::arg("reduction"),
          py::arg("smoothing"), py::arg("normalize"), py::arg("state"), py::arg("limits"), py::arg("most_log_q"),
          py::arg("threads"), py::arg("isa") = "", kWholeForward);
    m.def("contrastive_loss_whole_backward", &whole_backward, py::arg("upstream"), py::arg("content"),
          py::arg("ids_embedding"), py::arg("negatives"), py::arg("scale"), py::arg("bias"), py::arg("item_ids"),
          py::arg("log_q"), py::arg("weight"), py::arg("kind"), py::arg("duplicates"), py::arg("direction"),
          py::arg("reduction"), py::arg("smoothing"), py::arg("normalize"), py::arg("state"), py::arg("limits"),
          py::arg("dcontent"), py::arg("dids"), py::arg("dnegatives"), py::arg("dscale"), py::arg("dbias"), py::arg("dlog_q"), py::arg("dweight"),
          py::arg("threads"), py::arg("isa") = "", kWholeBackward);
}

}  // namespace em3
