// The mean of each segment's rows on the CPU.
#include "../cpu/mean_rows.h"

#include <cstdint>
#include <string>

#include "../cpu/isa.h"
#include "../tensor.h"
#include "bindings.h"
#include "storage.h"

namespace py = pybind11;

namespace em3 {
namespace {

Tensor tensor(const py::handle& given, const std::string& name) { return {given, "mean_rows: " + name}; }

constexpr const char* kMeans = R"(Writes mean [B, C], float32: the mean of each segment's rows, zeros where there are none.

x: [n, C] in float32, bfloat16 or float16, its rows in one piece each. places: int64 [T], the row of x that stands at each place,
or None where row i stands at place i. offsets: int64 [B + 1]; segment b has the places offsets[b] .. offsets[b + 1] - 1. isa:
"" for the widest instruction set of this processor.)";

void means(const py::object& x, const py::object& places, const py::object& offsets, const py::object& mean, int threads,
           const std::string& isa) {
    const Isa path = resolve_isa(isa);
    const Tensor rows = tensor(x, "x"), bounds = tensor(offsets, "offsets");
    rows.require_shape({-1, -1});
    bounds.require_shape({-1});
    if (bounds.shape()[0] < 1) bounds.fail("empty", "[B + 1]");
    MeanRows given{rows.rows_of_any(rows.shape()), storage_of(rows), rows.shape()[0], rows.shape()[1], rows.stride(0), nullptr,
                   rows.shape()[0], bounds.block<const std::int64_t>(bounds.shape()), bounds.shape()[0] - 1};
    if (!places.is_none()) {
        const Tensor named = tensor(places, "places");
        named.require_shape({-1});
        given.places = named.block<const std::int64_t>(named.shape());
        given.T = named.shape()[0];
    }
    float* const to = tensor(mean, "mean").block<float>({given.B, given.C});
    py::gil_scoped_release release;
    mean_rows(given, to, threads, path);
}

}  // namespace

void bind_mean_rows(py::module_& m) {
    m.def("mean_rows", &means, py::arg("x"), py::arg("places"), py::arg("offsets"), py::arg("mean"), py::arg("threads"),
          py::arg("isa") = "", kMeans);
}

}  // namespace em3
