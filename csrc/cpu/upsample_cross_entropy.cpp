// Mean cross-entropy of bilinearly upsampled logits, in every order: docs/ops/upsample_cross_entropy.md.
//
// The lanes of a vector are neighbouring cells: the pixels between two source columns.  A step takes the j-th pixel of
// each, so a cell's two ends are plain loads, and a gradient needs no scatter.  Rows are walked downwards, and the
// gradients of the two source rows around them are complete when the walk leaves a cell's row.
#include <algorithm>
#include <atomic>

#include "entry.h"
#include "tile.h"
#include "workspace.h"

namespace pmm::PMM_ISA {
namespace {

// One axis: the cell of each output index, and its distance from the cell's near end.
struct Axis {
  int64_t* cell;
  double* weight;

  Axis(Arena& arena, int64_t size_out) : cell(arena.take<int64_t>(size_out)), weight(arena.take<double>(size_out)) {}

  void fill(int64_t size_in, int64_t size_out, bool align_corners) {
    const double aligned = size_out > 1 ? double(size_in - 1) / double(size_out - 1) : 0.0;
    const double scale = double(size_in) / double(size_out);
    for (int64_t i = 0; i < size_out; ++i) {
      const double at = align_corners ? double(i) * aligned : std::max(0.0, (double(i) + 0.5) * scale - 0.5);
      cell[i] = std::min(int64_t(at), size_in - 1);
      weight[i] = at - double(cell[i]);
    }
  }
};

// What a thread works in; rows of logits are [K][row_size].
template <class R>
struct Scratch {
  R *above, *below, *above_a, *below_a;  // source rows around the output row; _a: of grad_grad_logits
  R *row, *row_a;                        // the output row's values at the source columns
  R *grad_above, *grad_below;
  int32_t* labels;  // in the order of the steps
  R *near, *slope, *near_a, *slope_a, *z, *z_a, *sum_near, *sum_far;  // [K][lanes]

  Scratch(Arena& arena, const LossArgs& a, int64_t row_size, int64_t steps) {
    const int64_t size = a.classes * row_size, lanes = a.classes * kLanes<R>;
    for (R** p : {&above, &below, &row}) *p = arena.take<R>(size);
    for (R** p : {&above_a, &below_a, &row_a}) *p = arena.take<R>(a.order > 1 ? size : 0);
    for (R** p : {&grad_above, &grad_below}) *p = arena.take<R>(a.order > 0 ? size : 0);
    labels = arena.take<int32_t>(steps * kLanes<R>);
    for (R** p : {&near, &slope, &z, &sum_near, &sum_far}) *p = arena.take<R>(lanes);
    for (R** p : {&near_a, &slope_a, &z_a}) *p = arena.take<R>(a.order > 1 ? lanes : 0);
  }
};

template <class T>
class Loss {
  using R = Computed<T>;
  static constexpr int L = kLanes<R>;

 public:
  Loss(const LossArgs& args, Arena& arena)
      : a(args),
        band(std::max<int64_t>(1, (a.height + 7) / 8)),
        bands((a.height + band - 1) / band),
        chunks(a.batch * bands),
        groups((a.width + L - 1) / L),
        row_size((groups + 1) * L),
        rows(arena, a.label_height),
        columns(arena, a.label_width),
        slot(arena.take<int64_t>(a.label_width)),
        first_step(arena.take<int64_t>(groups + 1)),
        first_row(arena.take<int64_t>(a.height + 1)),
        max_steps(most_steps()),
        weights(arena.take<R>(max_steps * L)),
        totals(arena.take<double>(chunks)),
        counts(arena.take<int64_t>(chunks)),
        borders(arena.take<R>(a.order > 0 ? chunks * 2 * a.classes * a.width : 0)),
        shared_bytes(arena.used()) {}

  int64_t workspace() const { return shared_bytes + a.threads * thread_bytes(); }

  bool run() {
    prepare();
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) if (chunks > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Arena arena(static_cast<char*>(a.workspace) + shared_bytes + thread_number() * thread_bytes());
      Scratch<R> scratch(arena, a, row_size, max_steps);
      walk(chunk, scratch);
    }
    finish();
    return good;
  }

 private:
  const LossArgs& a;
  const int64_t band, bands, chunks, groups, row_size;
  Axis rows, columns;
  int64_t* slot;        // of each output column: step and lane
  int64_t* first_step;  // of each group of cells
  int64_t* first_row;   // the first output row of each source row's cells
  const int64_t max_steps;
  R* weights;  // [steps][lanes], distance of a pixel from its cell's near end
  double* totals;
  int64_t* counts;
  R* borders;  // [chunks][first row, row after the last][K][w]
  const int64_t shared_bytes;
  R scale = 0;  // g / n
  std::atomic<bool> good{true};

  // a group has as many steps as its fullest cell has pixels: at most ceil(W / w) + 1 in the inside, and with unaligned
  // corners half a cell more at each border
  int64_t most_steps() const {
    const int64_t per_cell = (a.label_width + std::max<int64_t>(a.width - 1, 1) - 1) / std::max<int64_t>(a.width - 1, 1);
    return groups * std::min(a.label_width, 2 * per_cell + 2);
  }

  int64_t thread_bytes() const {
    Arena arena(nullptr);
    Scratch<R> scratch(arena, a, row_size, max_steps);
    return arena.used();
  }

  void prepare() {
    rows.fill(a.height, a.label_height, a.align_corners);
    columns.fill(a.width, a.label_width, a.align_corners);
    std::fill_n(weights, max_steps * L, R(0));
    int64_t step = 0, x = 0;
    for (int64_t group = 0; group < groups; ++group) {
      first_step[group] = step;
      int64_t most = 0, seen = 0;
      for (int64_t last = -1; x < a.label_width && columns.cell[x] < (group + 1) * L; ++x) {
        seen = columns.cell[x] == last ? seen + 1 : 0;
        last = columns.cell[x];
        slot[x] = (step + seen) * L + last % L;
        weights[slot[x]] = R(columns.weight[x]);
        most = std::max(most, seen + 1);
      }
      step += most;
    }
    first_step[groups] = step;
    for (int64_t y = 0, out = 0; y <= a.height; ++y) {
      while (out < a.label_height && rows.cell[out] < y) ++out;
      first_row[y] = out;
    }
    if (a.order > 0) scale = *static_cast<const R*>(a.grad_loss) / *static_cast<const R*>(a.count);
  }

  // a source row of a map, the last value repeated once for the right end of the last cell, then zeros
  void load_row(const Map& map, int64_t image, int64_t y, R* out) const {
    const T* data = static_cast<const T*>(map.data) + image * map.strides[0] + y * map.strides[2];
    for (int64_t k = 0; k < a.classes; ++k, out += row_size) {
      const T* from = data + k * map.strides[1];
      for (int64_t x = 0; x < a.width; ++x) out[x] = to_real(from[x * map.strides[3]]);
      out[a.width] = out[a.width - 1];
      for (int64_t x = a.width + 1; x < row_size; ++x) out[x] = 0;
    }
  }

  void store_row(int64_t image, int64_t y, const R* row, int64_t stride) const {
    const Map& map = a.logits_out;
    T* data = static_cast<T*>(map.data) + image * map.strides[0] + y * map.strides[2];
    for (int64_t k = 0; k < a.classes; ++k)
      for (int64_t x = 0; x < a.width; ++x)
        from_real(row[k * stride + x], data + k * map.strides[1] + x * map.strides[3]);
  }

  void walk(int64_t chunk, Scratch<R>& s) {
    const int64_t image = chunk / bands, begin = chunk % bands * band, end = std::min(begin + band, a.height);
    totals[chunk] = 0;
    counts[chunk] = 0;
    if (a.order > 0) std::fill_n(s.grad_above, a.classes * row_size, R(0));
    load_row(a.logits, image, begin, s.below);
    if (a.order > 1) load_row(a.grad_grad_logits, image, begin, s.below_a);
    for (int64_t y = begin; y < end; ++y) {
      std::swap(s.above, s.below);
      std::swap(s.above_a, s.below_a);
      const int64_t next = std::min(y + 1, a.height - 1);
      load_row(a.logits, image, next, s.below);
      if (a.order > 1) load_row(a.grad_grad_logits, image, next, s.below_a);
      if (a.order > 0) std::fill_n(s.grad_below, a.classes * row_size, R(0));
      for (int64_t out = first_row[y]; out < first_row[y + 1]; ++out) {
        read_labels(image, out, s);
        visit_row(R(rows.weight[out]), s, totals[chunk], counts[chunk]);
      }
      if (a.order > 0) leave_row(chunk, y, begin, image, s);
    }
    if (a.order > 0) keep_border(chunk, 1, s.grad_above);
  }

  // the gradient of row y is complete, but for what the chunk above adds to its first row
  void leave_row(int64_t chunk, int64_t y, int64_t begin, int64_t image, Scratch<R>& s) const {
    // the right end of the last cell is its left end
    for (R* grad : {s.grad_above, s.grad_below})
      for (int64_t k = 0; k < a.classes; ++k) {
        grad[k * row_size + a.width - 1] += grad[k * row_size + a.width];
        grad[k * row_size + a.width] = 0;
      }
    if (y == a.height - 1)
      for (int64_t i = 0; i < a.classes * row_size; ++i) s.grad_above[i] += s.grad_below[i];
    if (y == begin)
      keep_border(chunk, 0, s.grad_above);
    else
      store_row(image, y, s.grad_above, row_size);
    std::swap(s.grad_above, s.grad_below);
  }

  void keep_border(int64_t chunk, int64_t which, const R* grad) const {
    R* out = borders + (chunk * 2 + which) * a.classes * a.width;
    for (int64_t k = 0; k < a.classes; ++k) std::copy_n(grad + k * row_size, a.width, out + k * a.width);
  }

  void finish() const {
    double total = 0;
    int64_t count = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total += totals[chunk];
      count += counts[chunk];
      if (a.order == 0) continue;
      const int64_t size = a.classes * a.width;
      R* first = borders + chunk * 2 * size;
      // the row after the last of the chunk above
      for (int64_t i = 0; chunk % bands && i < size; ++i) first[i] += first[i - size];
      store_row(chunk / bands, chunk % bands * band, first, a.width);
    }
    const double labelled = double(std::max<int64_t>(count, 1));
    if (a.order == 0) *static_cast<R*>(a.count_out) = R(labelled);
    if (a.loss_out) *static_cast<R*>(a.loss_out) = R(total / labelled);
  }

  template <class Label>
  void read_labels_as(int64_t image, int64_t out, int32_t* labels) {
    const Label* from = static_cast<const Label*>(a.labels) + (image * a.label_height + out) * a.label_width;
    bool ok = true;
    for (int64_t x = 0; x < a.label_width; ++x) {
      const int64_t label = int64_t(from[x]);
      const bool is_class = label >= 0 && label < a.classes && label != a.ignore_index;
      ok &= is_class || label == a.ignore_index;
      labels[slot[x]] = is_class ? int32_t(label) : -1;
    }
    if (!ok) good = false;
  }

  // -1 where there is no pixel, or an ignored one
  void read_labels(int64_t image, int64_t out, Scratch<R>& s) {
    std::fill_n(s.labels, first_step[groups] * L, -1);
    with_label_type(a.label_type, [&](auto label) { read_labels_as<decltype(label)>(image, out, s.labels); });
  }

  void interpolate(const R* above, const R* below, R weight, R* row) const {
    for (int64_t i = 0; i < a.classes * row_size; ++i) row[i] = above[i] + weight * (below[i] - above[i]);
  }

  // the ends of a group's cells, as value and difference
  void load_ends(const R* row, int64_t group, R* near, R* slope) const {
    for (int64_t k = 0; k < a.classes; ++k) {
      const R* at = row + k * row_size + group * L;
      const Vec<R> left = load(at);
      store(near + k * L, left);
      store<R>(slope + k * L, load(at + 1) - left);
    }
  }

  void visit_row(R weight, Scratch<R>& s, double& total, int64_t& count) const {
    interpolate(s.above, s.below, weight, s.row);
    if (a.order > 1) interpolate(s.above_a, s.below_a, weight, s.row_a);
    Vec<R> sum_total = {};
    for (int64_t group = 0; group < groups; ++group) {
      load_ends(s.row, group, s.near, s.slope);
      if (a.order > 1) load_ends(s.row_a, group, s.near_a, s.slope_a);
      if (a.order > 0) {
        std::fill_n(s.sum_near, a.classes * L, R(0));
        std::fill_n(s.sum_far, a.classes * L, R(0));
      }
      for (int64_t step = first_step[group]; step < first_step[group + 1]; ++step) {
        const int32_t* labels = s.labels + step * L;
        int present = 0;
        for (int i = 0; i < L; ++i) present += labels[i] >= 0;
        if (!present) continue;
        count += present;
        const Vec<R> t = load(weights + step * L);
        if (a.order == 0) sum_total += step_forward(t, labels, s);
        if (a.order == 1) step_backward(t, labels, s);
        if (a.order == 2) sum_total += step_double_backward(t, labels, s);
      }
      if (a.order > 0) add_gradient(group, weight, s);
    }
    total += double(sum<R>(sum_total));
  }

  static Vec<R> label_vector(const int32_t* labels) {
    // labels are compared as numbers of the vector's own kind; those below 2^24 are exact
    R values[L];
    for (int i = 0; i < L; ++i) values[i] = R(labels[i]);
    return load(values);
  }

  // z of one step, its maximum, then e^(z - max) in its place, and their sum
  Vec<R> exponentials(Vec<R> t, Scratch<R>& s, Vec<R>* top_out = nullptr) const {
    Vec<R> top = {}, total = {};
    for (int64_t k = 0; k < a.classes; ++k) {
      const Vec<R> z = load(s.near + k * L) + t * load(s.slope + k * L);
      store<R>(s.z + k * L, z);
      top = k ? max<R>(z, top) : z;
    }
    for (int64_t k = 0; k < a.classes; ++k) {
      const Vec<R> e = exp_nonpositive<R>(load(s.z + k * L) - top);
      store<R>(s.z + k * L, e);
      total += e;
    }
    if (top_out) *top_out = top;
    return total;
  }

  Vec<R> step_forward(Vec<R> t, const int32_t* labels, Scratch<R>& s) const {
    Vec<R> top;
    const Vec<R> total = exponentials(t, s, &top);
    // the label's own z anew, since its exponential may have vanished
    R own[L];
    for (int i = 0; i < L; ++i) {
      const int64_t at = int64_t(std::max(labels[i], 0)) * L + i;
      own[i] = s.near[at] + t[i] * s.slope[at];
    }
    const Vec<R> term = top + log_positive<R>(total) - load(own);
    return label_vector(labels) >= splat(R(0)) ? term : Vec<R>{};
  }

  void step_backward(Vec<R> t, const int32_t* labels, Scratch<R>& s) const {
    const Vec<R> total = exponentials(t, s), label = label_vector(labels);
    const Vec<R> valid = label >= splat(R(0)) ? splat(scale) : Vec<R>{};
    const Vec<R> share = valid / total, far = t, near = R(1) - t;
    for (int64_t k = 0; k < a.classes; ++k) {
      Vec<R> slope = load(s.z + k * L) * share;
      slope -= label == splat(R(k)) ? valid : Vec<R>{};
      store<R>(s.sum_near + k * L, load(s.sum_near + k * L) + near * slope);
      store<R>(s.sum_far + k * L, load(s.sum_far + k * L) + far * slope);
    }
  }

  // returns sum_k (p_k - [k = label]) a_k of the labelled pixels
  Vec<R> step_double_backward(Vec<R> t, const int32_t* labels, Scratch<R>& s) const {
    const Vec<R> inverse = R(1) / exponentials(t, s), label = label_vector(labels);
    const auto valid = label >= splat(R(0));
    Vec<R> mean = {}, own = {};
    for (int64_t k = 0; k < a.classes; ++k) {
      const Vec<R> value = load(s.near_a + k * L) + t * load(s.slope_a + k * L);
      store<R>(s.z_a + k * L, value);
      mean += load(s.z + k * L) * value;
      own = label == splat(R(k)) ? value : own;
    }
    mean *= inverse;
    const Vec<R> share = (valid ? splat(scale) : Vec<R>{}) * inverse, far = t, near = R(1) - t;
    for (int64_t k = 0; k < a.classes; ++k) {
      const Vec<R> slope = share * load(s.z + k * L) * (load(s.z_a + k * L) - mean);
      store<R>(s.sum_near + k * L, load(s.sum_near + k * L) + near * slope);
      store<R>(s.sum_far + k * L, load(s.sum_far + k * L) + far * slope);
    }
    return valid ? mean - own : Vec<R>{};
  }

  static void add_to(R* at, Vec<R> v) { store<R>(at, load(at) + v); }

  void add_gradient(int64_t group, R weight, Scratch<R>& s) const {
    for (int64_t k = 0; k < a.classes; ++k) {
      const int64_t at = k * row_size + group * L;
      const Vec<R> near = load(s.sum_near + k * L), far = load(s.sum_far + k * L);
      add_to(s.grad_above + at, (R(1) - weight) * near);
      add_to(s.grad_above + at + 1, (R(1) - weight) * far);
      add_to(s.grad_below + at, weight * near);
      add_to(s.grad_below + at + 1, weight * far);
    }
  }
};

}  // namespace

int64_t loss_workspace(const LossArgs& args) {
  return with_type(args.type, [&](auto type) {
    Arena arena(nullptr);
    return Loss<decltype(type)>(args, arena).workspace();
  });
}

bool loss(const LossArgs& args) {
  return with_type(args.type, [&](auto type) {
    Arena arena(args.workspace);
    return Loss<decltype(type)>(args, arena).run();
  });
}

}  // namespace pmm::PMM_ISA
