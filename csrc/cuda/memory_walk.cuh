// What the three orders share: the walk of a persistent grid over tiles, the sums that blocks keep on the way, and the
// softmax over slots.  One tensor is read (`read`), pooled (`pool`) or both; the other half is not compiled in.
#pragma once

#include "labels.cuh"
#include "philox.cuh"
#include "plan.cuh"

namespace pmm {

template <class T>
__device__ const T* choose(const T* shared, const void* global) {
    return shared && global ? shared : static_cast<const T*>(global);
}

template <class T>
__device__ T* choose_sums(T* shared, T* global, const void* wanted) {
    return !wanted ? nullptr : shared ? shared : global;
}

// a matrix that has room in shared memory is copied there, and is there after the first `arrive`
template <class T>
__device__ void bring(T* shared, const void* global, int count) {
    if (!shared || !global) return;
    constexpr int wide = Sixteen<T>::count;
    const T* from = static_cast<const T*>(global);
    for (int i = wide * threadIdx.x; i < count; i += wide * kThreads) copy_sixteen(shared + i, from + i, true);
}

// a block's share of the workspace: [K, width] sums, [K, width] of keys, [K, deep] of values, [K] mass
template <class T>
__device__ T* own_workspace(const Call& call, const Plan& plan) {
    return static_cast<T*>(call.workspace) + static_cast<std::int64_t>(blockIdx.x) * plan.per_block;
}

template <class T>
__device__ void name_matrices(Frame<T>& frame, const Call& call, const Plan& plan) {
    T* own = own_workspace<T>(call, plan);
    T* const* shared = frame.shared.matrix;
    const int wide = call.slots * plan.width;
    Matrices<T>& m = frame.matrices;
    m.keys = choose<T>(shared[kKeys], call.keys);
    m.values = choose<T>(shared[kValues], call.values);
    m.grad_sums = choose<T>(shared[kGradSums], call.grad_sums);
    m.grad_grad_keys = choose<T>(shared[kGradGradKeys], call.grad_grad_keys);
    m.grad_grad_values = choose<T>(shared[kGradGradValues], call.grad_grad_values);
    m.sums = choose_sums(shared[kSumOfSums], own, call.out_sums);
    m.sum_keys = choose_sums(shared[kSumOfKeys], own + wide, call.out_keys);
    m.sum_values = choose_sums(shared[kSumOfValues], own + 2 * wide, call.out_values);
}

// Names the arrays of a block, brings matrices into shared memory and sets sums to zero; ends past a barrier.
template <class T, Order order, bool read, bool pool>
__device__ const Frame<T>& open_frame(const Call& call, const Plan& plan) {
    Frame<T>& frame = *reinterpret_cast<Frame<T>*>(shared_memory());
    if (threadIdx.x == 0) {
        carve<T, order, read, pool>(frame.shared, reinterpret_cast<T*>(shared_memory() + kFrameBytes), plan,
                                    call.slots);
        name_matrices(frame, call, plan);
    }
    __syncthreads();
    T* const* shared = frame.shared.matrix;
    const int wide = call.slots * plan.width, deep = call.slots * plan.deep;
    bring(shared[kKeys], call.keys, wide);
    bring(shared[kValues], call.values, deep);
    bring(shared[kGradSums], call.grad_sums, wide);
    bring(shared[kGradGradKeys], call.grad_grad_keys, wide);
    bring(shared[kGradGradValues], call.grad_grad_values, deep);
    if (frame.matrices.sums) fill_zero(frame.matrices.sums, wide);
    if (frame.matrices.sum_keys) fill_zero(frame.matrices.sum_keys, wide);
    if (frame.matrices.sum_values) fill_zero(frame.matrices.sum_values, deep);
    if (pool) fill_zero(frame.shared.total_mass, call.slots);
    __syncthreads();
    return frame;
}

template <class T>
__device__ void keep(T* to, const T* sums, int count) {
    if (!sums || sums == to) return;
    for (int i = threadIdx.x; i < count; i += kThreads) to[i] = sums[i];
}

// What a block has summed goes to its part of the workspace, where add_blocks finds it.
template <class T>
__device__ void keep_sums(const Frame<T>& frame, const Call& call, const Plan& plan) {
    T* own = own_workspace<T>(call, plan);
    const Matrices<T>& m = frame.matrices;
    const int wide = call.slots * plan.width, deep = call.slots * plan.deep;
    __syncthreads();
    keep(own, m.sums, wide);
    keep(own + wide, m.sum_keys, wide);
    keep(own + 2 * wide, m.sum_values, deep);
    if (call.out_mass) keep(own + 2 * wide + deep, frame.shared.total_mass, call.slots);
}

__device__ inline Place tile_place(std::int64_t tile, const Call& call, const Plan& plan) {
    const std::int64_t positions = static_cast<std::int64_t>(call.height) * call.width;
    const Quotient at = divide(tile, plan.tiles_per_image);
    const std::int64_t first = at.rest * plan.size, left = positions - first;
    const int shift = plan.size == 32 ? 5 : plan.size == 16 ? 4 : 3;
    return {at.whole,
            first,
            left < plan.size ? static_cast<int>(left) : plan.size,
            plan.size,
            shift,
            plan.size + 4};
}

// A map that is one chunk is loaded at the begin of a tile, while the noise is drawn and the labels are sampled.
template <class Load>
__device__ void load_ahead(int all, int chunk, Load load) {
    if (all <= chunk) load(0, all, round_up(all, kMatrixPad));
}

// Calls `use(first, valid, rows)` for every chunk of `all` channels, staged by `load` if not ahead.
template <class Load, class Use>
__device__ void for_chunks(int all, int chunk, Load load, Use use) {
    const bool resident = all <= chunk;
    for (int first = 0; first < all; first += chunk) {
        const int valid = all - first < chunk ? all - first : chunk, rows = round_up(valid, kMatrixPad);
        if (!resident) {
            __syncthreads();
            load(first, valid, rows);
            arrive();
        }
        use(first, valid, rows);
    }
}

// A thread's position and its slots: kThreads / P neighbouring threads share a position.
struct Own {
    int lanes;
    int position;
    int lane;
    __device__ explicit Own(const Place& place)
        : lanes(kThreads / place.size), position(threadIdx.x / lanes), lane(threadIdx.x % lanes) {}
    template <class T>
    __device__ T& at(T* array, const Place& place, int k) const {
        return array[k * place.pitch + position];
    }
};

// weight: noise becomes softmax((score + noise) / temperature) over the slots of the thread's position
template <class T>
__device__ void softmax(T* weight, const T* score, const Own& own, const Place& place, int slots, T temperature) {
    T most = -T(INFINITY), sum = T(0);
    for (int k = own.lane; k < slots; k += own.lanes) {
        const T logit = (own.at(score, place, k) + own.at(weight, place, k)) / temperature;
        own.at(weight, place, k) = logit;
        most = logit > most ? logit : most;
    }
    most = max_lanes(most, own.lanes);
    for (int k = own.lane; k < slots; k += own.lanes) {
        const T power = exponential(own.at(weight, place, k) - most);
        own.at(weight, place, k) = power;
        sum += power;
    }
    const T scale = T(1) / sum_lanes(sum, own.lanes);
    for (int k = own.lane; k < slots; k += own.lanes) own.at(weight, place, k) *= scale;
}

// The labels of a tile: masses and the list of classes present.  Begins past a barrier, ends before one.
template <class T>
__device__ void prepare_classes(const Shared<T>& s, const Call& call, const Place& place) {
    fill_zero(s.mass, call.slots * place.pitch);
    __syncthreads();
    sample_labels(s.mass, call, place);
    __syncthreads();
    list_classes(s.mass, call.slots, place, s.present, s.list, s.count);
}

template <class T>
__device__ void zero_rows(T* array, const Call& call, const Place& place) {
    fill_zero(array, call.slots * place.pitch);
}

constexpr int kShares = 16;
constexpr int kParts = 4;

// one part of a block's workspace: `elements` numbers in rows of `columns`, `width` apart; none: nothing is wanted
template <class T>
struct Part {
    T* out = nullptr;
    int first = 0;
    int elements = 0;
    int columns = 1;
    int width = 1;
};

template <class T>
struct Parts {
    Part<T> part[kParts];
};

// Every part's `out` = its sum over the blocks of the walk, in a fixed order.  A block has 32 elements of one part,
// lane by lane; its warps share the blocks.
template <class T>
__global__ void __launch_bounds__(32 * kShares)
    add_blocks(const T* workspace, int blocks, int per_block, const __grid_constant__ Parts<T> parts) {
    T* partial = reinterpret_cast<T*>(shared_memory());
    const int lane = threadIdx.x % 32, share = threadIdx.x / 32;
    int which = 0, begin = blockIdx.x * 32;
    while (begin >= round_up(parts.part[which].elements, 32)) begin -= round_up(parts.part[which++].elements, 32);
    const Part<T>& part = parts.part[which];
    const int element = begin + lane;
    T sum = T(0);
    if (element < part.elements) {
        const T* from = workspace + part.first + element / part.columns * part.width + element % part.columns;
#pragma unroll 8
        for (int block = share; block < blocks; block += kShares)
            sum += from[static_cast<std::int64_t>(block) * per_block];
    }
    partial[share * 32 + lane] = sum;
    __syncthreads();
    if (share != 0 || element >= part.elements) return;
    for (int other = 1; other < kShares; ++other) sum += partial[other * 32 + lane];
    part.out[element] = sum;
}

}  // namespace pmm
