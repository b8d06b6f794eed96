// The Python module em3._C: what it is built with and what this processor has; the operations are in bindings/.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bindings.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

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
    em3::bind_qformer_attention(m);
    em3::bind_lora_target_attention(m);
    em3::bind_contrastive_loss(m);
    em3::bind_lora_linear(m);
    em3::bind_mean_rows(m);
    em3::watch_forks();
}
