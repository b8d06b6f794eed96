// The products with the value weights, a few items at a time; of qformer_attention_kernel.inl.

// o of items begin .. end from their y.
static void project_items(const ForwardJob& job, ForwardState& st, int64_t begin, int64_t end) {
  const Shape& shape = job.shape;
  const int64_t E = shape.E, ld = round_up(E, kVec), rows = (end - begin) * shape.Q;
  if (rows == 0 || E == 0) return;
  for (int64_t h = 0; h < shape.H; ++h) {
    const int64_t first = (h * shape.B + begin) * shape.Q;
    for (int m = 0; m < job.M; ++m) {
      const int64_t C = job.streams[m].tokens.C, k = width_of(shape, C);
      const float* const y = job.streams[m].y + first * C;
      const float* const w = job.packed_w[m] + h * ld * k;
      if (shape.pairs) {
        round_row(y, rows * C, reinterpret_cast<Half*>(st.rounded));
        scores<true>({st.rounded, k, w, k, st.values, ld}, rows, ld);
      } else {
        scores({y, C, w, C, st.values, ld}, rows, ld);
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* o = job.o + (first + i) * E;
        for (int64_t e = 0; e < E; ++e) o[e] = m == 0 ? st.values[i * ld + e] : o[e] + st.values[i * ld + e];
      }
    }
  }
}

// dy = dout w of items begin .. end.
static void read_back(const BackwardJob& job, BackwardState& st, int64_t begin, int64_t end) {
  const Shape& shape = job.shape;
  const int64_t E = shape.E, rows = (end - begin) * shape.Q;
  if (rows == 0) return;
  for (int m = 0; m < job.M; ++m) {
    if (!wanted(job.streams[m])) continue;
    const int64_t ld = round_up(job.streams[m].tokens.C, kVec);
    for (int64_t h = 0; h < shape.H; ++h) {
      const float* dout = job.dout + (h * shape.B + begin) * shape.Q * E;
      float* const dy = st.of[m].dy_rows + h * rows * ld;
      if (shape.pairs) {
        round_row(dout, rows * E, reinterpret_cast<Half*>(st.dout_pairs));
        scores<true>({st.dout_pairs, E / 2, job.packed_w[m] + h * E / 2 * ld, E / 2, dy, ld}, rows, ld);
      } else {
        scores({dout, E, job.packed_w[m] + h * E * ld, E, dy, ld}, rows, ld);
      }
    }
  }
}

// dw = dout^T y of items begin .. end: one head of a stream after the other, whose y, which nothing else reads, comes from
// memory in its order.
static void weigh(const BackwardJob& job, BackwardState& st, int m, int64_t begin, int64_t end, float* dw) {
  const Shape& shape = job.shape;
  const int64_t E = shape.E, C = job.streams[m].tokens.C, rows = (end - begin) * shape.Q;
  if (rows == 0 || E == 0) return fill(dw, shape.H * E * C, 0.0f);
  for (int64_t h = 0; h < shape.H; ++h) {
    for (int64_t e = 0; e < E; ++e) st.sum_w.dw_rows[e] = dw + (h * E + e) * C;
    for (int64_t i = 0; i < rows; i += kWeighed) {
      const int64_t first = (h * shape.B + begin) * shape.Q + i, n = smaller(kWeighed, rows - i);
      const float *y = job.streams[m].y + first * C, *dout = job.dout + first * E;
      const int64_t depth = shape.pairs ? (n + 1) / 2 : n, row = C * static_cast<int64_t>(sizeof(float));
      const Ahead next{reinterpret_cast<uintptr_t>(y + n * C), row, smaller(kWeighed, rows - i - n), sizeof(float)};
      if (shape.pairs) {
        join_floats(y, n, C, C, st.sum_w.y_joined);
        join_floats(dout, n, E, E, st.dout_pairs);
        y = st.sum_w.y_joined;
        dout = st.dout_pairs;
      }
      for (int64_t k = 0; k < depth; ++k) st.sum_w.y_rows[k] = y + k * C;
      pack_panels(y, depth, C, st.sum_w.y_packed);
      const Update g{dout, E, depth, st.sum_w.y_rows, st.sum_w.dw_rows, nullptr, nullptr, i > 0, st.sum_w.y_packed, {}};
      if (shape.pairs) {
        update<true>(g, E, C, next);
      } else {
        update(g, E, C, next);
      }
    }
  }
}
