// The walk over the feature positions: memory_read, masked_average_pool and memory_pass, in every order.  Formulas and
// letters: docs/ops/memory_pass.md and the two pages that it names.
//
// Tiles are handed out in chunks that depend on the shapes alone.  Sums over positions are kept by chunk and added in
// the chunks' order, so a result does not depend on the number of threads.
#include "entry.h"

#include <algorithm>
#include <atomic>

#include "pool_tile.h"
#include "read_tile.h"

namespace pmm::PMM_ISA {
namespace {

// What a thread works in.
template <class R>
struct Scratch {
  R *x, *written, *grad_read, *grad_grad, *grad_grad_written, *out;  // tiles that could not be used where they lie
  R *norm, *norm_written, *beta, *beta_written;
  ReadTile<R> read;
  Masses<R> masses;
  PoolTerms<R> pool;
  const R** rows;  // of the gradient of the features
  R* weights;
  R *keys_sum, *values_sum, *sums;  // [K][channels][lanes]
  double* mass;

  Scratch(Arena& arena, const PassArgs& a)
      : x(arena.take<R>(a.channels * kTile<R>)),
        written(arena.take<R>(a.channels * kTile<R>)),
        grad_read(arena.take<R>(a.order > 0 ? a.depth * kTile<R> : 0)),
        grad_grad(arena.take<R>(a.order > 1 ? a.channels * kTile<R> : 0)),
        grad_grad_written(arena.take<R>(a.order > 1 ? a.channels * kTile<R> : 0)),
        out(arena.take<R>(std::max(a.channels, a.depth) * kTile<R>)),
        norm(arena.take<R>(kTile<R>)),
        norm_written(arena.take<R>(kTile<R>)),
        beta(arena.take<R>(kTile<R>)),
        beta_written(arena.take<R>(kTile<R>)),
        read(arena, a.keys ? a.classes : 0, a.temperature, a.order),
        masses(arena, a.labels ? a.classes : 0),
        pool(arena, a.labels ? a.classes : 0),
        rows(arena.take<const R*>(3 * a.classes)),
        weights(arena.take<R>(3 * a.classes * kTile<R>)),
        keys_sum(arena.take<R>(a.keys_out ? a.classes * a.channels * kLanes<R> : 0)),
        values_sum(arena.take<R>(a.values_out ? a.classes * a.depth * kLanes<R> : 0)),
        sums(arena.take<R>(a.sums_out ? a.classes * a.channels * kLanes<R> : 0)),
        mass(arena.take<double>(a.labels ? a.classes : 0)) {}
};

template <class T>
class Pass {
  using R = Computed<T>;
  static constexpr int P = kTile<R>;

 public:
  Pass(const PassArgs& args, Arena& arena)
      : a(args),
        tiles_per_image((a.height * a.width + P - 1) / P),
        tiles(a.batch * tiles_per_image),
        chunks(std::clamp<int64_t>(tiles / 16, std::min<int64_t>(tiles, 8), 64)),
        partial_size(a.classes * (a.channels * ((a.keys_out != nullptr) + (a.sums_out != nullptr)) +
                                  (a.values_out ? a.depth : 0) + 1)),
        tap_rows(arena, a.labels ? a.height : 0),
        tap_columns(arena, a.labels ? a.width : 0),
        keys(arena.take<const R*>(a.classes)),
        values(arena.take<const R*>(a.classes)),
        grad_grad_keys(arena.take<const R*>(a.classes)),
        grad_grad_values(arena.take<const R*>(a.classes)),
        partials(arena.take<R>(chunks * partial_size)),
        shared_bytes(arena.used()) {}

  int64_t workspace() const { return shared_bytes + a.threads * thread_bytes(); }

  bool run() {
    prepare();
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) if (chunks > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Arena arena(static_cast<char*>(a.workspace) + shared_bytes + thread_number() * thread_bytes());
      Scratch<R> scratch(arena, a);
      clear(scratch);
      for (int64_t tile = chunk * tiles / chunks; tile < (chunk + 1) * tiles / chunks; ++tile) {
        const int64_t start = tile % tiles_per_image * P, count = std::min<int64_t>(P, a.height * a.width - start);
        visit({tile / tiles_per_image, start, int(count), a.width}, scratch);
      }
      keep(scratch, partials + chunk * partial_size);
    }
    add_chunks();
    return good;
  }

 private:
  const PassArgs& a;
  const int64_t tiles_per_image, tiles, chunks, partial_size;
  Taps<R> tap_rows, tap_columns;
  const R **keys, **values, **grad_grad_keys, **grad_grad_values;
  R* partials;
  const int64_t shared_bytes;
  std::atomic<bool> good{true};

  int64_t thread_bytes() const {
    Arena arena(nullptr);
    Scratch<R> scratch(arena, a);
    return arena.used();
  }

  bool is_flat(const Map& map) const { return PMM_ISA::is_flat(map, a.height, a.width); }

  Tile<R> load(const Map& map, const Run& run, int64_t channels, R* buffer) const {
    return load_tile<T>(map, run, channels, is_flat(map), buffer);
  }

  void prepare() {
    tap_rows.fill(a.labels ? a.height : 0, a.label_height);
    tap_columns.fill(a.labels ? a.width : 0, a.label_width);
    for (int64_t k = 0; k < a.classes; ++k) {
      keys[k] = static_cast<const R*>(a.keys) + k * a.channels;
      values[k] = static_cast<const R*>(a.values) + k * a.depth;
      grad_grad_keys[k] = static_cast<const R*>(a.grad_grad_keys) + k * a.channels;
      grad_grad_values[k] = static_cast<const R*>(a.grad_grad_values) + k * a.depth;
    }
  }

  void clear(Scratch<R>& s) const {
    if (a.keys_out) std::fill_n(s.keys_sum, a.classes * a.channels * kLanes<R>, R(0));
    if (a.values_out) std::fill_n(s.values_sum, a.classes * a.depth * kLanes<R>, R(0));
    if (a.sums_out) std::fill_n(s.sums, a.classes * a.channels * kLanes<R>, R(0));
    if (a.labels) std::fill_n(s.mass, a.classes, 0.0);
  }

  static R* keep_lanes(const R* sums, int64_t count, R* out) {
    for (int64_t i = 0; i < count; ++i) *out++ = sum<R>(PMM_ISA::load(sums + i * kLanes<R>));
    return out;
  }

  void keep(const Scratch<R>& s, R* out) const {
    if (a.keys_out) out = keep_lanes(s.keys_sum, a.classes * a.channels, out);
    if (a.values_out) out = keep_lanes(s.values_sum, a.classes * a.depth, out);
    if (a.sums_out) out = keep_lanes(s.sums, a.classes * a.channels, out);
    for (int64_t k = 0; a.mass_out && k < a.classes; ++k) *out++ = R(s.mass[k]);
  }

  // the chunks' sums, added in order, into one result after the other
  void add_chunks() const {
    int64_t offset = 0;
    const auto add = [&](void* out, int64_t count) {
      for (int64_t i = 0; out && i < count; ++i) {
        R total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partials[chunk * partial_size + offset + i];
        static_cast<R*>(out)[i] = total;
      }
      offset += out ? count : 0;
    };
    add(a.keys_out, a.classes * a.channels);
    add(a.values_out, a.classes * a.depth);
    add(a.sums_out, a.classes * a.channels);
    add(a.mass_out, a.classes);
  }

  void visit(const Run& run, Scratch<R>& s) {
    const bool reads = a.keys, pools = a.labels;
    const Tile<R> x = load(a.features, run, a.channels, s.x);
    Tile<R> written = x;
    const R* norm_written = nullptr;
    if (reads) {
      inverse_norms(s.norm, x, a.channels);
      assign(run, x, s);
    }
    if (pools) {
      if (a.written) written = load(a.written, run, a.channels, s.written);
      find_masses(run, s);
      if (reads && !a.written)
        norm_written = s.norm;
      else if (a.normalize) {
        inverse_norms(s.norm_written, written, a.channels);
        norm_written = s.norm_written;
      }
    }
    if (a.order == 0)
      forward(run, written, norm_written, s);
    else if (a.order == 1)
      backward(run, x, written, norm_written, s);
    else
      double_backward(run, x, written, norm_written, s);
  }

  void find_masses(const Run& run, Scratch<R>& s) {
    const bool ok = with_label_type(a.label_type, [&](auto label) {
      return class_masses<decltype(label)>(a, tap_rows, tap_columns, run, s.masses);
    });
    if (!ok) good = false;
  }

  // scores and weights, with noise if there is any
  void assign(const Run& run, Tile<R> x, Scratch<R>& s) const {
    dots(s.read.s, keys, a.classes, x, a.channels);
    if (a.seed)
      seeded_noise(*a.seed, run.image * a.height * a.width + run.start, a.classes, s.read.noise);
    else if (a.noise)
      load_rows(a.noise, run, s.read.noise);
    s.read.assign(s.norm, a.seed || a.noise);
  }

  // [K][kTile] of a map of scores, whatever its strides; zeros where there is none
  void load_rows(const Map& map, const Run& run, R* out) const {
    if (!map) return std::fill_n(out, a.classes * P, R(0)), void();
    const Tile<R> tile = load_tile<R>(map, run, a.classes, is_flat(map), out);
    for (int64_t k = 0; tile.data != out && k < a.classes; ++k) std::copy_n(tile.row(k), P, out + k * P);
  }

  void store_rows(const Map& map, const Run& run, const R* rows) const {
    if (map) store_tile<R>(map, run, a.classes, is_flat(map), rows);
  }

  // rows of a matrix, weighted, and multiples of tiles, into a map of the features' type
  void write(const Map& map, const Run& run, const Combination<R>& terms, int64_t channels, R* buffer) const {
    if (!map) return;
    const bool flat = is_flat(map);
    const auto target = target_tile<T, R>(map, run, flat, buffer);
    combine(target.data, target.stride, terms, channels);
    if (target.data == buffer) store_tile<T, R>(map, run, channels, flat, buffer);
  }

  void forward(const Run& run, Tile<R> written, const R* norm_written, Scratch<R>& s) const {
    if (a.keys) {
      store_rows(a.scores, run, s.read.s);
      write(a.read, run, {values, s.read.w, a.classes}, a.depth, s.out);
    }
    if (a.labels) pool_forward(s.masses, norm_written, written, a.channels, s.weights, s.sums, s.mass);
  }

  // d, e, v, u of the read; returns the tile of grad_read
  Tile<R> read_slopes(const Run& run, Scratch<R>& s) const {
    Tile<R> grad_read;
    if (a.grad_read) {
      grad_read = load(a.grad_read, run, a.depth, s.grad_read);
      dots(s.read.d, values, a.classes, grad_read, a.depth);
    } else {
      s.read.zero(s.read.d);
    }
    load_rows(a.grad_scores, run, s.read.e);
    s.read.backward(s.norm, s.weights);
    return grad_read;
  }

  void backward(const Run& run, Tile<R> x, Tile<R> written, const R* norm_written, Scratch<R>& s) const {
    Combination<R> terms{s.rows, s.weights, 0};
    if (a.keys) {
      const Tile<R> grad_read = read_slopes(run, s);
      store_rows(a.noise_out, run, s.read.v);
      if (a.keys_out) accumulate(s.keys_sum, nullptr, s.weights, a.classes, x, a.channels);
      if (a.values_out && a.grad_read)
        accumulate(s.values_sum, nullptr, s.read.w, a.classes, grad_read, a.depth);
      std::copy_n(keys, a.classes, s.rows);
      terms = {s.rows, s.weights, a.classes, s.read.of_x, x};
    }
    if (a.labels && a.grad_sums) {
      const bool apart = bool(a.written);
      s.pool.weights = s.weights + (apart ? 0 : terms.count) * P;
      s.pool.rows = s.rows + (apart ? 0 : terms.count);
      // the read's gradient must be out before its rows are overwritten
      if (apart) write(a.features_out, run, terms, a.channels, s.out);
      s.pool.select(static_cast<const R*>(a.grad_sums), s.masses, a.channels);
      pool_backward(s.masses, norm_written, written, a.channels, s.pool);
      if (apart || !a.keys) {
        // without normalising the gradient does not depend on the features, be they NaN
        const R* of_x = norm_written ? s.pool.of_x : nullptr;
        const Combination<R> pooled{s.pool.rows, s.pool.weights, s.masses.count, of_x, written};
        return write(apart ? a.written_out : a.features_out, run, pooled, a.channels, s.out);
      }
      terms.count += s.masses.count;
      for (int i = 0; i < P; ++i) s.read.of_x[i] += s.pool.of_x[i];
    }
    write(a.features_out, run, terms, a.channels, s.out);
    write_zeros(a.written_out, run, s);
  }

  // the read's half of the double backward, without the gradient of the features, whose terms are returned
  Combination<R> read_double_backward(const Run& run, Tile<R> x, Tile<R> grad_grad, Scratch<R>& s) const {
    const Tile<R> grad_read = read_slopes(run, s);
    if (a.grad_grad_features)
      dots(s.read.alpha, keys, a.classes, grad_grad, a.channels);
    else
      s.read.zero(s.read.alpha);
    if (a.grad_grad_keys)
      dots(s.read.b, grad_grad_keys, a.classes, x, a.channels);
    else
      s.read.zero(s.read.b);
    if (a.grad_grad_values && a.grad_read)
      dots(s.read.c, grad_grad_values, a.classes, grad_read, a.depth);
    else
      s.read.zero(s.read.c);
    load_rows(a.grad_grad_noise, run, s.read.n);
    s.read.double_backward(s.norm, s.beta, s.weights);
    store_rows(a.scores, run, s.read.e);
    store_rows(a.noise_out, run, s.read.d);
    if (a.keys_out) {
      accumulate(s.keys_sum, nullptr, s.weights, a.classes, x, a.channels);
      if (a.grad_grad_features)
        accumulate(s.keys_sum, nullptr, s.weights + a.classes * P, a.classes, grad_grad, a.channels);
    }
    if (a.values_out && a.grad_read) accumulate(s.values_sum, nullptr, s.read.h, a.classes, grad_read, a.depth);
    write_grad_grad_read(run, s);
    std::copy_n(keys, a.classes, s.rows);
    std::copy_n(grad_grad_keys, a.classes, s.rows + a.classes);
    const int64_t count = a.grad_grad_keys ? 2 * a.classes : a.classes;
    Combination<R> terms{s.rows, s.weights, count, s.read.of_x, x};
    if (a.grad_grad_features) terms.of_a = s.read.of_a, terms.a = grad_grad;
    return terms;
  }

  // sum_k t_k values_k + w_k Q_k
  void write_grad_grad_read(const Run& run, Scratch<R>& s) const {
    if (!a.read) return;
    // t and w side by side
    std::copy_n(s.read.w, a.classes * P, s.read.h + a.classes * P);
    std::copy_n(values, a.classes, s.rows);
    std::copy_n(grad_grad_values, a.classes, s.rows + a.classes);
    write(a.read, run, {s.rows, s.read.h, a.grad_grad_values ? 2 * a.classes : a.classes}, a.depth, s.out);
  }

  void double_backward(const Run& run, Tile<R> x, Tile<R> written, const R* norm_written, Scratch<R>& s) const {
    Tile<R> grad_grad, grad_grad_written;
    std::fill_n(s.beta, P, R(0));
    if (a.grad_grad_features) {
      grad_grad = load(a.grad_grad_features, run, a.channels, s.grad_grad);
      dot_positions(s.beta, x, grad_grad, a.channels);
    }
    Combination<R> terms{s.rows, s.weights, 0};
    if (a.keys) {
      for (int i = 0; i < P; ++i) s.beta[i] *= s.norm[i];
      terms = read_double_backward(run, x, grad_grad, s);
    }
    const bool apart = bool(a.written);
    if (!a.labels || (apart ? !a.grad_grad_written : !a.grad_grad_features))
      return write(a.features_out, run, terms, a.channels, s.out), write_zeros(a.written_out, run, s);
    const R* beta = s.beta;
    if (apart) {
      write(a.features_out, run, terms, a.channels, s.out);
      terms.count = 0;
      grad_grad_written = load(a.grad_grad_written, run, a.channels, s.grad_grad_written);
      dot_positions(s.beta_written, written, grad_grad_written, a.channels);
      for (int i = 0; i < P; ++i) s.beta_written[i] *= norm_written[i];
      beta = s.beta_written;
    } else {
      grad_grad_written = grad_grad;
      if (!a.keys && norm_written)
        for (int i = 0; i < P; ++i) s.beta[i] *= norm_written[i];
    }
    pool_double_backward_terms(run, written, grad_grad_written, norm_written, beta, terms, s);
  }

  void pool_double_backward_terms(const Run& run, Tile<R> written, Tile<R> grad_grad, const R* norm, const R* beta,
                                  Combination<R> terms, Scratch<R>& s) const {
    const bool apart = bool(a.written), gradient = a.grad_sums && norm;
    s.pool.weights = s.weights + terms.count * P;
    s.pool.rows = s.rows + terms.count;
    if (gradient) s.pool.select(static_cast<const R*>(a.grad_sums), s.masses, a.channels);
    pool_double_backward(s.masses, norm, beta, written, grad_grad, a.channels, gradient, a.sums_out ? s.sums : nullptr,
                         s.pool);
    const Map& out = apart ? a.written_out : a.features_out;
    if (!gradient) return apart || !a.keys ? write_zeros(out, run, s) : write(out, run, terms, a.channels, s.out);
    if (a.keys && !apart) {
      terms.count += s.masses.count;
      for (int i = 0; i < P; ++i) s.read.of_x[i] += s.pool.of_x[i], s.read.of_a[i] += s.pool.of_a[i];
    } else {
      terms = {s.pool.rows, s.pool.weights, s.masses.count, s.pool.of_x, written, s.pool.of_a, grad_grad};
    }
    write(out, run, terms, a.channels, s.out);
  }

  void write_zeros(const Map& map, const Run& run, Scratch<R>& s) const {
    write(map, run, {s.rows, s.weights, 0}, a.channels, s.out);
  }
};

}  // namespace

int64_t pass_workspace(const PassArgs& args) {
  return with_type(args.type, [&](auto type) {
    Arena arena(nullptr);
    return Pass<decltype(type)>(args, arena).workspace();
  });
}

bool pass(const PassArgs& args) {
  return with_type(args.type, [&](auto type) {
    Arena arena(args.workspace);
    return Pass<decltype(type)>(args, arena).run();
  });
}

}  // namespace pmm::PMM_ISA
