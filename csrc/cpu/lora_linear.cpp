// Checks, the rows of each adapter, their division among threads, and the choice of the instruction set. The mathematics is
// in lora_linear_kernel.inl.
#include "lora_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "parallel.h"

#if EM3_HAVE_X86_PATHS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace em3 {
namespace {

// Forward: x is read and y added to. Backward: x and y, which is dy, are read, and dx added to.
struct LoraJob {
  LoraLinear given;
  bool backward;
  const std::int64_t* order;  // the rows by adapter; null = as they lie
  Rows x, y;
  LoraGradients to;
};

// Places begin .. end of the order, all of one adapter. A whole part has all rows of its adapter and writes its gradients,
// another one sums: da [R, C], db [R, D], where these are wanted.
struct LoraPart {
  std::int64_t adapter, begin, end;
  bool whole;
  float *da, *db;
};

inline std::uintptr_t place_of(const void* first, Storage storage, std::int64_t element) {
  return reinterpret_cast<std::uintptr_t>(first) + static_cast<std::uintptr_t>(element * bytes_of(storage));
}

inline float scaling_of(const LoraLinear& given, std::int64_t adapter) {
  return given.scalings == nullptr ? given.scaling : given.scaling * given.scalings[adapter];
}

struct KernelTable {
  std::int64_t (*scratch)(const LoraJob&);
  void (*forward_part)(const LoraJob&, const LoraPart&, float* scratch);
  void (*backward_part)(const LoraJob&, const LoraPart&, float* scratch);
  // What an adapter that was cut gets from the first of its parts, which holds the sums of all.
  void (*write)(const LoraJob&, const LoraPart&, float* scratch);
};

// Every standard header must be included above this line.
#define EM3_KERNEL "lora_linear_kernel.inl"
#include "every_isa.inl"

void check(const LoraLinear& given) {
  if (given.T < 0 || given.C < 1 || given.D < 1 || given.G < 1 || given.R < 1) {
    throw std::invalid_argument("lora_linear: T must be at least 0, C, D, G and R at least 1");
  }
  if (given.offsets == nullptr) return;
  if (given.offsets[0] != 0 || given.offsets[given.G] > given.T) {
    throw std::invalid_argument("lora_linear: offsets must begin with 0 and end within the rows");
  }
  for (int64_t g = 0; g < given.G; ++g) {
    if (given.offsets[g] > given.offsets[g + 1]) throw std::invalid_argument("lora_linear: offsets must not decrease");
  }
}

// Each adapter's run of places in the order.
class Division {
 public:
  explicit Division(const LoraLinear& given) : given_(given) {
    if (given.adapter != nullptr) {
      sort();
    } else if (given.offsets != nullptr) {
      bounds_.assign(given.offsets, given.offsets + given.G + 1);
    } else {
      bounds_.assign(static_cast<std::size_t>(given.G) + 1, given.T);
      bounds_[0] = 0;
    }
  }

  const int64_t* order() const { return given_.adapter == nullptr ? nullptr : order_.data(); }

  // The parts of every adapter that has rows; with `all`, one without rows for the others. Their number does not depend
  // on threads. A part of several has half of `most` rows at least: that bounds what the sums of parts take.
  std::vector<LoraPart> parts(bool all) const {
    const int64_t most = std::max({int64_t{128}, 4 * given_.R, (given_.T + 31) / 32});
    std::vector<LoraPart> out;
    for (int64_t g = 0; g < given_.G; ++g) {
      const int64_t begin = bounds_[static_cast<std::size_t>(g)], rows = bounds_[static_cast<std::size_t>(g) + 1] - begin;
      const int64_t count = std::max((rows + most - 1) / most, int64_t{all});
      for (int64_t i = 0; i < count; ++i) {
        out.push_back({g, begin + rows * i / count, begin + rows * (i + 1) / count, count == 1, nullptr, nullptr});
      }
    }
    return out;
  }

 private:
  // By counting. Rows of one adapter stay in their order.
  void sort() {
    bounds_.assign(static_cast<std::size_t>(given_.G) + 1, 0);
    for (int64_t i = 0; i < given_.T; ++i) {
      if (has(i)) ++bounds_[static_cast<std::size_t>(given_.adapter[i]) + 1];
    }
    for (std::size_t g = 1; g < bounds_.size(); ++g) bounds_[g] += bounds_[g - 1];
    order_.resize(static_cast<std::size_t>(bounds_.back()));
    std::vector<int64_t> next(bounds_);
    for (int64_t i = 0; i < given_.T; ++i) {
      if (has(i)) order_[static_cast<std::size_t>(next[static_cast<std::size_t>(given_.adapter[i])]++)] = i;
    }
  }

  bool has(int64_t i) const { return given_.adapter[i] >= 0 && given_.adapter[i] < given_.G; }

  LoraLinear given_;
  std::vector<int64_t> bounds_, order_;
};

template <class Kernel>
void run(const LoraJob& job, const std::vector<LoraPart>& parts, const KernelTable& table, int threads, const Kernel& kernel) {
  const auto scratch = static_cast<std::size_t>(table.scratch(job));
  parallel_for(threads, static_cast<int>(parts.size()), [&](int i) {
    kernel(job, parts[static_cast<std::size_t>(i)], thread_scratch(scratch));
  });
}

// The sums of an adapter that was cut, in the order of its parts, one row of A and column of B a unit of work.
void add_up(const LoraJob& job, const std::vector<LoraPart>& parts, const KernelTable& table, int threads) {
  std::vector<std::size_t> cut;  // the first part of each such adapter
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].whole && (i == 0 || parts[i - 1].adapter != parts[i].adapter)) cut.push_back(i);
  }
  const int64_t C = job.given.C, D = job.given.D, R = job.given.R;
  parallel_for(threads, static_cast<int>(static_cast<int64_t>(cut.size()) * R), [&](int unit) {
    const std::size_t first = cut[static_cast<std::size_t>(unit / R)];
    const int64_t g = parts[first].adapter, r = unit % R;
    std::size_t end = first;
    while (end < parts.size() && parts[end].adapter == g) ++end;
    const auto sum = [&](float* LoraPart::* of, int64_t width) {
      float* const total = parts[first].*of + r * width;
      for (std::size_t i = first + 1; i < end; ++i) {
        const float* const more = parts[i].*of + r * width;
        for (int64_t k = 0; k < width; ++k) total[k] += more[k];
      }
    };
    if (job.to.da != nullptr) sum(&LoraPart::da, C);
    if (job.to.db != nullptr) sum(&LoraPart::db, D);
  });
  const auto scratch = static_cast<std::size_t>(table.scratch(job));
  parallel_for(threads, static_cast<int>(cut.size()), [&](int i) {
    table.write(job, parts[cut[static_cast<std::size_t>(i)]], thread_scratch(scratch));
  });
}

}  // namespace

void lora_linear_forward(const LoraLinear& given, const Rows& x, const Rows& y, int threads, Isa isa) {
  check(given);
  const Division division(given);
  const KernelTable& table = kernels(isa);
  run({given, false, division.order(), x, y, {}}, division.parts(false), table, threads, table.forward_part);
}

void lora_linear_backward(const LoraLinear& given, const Rows& dy, const Rows& x, const LoraGradients& to, int threads,
                          Isa isa) {
  check(given);
  const bool sums = to.da != nullptr || to.db != nullptr;
  const Division division(given);
  const KernelTable& table = kernels(isa);
  std::vector<LoraPart> parts = division.parts(sums);
  const int64_t C = given.C, D = given.D, R = given.R, of_part = R * ((to.da ? C : 0) + (to.db ? D : 0));
  const auto cut = std::count_if(parts.begin(), parts.end(), [](const LoraPart& part) { return !part.whole; });
  std::vector<float> memory(static_cast<std::size_t>(cut * of_part));
  float* next = memory.data();
  for (LoraPart& part : parts) {
    if (part.whole) continue;
    part.da = next;
    part.db = next + (to.da ? R * C : 0);
    next += of_part;
  }
  const LoraJob job{given, true, division.order(), x, dy, to};
  run(job, parts, table, threads, table.backward_part);
  add_up(job, parts, table, threads);
}

}  // namespace em3
