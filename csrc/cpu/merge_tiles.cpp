// Logits of overlapping tiles to one map or straight to classes: docs/ops/merge_tiles.md.
//
// A row of the image is made at a time.  The logits of each tile that covers it are interpolated down their columns
// first, at the source's width.  Then the row is cut at the edges of its tiles, so that all pixels of a piece have the
// same tiles, and walked in blocks of pixels: the few source columns that a vector of pixels lies between are one load,
// and a permutation takes each pixel's own.  A block's averages stay in the first-level cache.
#include <algorithm>

#include "entry.h"
#include "tile.h"
#include "vec.h"
#include "workspace.h"

namespace pmm::PMM_ISA {
namespace {

// vectors of a block
constexpr int kTogether = 4;

template <class R>
inline Vec<R> permute(Vec<R> v, Vec<Int<R>> from) {
#if defined(__clang__)
  Vec<R> out;
  for (int i = 0; i < kLanes<R>; ++i) out[i] = v[from[i]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

// One axis: the source index below each pixel of a tile, and the weight of the one above.  The position is a ratio of
// integers, so both are exact.
template <class R>
struct Axis {
  Int<R>* low;
  R* weight;

  Axis(Arena& arena, int64_t pixels) : low(arena.take<Int<R>>(pixels)), weight(arena.take<R>(pixels)) {}

  // beyond the tile's end the last pixel is repeated
  void fill(int64_t source, int64_t pixels, int64_t size) const {
    const int64_t step = pixels > 1 ? source - 1 : 0, unit = std::max<int64_t>(pixels - 1, 1);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = std::min(i, pixels - 1) * step;
      low[i] = Int<R>(at / unit);
      weight[i] = R(double(at % unit) / double(unit));
    }
  }
};

// A tile that covers the row: its interpolated logits [K][row_size], and where it begins.
template <class R>
struct Member {
  const R* rows;
  int64_t left;
};

// What a thread works in.
template <class R>
struct Scratch {
  Member<R> *members, *covering;  // of the row; of a piece
  int64_t* edges;
  R *rows, *z;  // [tiles that cover a row][K][row_size]; [K][block]

  Scratch(Arena& arena, const MergeArgs& a, int64_t deepest, int64_t row_size)
      : members(arena.take<Member<R>>(deepest)),
        covering(arena.take<Member<R>>(deepest)),
        edges(arena.take<int64_t>(2 * deepest)),
        rows(arena.take<R>(deepest * a.classes * row_size)),
        z(arena.take<R>(a.classes * kTogether * kLanes<R>)) {}
};

template <class T>
class Merge {
  using R = Computed<T>;
  static constexpr int L = kLanes<R>;
  static constexpr int64_t B = kTogether * L;

 public:
  Merge(const MergeArgs& args, Arena& arena)
      : a(args),
        row_size(a.width + L),
        deepest(most_covering()),
        down(arena, a.tile_height),
        across(arena, a.tile_width + B),
        shared_bytes(arena.used()) {}

  int64_t workspace() const { return shared_bytes + a.threads * thread_bytes(); }

  void run() const {
    down.fill(a.height, a.tile_height, a.tile_height);
    across.fill(a.width, a.tile_width, a.tile_width + B);
#pragma omp parallel for schedule(dynamic, 8) num_threads(a.threads) if (a.image_height > 8)
    for (int64_t y = 0; y < a.image_height; ++y) {
      Arena arena(static_cast<char*>(a.workspace) + shared_bytes + thread_number() * thread_bytes());
      merge_row(y, Scratch<R>(arena, a, deepest, row_size));
    }
  }

 private:
  const MergeArgs& a;
  const int64_t row_size, deepest;
  const Axis<R> down, across;
  const int64_t shared_bytes;

  int64_t thread_bytes() const {
    Arena arena(nullptr);
    Scratch<R>(arena, a, deepest, row_size);
    return arena.used();
  }

  bool covers(int64_t tile, int64_t y) const { return a.tops[tile] <= y && y < a.tops[tile] + a.tile_height; }

  // tiles that cover one row; a row with the most of them is the first of some tile
  int64_t most_covering() const {
    int64_t most = 0;
    for (int64_t first = 0; first < a.batch; ++first) {
      int64_t count = 0;
      for (int64_t tile = 0; tile < a.batch; ++tile) count += covers(tile, a.tops[first]);
      most = std::max(most, count);
    }
    return most;
  }

  void merge_row(int64_t y, const Scratch<R>& s) const {
    int64_t count = 0;
    for (int64_t tile = 0; tile < a.batch; ++tile) {
      if (!covers(tile, y)) continue;
      R* rows = s.rows + count * a.classes * row_size;
      for (int64_t k = 0; k < a.classes; ++k) load_row(tile, k, y - a.tops[tile], rows + k * row_size);
      s.edges[2 * count] = a.lefts[tile];
      s.edges[2 * count + 1] = a.lefts[tile] + a.tile_width;
      s.members[count++] = {rows, a.lefts[tile]};
    }
    std::sort(s.edges, s.edges + 2 * count);
    for (int64_t i = 0; i + 1 < 2 * count; ++i) {
      const int64_t begin = s.edges[i], end = s.edges[i + 1];
      const auto reaches = [&](const Member<R>& one) { return one.left <= begin && begin < one.left + a.tile_width; };
      const int64_t depth = std::copy_if(s.members, s.members + count, s.covering, reaches) - s.covering;
      for (int64_t x = begin; x < end; x += B) merge_block(y, x, std::min(end - x, B), depth, s);
    }
  }

  // a tile's row between two rows of logits, its last value repeated
  void load_row(int64_t tile, int64_t k, int64_t y, R* out) const {
    const int64_t* strides = a.logits.strides;
    const T* from = static_cast<const T*>(a.logits.data) + tile * strides[0] + k * strides[1];
    const int64_t low = down.low[y], high = std::min(low + 1, a.height - 1);
    const T *above = from + low * strides[2], *below = from + high * strides[2];
    // a step that the compiler knows makes vectors of the loop
    if (strides[3] == 1)
      blend(above, below, std::integral_constant<int64_t, 1>{}, down.weight[y], out);
    else
      blend(above, below, strides[3], down.weight[y], out);
    std::fill(out + a.width, out + row_size, out[a.width - 1]);
  }

  template <class Step>
  void blend(const T* above, const T* below, Step step, R weight, R* out) const {
    for (int64_t x = 0; x < a.width; ++x) {
      const R upper = to_real(above[x * step]), lower = to_real(below[x * step]);
      out[x] = upper + weight * (lower - upper);
    }
  }

  // `count` pixels from column x, all under the same `depth` tiles
  void merge_block(int64_t y, int64_t x, int64_t count, int64_t depth, const Scratch<R>& s) const {
    // the pixels of a vector lie between as many columns as it has lanes, unless a tile is smaller than its logits
    const bool near = a.width <= a.tile_width;
    near ? add_tile<false, true>(s.covering[0], x, s.z) : add_tile<false, false>(s.covering[0], x, s.z);
    for (int64_t n = 1; n < depth; ++n)
      near ? add_tile<true, true>(s.covering[n], x, s.z) : add_tile<true, false>(s.covering[n], x, s.z);
    const R share = R(1) / R(depth);
    const int64_t pixel = y * a.image_width + x;
    if (a.average)
      store_average(share, s.z, count, a.average + pixel);
    else
      store_classes(share, s.z, count, pixel);
  }

  template <bool kMore, bool kNear>
  void add_tile(const Member<R>& tile, int64_t x, R* z) const {
    const Int<R>* low = across.low + (x - tile.left);
    Vec<R> weight[kTogether];
    Vec<Int<R>> lane[kTogether];
    PMM_UNROLL for (int i = 0; i < kTogether; ++i) {
      weight[i] = load(across.weight + (x - tile.left) + i * L);
      lane[i] = load(low + i * L) - low[i * L];
    }
    for (int64_t k = 0; k < a.classes; ++k) {
      const R* row = tile.rows + k * row_size;
      PMM_UNROLL for (int i = 0; i < kTogether; ++i) {
        const Vec<R> left = kNear ? permute<R>(load(row + low[i * L]), lane[i]) : gather(row, low + i * L);
        const Vec<R> right = kNear ? permute<R>(load(row + low[i * L] + 1), lane[i]) : gather(row + 1, low + i * L);
        const Vec<R> value = left + weight[i] * (right - left);
        R* to = z + (k * kTogether + i) * L;
        store<R>(to, kMore ? load(to) + value : value);
      }
    }
  }

  static Vec<R> gather(const R* row, const Int<R>* from) {
    R values[L];
    for (int i = 0; i < L; ++i) values[i] = row[from[i]];
    return load(values);
  }

  void store_average(R share, const R* z, int64_t count, float* out) const {
    for (int64_t k = 0; k < a.classes; ++k, out += a.image_height * a.image_width)
      for (int64_t i = 0; i < count; ++i) out[i] = float(share * z[k * B + i]);
  }

  void store_classes(R share, R* z, int64_t count, int64_t pixel) const {
    R best[B], index[B];
    PMM_UNROLL for (int i = 0; i < kTogether; ++i) {
      Vec<R> most = load(z + i * L) * share, at = {};
      store<R>(z + i * L, most);
      for (int64_t k = 1; k < a.classes; ++k) {
        R* own = z + (k * kTogether + i) * L;
        const Vec<R> value = load(own) * share;
        store<R>(own, value);
        // a NaN is larger than all that is none, and the first one stays
        const auto taken = ~(value <= most) & (most == most);
        most = taken ? value : most;
        at = taken ? splat(R(k)) : at;
      }
      store<R>(best + i * L, most);
      store<R>(index + i * L, at);
    }
    for (int64_t i = 0; i < count; ++i) a.labels[pixel + i] = uint8_t(index[i]);
    if (!a.confidence) return;
    PMM_UNROLL for (int i = 0; i < kTogether; ++i) {
      const Vec<R> most = load(best + i * L);
      Vec<R> total = {};
      for (int64_t k = 0; k < a.classes; ++k) total += exp_nonpositive<R>(load(z + (k * kTogether + i) * L) - most);
      store<R>(best + i * L, R(1) / total);
    }
    for (int64_t i = 0; i < count; ++i) a.confidence[pixel + i] = float(best[i]);
  }
};

}  // namespace

int64_t merge_workspace(const MergeArgs& args) {
  return with_type(args.type, [&](auto type) {
    Arena arena(nullptr);
    return Merge<decltype(type)>(args, arena).workspace();
  });
}

void merge_tiles(const MergeArgs& args) {
  with_type(args.type, [&](auto type) {
    Arena arena(args.workspace);
    Merge<decltype(type)>(args, arena).run();
  });
}

}  // namespace pmm::PMM_ISA
