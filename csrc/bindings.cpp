// The Python module em3._C. Functions take data pointers, sizes and strides: no torch header is included, so one
// build works with every torch release.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/qformer_attention.h"

#ifdef EM3_WITH_CUDA
#include "cuda/probe.h"
#endif

namespace py = pybind11;

namespace {

// ---- build information and devices, for `em3 env` ----

const char* compiler() {
#if defined(__VERSION__) && defined(__clang__)
    return __VERSION__;
#elif defined(__VERSION__)
    return "GCC " __VERSION__;
#else
    return "MSVC";
#endif
}

#ifdef EM3_WITH_CUDA
py::dict cuda_devices() {
    em3::cuda::Probe probe;
    {
        py::gil_scoped_release release;
        probe = em3::cuda::probe();
    }
    py::list devices;
    for (const em3::cuda::Device& device : probe.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["memory_bytes"] = device.memory_bytes;
        entry["error"] = device.error.empty() ? py::object(py::none()) : py::str(device.error);
        devices.append(entry);
    }
    py::dict result;
    result["error"] = probe.error.empty() ? py::object(py::none()) : py::str(probe.error);
    result["driver_version"] = probe.driver_version;
    result["runtime_version"] = probe.runtime_version;
    result["devices"] = devices;
    return result;
}
#endif

// ---- CPU ----

py::dict cpu_features() {
    py::dict paths;
    for (const em3::IsaInfo& info : em3::isa_table()) {
        paths[info.name.c_str()] = info.usable ? py::object(py::none()) : py::str(info.reason);
    }
    py::dict result;
    result["isa"] = paths;
    result["default"] = em3::isa_name(em3::resolve_isa(""));
    result["threads"] = em3::thread_runtime();
    return result;
}

template <class T>
T* pointer(const py::handle& address) {
    return reinterpret_cast<T*>(address.cast<std::uintptr_t>());
}

py::tuple stream_tuple(const py::handle& stream, std::size_t length) {
    py::tuple t = stream.cast<py::tuple>();
    if (t.size() != length) throw std::invalid_argument("a stream must be a tuple of " + std::to_string(length));
    return t;
}

em3::TokenStream token_stream(const py::tuple& t) {
    return {pointer<const float>(t[0]),        t[1].cast<std::int64_t>(),
            t[2].cast<std::int64_t>(),         t[3].cast<std::int64_t>(),
            t[4].cast<std::int64_t>(),         pointer<const std::int64_t>(t[5]),
            pointer<const std::uint8_t>(t[6]), t[7].cast<std::int64_t>()};
}

constexpr const char* kQformerForward = R"(qformer_attention_forward(shape, streams, lse, threads, isa="")

shape: (B, H, Q, shared_u). A stream is (x, item_stride, token_stride, n, C, offsets, mask, mask_item_stride,
u, c, y, mass). Pointers are data_ptr() integers, 0 where there is none (offsets, mask, c, mass); strides count
elements. offsets == 0: x [B, n, C] padded; else x [n, C] with offsets int64 [B + 1]. u [H, Bu, Q, C], c [H, Bu, Q],
Bu = 1 if shared_u else B. Writes y [H, B, Q, C], mass [H, B, Q], lse [H, B, Q].)";

void qformer_forward(const py::tuple& shape, const py::sequence& streams, std::uintptr_t lse, int threads,
                     const std::string& isa) {
    const em3::Isa path = em3::resolve_isa(isa);
    const em3::Shape dims{shape[0].cast<std::int64_t>(), shape[1].cast<std::int64_t>(), shape[2].cast<std::int64_t>(),
                          shape[3].cast<bool>()};
    std::vector<em3::ForwardStream> all;
    for (const py::handle& stream : streams) {
        const py::tuple t = stream_tuple(stream, 12);
        all.push_back({token_stream(t), pointer<const float>(t[8]), pointer<const float>(t[9]), pointer<float>(t[10]),
                       pointer<float>(t[11])});
    }
    py::gil_scoped_release release;
    em3::qformer_attention_forward(dims, all, reinterpret_cast<float*>(lse), threads, path);
}

constexpr const char* kQformerBackward = R"(qformer_attention_backward(shape, streams, lse, threads, isa="")

As the forward; a stream is (x, item_stride, token_stride, n, C, offsets, mask, mask_item_stride, u, c, y, mass,
dy, dmass, du, dc, dx). mass is read only with dmass. Writes those of du [H, Bu, Q, C], dc [H, Bu, Q] and
dx (contiguous [B, n, C] or [n, C]) that are not 0; what is 0 costs nothing.)";

void qformer_backward(const py::tuple& shape, const py::sequence& streams, std::uintptr_t lse, int threads,
                      const std::string& isa) {
    const em3::Isa path = em3::resolve_isa(isa);
    const em3::Shape dims{shape[0].cast<std::int64_t>(), shape[1].cast<std::int64_t>(), shape[2].cast<std::int64_t>(),
                          shape[3].cast<bool>()};
    std::vector<em3::BackwardStream> all;
    for (const py::handle& stream : streams) {
        const py::tuple t = stream_tuple(stream, 17);
        all.push_back({token_stream(t), pointer<const float>(t[8]), pointer<const float>(t[9]),
                       pointer<const float>(t[10]), pointer<const float>(t[11]), pointer<const float>(t[12]),
                       pointer<const float>(t[13]), pointer<float>(t[14]), pointer<float>(t[15]),
                       pointer<float>(t[16])});
    }
    py::gil_scoped_release release;
    em3::qformer_attention_backward(dims, all, reinterpret_cast<const float*>(lse), threads, path);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "em3's compiled kernels";
    m.attr("__version__") = EM3_VERSION;
    m.attr("compiler") = compiler();
#ifdef EM3_WITH_CUDA
    m.attr("with_cuda") = true;
    m.def("cuda_devices", &cuda_devices,
          "Devices as the CUDA runtime lists them; per device, and as a whole, the error that bars its use or None.");
#else
    m.attr("with_cuda") = false;
#endif

    m.def("cpu_features", &cpu_features,
          "{'isa': {name: None if usable, else the reason why not}, 'default': name, 'threads': thread runtime}");
    m.def("set_thread_runtime", &em3::set_thread_runtime, py::arg("name"),
          "'auto': the OpenMP pool that is already loaded (PyTorch's), else threads of our own; 'std': always our own.");
    m.def("qformer_attention_forward", &qformer_forward, py::arg("shape"), py::arg("streams"), py::arg("lse"),
          py::arg("threads"), py::arg("isa") = "", kQformerForward);
    m.def("qformer_attention_backward", &qformer_backward, py::arg("shape"), py::arg("streams"), py::arg("lse"),
          py::arg("threads"), py::arg("isa") = "", kQformerBackward);
}
