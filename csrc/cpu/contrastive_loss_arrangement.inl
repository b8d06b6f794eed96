// How a contrast is laid out: its division among threads, rows in the order of their items, offsets, scratch. Included
// once by contrastive_loss.cpp, in its anonymous namespace.

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
// threads ever add to the same sum, nothing is kept a thread, and every sum has one order. Of few rows and many columns only
// these are cut: each part then has sums of its own for the rows, a slot, which are added up in the end.
class Division {
 public:
  Division(const Contrast& given, int64_t panel, int products, int threads) : panel_(panel), threads_(threads) {
    rows_ = given.B;
    panels_ = (given.M + panel - 1) / panel;
    // A block should be worth waking a thread for, a few microseconds.
    constexpr double kBlock = 4e5;  // multiply-adds
    const double work = static_cast<double>(given.B) * static_cast<double>(given.M) *
                        static_cast<double>(given.V * products + 32);
    constexpr int64_t kShort = 64;  // rows; the sums of all slots are no larger than the candidates
    by_columns_ = given.B <= kShort && 4 * given.B <= given.M;
    const double columns_a_row = static_cast<double>(given.M) / static_cast<double>(std::max<int64_t>(1, given.B));
    const double most = by_columns_ ? std::min(work / kBlock, columns_a_row) : std::sqrt(work / kBlock);
    parts_ = most < threads ? std::max(1, static_cast<int>(most)) : threads;
    // Two parts a thread where they are long: one that was held up leaves the rest to the others.
    if (threads > 1 && most > 8.0 * threads) parts_ = 2 * threads;
  }

  int64_t padded() const { return panels_ * panel_; }
  int slots() const { return by_columns_ ? parts_ : 1; }
  int64_t longest_rows() const { return by_columns_ ? rows_ : (rows_ + parts_ - 1) / parts_; }
  int64_t longest_cols() const { return (panels_ + parts_ - 1) / parts_ * panel_; }

  // fn(rows, cols, slot), once for every block.
  template <class Fn>
  void each_block(const Fn& fn) const {
    for (int round = 0; round < (by_columns_ ? 1 : parts_); ++round) {
      parallel_for(threads_, parts_, [&](int part) {
        const Range all{0, rows_}, some{rows_ * part / parts_, rows_ * (part + 1) / parts_};
        const int64_t run = (part + round) % parts_;
        const Range cols{panels_ * run / parts_ * panel_, panels_ * (run + 1) / parts_ * panel_};
        fn(by_columns_ ? all : some, cols, by_columns_ ? part : 0);
      });
    }
  }

 private:
  int64_t rows_ = 0, panels_ = 0, panel_;
  int threads_, parts_ = 1;
  bool by_columns_ = false;
};

// The rows of one side in their own order.
Source source_of(const Embeddings& given, int64_t n, int64_t V) { return {given, n, V, n, nullptr, 0}; }

struct Arrangement {
  const KernelTable& table;
  Division division;
  std::vector<int64_t> row_order, col_order;
  std::vector<Range> item;
  Floats across, across_weight, down, down_weight;
  Sheet sheet{};
  float largest_offset = 0.0f;
  double shift = 0.0;  // of exponentials and weights together, to base e

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
    sheet.few = given.B <= table.few;
    sheet.pairs = table.pairs && !sheet.few && given.x.storage == Storage::bf16 && given.y.storage == Storage::bf16;
    sheet.item = item.data();
    sheet.x = {given.x, given.B, given.V, given.B, row_order.data(), static_cast<int64_t>(row_order.size())};
    const std::vector<int64_t>& order = given.own ? row_order : col_order;
    sheet.y = {given.y, given.M, given.V, sheet.padded_M, order.data(), static_cast<int64_t>(order.size())};
    sheet.scale = static_cast<float>(given.scale * kLog2E);
    sheet.bias = static_cast<float>(given.bias * kLog2E);
    const float spread = arrange_offsets(given);
    if (sheet.sigmoid) return;
    const float bound = std::fabs(static_cast<float>(given.scale)) *
                        (given.longest != nullptr ? *given.longest : longest_product(given, threads, isa));
    sheet.one_shift = bound <= limits.largest_logit && spread <= limits.largest_spread;
    sheet.shift = std::max(0.0f, bound - limits.top) * static_cast<float>(kLog2E);
    shift = sheet.shift / kLog2E + largest_offset;
  }

  // Scratch of the calling thread: what both passes need and, in the backward, panels for the gradients.
  Workspace workspace(bool backward) const {
    Workspace space{};
    const int64_t width = round_up(sheet.V, table.panel);
    space.rows = std::max<int64_t>(1, std::min(table.tile_rows, division.longest_rows()));
    // Wide rows take more of the cache than the sums over them, unless they are pairs; and what few half rows take in memory,
    // a thread's tile with all columns would take once more.
    const bool small = sheet.y.storage != Storage::f32 && sheet.M * sheet.V < (int64_t{1} << 19);
    const int64_t most = (sheet.V > 256 && !sheet.pairs) || small ? table.tile_cols / 2 : table.tile_cols;
    space.cols = std::max(table.panel, std::min(most, division.longest_cols()));
    const int64_t rounded = sheet.pairs ? table.tile_rows * table.tile_stride / 2 : 0;
    const std::pair<float**, int64_t> parts[] = {
        {&space.tile, table.tile_rows * table.tile_stride},
        {&space.x, space.rows * width},
        {&space.y_transposed, sheet.few ? 0 : space.cols * sheet.V},
        {&space.y, backward && !sheet.few ? space.cols * width : 0},
        {&space.dx, backward ? space.rows * width : 0},
        {&space.dy, backward ? space.cols * width : 0},
        {&space.factors, sheet.pairs ? table.tile_cols : 0},
        {&space.across, backward ? rounded : 0},
        {&space.down, backward ? rounded : 0},
    };
    int64_t total = 0;
    for (const auto& part : parts) total += round_up(part.second, 16);
    float* at = thread_scratch(static_cast<std::size_t>(total));
    for (const auto& part : parts) {
      *part.first = at;
      at += round_up(part.second, 16);
    }
    return space;
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
    sort(given.row_ids, given.B, given.own ? given.order : nullptr, row_order);
    if (!given.own) sort(given.col_ids, given.N, nullptr, col_order);
    const std::vector<int64_t>& cols = given.own ? row_order : col_order;
    const auto row_id = [&](std::size_t i) { return given.row_ids[row_order[i]]; };
    const auto col_id = [&](std::size_t i) { return given.col_ids[cols[i]]; };
    std::size_t begin = 0, end = 0;
    for (std::size_t i = 0; i < row_order.size(); ++i) {
      if (i == 0 || row_id(i) != row_id(i - 1)) {
        for (begin = end; begin < cols.size() && col_id(begin) < row_id(i);) ++begin;
        for (end = begin; end < cols.size() && col_id(end) == row_id(i);) ++end;
      }
      item[i] = {static_cast<int64_t>(begin), static_cast<int64_t>(end)};
    }
  }

  static void sort(const int64_t* ids, int64_t n, const int64_t* known, std::vector<int64_t>& order) {
    if (known != nullptr) {
      order.assign(known, known + n);
    } else {
      order.resize(static_cast<std::size_t>(n));
      item_order(ids, n, order.data());
    }
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
    sheet.across = across.get();
    sheet.across_weight = across_weight.get();
    sheet.down = sheet.across;  // of the same rows in the same order
    sheet.down_weight = sheet.across_weight;
    if (!given.own) {
      arrange(sheet.x, given.down, given.B, down, down_weight);
      sheet.down = down.get();
      sheet.down_weight = down_weight.get();
    }
    return low <= high ? high - low : 0.0f;
  }
};
