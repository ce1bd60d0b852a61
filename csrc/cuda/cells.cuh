// Bilinear upsampling seen from the source (docs/ops/upsample_cross_entropy.md): which pixels lie in a cell, and where.
// All in integers, so that floors and weights are exact.
#pragma once

#include "labels.cuh"

namespace pmm {

// one axis: `small` source positions, `large` pixels
struct Axis {
    int small;
    int large;
    bool aligned;
};

// the source positions of pixel x and the weight of the upper one
template <class T>
__device__ Tap<T> source_tap(int x, const Axis& axis) {
    // the positions of the other map, with the sizes exchanged
    if (axis.aligned) return aligned_tap<T>(x, axis.large, axis.small);
    const std::int64_t steps = 2 * static_cast<std::int64_t>(axis.large);
    const std::int64_t scaled = (2 * static_cast<std::int64_t>(x) + 1) * axis.small - axis.large;
    if (scaled < 0) return {0, axis.small > 1 ? 1 : 0, T(0)};
    const Quotient at = divide(scaled, steps);
    return {at.whole, at.whole + 1 < axis.small ? at.whole + 1 : at.whole, T(at.rest) / T(steps)};
}

// the first pixel of cell i or of a later one; the number of pixels where there is none
__device__ inline int first_pixel(int i, const Axis& axis) {
    if (i <= 0) return 0;
    if (i >= axis.small || (axis.aligned && axis.large < 2)) return axis.large;
    std::int64_t numerator = static_cast<std::int64_t>(i) * (axis.large - 1), denominator = axis.small - 1;
    if (!axis.aligned) {
        numerator = (2 * static_cast<std::int64_t>(i) + 1) * axis.large - axis.small;
        denominator = 2 * static_cast<std::int64_t>(axis.small);
    }
    const std::int64_t first = numerator <= 0 ? 0 : divide(numerator + denominator - 1, denominator).whole;
    return first < axis.large ? static_cast<int>(first) : axis.large;
}

// The pixels of a row of cells, and how far each is below the cell's upper end: pixel begin + i by
// (rest + i step) scale, or not at all where that is negative.
template <class T>
struct Span {
    int begin;
    int end;
    int rest;
    int step;
    T scale;
    __device__ T weight(int y) const {
        const int steps = rest + (y - begin) * step;
        return steps > 0 ? T(steps) * scale : T(0);
    }
};

// of cell i, whose first pixel is `begin`
template <class T>
__device__ Span<T> span_of(int i, int begin, const Axis& axis) {
    const std::int64_t twice = axis.aligned ? 1 : 2, steps = twice * axis.large - (axis.aligned ? 1 : 0);
    const std::int64_t step = twice * axis.small - (axis.aligned ? 1 : 0);
    const std::int64_t first = begin * step + (axis.aligned ? 0 : axis.small - axis.large);
    const int rest = static_cast<int>(first - i * steps);
    return {begin, first_pixel(i + 1, axis), rest, static_cast<int>(step), steps > 0 ? T(1) / T(steps) : T(0)};
}

}  // namespace pmm
