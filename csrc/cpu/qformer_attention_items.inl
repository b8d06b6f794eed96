// Runs of items, forward and backward; of qformer_attention_kernel.inl.

static int64_t forward_scratch(const ForwardJob& job) {
  Arena arena{nullptr, 0};
  forward_state(job, arena);
  return arena.used;
}

static void forward_items(const ForwardJob& job, int64_t begin, int64_t end, float* scratch) {
  Arena arena{scratch, 0};
  ForwardState st = forward_state(job, arena);
  const Shape& shape = job.shape;
  for (int m = 0; m < job.M; ++m) {
    fill(st.bias[m], round_up(shape.K(), kVec), 0.0f);
    if (!shape.shared_u) continue;
    gather_rows(job.streams[m].c, 1, 0, shape.H, shape.Q, st.bias[m]);
    if (narrow_width(shape) != 0) repeat(st.bias[m], narrow_width(shape));
    row_table(job.streams[m].u, 1, 0, shape.H, shape.Q, job.streams[m].tokens.C, st.u[m]);
  }
  const int64_t together = items_together(shape, job.streams, job.M);
  for (int64_t b = begin; b < end; b += together) {
    const int64_t stop = smaller(b + together, end);
    for (int64_t i = b; i < stop; ++i) forward_item(job, st, i);
    project_items(job, st, b, stop);
  }
}

static int64_t backward_scratch(const BackwardJob& job) {
  Arena arena{nullptr, 0};
  backward_state(job, arena);
  return arena.used;
}

// to: where this part's sums go; du and dc the outputs themselves where u is not shared.
static void backward_items(const BackwardJob& job, int64_t begin, int64_t end, const Gradients& to, float* scratch) {
  Arena arena{scratch, 0};
  BackwardState st = backward_state(job, arena);
  const Shape& shape = job.shape;
  start_part(job, st);
  if (shape.shared_u) start_sums(job, st, 1, 0, to);
  const int64_t together = items_together(shape, job.streams, job.M);
  for (int64_t first = begin; first < end; first += together) {
    const int64_t stop = smaller(first + together, end);
    read_back(job, st, first, stop);
    for (int64_t b = first; b < stop; ++b) {
      if (!shape.shared_u) start_sums(job, st, shape.B, b, to);
      backward_item(job, st, b, first, stop - first);
      if (!shape.shared_u) finish_sums(job, st, shape.B, b, to);
    }
  }
  if (shape.shared_u) finish_sums(job, st, 1, 0, to);
  for (int m = 0; m < job.M; ++m) {
    if (to.dw[m] != nullptr) weigh(job, st, m, begin, end, to.dw[m]);
  }
}
