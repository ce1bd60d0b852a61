// memory_read within a tile: docs/ops/memory_read.md, whose letters these are.  All rows are [K][kTile].
#pragma once

#include "philox.h"
#include "tile.h"
#include "workspace.h"

namespace pmm::PMM_ISA {

template <class R>
struct ReadTile {
  int64_t classes;
  R inverse_temperature;
  R *s, *w, *noise;                       // forward
  R *d, *e, *v, *u;                       // backward
  R *alpha, *b, *c, *n, *h;               // double backward
  R *of_x, *of_a;                         // [kTile], coefficients of the gradient

  ReadTile(Arena& arena, int64_t slots, double temperature, int order)
      : classes(slots), inverse_temperature(R(1.0 / temperature)) {
    const int64_t size = slots * kTile<R>;
    for (R** row : {&s, &w, &noise}) *row = arena.take<R>(size);
    for (R** row : {&d, &e, &v, &u}) *row = arena.take<R>(order > 0 ? size : 0);
    for (R** row : {&alpha, &b, &c, &n}) *row = arena.take<R>(order > 1 ? size : 0);
    // t, and room for w behind it
    h = arena.take<R>(order > 1 ? 2 * size : 0);
    for (R** row : {&of_x, &of_a}) *row = arena.take<R>(kTile<R>);
  }

  R& at(R* rows, int64_t k, int i) const { return rows[k * kTile<R> + i]; }

  void zero(R* rows) const {
    for (int64_t i = 0; i < classes * kTile<R>; ++i) rows[i] = 0;
  }

  // s from keys.f in s, then w; `noisy`: the noise is in place
  void assign(const R* norm, bool noisy) {
    constexpr int L = kLanes<R>, P = kTile<R>;
    for (int t = 0; t < kVectors; ++t) {
      const Vec<R> scale = load(norm + t * L);
      Vec<R> top = {};
      for (int64_t k = 0; k < classes; ++k) {
        R* at = s + k * P + t * L;
        const Vec<R> score = load(at) * scale;
        store<R>(at, score);
        const Vec<R> z = (noisy ? score + load(noise + k * P + t * L) : score) * inverse_temperature;
        store<R>(w + k * P + t * L, z);
        top = k ? max<R>(z, top) : z;
      }
      Vec<R> total = {};
      for (int64_t k = 0; k < classes; ++k) {
        R* at = w + k * P + t * L;
        const Vec<R> weight = exp_nonpositive<R>(load(at) - top);
        store<R>(at, weight);
        total += weight;
      }
      const Vec<R> share = R(1) / total;
      for (int64_t k = 0; k < classes; ++k) {
        R* at = w + k * P + t * L;
        store<R>(at, load(at) * share);
      }
    }
  }

  // v and u from d and e; the weights r u of the keys and the coefficient -r^2 sum u s of f in the gradient of f
  void backward(const R* norm, R* weights) {
    constexpr int P = kTile<R>;
    R mean[P] = {};
    for (int64_t k = 0; k < classes; ++k)
      for (int i = 0; i < P; ++i) mean[i] += at(w, k, i) * at(d, k, i);
    for (int i = 0; i < P; ++i) of_x[i] = 0;
    for (int64_t k = 0; k < classes; ++k)
      for (int i = 0; i < P; ++i) {
        at(v, k, i) = at(w, k, i) * (at(d, k, i) - mean[i]) * inverse_temperature;
        at(u, k, i) = at(e, k, i) + at(v, k, i);
        at(weights, k, i) = norm[i] * at(u, k, i);
        of_x[i] -= norm[i] * norm[i] * at(u, k, i) * at(s, k, i);
      }
  }

  // From alpha = keys.a, b = P.f, c = Q.A, n and beta: rho in e (what the gradient of e is), t in h (the weights of the
  // values), q in d (the gradient of the noise), r sigma and r u in `weights` (of the keys, of P), and the coefficients
  // of f and a in the gradient of f.  Expects backward() before.
  void double_backward(const R* norm, const R* beta, R* weights) {
    constexpr int P = kTile<R>;
    R us[P] = {}, mean_d[P] = {}, mean_h[P] = {}, mean_y[P] = {}, kappa[P] = {}, gamma[P] = {};
    for (int64_t k = 0; k < classes; ++k)
      for (int i = 0; i < P; ++i) {
        const R slope = at(alpha, k, i) - at(s, k, i) * beta[i];
        at(b, k, i) *= norm[i];
        at(e, k, i) = norm[i] * slope + at(b, k, i);
        at(h, k, i) = at(e, k, i) + at(n, k, i);
        us[i] += at(u, k, i) * at(s, k, i);
        mean_d[i] += at(w, k, i) * at(d, k, i);
        mean_h[i] += at(w, k, i) * at(h, k, i);
        kappa[i] += at(u, k, i) * slope;
      }
    for (int64_t k = 0; k < classes; ++k)
      for (int i = 0; i < P; ++i) {
        const R product = at(d, k, i) * at(h, k, i) - at(d, k, i) * mean_h[i] - at(h, k, i) * mean_d[i];
        at(d, k, i) = product * inverse_temperature + at(c, k, i);  // y
        at(h, k, i) = at(w, k, i) * (at(h, k, i) - mean_h[i]) * inverse_temperature;
        mean_y[i] += at(w, k, i) * at(d, k, i);
      }
    for (int64_t k = 0; k < classes; ++k)
      for (int i = 0; i < P; ++i) {
        at(d, k, i) = at(w, k, i) * (at(d, k, i) - mean_y[i]) * inverse_temperature;
        const R sigma = at(d, k, i) - norm[i] * beta[i] * at(u, k, i);
        gamma[i] += sigma * at(s, k, i) + at(u, k, i) * at(b, k, i);
        at(weights, k, i) = norm[i] * sigma;
        at(weights, classes + k, i) = norm[i] * at(u, k, i);
      }
    for (int i = 0; i < P; ++i) {
      const R r = norm[i], r2 = r * r;
      of_a[i] = -r2 * us[i];
      of_x[i] = -r2 * (gamma[i] - r * us[i] * beta[i]) - r2 * r * kappa[i];
    }
  }
};

}  // namespace pmm::PMM_ISA
