// What the CUDA runtime says about this machine, and whether this build has code for its devices.
#pragma once

#include <string>
#include <vector>

namespace em3::cuda {

struct Device {
    std::string name;
    int major = 0;               // compute capability
    int minor = 0;
    size_t memory_bytes = 0;
    std::string error;           // why em3's kernels cannot run on it; empty where they can
};

struct Probe {
    std::string error;           // why no device could be listed; empty where that worked
    int driver_version = 0;      // 13000 is CUDA 13.0; 0 without a driver
    int runtime_version = 0;     // of the runtime linked into this module
    std::vector<Device> devices;
};

// Never throws for want of a driver or a device: the reason is the answer.
Probe probe();

}  // namespace em3::cuda
