// Forward of the memory operators (docs/ops/memory_read.md, masked_average_pool.md, memory_pass.md).
#pragma once

#include "memory_walk.cuh"

namespace pmm {

// score: keys.f becomes the cosine; weight: noise becomes w; mass: y becomes the factor of f in the class sums
template <class T, bool read, bool pool>
__device__ void forward_position(const Shared<T>& s, const Call& call, const Place& place) {
    const Own own(place);
    const T r = call.normalize ? inverse_norm(s.squared[own.position]) : T(1);
    if (read) {
        for (int k = own.lane; k < call.slots; k += own.lanes) own.at(s.score, place, k) *= r;
        softmax(s.weight, s.score, own, place, call.slots, T(call.temperature));
    }
    if (pool)
        for (int k = own.lane; k < call.slots; k += own.lanes) own.at(s.mass, place, k) *= r;
}

template <class T>
__device__ void add_mass(const Shared<T>& s, const Place& place) {
    for (int i = threadIdx.x; i < *s.count; i += kThreads) {
        const int k = s.list[i];
        T sum = T(0);
        for (int p = 0; p < place.size; ++p) sum += s.mass[k * place.pitch + p];
        s.total_mass[k] += sum;
    }
}

template <class T, bool read, bool pool>
__device__ __forceinline__ void forward_tile(const Shared<T>& s, const Matrices<T>& m, const Call& call,
                                             const Plan& plan, const Place& place) {
    const auto load = [&](int first, int valid, int rows) {
        stage(s.features, call.features, place, first, valid, rows);
    };
    load_ahead(call.channels, plan.channels, load);
    fill_zero(s.squared, place.pitch);
    if (read) {
        zero_rows(s.score, call, place);
        stage_noise(s.weight, call, place);
    }
    if (pool) prepare_classes(s, call, place);
    arrive();
    if (pool) add_mass(s, place);
    const Rows all{nullptr, call.slots}, present{s.list, pool ? *s.count : 0};
    for_chunks(call.channels, plan.channels, load, [&](int first, int, int rows) {
        contract_maps(s.squared, s.features, s.features, rows, place, s.partial);
        if (read) contract_channels(s.score, s.features, m.keys + first, plan.width, all, rows, place, s.partial);
    });
    forward_position<T, read, pool>(s, call, place);
    __syncthreads();
    if (read) {
        store_rows(call.out_scores, place, s.score, call.slots);
        write_map<T>(call.out_read, place, 0, call.depth, [&](T(&block)[kBlockChannels][4], int channel, int position) {
            add_rows(block, s.weight, m.values, plan.deep, all, channel, position, place.pitch);
        });
    }
    if (pool)
        for_chunks(call.channels, plan.channels, load, [&](int first, int, int rows) {
            contract_positions<T>(m.sums + first, plan.width, {s.mass, s.features}, present, rows, place);
        });
    __syncthreads();
}

template <class T, bool read, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks<T, Order::forward, read>)
    forward_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan) {
    const Frame<T>& frame = open_frame<T, Order::forward, read, pool>(call, plan);
    for (std::int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x)
        forward_tile<T, read, pool>(frame.shared, frame.matrices, call, plan, tile_place(tile, call, plan));
    keep_sums(frame, call, plan);
}

}  // namespace pmm
