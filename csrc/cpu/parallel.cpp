#include "parallel.h"

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#define EM3_FIND_OPENMP 1
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#else
#define EM3_FIND_OPENMP 0
#endif

namespace em3 {
namespace {

// PyTorch's OpenMP workers spin for a while after each of its operators. A second pool then shares the cores with
// them, so we borrow the pool that is already there: GOMP_parallel is exported by libgomp, libomp and libiomp5
// alike and needs no link dependency.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string path;
};

std::atomic<bool> force_std{false};
// GNU OpenMP hangs when it is used in a process forked after its pool was started.
std::atomic<bool> forked{false};

bool must_use_std() { return force_std.load() || forked.load(); }

#if EM3_FIND_OPENMP
bool is_openmp(const std::string& path) {
  const std::string file = path.substr(path.rfind('/') + 1);
  return file.rfind("libgomp", 0) == 0 || file.rfind("libomp", 0) == 0 || file.rfind("libiomp5", 0) == 0;
}

int collect(dl_phdr_info* info, std::size_t, void* out) {
  if (info->dlpi_name != nullptr && is_openmp(info->dlpi_name)) {
    static_cast<std::vector<std::string>*>(out)->push_back(info->dlpi_name);
  }
  return 0;
}

Runtime find_runtime() {
  std::vector<std::string> paths;
  dl_iterate_phdr(collect, &paths);
  Runtime found;
  for (const bool want_torch : {true, false}) {
    for (const std::string& path : paths) {
      if (found.parallel != nullptr) break;
      if (want_torch && path.find("torch") == std::string::npos) continue;
      // The handle is kept: the library must stay loaded as long as its function may be called.
      void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
      if (handle == nullptr) continue;
      found.parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
      found.path = path;
    }
  }
  return found;
}
#else
Runtime find_runtime() { return {}; }
#endif

// Searched again while nothing was found (PyTorch may be imported after this module), then fixed.
Runtime runtime() {
  static std::mutex lock;
  static Runtime cached;
  std::lock_guard<std::mutex> guard(lock);
  if (cached.parallel == nullptr) {
    cached = find_runtime();
  }
  return cached;
}

struct Job {
  const std::function<void(int)>* fn;
  int parts;
  std::atomic<int> next{0};
  std::mutex lock;
  int failed_part = -1;
  std::exception_ptr error;
};

// Runs on every member of the team, however many there are. Nothing may be thrown out of it.
void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int part = job.next.fetch_add(1); part < job.parts; part = job.next.fetch_add(1)) {
    try {
      (*job.fn)(part);
    } catch (...) {
      std::lock_guard<std::mutex> guard(job.lock);
      if (job.failed_part < 0 || part < job.failed_part) {
        job.failed_part = part;
        job.error = std::current_exception();
      }
    }
  }
}

void run_on_std_threads(int threads, Job& job) {
  std::vector<std::thread> team;
  team.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) team.emplace_back(work, &job);
  } catch (const std::system_error&) {
    // The system refuses more threads: those that started share the parts.
  }
  work(&job);
  for (std::thread& member : team) member.join();
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};

}  // namespace

void parallel_for(int threads, int parts, const std::function<void(int)>& fn) {
  if (threads > parts) threads = parts;
  if (threads <= 1) {
    for (int part = 0; part < parts; ++part) fn(part);
    return;
  }
  Job job;
  job.fn = &fn;
  job.parts = parts;
  const Runtime found = must_use_std() ? Runtime{} : runtime();
  if (found.parallel != nullptr) {
    found.parallel(work, &job, static_cast<unsigned>(threads), 0);
  } else {
    run_on_std_threads(threads, job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

void watch_forks() {
#if EM3_FIND_OPENMP
  static const int failed = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  if (failed != 0) force_std.store(true);  // a borrowed pool is not safe without it
#endif
}

void set_thread_runtime(const std::string& name) {
  if (name != "auto" && name != "std") {
    throw std::invalid_argument("thread runtime '" + name + "' is unknown: it must be 'auto' or 'std'");
  }
  force_std.store(name == "std");
}

std::string thread_runtime() {
  if (must_use_std()) return "std";
  const Runtime found = runtime();
  return found.parallel != nullptr ? "gomp:" + found.path : "std";
}

float* thread_scratch(std::size_t floats) {
  constexpr std::size_t kKeep = std::size_t{4} << 20;  // floats: 16 MB
  thread_local std::unique_ptr<float, AlignedDelete> memory;
  thread_local std::size_t capacity = 0;
  if (floats > capacity || capacity > kKeep) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64))));
    capacity = floats;
  }
  return memory.get();
}

}  // namespace em3
