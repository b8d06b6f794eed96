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
struct Source : Embeddings {
  std::int64_t total, V;
  std::int64_t places;  // with those behind the last row that fill its panel
  const std::int64_t* order;
  std::int64_t ordered;

  std::int64_t place(std::int64_t i) const { return i < ordered ? order[i] : i; }
  const float* at(std::int64_t p) const { return p < count ? rows + p * stride : more + (p - count) * V; }
  const float* row(std::int64_t i) const { return at(place(i)); }
  float factor_of(std::int64_t i) const { return factor == nullptr ? 1.0f : factor[place(i)]; }
};

// The gradients to the caller's rows, in the same two pieces; rows = null: not wanted.
struct Gradient {
  float *rows, *more;
  std::int64_t count, V;

  float* row(std::int64_t p) const { return p < count ? rows + p * V : more + (p - count) * V; }
};

// The matrix of logits that is never formed, rows and columns in the order of their items: equal ids side by side, so
// that what a row must not meet is one run of columns. Logits, bias, offsets and shift are to base 2, which costs nothing
// here (it is in the packed rows of x) and saves a third of each exponential.
struct Sheet {
  std::int64_t B, M, V, padded_M;  // columns come in whole panels; those behind M have weight 0, offset -inf
  bool own, sigmoid, positive, offsets;
  const Range* item;               // [B], the columns of row i's item
  Source x, y;
  float scale;                     // times log2(e): packed rows of x have it
  float bias;
  const float *across, *across_weight;  // [padded_M], of columns; weight = exp(offset - the largest one of both)
  const float *down, *down_weight;      // [B], of rows
  bool one_shift;
  float shift;
};

struct ForwardJob {
  Sheet sheet;
  float *row_sum, *row_max;  // [B]
  float *col_sum, *col_max;  // [padded_M]
  float* kept;
  std::int64_t kept_stride;
};

// With one shift, row and col are the gradient times exp(shift + largest offset - logsumexp), and drow, dcol unused.
struct BackwardJob {
  Sheet sheet;
  const float *row, *drow;  // [B]
  const float *col, *dcol;  // [padded_M]
  Gradient dx, dy;
  float* offset_down;       // [B], what a candidate's offset gets as a row, and [padded_M] as a column
  float* offset_across;
  float* bias;              // [B], the sums of the rows of the gradient to the logits
  float* kept;
  std::int64_t kept_stride;
};

// What a thread works in: a tile, of at most so many rows and columns, and in panels the rows that it meets.
struct Workspace {
  std::int64_t rows, cols;
  float *tile, *x, *y, *y_transposed, *dx, *dy;
};

// NaN if one is.
inline float larger(float a, float b) { return b <= a || a != a ? a : b; }

struct KernelTable {
  std::int64_t panel, tile_rows, tile_cols, tile_stride;
  double (*dot)(const float* a, const float* b, std::int64_t n);
  float (*longest)(const Source&, const Range& rows);
  double (*finish)(const Source&, float scale, const Range& rows, const Gradient& to);
  void (*forward_block)(const ForwardJob&, const Range& rows, const Range& cols, const Workspace&);
  void (*backward_block)(const BackwardJob&, const Range& rows, const Range& cols, const Workspace&);
};

// Every standard header must be included above this line.
#define EM3_KERNEL "contrastive_loss_kernel.inl"
#include "every_isa.inl"

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

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

  int64_t longest_rows() const { return (rows_ + parts_ - 1) / parts_; }
  int64_t longest_cols() const { return (panels_ + parts_ - 1) / parts_ * panel_; }

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
  Floats across, across_weight, down, down_weight;
  Sheet sheet{};
  float largest_offset = 0.0f;
  float shift = 0.0f;  // of exponentials and weights together, to base e

  Arrangement(const Contrast& given, const ShiftLimits& limits, int products, int threads, Isa isa)
      : table(kernels(isa)), division(given, table.panel, products, threads) {
    sort(given);
    sheet.B = given.B;
    sheet.M = given.M;
    sheet.V = given.V;
    sheet.padded_M = division.padded();
    sheet.own = given.own;
    sheet.sigmoid = given.kind != ContrastKind::infonce;
    sheet.positive = given.kind == ContrastKind::sigmoid_positive;
    sheet.offsets = given.across != nullptr || given.down != nullptr;
    sheet.item = item.data();
    sheet.x = {given.x, given.B, given.V, given.B, row_order.data(), static_cast<int64_t>(row_order.size())};
    sheet.y = {given.y, given.M, given.V, sheet.padded_M, col_order.data(), static_cast<int64_t>(col_order.size())};
    sheet.scale = static_cast<float>(given.scale * kLog2E);
    sheet.bias = static_cast<float>(given.bias * kLog2E);
    const float spread = arrange_offsets(given);
    if (sheet.sigmoid) return;
    const float bound = std::fabs(static_cast<float>(given.scale)) * longest_product();
    sheet.one_shift = bound <= limits.largest_logit && spread <= limits.largest_spread;
    shift = std::max(0.0f, bound - limits.top);
    sheet.shift = shift * static_cast<float>(kLog2E);
    shift += largest_offset;
  }

  // Scratch of the calling thread: what both passes need and, in the backward, panels for the gradients.
  Workspace workspace(bool backward) const {
    const int64_t width = round_up(sheet.V, table.panel), rows = std::max<int64_t>(1, std::min(table.tile_rows, division.longest_rows()));
    // Wide rows take more of the cache than the sums over them.
    const int64_t most = sheet.V > 256 ? table.tile_cols / 2 : table.tile_cols;
    const int64_t cols = std::max(table.panel, std::min(most, division.longest_cols()));
    const int64_t sizes[] = {table.tile_rows * table.tile_stride, rows * width, cols * sheet.V,
                             backward ? cols * width : 0, backward ? rows * width : 0, backward ? cols * width : 0};
    int64_t total = 0;
    for (const int64_t size : sizes) total += round_up(size, 16);
    float* at = thread_scratch(static_cast<std::size_t>(total));
    float* parts[6];
    for (int i = 0; i < 6; ++i) {
      parts[i] = at;
      at += round_up(sizes[i], 16);
    }
    return {rows, cols, parts[0], parts[1], parts[3], parts[2], parts[4], parts[5]};
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
        value *= static_cast<float>(kLog2E);
      }
    };
    arrange(sheet.y, given.across, given.M, across, across_weight);
    arrange(sheet.x, given.down, given.B, down, down_weight);
    sheet.across = across.get();
    sheet.across_weight = across_weight.get();
    sheet.down = down.get();
    sheet.down_weight = down_weight.get();
    return low <= high ? high - low : 0.0f;
  }

  // No product of a row and a column is larger than this; NaN if one may be NaN.
  float longest_product() {
    std::vector<float> longest_x(static_cast<std::size_t>(division.parts())), longest_y(longest_x);
    division.each_part([&](int part) {
      const Range cols = division.cols(part);
      longest_x[static_cast<std::size_t>(part)] = table.longest(sheet.x, division.rows(part));
      longest_y[static_cast<std::size_t>(part)] = table.longest(sheet.y, {cols.begin, std::min(cols.end, sheet.M)});
    });
    const auto longest = [](const std::vector<float>& of_parts) {
      return std::sqrt(std::accumulate(of_parts.begin(), of_parts.end(), 0.0f, larger));
    };
    return longest(longest_x) * longest(longest_y);
  }
};

void check(const Contrast& given) {
  if (given.B < 0 || given.N < 0 || given.M < given.N || given.V < 1 || given.y.count > given.M || (given.own && given.N != given.B)) {
    throw std::invalid_argument("contrastive_loss: B and N must be at least 0, M at least N and V at least 1");
  }
}

// log(sums) + shifts to base 2 (null = the one shift) in the caller's order. False if one is not at least `lowest`.
bool finish(const Arrangement& a, const Source& side, int64_t n, const Floats& sums, const float* shifts, float lowest,
            bool base2, float* out) {
  bool good = true;
  for (int64_t i = 0; out != nullptr && i < n; ++i) {
    const double log = std::log(static_cast<double>(sums.get()[i]));
    const double value = log + (shifts == nullptr ? a.shift : shifts[i] / kLog2E);
    good = good && value >= lowest;
    out[side.place(i)] = static_cast<float>(!base2 ? value : shifts == nullptr ? value * kLog2E : log * kLog2E + shifts[i]);
  }
  return good;
}

bool at_least(float lowest, const float* of_rows, int64_t n, bool base2) {
  const float least = base2 ? static_cast<float>(lowest * kLog2E) : lowest;
  return of_rows == nullptr || std::all_of(of_rows, of_rows + n, [&](float value) { return value >= least; });
}

// What softmaxes() takes for a direction: its logsumexp to base 2 or, with one shift, the factor of the exponentials.
// Where there is no gradient or no candidate, an infinite logsumexp makes every share of it 0.
Floats factors(const Arrangement& a, const Source& side, int64_t n, const float* of_side, const Floats& gradient,
               bool base2) {
  Floats lse = Arrangement::arranged(side, of_side, n, kInfinity);
  for (int64_t i = 0; i < side.places; ++i) {
    float& value = lse.get()[i];
    if (value == -kInfinity) value = kInfinity;
    const double log2 = base2 ? value : kLog2E * value;
    value = static_cast<float>(a.sheet.one_shift ? gradient.get()[i] * std::exp(a.shift - log2 / kLog2E) : log2);
  }
  return lse;
}

void run_forward(const Arrangement& a, const ForwardJob& job) {
  a.division.each_block([&](const Range& rows, const Range& cols) {
    a.table.forward_block(job, rows, cols, a.workspace(false));
  });
}

// The sums of pairs' losses, in the caller's order.
void copy_sums(const Source& side, int64_t n, const Floats& sums, float* out) {
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

void contrastive_loss_forward(const Contrast& given, const ShiftLimits& limits, float* row, float* col, const Kept& kept,
                              int threads, Isa isa) {
  check(given);
  const Arrangement a(given, limits, 1, threads, isa);
  const Sheet& sheet = a.sheet;
  if (sheet.one_shift || sheet.sigmoid) {
    const Floats row_sum(sheet.B), col_sum(sheet.padded_M);
    run_forward(a, {sheet, row_sum.get(), nullptr, col_sum.get(), nullptr, kept.logits, kept.stride});
    if (sheet.sigmoid) {
      copy_sums(sheet.x, given.B, row_sum, row);
      return copy_sums(sheet.y, given.N, col_sum, col);
    }
    const bool rows_fit = finish(a, sheet.x, given.B, row_sum, nullptr, a.shift + limits.low, given.base2, row);
    if (finish(a, sheet.y, given.N, col_sum, nullptr, a.shift + limits.low, given.base2, col) && rows_fit) return;
  }
  const Floats row_sum(sheet.B), row_max(sheet.B), col_sum(sheet.padded_M), col_max(sheet.padded_M);
  std::fill(row_max.get(), row_max.get() + sheet.B, std::numeric_limits<float>::lowest());
  std::fill(col_max.get(), col_max.get() + sheet.padded_M, std::numeric_limits<float>::lowest());
  ForwardJob job{sheet, row_sum.get(), row_max.get(), col_sum.get(), col_max.get(), kept.logits, kept.stride};
  job.sheet.one_shift = false;
  run_forward(a, job);
  finish(a, sheet.x, given.B, row_sum, row_max.get(), -kInfinity, given.base2, row);
  finish(a, sheet.y, given.N, col_sum, col_max.get(), -kInfinity, given.base2, col);
}

void contrastive_loss_backward(const Contrast& given, const ShiftLimits& limits, const float* row, const float* col,
                               const float* drow, const float* dcol, const Kept& kept, const ContrastGradients& to,
                               int threads, Isa isa) {
  check(given);
  const bool need_x = to.dx != nullptr, need_y = to.dy != nullptr;
  Arrangement a(given, limits, 1 + need_x + need_y, threads, isa);
  Sheet& sheet = a.sheet;
  if (!sheet.sigmoid) {
    const float lowest = a.shift + limits.low;
    sheet.one_shift = sheet.one_shift && at_least(lowest, row, given.B, given.base2) &&
                      at_least(lowest, col, given.N, given.base2);
    if (row == nullptr) drow = nullptr;
    if (col == nullptr) dcol = nullptr;
  }
  const Floats to_rows = Arrangement::arranged(sheet.x, drow, given.B, 0.0f);
  const Floats to_cols = Arrangement::arranged(sheet.y, dcol, given.N, 0.0f);
  Floats rows, cols;
  if (!sheet.sigmoid) {
    rows = factors(a, sheet.x, given.B, row, to_rows, given.base2);
    cols = factors(a, sheet.y, given.N, col, to_cols, given.base2);
  }
  const Floats down(sheet.B), across(sheet.padded_M), bias(sheet.sigmoid ? sheet.B : 0);
  const BackwardJob job{sheet, rows.get(), to_rows.get(), cols.get(), to_cols.get(),
                        {to.dx, nullptr, given.B, given.V},
                        {to.dy, to.more, given.y.count, given.V},
                        down.get(), to.doffset != nullptr ? across.get() : nullptr, bias.get(), kept.logits, kept.stride};
  a.division.each_block([&](const Range& r, const Range& c) {
    a.table.backward_block(job, r, c, a.workspace(true));
  });

  std::vector<double> along(static_cast<std::size_t>(a.division.parts()));
  a.division.each_part([&](int part) {
    const Range r = a.division.rows(part), c = a.division.cols(part);
    if (need_x) along[static_cast<std::size_t>(part)] = a.table.finish(sheet.x, static_cast<float>(given.scale), r, job.dx);
    if (need_y) a.table.finish(sheet.y, 1.0f, {c.begin, std::min(c.end, sheet.M)}, job.dy);
  });
  if (to.dscale != nullptr) *to.dscale = std::accumulate(along.begin(), along.end(), 0.0);
  if (to.dbias != nullptr) *to.dbias = std::accumulate(bias.get(), bias.get() + (sheet.sigmoid ? sheet.B : 0), 0.0);
  if (to.doffset != nullptr) write_offsets(given, sheet, down, across, to.doffset);
}

namespace {

// fn(begin, end) for runs of n rows, a few microseconds each at least.
template <class Fn>
void each_run_of_rows(int64_t n, int64_t V, int threads, const Fn& fn) {
  const int parts = static_cast<int>(std::min<int64_t>(threads, 1 + n * V / 100000));
  parallel_for(threads, parts, [&](int part) { fn(n * part / parts, n * (part + 1) / parts); });
}

}  // namespace

double rounded_scale(double scale, const float* factor) {
  const float packed = static_cast<float>(scale * kLog2E);
  return (factor == nullptr ? packed : packed * *factor) / kLog2E;
}

void row_products(const float* a, const float* b, int64_t n, int64_t V, double* to, int threads, Isa isa) {
  const KernelTable& table = kernels(isa);
  each_run_of_rows(n, V, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = table.dot(a + i * V, b + i * V, V);
  });
}

void inverse_lengths(const float* rows, int64_t n, int64_t V, float* to, int threads, Isa isa) {
  const KernelTable& table = kernels(isa);
  each_run_of_rows(n, V, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double length = std::sqrt(table.dot(rows + i * V, rows + i * V, V));
      to[i] = length > 1e-12 ? static_cast<float>(1.0 / length) : 0.0f;
    }
  });
}

}  // namespace em3
