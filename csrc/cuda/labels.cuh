// The class masses of a tile of positions, from the four label pixels around each (docs/ops/masked_average_pool.md).
#pragma once

#include "maps.cuh"

namespace pmm {

template <class L>
__device__ std::int64_t label_as(const void* labels, std::int64_t index) {
    return static_cast<std::int64_t>(static_cast<const L*>(labels)[index]);
}

// A label in its own type: a uniform branch, and one-byte labels move one byte.
__device__ inline std::int64_t load_label(const Labels& labels, std::int64_t index) {
    switch (labels.type) {
        case Type::uint8:
            return label_as<std::uint8_t>(labels.data, index);
        case Type::int8:
            return label_as<std::int8_t>(labels.data, index);
        case Type::int16:
            return label_as<std::int16_t>(labels.data, index);
        case Type::int32:
            return label_as<std::int32_t>(labels.data, index);
        default:
            return label_as<std::int64_t>(labels.data, index);
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

template <class T>
__device__ void add_label(T* masses, int pitch, const Labels& labels, std::int64_t index, T weight, int slots) {
    const std::int64_t label = load_label(labels, index);
    if (label == labels.ignore_index) return;
    if (label < 0 || label >= slots) return wrong_label();
    masses[label * pitch] += weight;
}

// masses [K][P], zero before: one thread a position, so nothing is added by two threads.
template <class T>
__device__ void sample_labels(T* masses, const Call& call, const Place& place) {
    const int p = threadIdx.x;
    if (p >= place.count) return;
    const Labels& labels = call.labels;
    const int row = static_cast<int>((place.first + p) / call.width);
    const int column = static_cast<int>((place.first + p) % call.width);
    const Tap<T> y = aligned_tap<T>(row, call.height, labels.height);
    const Tap<T> x = aligned_tap<T>(column, call.width, labels.width);
    const std::int64_t image = place.image * labels.height;
    const std::int64_t upper = (image + y.lower) * labels.width, lower = (image + y.upper) * labels.width;
    T* own = masses + p;
    add_label(own, place.pitch, labels, upper + x.lower, (T(1) - y.weight) * (T(1) - x.weight), call.slots);
    add_label(own, place.pitch, labels, upper + x.upper, (T(1) - y.weight) * x.weight, call.slots);
    add_label(own, place.pitch, labels, lower + x.lower, y.weight * (T(1) - x.weight), call.slots);
    add_label(own, place.pitch, labels, lower + x.upper, y.weight * x.weight, call.slots);
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
