// Checks, the passes over the matrix, and the choice of the instruction set. The mathematics is in
// contrastive_loss_kernel.inl; how rows are arranged and divided among threads, in contrastive_loss_arrangement.inl.
#include "contrastive_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.h"

#if EM3_HAVE_X86_PATHS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace em3 {
namespace {

#include "contrastive_loss_sheet.inl"

// Every standard header must be included above this line.
#define EM3_KERNEL "contrastive_loss_kernel.inl"
#define EM3_KERNEL_BF16
#include "every_isa.inl"

#include "contrastive_loss_arrangement.inl"

void check(const Contrast& given) {
  if (given.B < 0 || given.N < 0 || given.M < given.N || given.V < 1 || given.y.count > given.M || (given.own && given.N != given.B)) {
    throw std::invalid_argument("contrastive_loss: B and N must be at least 0, M at least N and V at least 1");
  }
}

// log(sums) + shifts to base 2 (null = the one shift) in the caller's order. False if one is not at least `lowest`.
bool finish(const Arrangement& a, const Source& side, int64_t n, const Floats& sums, const float* shifts, double lowest,
            double* out) {
  bool good = true;
  for (int64_t i = 0; out != nullptr && i < n; ++i) {
    const double value = std::log(static_cast<double>(sums.get()[i])) + (shifts == nullptr ? a.shift : shifts[i] / kLog2E);
    good = good && value >= lowest;
    out[side.place(i)] = value;
  }
  return good;
}

bool at_least(double lowest, const double* of_rows, int64_t n) {
  return of_rows == nullptr || std::all_of(of_rows, of_rows + n, [&](double value) { return value >= lowest; });
}

// What softmaxes() takes for a direction: its logsumexp to base 2 or, with one shift, the factor of the exponentials.
// What float32 cuts off a logsumexp goes into the gradient to it, where it costs nothing for each logit. Where there is no
// gradient or no candidate, an infinite logsumexp makes every share of it 0.
Floats factors(const Arrangement& a, const Source& side, int64_t n, const double* of_side, const Floats& gradient) {
  Floats found(side.places);
  for (int64_t i = 0; i < side.places; ++i) {
    const double given = of_side == nullptr || i >= n ? kInfinity : of_side[side.place(i)];
    const double lse = given == -kInfinity ? kInfinity : given, exact = lse * kLog2E;
    float &to = gradient.get()[i], &value = found.get()[i];
    value = static_cast<float>(a.sheet.one_shift ? to * std::exp(a.shift - lse) : exact);
    if (!a.sheet.one_shift && std::isfinite(value)) to = static_cast<float>(to * std::exp2(value - exact));
  }
  return found;
}

// Each slot has sums of its own.
void run_forward(const Arrangement& a, const ForwardJob& job) {
  a.division.each_block([&](const Range& rows, const Range& cols, int slot) {
    ForwardJob of_slot = job;
    of_slot.row_sum += slot * job.sheet.B;
    if (job.row_max != nullptr) of_slot.row_max += slot * job.sheet.B;
    a.table.forward_block(of_slot, rows, cols, a.workspace(false));
  });
}

// n numbers of each slot, added up in those of the first one.
void join_slots(int slots, int64_t n, float* sums) {
  for (int slot = 1; slot < slots; ++slot)
    for (int64_t i = 0; i < n; ++i) sums[i] += sums[slot * n + i];
}

void join_slots(int slots, int64_t n, float* sums, float* maxima) {
  for (int64_t i = 0; slots > 1 && i < n; ++i) {
    float most = maxima[i];
    for (int slot = 1; slot < slots; ++slot) most = larger(most, maxima[slot * n + i]);
    float total = 0.0f;
    for (int slot = 0; slot < slots; ++slot) total += sums[slot * n + i] * std::exp2(maxima[slot * n + i] - most);
    sums[i] = total;
    maxima[i] = most;
  }
}

// The sums of pairs' losses, in the caller's order.
void copy_sums(const Source& side, int64_t n, const Floats& sums, double* out) {
  for (int64_t i = 0; out != nullptr && i < n; ++i) out[side.place(i)] = sums.get()[i];
}

// The offsets' gradients as candidates of columns and of rows, in the form in which they came.
void write_offsets(const Contrast& given, const Sheet& sheet, const Floats& down, const Floats& across, float* doffset) {
  float* const to_across = doffset + (given.own ? 0 : sheet.B);
  for (int64_t j = 0; j < sheet.M; ++j) to_across[sheet.y.place(j)] = across.get()[j];
  for (int64_t i = 0; i < sheet.B; ++i) {
    float& share = doffset[sheet.x.place(i)];
    share = given.own ? share + down.get()[i] : down.get()[i];
  }
}

}  // namespace

void contrastive_loss_forward(const Contrast& given, const ShiftLimits& limits, double* row, double* col, const Kept& kept,
                              int threads, Isa isa) {
  check(given);
  const Arrangement a(given, limits, 1, threads, isa);
  const Sheet& sheet = a.sheet;
  const int slots = a.division.slots();
  if (sheet.one_shift || sheet.sigmoid) {
    const Floats row_sum(slots * sheet.B), col_sum(sheet.padded_M);
    run_forward(a, {sheet, row_sum.get(), nullptr, col_sum.get(), nullptr, kept.logits, kept.stride});
    join_slots(slots, sheet.B, row_sum.get());
    if (sheet.sigmoid) {
      copy_sums(sheet.x, given.B, row_sum, row);
      return copy_sums(sheet.y, given.N, col_sum, col);
    }
    const bool rows_fit = finish(a, sheet.x, given.B, row_sum, nullptr, a.shift + limits.low, row);
    if (finish(a, sheet.y, given.N, col_sum, nullptr, a.shift + limits.low, col) && rows_fit) return;
  }
  const Floats row_sum(slots * sheet.B), row_max(slots * sheet.B), col_sum(sheet.padded_M), col_max(sheet.padded_M);
  std::fill(row_max.get(), row_max.get() + slots * sheet.B, std::numeric_limits<float>::lowest());
  std::fill(col_max.get(), col_max.get() + sheet.padded_M, std::numeric_limits<float>::lowest());
  ForwardJob job{sheet, row_sum.get(), row_max.get(), col_sum.get(), col_max.get(), kept.logits, kept.stride};
  job.sheet.one_shift = false;
  run_forward(a, job);
  join_slots(slots, sheet.B, row_sum.get(), row_max.get());
  finish(a, sheet.x, given.B, row_sum, row_max.get(), -kInfinity, row);
  finish(a, sheet.y, given.N, col_sum, col_max.get(), -kInfinity, col);
}

void contrastive_loss_backward(const Contrast& given, const ShiftLimits& limits, const double* row, const double* col,
                               const float* drow, const float* dcol, const Kept& kept, const ContrastGradients& to,
                               int threads, Isa isa) {
  check(given);
  const bool need_x = to.dx != nullptr, need_y = to.dy != nullptr;
  Arrangement a(given, limits, 1 + need_x + need_y, threads, isa);
  Sheet& sheet = a.sheet;
  if (!sheet.sigmoid) {
    const double lowest = a.shift + limits.low;
    sheet.one_shift = sheet.one_shift && at_least(lowest, row, given.B) && at_least(lowest, col, given.N);
    if (row == nullptr) drow = nullptr;
    if (col == nullptr) dcol = nullptr;
  }
  const Floats to_rows = Arrangement::arranged(sheet.x, drow, given.B, 0.0f);
  const Floats to_cols = Arrangement::arranged(sheet.y, dcol, given.N, 0.0f);
  Floats rows, cols;
  if (!sheet.sigmoid) {
    rows = factors(a, sheet.x, given.B, row, to_rows);
    cols = factors(a, sheet.y, given.N, col, to_cols);
  }
  const int slots = a.division.slots();
  const int64_t size_x = need_x ? sheet.B * sheet.V : 0;
  const Floats down(slots * sheet.B), across(sheet.padded_M), bias(sheet.sigmoid ? slots * sheet.B : 0);
  const Floats more_dx((slots - 1) * size_x);  // the first slot's are the caller's
  const BackwardJob job{sheet, rows.get(), to_rows.get(), cols.get(), to_cols.get(),
                        {to.dx, nullptr, given.B, given.V},
                        {to.dy, to.more, given.y.count, given.V},
                        to.more == nullptr ? std::min(given.y.count, given.M) : given.M,
                        down.get(), to.doffset != nullptr ? across.get() : nullptr, bias.get(), kept.logits, kept.stride};
  a.division.each_block([&](const Range& r, const Range& c, int slot) {
    BackwardJob of_slot = job;
    if (slot > 0 && need_x) of_slot.dx.rows = more_dx.get() + (slot - 1) * size_x;
    of_slot.offset_down += slot * sheet.B;
    if (sheet.sigmoid) of_slot.bias += slot * sheet.B;
    a.table.backward_block(of_slot, r, c, a.workspace(true));
  });
  for (int slot = 1; slot < slots; ++slot) {
    const float* const from = more_dx.get() + (slot - 1) * size_x;
    for (int64_t i = 0; i < size_x; ++i) to.dx[i] += from[i];
  }
  join_slots(slots, sheet.B, down.get());
  if (to.dbias != nullptr) *to.dbias = std::accumulate(bias.get(), bias.get() + (sheet.sigmoid ? slots * sheet.B : 0), 0.0);
  if (to.doffset != nullptr) write_offsets(given, sheet, down, across, to.doffset);
}

namespace {

// fn(part, begin, end) for runs of n rows, a few microseconds each at least.
int parts_of_rows(int64_t n, int64_t V, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + n * V / 100000));
}
template <class Fn>
void each_run_of_rows(int64_t n, int64_t V, int threads, const Fn& fn) {
  const int parts = parts_of_rows(n, V, threads);
  parallel_for(threads, parts, [&](int part) { fn(part, n * part / parts, n * (part + 1) / parts); });
}

// The largest length of n rows times their factors.
float longest_of(const Embeddings& of, int64_t n, int64_t V, int threads, Isa isa) {
  if (of.factor != nullptr) {  // 1, but for rounding
    const float largest = std::accumulate(of.factor, of.factor + n, 0.0f, larger);
    return largest >= 0.0f ? 1.000001f : std::numeric_limits<float>::quiet_NaN();
  }
  const Source rows = source_of(of, n, V);
  std::vector<float> of_parts(static_cast<std::size_t>(parts_of_rows(n, V, threads)));
  each_run_of_rows(n, V, threads, [&](int part, int64_t begin, int64_t end) {
    of_parts[static_cast<std::size_t>(part)] = kernels(isa).longest(rows, {begin, end});
  });
  return std::sqrt(std::accumulate(of_parts.begin(), of_parts.end(), 0.0f, larger));
}

const float* floats_of(const KernelTable& table, const Source& rows, int64_t i, float* room) {
  if (rows.storage == Storage::f32) return reinterpret_cast<const float*>(rows.at(i));
  table.read_row(rows.storage, rows.at(i), rows.V, room);
  return room;
}

}  // namespace

double finish_gradients(const Embeddings& of, int64_t begin, int64_t end, int64_t V, double scale, const float* from,
                        void* to, int threads, Isa isa) {
  const KernelTable& table = kernels(isa);
  const Source rows = source_of(of, end, V);
  const bool narrow = of.storage != Storage::f32;
  std::vector<double> along(static_cast<std::size_t>(parts_of_rows(end - begin, V, threads)));
  each_run_of_rows(end - begin, V, threads, [&](int part, int64_t first, int64_t last) {
    std::vector<float> row(static_cast<std::size_t>(narrow ? V : 0));
    std::vector<float> out(static_cast<std::size_t>(narrow || to == nullptr ? V : 0));
    double total = 0.0;
    for (int64_t i = first; i < last; ++i) {
      const float* const factor = of.factor == nullptr ? nullptr : of.factor + begin + i;
      float* const floats = narrow || to == nullptr ? out.data() : static_cast<float*>(to) + i * V;
      const float* const given = floats_of(table, rows, begin + i, row.data());
      total += table.finish_row(given, factor, static_cast<float>(scale), V, from + i * V, floats);
      if (narrow && to != nullptr) {
        const auto offset = static_cast<std::uintptr_t>(i * V * bytes_of(of.storage));
        table.write_row(of.storage, floats, V, reinterpret_cast<std::uintptr_t>(to) + offset);
      }
    }
    along[static_cast<std::size_t>(part)] = total;
  });
  return std::accumulate(along.begin(), along.end(), 0.0);
}

void item_order(const int64_t* ids, int64_t n, int64_t* order) {
  std::vector<std::pair<int64_t, int64_t>> places(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) places[static_cast<std::size_t>(i)] = {ids[i], i};
  std::sort(places.begin(), places.end());
  for (const auto& place : places) *order++ = place.second;
}

float longest_product(const Contrast& given, int threads, Isa isa) {
  return longest_of(given.x, given.B, given.V, threads, isa) * longest_of(given.y, given.M, given.V, threads, isa);
}

double rounded_scale(double scale, const float* factor) {
  const float packed = static_cast<float>(scale * kLog2E);
  return (factor == nullptr ? packed : packed * *factor) / kLog2E;
}

void row_products(const Embeddings& a, const Embeddings& b, int64_t n, int64_t V, double* to, int threads, Isa isa) {
  const KernelTable& table = kernels(isa);
  const Source of_a = source_of(a, n, V), of_b = source_of(b, n, V);
  each_run_of_rows(n, V, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<float> room(static_cast<std::size_t>(a.storage == Storage::f32 ? 0 : 2 * V));
    for (int64_t i = begin; i < end; ++i) {
      to[i] = table.dot(floats_of(table, of_a, i, room.data()), floats_of(table, of_b, i, room.data() + V), V);
    }
  });
}

void inverse_lengths(const Embeddings& of, int64_t n, int64_t V, float* to, int threads, Isa isa) {
  const KernelTable& table = kernels(isa);
  const Source rows = source_of(of, n, V);
  each_run_of_rows(n, V, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<float> room(static_cast<std::size_t>(of.storage == Storage::f32 ? 0 : V));
    for (int64_t i = begin; i < end; ++i) {
      const float* const row = floats_of(table, rows, i, room.data());
      const double length = std::sqrt(table.dot(row, row, V)), inverse = length > 1e-12 ? 1.0 / length : 0.0;
      to[i] = std::isfinite(length) ? static_cast<float>(inverse) : std::numeric_limits<float>::quiet_NaN();
    }
  });
}

const float* row_as_floats(const Embeddings& of, int64_t i, int64_t V, float* room, Isa isa) {
  return floats_of(kernels(isa), source_of(of, i + 1, V), i, room);
}

}  // namespace em3
