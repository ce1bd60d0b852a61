// The class masses of a tile of positions, from the four label pixels around each (docs/ops/masked_average_pool.md).
#pragma once

#include "maps.cuh"

namespace pmm {

constexpr int kLabels = 4;

// the numbers of four classes, -1 where there is none
struct Classes {
    int k[kLabels];
};

template <class L>
__device__ Classes classes_as(const Labels& labels, const std::int64_t (&index)[kLabels], int slots) {
    std::int64_t found[kLabels];
#pragma unroll
    for (int i = 0; i < kLabels; ++i)
        found[i] = index[i] < 0 ? labels.ignore_index : static_cast<const L*>(labels.data)[index[i]];
    Classes classes;
    bool wrong = false;
#pragma unroll
    for (int i = 0; i < kLabels; ++i) {
        const bool right = found[i] >= 0 && found[i] < slots, ignored = found[i] == labels.ignore_index;
        wrong |= !right && !ignored;
        classes.k[i] = right && !ignored ? static_cast<int>(found[i]) : -1;
    }
    if (wrong) wrong_label();
    return classes;
}

// The labels at four places, none at a negative one; all are loaded before the first is looked at.  In their own type:
// a uniform branch, and one-byte labels move one byte.
__device__ inline Classes load_classes(const Labels& labels, const std::int64_t (&index)[kLabels], int slots) {
    switch (labels.type) {
        case Type::uint8:
            return classes_as<std::uint8_t>(labels, index, slots);
        case Type::int8:
            return classes_as<std::int8_t>(labels, index, slots);
        case Type::int16:
            return classes_as<std::int16_t>(labels, index, slots);
        case Type::int32:
            return classes_as<std::int32_t>(labels, index, slots);
        default:
            return classes_as<std::int64_t>(labels, index, slots);
    }
}

// Two neighbouring pixels and the weight of the upper one.
template <class T>
struct Tap {
    int lower;
    int upper;
    T weight;
};

struct Quotient {
    int whole;
    std::int64_t rest;
};

// of numbers that are not negative; a 64-bit division costs several times a 32-bit one and is rarely needed
__device__ inline Quotient divide(std::int64_t numerator, std::int64_t denominator) {
    if ((numerator | denominator) >> 32) return {static_cast<int>(numerator / denominator), numerator % denominator};
    const unsigned whole = static_cast<unsigned>(numerator) / static_cast<unsigned>(denominator);
    return {static_cast<int>(whole), numerator - static_cast<std::int64_t>(whole) * denominator};
}

// Position i of `small` on an axis of `large` pixels with aligned corners.  i (large - 1) / (small - 1) in integers:
// its floor and remainder are exact, where float32 loses the weight's last digits far from the origin.
template <class T>
__device__ Tap<T> aligned_tap(int i, int small, int large) {
    if (small < 2) return {0, large > 1 ? 1 : 0, T(0)};
    const std::int64_t scaled = static_cast<std::int64_t>(i) * (large - 1), steps = small - 1;
    const Quotient at = divide(scaled, steps);
    return {at.whole, at.whole + 1 < large ? at.whole + 1 : at.whole, T(at.rest) / T(steps)};
}

// masses [K][P], zero before: one thread a position, so nothing is added by two threads.
template <class T>
__device__ void sample_labels(T* masses, const Call& call, const Place& place) {
    const int p = threadIdx.x;
    if (p >= place.count) return;
    const Labels& labels = call.labels;
    const Quotient at = divide(place.first + p, call.width);
    const Tap<T> y = aligned_tap<T>(at.whole, call.height, labels.height);
    const Tap<T> x = aligned_tap<T>(static_cast<int>(at.rest), call.width, labels.width);
    const std::int64_t image = place.image * labels.height;
    const std::int64_t upper = (image + y.lower) * labels.width, lower = (image + y.upper) * labels.width;
    const std::int64_t corners[kLabels] = {upper + x.lower, upper + x.upper, lower + x.lower, lower + x.upper};
    const T weights[kLabels] = {(T(1) - y.weight) * (T(1) - x.weight), (T(1) - y.weight) * x.weight,
                                y.weight * (T(1) - x.weight), y.weight * x.weight};
    const Classes found = load_classes(labels, corners, call.slots);
#pragma unroll
    for (int i = 0; i < kLabels; ++i)
        if (found.k[i] >= 0) masses[found.k[i] * place.pitch + p] += weights[i];
}

// The classes that a tile holds, ascending: few as a rule, so that pooling costs little beside the read.
// `present` has room for K numbers; `list` [K] and `count` are the result.
template <class T>
__device__ void list_classes(const T* masses, int slots, const Place& place, int* present, int* list, int* count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int k = warp; k < slots; k += kWarps) {
        const bool mass = lane < place.size && masses[k * place.pitch + lane] != T(0);
        const unsigned lanes = __ballot_sync(kAllLanes, mass);
        if (lane == 0) present[k] = lanes != 0;
    }
    __syncthreads();
    if (warp != 0) return;
    int before = 0;
    for (int first = 0; first < slots; first += 32) {
        const bool here = first + lane < slots && present[first + lane];
        const unsigned lanes = __ballot_sync(kAllLanes, here);
        if (here) list[before + __popc(lanes & ((1u << lane) - 1u))] = first + lane;
        before += __popc(lanes);
    }
    if (lane == 0) *count = before;
}

}  // namespace pmm
