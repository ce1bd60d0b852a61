// A tile is a run of kTile positions of one image, all channels: [channels][kTile], the vectors along the positions.
// Loading, storing, and the three products that the kernels consist of.
#pragma once

#include "args.h"
#include "vec.h"

#define PMM_UNROLL _Pragma("GCC unroll 16")

namespace pmm::PMM_ISA {

constexpr int kVectors = 4;  // a row of a tile
template <class R>
constexpr int kTile = kVectors * kLanes<R>;

// rows that a product works on at once, so that its sums fill the registers: 32 of them with AVX-512, else 16
constexpr int kBlock = PMM_BYTES == 64 ? 6 : 2;

struct BFloat16 {
  uint16_t bits;
};

inline float to_real(float x) { return x; }
inline double to_real(double x) { return x; }
inline float to_real(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void from_real(float x, float* out) { *out = x; }
inline void from_real(double x, double* out) { *out = x; }
inline void from_real(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // to nearest even; a NaN keeps its high bits and is made quiet, since rounding could make it infinite
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(x != x ? (bits >> 16) | 0x40 : rounded);
}

// what values of a type are computed in
template <class T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

// calls a function with a value of the type that is meant
template <class Function>
auto with_type(Type type, Function function) {
  if (type == Type::kFloat64) return function(double{});
  if (type == Type::kBFloat16) return function(BFloat16{});
  return function(float{});
}

// the same for labels
template <class Function>
auto with_label_type(LabelType type, Function function) {
  if (type == LabelType::kInt16) return function(int16_t{});
  if (type == LabelType::kInt32) return function(int32_t{});
  if (type == LabelType::kInt64) return function(int64_t{});
  return function(uint8_t{});
}

// A run of positions of one image.
struct Run {
  int64_t image, start;
  int count;  // up to kTile
  int64_t width;
};

template <class R>
struct Tile {
  const R* data = nullptr;
  int64_t stride = 0;  // between channels
  const R* row(int64_t c) const { return data + c * stride; }
};

// whether the positions of an image follow each other
inline bool is_flat(const Map& map, int64_t height, int64_t width) {
  return (map.strides[3] == 1 || width == 1) && (map.strides[2] == width * map.strides[3] || height == 1) &&
         (width > 1 || map.strides[2] == 1 || height == 1);
}

inline void position_offsets(const Map& map, const Run& run, int64_t* offsets) {
  int64_t y = run.start / run.width, x = run.start % run.width;
  for (int i = 0; i < run.count; ++i) {
    offsets[i] = run.image * map.strides[0] + y * map.strides[2] + x * map.strides[3];
    if (++x == run.width) x = 0, ++y;
  }
}

// A tile's rows are as far apart as the channels, too far for the hardware to see that the next tile lies beside it.
template <class R>
inline void prefetch_next(const R* data, int64_t stride, int64_t channels) {
  constexpr int kLine = 64 / sizeof(R);
  for (int64_t c = 0; c < channels; ++c)
    for (int i = 0; i < kTile<R>; i += kLine) __builtin_prefetch(data + c * stride + kTile<R> + i, 0, 2);
}

// The tile where it lies, if it has the right form; otherwise a copy in `buffer`, zero beyond the run.
template <class T, class R>
Tile<R> load_tile(const Map& map, const Run& run, int64_t channels, bool flat, R* buffer) {
  constexpr int P = kTile<R>;
  const T* data = static_cast<const T*>(map.data);
  const int64_t stride = map.strides[1];
  if (flat) {
    data += run.image * map.strides[0] + run.start;
    if constexpr (std::is_same_v<T, R>)
      if (run.count == P) {
        prefetch_next(data, stride, channels);
        return {data, stride};
      }
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = data + c * stride;
      R* to = buffer + c * P;
      for (int i = 0; i < run.count; ++i) to[i] = to_real(from[i]);
      for (int i = run.count; i < P; ++i) to[i] = 0;
    }
    return {buffer, P};
  }
  int64_t offsets[P];
  position_offsets(map, run, offsets);
  for (int64_t c = 0; c < channels; ++c) {
    R* to = buffer + c * P;
    for (int i = 0; i < run.count; ++i) to[i] = to_real(data[offsets[i] + c * stride]);
    for (int i = run.count; i < P; ++i) to[i] = 0;
  }
  return {buffer, P};
}

// Where a tile of results is to be computed: in place, or in a buffer that store_tile then copies.
template <class T, class R>
struct Target {
  R* data;
  int64_t stride;
};

template <class T, class R>
Target<T, R> target_tile(const Map& map, const Run& run, bool flat, R* buffer) {
  if constexpr (std::is_same_v<T, R>)
    if (flat && run.count == kTile<R>)
      return {static_cast<R*>(map.data) + run.image * map.strides[0] + run.start, map.strides[1]};
  return {buffer, kTile<R>};
}

template <class T, class R>
void store_tile(const Map& map, const Run& run, int64_t channels, bool flat, const R* buffer) {
  constexpr int P = kTile<R>;
  T* data = static_cast<T*>(map.data);
  if (flat) {
    data += run.image * map.strides[0] + run.start;
    for (int64_t c = 0; c < channels; ++c)
      for (int i = 0; i < run.count; ++i) from_real(buffer[c * P + i], data + c * map.strides[1] + i);
    return;
  }
  int64_t offsets[P];
  position_offsets(map, run, offsets);
  for (int64_t c = 0; c < channels; ++c)
    for (int i = 0; i < run.count; ++i) from_real(buffer[c * P + i], data + offsets[i] + c * map.strides[1]);
}

// A block of sums that stays in registers, if every loop over it is unrolled: PMM_UNROLL.
template <int N, class R>
struct Sums {
  Vec<R> at[N][kVectors];

  Sums() {
    PMM_UNROLL for (int n = 0; n < N; ++n) PMM_UNROLL for (int t = 0; t < kVectors; ++t) at[n][t] = Vec<R>{};
  }

  // at[n] += factors[n] * row
  template <class Factor>
  void add(const R* row, Factor factor) {
    PMM_UNROLL for (int t = 0; t < kVectors; ++t) {
      const Vec<R> v = load(row + t * kLanes<R>);
      PMM_UNROLL for (int n = 0; n < N; ++n) at[n][t] += factor(n) * v;
    }
  }

  void store_rows(R* out, int64_t stride) const {
    PMM_UNROLL for (int n = 0; n < N; ++n) PMM_UNROLL for (int t = 0; t < kVectors; ++t)
        store<R>(out + n * stride + t * kLanes<R>, at[n][t]);
  }
};

// out[r][p] = sum_c rows[r][c] x[c][p]
template <int N, class R>
inline void dots_block(R* out, const R* const* rows, Tile<R> x, int64_t channels) {
  Sums<N, R> sums;
  const R* own[N];
  PMM_UNROLL for (int n = 0; n < N; ++n) own[n] = rows[n];
  for (int64_t c = 0; c < channels; ++c) sums.add(x.row(c), [&](int n) { return own[n][c]; });
  sums.store_rows(out, kTile<R>);
}

template <class R>
void dots(R* out, const R* const* rows, int64_t count, Tile<R> x, int64_t channels) {
  int64_t r = 0;
  for (; r + kBlock <= count; r += kBlock) dots_block<kBlock>(out + r * kTile<R>, rows + r, x, channels);
  for (; r < count; ++r) dots_block<1>(out + r * kTile<R>, rows + r, x, channels);
}

// A gradient of a tile: of_x * x + of_a * a + sum_r weights[r] rows[r], coefficients by position.  A null coefficient
// leaves its term out.
template <class R>
struct Combination {
  const R* const* rows;
  const R* weights;  // [count][kTile]
  int64_t count;
  const R* of_x = nullptr;
  Tile<R> x = {};
  const R* of_a = nullptr;
  Tile<R> a = {};
};

// sums[n] += factor * tile[c + n], factors by position
template <int N, class R>
inline void add_multiple(Sums<N, R>& sums, const R* factor, Tile<R> tile, int64_t c) {
  if (!factor) return;
  PMM_UNROLL for (int t = 0; t < kVectors; ++t) {
    const Vec<R> scale = load(factor + t * kLanes<R>);
    PMM_UNROLL for (int n = 0; n < N; ++n) sums.at[n][t] += scale * load(tile.row(c + n) + t * kLanes<R>);
  }
}

template <int N, class R>
inline void combine_block(R* out, int64_t stride, const Combination<R>& terms, int64_t c) {
  Sums<N, R> sums;
  for (int64_t r = 0; r < terms.count; ++r) {
    const R* row = terms.rows[r] + c;
    sums.add(terms.weights + r * kTile<R>, [&](int n) { return row[n]; });
  }
  add_multiple(sums, terms.of_x, terms.x, c);
  add_multiple(sums, terms.of_a, terms.a, c);
  sums.store_rows(out + c * stride, stride);
}

template <class R>
void combine(R* out, int64_t stride, const Combination<R>& terms, int64_t channels) {
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) combine_block<kBlock>(out, stride, terms, c);
  for (; c < channels; ++c) combine_block<1>(out, stride, terms, c);
}

// sums[ids[r]][c] += weights[r][.] x[c][.], kept as vectors until a chunk ends: sums is [K][channels][lanes]
template <int N, class R>
inline void accumulate_block(R* const* sums, const R* weights, Tile<R> x, int64_t channels) {
  Vec<R> w[N][kVectors];
  R* own[N];
  PMM_UNROLL for (int n = 0; n < N; ++n) {
    own[n] = sums[n];
    PMM_UNROLL for (int t = 0; t < kVectors; ++t) w[n][t] = load(weights + n * kTile<R> + t * kLanes<R>);
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec<R> v[kVectors];
    PMM_UNROLL for (int t = 0; t < kVectors; ++t) v[t] = load(x.row(c) + t * kLanes<R>);
    PMM_UNROLL for (int n = 0; n < N; ++n) {
      // two chains, which do not wait for each other
      Vec<R> even = load(own[n] + c * kLanes<R>) + w[n][0] * v[0], odd = w[n][1] * v[1];
      PMM_UNROLL for (int t = 2; t < kVectors; t += 2) even += w[n][t] * v[t], odd += w[n][t + 1] * v[t + 1];
      store<R>(own[n] + c * kLanes<R>, even + odd);
    }
  }
}

template <int N, class R>
inline void accumulate_rows(R* sums, const int* ids, const R* weights, int64_t r, Tile<R> x, int64_t channels) {
  R* rows[N];
  for (int n = 0; n < N; ++n) rows[n] = sums + (ids ? ids[r + n] : r + n) * channels * kLanes<R>;
  accumulate_block<N>(rows, weights + r * kTile<R>, x, channels);
}

template <class R>
void accumulate(R* sums, const int* ids, const R* weights, int64_t count, Tile<R> x, int64_t channels) {
  constexpr int N = PMM_BYTES == 64 ? 4 : 2;
  int64_t r = 0;
  for (; r + N <= count; r += N) accumulate_rows<N>(sums, ids, weights, r, x, channels);
  if (count - r == 3) accumulate_rows<3>(sums, ids, weights, r, x, channels);
  if (count - r == 2) accumulate_rows<2>(sums, ids, weights, r, x, channels);
  if (count - r == 1) accumulate_rows<1>(sums, ids, weights, r, x, channels);
}

// out[p] = sum_c x[c][p] y[c][p]
template <class R>
void dot_positions(R* out, Tile<R> x, Tile<R> y, int64_t channels) {
  Sums<1, R> sums;
  for (int64_t c = 0; c < channels; ++c)
    PMM_UNROLL for (int t = 0; t < kVectors; ++t)
      sums.at[0][t] += load(x.row(c) + t * kLanes<R>) * load(y.row(c) + t * kLanes<R>);
  sums.store_rows(out, kTile<R>);
}

// r = 1 / ||x||, 0 for a zero vector (squared norm up to 1e-24)
template <class R>
void inverse_norms(R* out, Tile<R> x, int64_t channels) {
  dot_positions(out, x, x, channels);
  for (int i = 0; i < kTile<R>; ++i) out[i] = out[i] <= R(1e-24) ? R(0) : R(1) / std::sqrt(out[i]);
}

}  // namespace pmm::PMM_ISA
