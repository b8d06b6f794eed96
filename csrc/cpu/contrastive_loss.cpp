// Checks, the arrangement of rows, division of the matrix among threads, and the choice of the instruction set. The
// mathematics is in contrastive_loss_kernel.inl.
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

struct Range {
  std::int64_t begin, end;
};

// The caller's rows in the order of the sheet: its first `ordered` places hold the rows that `order` names.
struct Source {
  const float* rows;
  std::int64_t stride, V;
  std::int64_t places;  // of its panels, rows of zeros behind the last one included
  const std::int64_t* order;
  std::int64_t ordered;

  std::int64_t place(std::int64_t i) const { return i < ordered ? order[i] : i; }
  const float* row(std::int64_t i) const { return rows + place(i) * stride; }
};

// The matrix of logits that is never formed, rows and columns in the order of their items: equal ids side by side, so
// that what a row must not meet is one run of columns. Logits, offsets and shift are to base 2, which costs nothing
// here (it is in the rows of x) and saves a third of each exponential.
struct Sheet {
  std::int64_t B, M, V, padded_M;  // columns come in whole panels; those behind M have weight 0, offset -inf
  const Range* item;               // [B], the columns of row i's item
  const float* x;                  // times the scale and log2(e), panels [V / kPanel][B][kPanel]
  const float* y;                  // panels [V / kPanel][padded_M][kPanel]
  const float* y_transposed;       // panels [padded_M / kPanel][V][kPanel]
  const float *across, *across_weight;  // [padded_M], of columns; weight = exp(offset - the largest one of both)
  const float *down, *down_weight;      // [B], of rows
  bool one_shift;
  float shift;
};

struct ForwardJob {
  Sheet sheet;
  float *row_sum, *row_max;  // [B]
  float *col_sum, *col_max;  // [padded_M]
};

// With one shift, row and col are the gradient times exp(shift + largest offset - logsumexp), and drow, dcol unused.
struct BackwardJob {
  Sheet sheet;
  const float *row, *drow;  // [B]
  const float *col, *dcol;  // [padded_M]
  float *dx, *dy;           // panels like x and y
  float* offset_down;       // [B], what a candidate's offset gets as a row, and [padded_M] as a column
  float* offset_across;
};

// NaN if one is.
inline float larger(float a, float b) { return b <= a || a != a ? a : b; }

struct KernelTable {
  std::int64_t panel, tile;
  float (*pack)(const Source&, float scale, std::int64_t begin, std::int64_t end, float* out);
  void (*pack_transposed)(const Source&, std::int64_t begin, std::int64_t end, float* out);
  void (*unpack)(const float* panels, const Source& like, float scale, std::int64_t begin, std::int64_t end, float* out,
                 double* dot);
  void (*forward_block)(const ForwardJob&, const Range& rows, const Range& cols, float* tile);
  void (*backward_block)(const BackwardJob&, const Range& rows, const Range& cols, float* tile);
};

// Every standard header must be included above this line.
#define EM3_KERNEL "contrastive_loss_kernel.inl"
#include "every_isa.inl"

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Zeros on whole cache lines.
class Floats {
 public:
  explicit Floats(int64_t n = 0) {
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(float);
    memory_.reset(static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
    std::fill(get(), get() + n, 0.0f);
  }
  float* get() const { return memory_.get(); }

 private:
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Delete> memory_;
};

// Rows and columns are cut into as many parts. In each round a part meets another run of columns, so that no two
// threads ever add to the same sum, nothing is kept a thread, and every sum has one order.
class Division {
 public:
  Division(const Contrast& given, int64_t panel, int products, int threads) : panel_(panel), threads_(threads) {
    rows_ = given.B;
    panels_ = (given.M + panel - 1) / panel;
    // A block should be worth waking a thread for, a few microseconds.
    constexpr double kBlock = 4e5;  // multiply-adds
    const double work = static_cast<double>(given.B) * static_cast<double>(given.M) *
                        static_cast<double>(given.V * products + 32);
    const double most = std::sqrt(work / kBlock);
    parts_ = most < threads ? std::max(1, static_cast<int>(most)) : threads;
    // Two parts a thread where they are long: one that was held up leaves the rest to the others.
    if (threads > 1 && most > 8.0 * threads) parts_ = 2 * threads;
  }

  int64_t padded() const { return panels_ * panel_; }
  int parts() const { return parts_; }
  Range rows(int part) const { return {rows_ * part / parts_, rows_ * (part + 1) / parts_}; }
  Range cols(int part) const { return {panels_ * part / parts_ * panel_, panels_ * (part + 1) / parts_ * panel_}; }

  // fn(part), once for every part.
  template <class Fn>
  void each_part(const Fn& fn) const {
    parallel_for(threads_, parts_, fn);
  }

  // fn(rows, cols), once for every block.
  template <class Fn>
  void each_block(const Fn& fn) const {
    for (int round = 0; round < parts_; ++round) {
      each_part([&](int part) { fn(rows(part), cols((part + round) % parts_)); });
    }
  }

 private:
  int64_t rows_ = 0, panels_ = 0, panel_;
  int threads_, parts_ = 1;
};

struct Arrangement {
  const KernelTable& table;
  Division division;
  std::vector<int64_t> row_order, col_order;
  std::vector<Range> item;
  Floats x_panels, y_panels, y_transposed, across, across_weight, down, down_weight;
  Source x, y;
  Sheet sheet;
  float largest_offset = 0.0f;
  float shift = 0.0f;  // of exponentials and weights together, to base e

  Arrangement(const Contrast& given, const ShiftLimits& limits, bool y_itself, int products, int threads, Isa isa)
      : table(kernels(isa)), division(given, table.panel, products, threads) {
    const int64_t width = (given.V + table.panel - 1) / table.panel * table.panel;
    sort(given);
    x = {given.x, given.x_stride, given.V, given.B, row_order.data(), static_cast<int64_t>(row_order.size())};
    y = {given.y, given.y_stride, given.V, division.padded(), col_order.data(), static_cast<int64_t>(col_order.size())};
    x_panels = Floats(given.B * width);
    if (y_itself) y_panels = Floats(division.padded() * width);
    y_transposed = Floats(division.padded() * given.V);
    sheet = {given.B, given.M, given.V, division.padded(), item.data(), x_panels.get(), y_panels.get(),
             y_transposed.get(), nullptr, nullptr, nullptr, nullptr, false, 0.0f};
    const float spread = arrange_offsets(given);
    const float bound = kLn2 * pack(given.scale * kLog2E, y_itself);
    sheet.one_shift = bound <= limits.largest_logit && spread <= limits.largest_spread;
    shift = std::max(0.0f, bound - limits.top);
    sheet.shift = shift * kLog2E;
    shift += largest_offset;
  }

  // The first n numbers of a side from the caller's order, null = `missing`, which also fills the places behind n.
  static Floats arranged(const Source& side, const float* given, int64_t n, float missing) {
    Floats out(side.places);
    for (int64_t i = 0; i < side.places; ++i) {
      out.get()[i] = given == nullptr || i >= n ? missing : given[side.place(i)];
    }
    return out;
  }

 private:
  void sort(const Contrast& given) {
    item.resize(static_cast<std::size_t>(given.B));
    if (given.row_ids == nullptr) {
      for (int64_t i = 0; i < given.B; ++i) item[static_cast<std::size_t>(i)] = given.own ? Range{i, i + 1} : Range{0, 0};
      return;
    }
    const std::vector<int64_t> rows = sorted(given.row_ids, given.B, row_order);
    const std::vector<int64_t> cols = given.own ? rows : sorted(given.col_ids, given.N, col_order);
    if (given.own) col_order = row_order;
    std::size_t begin = 0, end = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (i == 0 || rows[i] != rows[i - 1]) {
        for (begin = end; begin < cols.size() && cols[begin] < rows[i];) ++begin;
        for (end = begin; end < cols.size() && cols[end] == rows[i];) ++end;
      }
      item[i] = {static_cast<int64_t>(begin), static_cast<int64_t>(end)};
    }
  }

  // The ids in ascending order, and into `order` the place of each.
  static std::vector<int64_t> sorted(const int64_t* given, int64_t n, std::vector<int64_t>& order) {
    std::vector<std::pair<int64_t, int64_t>> ids;
    for (int64_t i = 0; i < n; ++i) ids.emplace_back(given[i], i);
    std::sort(ids.begin(), ids.end());
    std::vector<int64_t> values;
    for (const auto& [id, place] : ids) {
      values.push_back(id);
      order.push_back(place);
    }
    return values;
  }

  // How far the offsets lie apart.
  float arrange_offsets(const Contrast& given) {
    float low = kInfinity, high = -kInfinity;
    const auto widen = [&](const float* offset, int64_t n) {
      if (offset == nullptr || n == 0) return;
      const auto [least, most] = std::minmax_element(offset, offset + n);
      low = std::min(low, *least);
      high = std::max(high, *most);
    };
    if (!given.own) widen(given.down, given.B);
    widen(given.across, given.M);
    if (low <= high) largest_offset = high;
    const auto arrange = [&](const Source& side, const float* natural, int64_t n, Floats& offset, Floats& weight) {
      offset = arranged(side, natural, natural == nullptr ? 0 : n, -kInfinity);
      weight = Floats(side.places);
      for (int64_t i = 0; i < n; ++i) {
        float& value = offset.get()[i];
        if (natural == nullptr) value = 0.0f;
        weight.get()[i] = natural == nullptr ? 1.0f : std::exp(value - largest_offset);
        value *= kLog2E;
      }
    };
    arrange(y, given.across, given.M, across, across_weight);
    arrange(x, given.down, given.B, down, down_weight);
    sheet.across = across.get();
    sheet.across_weight = across_weight.get();
    sheet.down = down.get();
    sheet.down_weight = down_weight.get();
    return low <= high ? high - low : 0.0f;
  }

  // No logit is larger than this; NaN if one may be NaN.
  float pack(float scale, bool y_itself) {
    std::vector<float> longest_x(static_cast<std::size_t>(division.parts())), longest_y(longest_x);
    division.each_part([&](int part) {
      const Range rows = division.rows(part), cols = division.cols(part);
      const int64_t end = std::min(cols.end, sheet.M);
      longest_x[static_cast<std::size_t>(part)] = table.pack(x, scale, rows.begin, rows.end, x_panels.get());
      longest_y[static_cast<std::size_t>(part)] =
          table.pack(y, 1.0f, cols.begin, end, y_itself ? y_panels.get() : nullptr);
      table.pack_transposed(y, cols.begin, end, y_transposed.get());
    });
    const auto longest = [](const std::vector<float>& of_parts) {
      return std::sqrt(std::accumulate(of_parts.begin(), of_parts.end(), 0.0f, larger));
    };
    return longest(longest_x) * longest(longest_y);
  }
};

void check(const Contrast& given) {
  if (given.B < 0 || given.N < 0 || given.M < given.N || given.V < 1 || (given.own && given.N != given.B)) {
    throw std::invalid_argument("contrastive_loss: B and N must be at least 0, M at least N and V at least 1");
  }
}

// log(sums) + shifts to base 2 (null = the one shift) in the caller's order. False if one is not at least `lowest`.
bool finish(const Arrangement& a, const Source& side, int64_t n, const Floats& sums, const float* shifts, float lowest,
            float* out) {
  bool good = true;
  for (int64_t i = 0; out != nullptr && i < n; ++i) {
    const float value = std::log(sums.get()[i]) + (shifts == nullptr ? a.shift : kLn2 * shifts[i]);
    good = good && value >= lowest;
    out[side.place(i)] = value;
  }
  return good;
}

bool at_least(float lowest, const float* of_rows, int64_t n) {
  return of_rows == nullptr || std::all_of(of_rows, of_rows + n, [&](float value) { return value >= lowest; });
}

// What softmaxes() takes for a direction: its logsumexp to base 2 or, with one shift, the factor of the exponentials.
// Where there is no gradient or no candidate, an infinite logsumexp makes every share of it 0.
Floats factors(const Arrangement& a, const Source& side, int64_t n, const float* of_side, const Floats& gradient) {
  Floats lse = Arrangement::arranged(side, of_side, n, kInfinity);
  for (int64_t i = 0; i < side.places; ++i) {
    float& value = lse.get()[i];
    if (value == -kInfinity) value = kInfinity;
    value = a.sheet.one_shift ? gradient.get()[i] * std::exp(a.shift - value) : kLog2E * value;
  }
  return lse;
}

void run_forward(const Arrangement& a, const ForwardJob& job) {
  a.division.each_block([&](const Range& rows, const Range& cols) {
    a.table.forward_block(job, rows, cols, thread_scratch(static_cast<std::size_t>(a.table.tile)));
  });
}

}  // namespace

void contrastive_loss_forward(const Contrast& given, const ShiftLimits& limits, float* row, float* col, int threads,
                              Isa isa) {
  check(given);
  const Arrangement a(given, limits, false, 1, threads, isa);
  if (a.sheet.one_shift) {
    const Floats row_sum(a.sheet.B), col_sum(a.sheet.padded_M);
    run_forward(a, {a.sheet, row_sum.get(), nullptr, col_sum.get(), nullptr});
    const bool rows_fit = finish(a, a.x, given.B, row_sum, nullptr, a.shift + limits.low, row);
    if (finish(a, a.y, given.N, col_sum, nullptr, a.shift + limits.low, col) && rows_fit) return;
  }
  const Floats row_sum(a.sheet.B), row_max(a.sheet.B), col_sum(a.sheet.padded_M), col_max(a.sheet.padded_M);
  std::fill(row_max.get(), row_max.get() + a.sheet.B, std::numeric_limits<float>::lowest());
  std::fill(col_max.get(), col_max.get() + a.sheet.padded_M, std::numeric_limits<float>::lowest());
  ForwardJob job{a.sheet, row_sum.get(), row_max.get(), col_sum.get(), col_max.get()};
  job.sheet.one_shift = false;
  run_forward(a, job);
  finish(a, a.x, given.B, row_sum, row_max.get(), -kInfinity, row);
  finish(a, a.y, given.N, col_sum, col_max.get(), -kInfinity, col);
}

void contrastive_loss_backward(const Contrast& given, const ShiftLimits& limits, const float* row, const float* col,
                               const float* drow, const float* dcol, const ContrastGradients& to, int threads,
                               Isa isa) {
  check(given);
  const bool need_x = to.dx != nullptr || to.dscale != nullptr, need_y = to.dy != nullptr;
  Arrangement a(given, limits, need_x, 1 + need_x + need_y, threads, isa);
  const float lowest = a.shift + limits.low;
  a.sheet.one_shift = a.sheet.one_shift && at_least(lowest, row, given.B) && at_least(lowest, col, given.N);
  const Sheet& sheet = a.sheet;

  const Floats to_rows = Arrangement::arranged(a.x, row == nullptr ? nullptr : drow, given.B, 0.0f);
  const Floats to_cols = Arrangement::arranged(a.y, col == nullptr ? nullptr : dcol, given.N, 0.0f);
  const Floats rows = factors(a, a.x, given.B, row, to_rows), cols = factors(a, a.y, given.N, col, to_cols);
  const int64_t width = (sheet.V + a.table.panel - 1) / a.table.panel * a.table.panel;
  const Floats dx(need_x ? sheet.B * width : 0), dy(need_y ? sheet.padded_M * width : 0);
  const Floats down(sheet.B), across(sheet.padded_M);
  const BackwardJob job{sheet, rows.get(), to_rows.get(), cols.get(), to_cols.get(), need_x ? dx.get() : nullptr,
                        need_y ? dy.get() : nullptr, down.get(), to.doffset != nullptr ? across.get() : nullptr};
  a.division.each_block([&](const Range& r, const Range& c) {
    a.table.backward_block(job, r, c, thread_scratch(static_cast<std::size_t>(a.table.tile)));
  });

  std::vector<double> dots(to.dscale != nullptr ? static_cast<std::size_t>(sheet.B) : 0);
  a.division.each_part([&](int part) {
    const Range r = a.division.rows(part), c = a.division.cols(part);
    if (need_x) a.table.unpack(dx.get(), a.x, given.scale, r.begin, r.end, to.dx, dots.empty() ? nullptr : dots.data());
    if (need_y) a.table.unpack(dy.get(), a.y, kLn2, c.begin, std::min(c.end, sheet.M), to.dy, nullptr);
  });
  if (to.dscale != nullptr) *to.dscale = std::accumulate(dots.begin(), dots.end(), 0.0);
  if (to.doffset == nullptr) return;
  float* const to_across = to.doffset + (given.own ? 0 : sheet.B);
  for (int64_t j = 0; j < sheet.M; ++j) to_across[a.y.place(j)] = across.get()[j];
  for (int64_t i = 0; i < sheet.B; ++i) {
    float& share = to.doffset[a.x.place(i)];
    share = given.own ? share + down.get()[i] : down.get()[i];
  }
}

}  // namespace em3
