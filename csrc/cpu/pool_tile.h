// masked_average_pool within a tile: docs/ops/masked_average_pool.md.
#pragma once

#include "tile.h"
#include "workspace.h"

namespace pmm::PMM_ISA {

// The label pixels around each feature row or column and the weight of the second one.
template <class R>
struct Taps {
  int64_t *first, *second;
  R* weight;

  Taps(Arena& arena, int64_t positions)
      : first(arena.take<int64_t>(positions)), second(arena.take<int64_t>(positions)), weight(arena.take<R>(positions)) {}

  void fill(int64_t positions, int64_t pixels) {
    const double scale = positions > 1 ? double(pixels - 1) / double(positions - 1) : 0.0;
    for (int64_t i = 0; i < positions; ++i) {
      const double at = double(i) * scale;
      first[i] = at < double(pixels - 1) ? int64_t(at) : pixels - 1;
      second[i] = first[i] + 1 < pixels ? first[i] + 1 : pixels - 1;
      weight[i] = R(at - double(first[i]));
    }
  }
};

// The classes that a tile sees and how much of each its positions see: y, one row a class that is present.
template <class R>
struct Masses {
  int count = 0;
  int* ids;       // [K]
  R* rows;        // [K][kTile], the first `count` in use
  int32_t* slot;  // [K]: row of a class, -1 where it is absent

  Masses(Arena& arena, int64_t classes)
      : ids(arena.take<int>(classes)), rows(arena.take<R>(classes * kTile<R>)), slot(arena.take<int32_t>(classes)) {}

  void clear(int64_t classes) {
    for (int64_t k = 0; k < classes; ++k) slot[k] = -1;
    count = 0;
  }

  void add(int64_t label, int position, R weight) {
    if (slot[label] < 0) {
      slot[label] = count;
      ids[count] = int(label);
      for (int i = 0; i < kTile<R>; ++i) rows[int64_t(count) * kTile<R> + i] = 0;
      ++count;
    }
    rows[int64_t(slot[label]) * kTile<R> + position] += weight;
  }
};

// Fills the masses of a run; false when a label is neither a class nor ignored.
template <class L, class R>
bool class_masses(const PassArgs& args, const Taps<R>& rows, const Taps<R>& columns, const Run& run, Masses<R>& y) {
  const L* labels = static_cast<const L*>(args.labels) + run.image * args.label_height * args.label_width;
  y.clear(args.classes);
  bool good = true;
  int64_t row = run.start / run.width, column = run.start % run.width;
  for (int i = 0; i < run.count; ++i, ++column) {
    if (column == run.width) column = 0, ++row;
    const int64_t tap_rows[2] = {rows.first[row], rows.second[row]};
    const int64_t tap_columns[2] = {columns.first[column], columns.second[column]};
    const R weight_rows[2] = {1 - rows.weight[row], rows.weight[row]};
    const R weight_columns[2] = {1 - columns.weight[column], columns.weight[column]};
    for (int a = 0; a < 2; ++a)
      for (int b = 0; b < 2; ++b) {
        const int64_t label = int64_t(labels[tap_rows[a] * args.label_width + tap_columns[b]]);
        if (label == args.ignore_index) continue;
        if (label < 0 || label >= args.classes)
          good = false;
        else
          y.add(label, i, weight_rows[a] * weight_columns[b]);
      }
  }
  return good;
}

// What the pool adds to the gradient of a tile, as terms of a Combination: rows of G with weights, and coefficients.
template <class R>
struct PoolTerms {
  const R** rows = nullptr;  // the present rows of G; these two lie where the walk collects a gradient's terms
  R* weights = nullptr;      // [K][kTile]
  R *of_x, *of_a;            // [kTile]
  R *with_x, *with_a;  // scratch: G_k . f and G_k . a

  PoolTerms(Arena& arena, int64_t classes)
      : of_x(arena.take<R>(kTile<R>)),
        of_a(arena.take<R>(kTile<R>)),
        with_x(arena.take<R>(classes * kTile<R>)),
        with_a(arena.take<R>(classes * kTile<R>)) {}

  void select(const R* grad_sums, const Masses<R>& y, int64_t channels) {
    for (int r = 0; r < y.count; ++r) rows[r] = grad_sums + y.ids[r] * channels;
  }
};

// sums += y r f, mass += y
template <class R>
void pool_forward(const Masses<R>& y, const R* norm, Tile<R> x, int64_t channels, R* weights, R* sums, double* mass) {
  constexpr int P = kTile<R>;
  for (int r = 0; r < y.count; ++r) {
    const R* row = y.rows + r * P;
    Vec<R> total = {};
    for (int i = 0; i < P; i += kLanes<R>) {
      const Vec<R> share = load(row + i);
      total += share;
      store<R>(weights + r * P + i, norm ? share * load(norm + i) : share);
    }
    mass[y.ids[r]] += double(sum<R>(total));
  }
  accumulate(sums, y.ids, weights, y.count, x, channels);
}

// df = sum_k r y_k G_k - r^3 (q.f) f; without normalising (no norm) sum_k y_k G_k
template <class R>
void pool_backward(const Masses<R>& y, const R* norm, Tile<R> x, int64_t channels, PoolTerms<R>& terms) {
  constexpr int P = kTile<R>;
  if (norm) dots(terms.with_x, terms.rows, y.count, x, channels);
  for (int t = 0; t < P; t += kLanes<R>) {
    const Vec<R> scale = norm ? load(norm + t) : splat(R(1));
    Vec<R> q_x = {};
    for (int i = t; i < y.count * P; i += P) {
      const Vec<R> share = load(y.rows + i);
      store<R>(terms.weights + i, scale * share);
      if (norm) q_x += share * load(terms.with_x + i);
    }
    store<R>(terms.of_x + t, -(scale * scale * scale) * q_x);
  }
}

// dG_k = sum y_k r (a - beta f^);  df = -r^2 [ (a.q - 3 beta f^.q) f^ + (f^.q) a + beta q ],  beta = f^.a.
// `sums` receives dG (null: not wanted), `terms` the gradient (rows selected: wanted).
template <class R>
void pool_double_backward(const Masses<R>& y, const R* norm, const R* beta, Tile<R> x, Tile<R> a, int64_t channels,
                          bool gradient, R* sums, PoolTerms<R>& terms) {
  constexpr int P = kTile<R>;
  if (sums) {
    for (int r = 0; r < y.count; ++r)
      for (int i = 0; i < P; ++i) terms.weights[r * P + i] = y.rows[r * P + i] * (norm ? norm[i] : R(1));
    accumulate(sums, y.ids, terms.weights, y.count, a, channels);
    if (norm) {
      for (int r = 0; r < y.count; ++r)
        for (int i = 0; i < P; ++i) terms.weights[r * P + i] *= -norm[i] * beta[i];
      accumulate(sums, y.ids, terms.weights, y.count, x, channels);
    }
  }
  if (!gradient) return;
  dots(terms.with_x, terms.rows, y.count, x, channels);
  dots(terms.with_a, terms.rows, y.count, a, channels);
  for (int t = 0; t < P; t += kLanes<R>) {
    const Vec<R> r = load(norm + t), along = load(beta + t);
    Vec<R> q_x = {}, q_a = {};
    for (int i = t; i < y.count * P; i += P) {
      const Vec<R> share = load(y.rows + i);
      q_x += share * load(terms.with_x + i) * r;
      q_a += share * load(terms.with_a + i);
      store<R>(terms.weights + i, -(r * r) * along * share);
    }
    store<R>(terms.of_x + t, -(r * r * r) * (q_a - R(3) * along * q_x));
    store<R>(terms.of_a + t, -(r * r) * q_x);
  }
}

}  // namespace pmm::PMM_ISA
