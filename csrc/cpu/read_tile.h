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
    constexpr int L = kLanes<R>, P = kTile<R>;
    for (int t = 0; t < P; t += L) {
      const Vec<R> r = load(norm + t);
      Vec<R> mean = {}, us = {};
      for (int64_t i = t; i < classes * P; i += P) mean += load(w + i) * load(d + i);
      for (int64_t i = t; i < classes * P; i += P) {
        const Vec<R> slope = load(w + i) * (load(d + i) - mean) * inverse_temperature;
        const Vec<R> total = load(e + i) + slope;
        store<R>(v + i, slope);
        store<R>(u + i, total);
        store<R>(weights + i, r * total);
        us += total * load(s + i);
      }
      store<R>(of_x + t, -(r * r) * us);
    }
  }

  // From alpha = keys.a, b = P.f, c = Q.A, n and beta: rho in e (what the gradient of e is), t in h (the weights of the
  // values), q in d (the gradient of the noise), r sigma and r u in `weights` (of the keys, of P), and the coefficients
  // of f and a in the gradient of f.  Expects backward() before.
  void double_backward(const R* norm, const R* beta, R* weights) {
    for (int t = 0; t < kTile<R>; t += kLanes<R>) double_backward_vector(t, load(norm + t), load(beta + t), weights);
  }

 private:
  void double_backward_vector(int t, Vec<R> r, Vec<R> beta, R* weights) {
    constexpr int P = kTile<R>;
    const int64_t end = classes * P;
    Vec<R> us = {}, mean_d = {}, mean_h = {}, mean_y = {}, kappa = {}, gamma = {};
    for (int64_t i = t; i < end; i += P) {
      const Vec<R> slope = load(alpha + i) - load(s + i) * beta, along = load(b + i) * r;
      const Vec<R> rho = r * slope + along, total = rho + load(n + i);
      store<R>(b + i, along);
      store<R>(e + i, rho);
      store<R>(h + i, total);
      us += load(u + i) * load(s + i);
      mean_d += load(w + i) * load(d + i);
      mean_h += load(w + i) * total;
      kappa += load(u + i) * slope;
    }
    for (int64_t i = t; i < end; i += P) {
      const Vec<R> d_i = load(d + i), h_i = load(h + i);
      const Vec<R> y = (d_i * h_i - d_i * mean_h - h_i * mean_d) * inverse_temperature + load(c + i);
      store<R>(d + i, y);
      store<R>(h + i, load(w + i) * (h_i - mean_h) * inverse_temperature);
      mean_y += load(w + i) * y;
    }
    for (int64_t i = t; i < end; i += P) {
      const Vec<R> q = load(w + i) * (load(d + i) - mean_y) * inverse_temperature, u_i = load(u + i);
      const Vec<R> sigma = q - r * beta * u_i;
      store<R>(d + i, q);
      store<R>(weights + i, r * sigma);
      store<R>(weights + end + i, r * u_i);
      gamma += sigma * load(s + i) + u_i * load(b + i);
    }
    store<R>(of_a + t, -(r * r) * us);
    store<R>(of_x + t, -(r * r) * (gamma - r * us * beta + r * kappa));
  }
};

}  // namespace pmm::PMM_ISA
