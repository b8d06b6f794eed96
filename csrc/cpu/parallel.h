// Running independent parts of a call on several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace em3 {

// Calls fn(part) once for every part in [0, parts), on at most `threads` threads, and returns when all are done.
// Which thread runs a part is not fixed (a part is claimed when a thread is free), so a caller that wants the
// same bits each time keeps one partial result a part, never one a thread. The first exception, by part number,
// is rethrown here. threads <= 1 or parts <= 1 runs in the calling thread and touches no runtime.
void parallel_for(int threads, int parts, const std::function<void(int)>& fn);

// Called when the module is loaded: from then on a forked process is known for one, whoever started the pool in its
// parent, and runs on threads of its own.
void watch_forks();

// "auto": the OpenMP runtime that is already loaded, else std::thread. "std": always std::thread.
// Anything else throws std::invalid_argument.
void set_thread_runtime(const std::string& name);

// What parallel_for uses now: "gomp:<path of the library>" or "std".
std::string thread_runtime();

// At least `floats` floats of 64-byte aligned scratch that belong to this thread, content undefined, valid until
// the next call in this thread. Kept between calls (fresh pages cost more than the kernels on small batches)
// unless it is large.
float* thread_scratch(std::size_t floats);

}  // namespace em3
