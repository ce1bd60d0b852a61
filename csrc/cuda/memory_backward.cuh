// Backward of the memory operators.  Both halves see f only through f^ = r f, so that their gradients add:
//   d f = r (x - (f^.x) f^),  x = sum_k u_k keys_k + y_k G_k
#pragma once

#include "memory_walk.cuh"

namespace pmm {

// product: values.A becomes v; u: e becomes r u, the factor of keys in d f and of f in d keys; weight: w
// returns the factor of f in d f
template <class T>
__device__ T backward_read(const Shared<T>& s, const Call& call, const Place& place, const Own& own, T r) {
    const T temperature = T(call.temperature);
    for (int k = own.lane; k < call.slots; k += own.lanes) own.at(s.score, place, k) *= r;
    softmax(s.weight, s.score, own, place, call.slots, temperature);
    T mean = T(0);
    for (int k = own.lane; k < call.slots; k += own.lanes)
        mean += own.at(s.weight, place, k) * own.at(s.product, place, k);
    mean = sum_lanes(mean, own.lanes);
    T us = T(0);
    for (int k = own.lane; k < call.slots; k += own.lanes) {
        const T v = own.at(s.weight, place, k) * (own.at(s.product, place, k) - mean) / temperature;
        const T u = own.at(s.u, place, k) + v;
        us += u * own.at(s.score, place, k);
        own.at(s.product, place, k) = v;
        own.at(s.u, place, k) = r * u;
    }
    return -r * r * sum_lanes(us, own.lanes);
}

// mass: y becomes r y, the factor of G in d f; returns the factor of f in d f
template <class T>
__device__ T backward_pool(const Shared<T>& s, const Call& call, const Place& place, const Own& own, T r) {
    T dot = T(0);
    for (int i = own.lane; i < *s.count; i += own.lanes) {
        const int k = s.list[i];
        const T mass = own.at(s.mass, place, k);
        dot += mass * r * own.at(s.pooled, place, k);
        own.at(s.mass, place, k) = r * mass;
    }
    dot = sum_lanes(dot, own.lanes);
    return call.normalize ? -r * r * dot : T(0);
}

template <class T, bool read, bool pool>
__device__ void backward_position(const Shared<T>& s, const Call& call, const Place& place) {
    const Own own(place);
    const T r = call.normalize ? inverse_norm(s.squared[own.position]) : T(1);
    T scale = T(0);
    if (read) scale += backward_read(s, call, place, own, r);
    if (pool) scale += backward_pool(s, call, place, own, r);
    if (own.lane == 0) s.scale_features[own.position] = scale;
}

template <class T, bool read, bool pool>
__device__ void backward_start(const Shared<T>& s, const Call& call, const Place& place) {
    fill_zero(s.squared, place.pitch);
    if (read) {
        zero_rows(s.score, call, place);
        zero_rows(s.product, call, place);
        stage_noise(s.weight, call, place);
        stage(s.u, call.grad_scores, place, 0, call.slots, call.slots);
    }
    if (pool) {
        zero_rows(s.pooled, call, place);
        prepare_classes(s, call, place);
    }
    arrive();
}

template <class T, bool read, bool pool>
__device__ __forceinline__ void backward_tile(const Shared<T>& s, const Matrices<T>& m, const Call& call,
                                              const Plan& plan, const Place& place) {
    const auto load = [&](int first, int valid, int rows) {
        stage(s.features, call.features, place, first, valid, rows);
    };
    const auto load_read = [&](int first, int valid, int rows) {
        stage(s.incoming, call.grad_read, place, first, valid, rows);
    };
    const int depth = read && call.grad_read.data ? call.depth : 0;
    load_ahead(call.channels, plan.channels, load);
    load_ahead(depth, plan.depth, load_read);
    backward_start<T, read, pool>(s, call, place);
    const Rows all{nullptr, call.slots}, present{s.list, pool ? *s.count : 0};
    for_chunks(call.channels, plan.channels, load, [&](int first, int, int rows) {
        contract_maps(s.squared, s.features, s.features, rows, place, s.partial);
        if (read) contract_channels(s.score, s.features, m.keys + first, plan.width, all, rows, place, s.partial);
        if (pool)
            contract_channels(s.pooled, s.features, m.grad_sums + first, plan.width, present, rows, place, s.partial);
    });
    for_chunks(depth, plan.depth, load_read, [&](int first, int, int rows) {
        contract_channels(s.product, s.incoming, m.values + first, plan.deep, all, rows, place, s.partial);
    });
    backward_position<T, read, pool>(s, call, place);
    __syncthreads();
    if (read && call.out_noise.data) store_rows(call.out_noise, place, s.product, call.slots);
    const int channels = call.out_features.data || m.sum_keys ? call.channels : 0;
    for_chunks(channels, plan.channels, load, [&](int first, int valid, int rows) {
        if (read && m.sum_keys)
            contract_positions<T>(m.sum_keys + first, plan.width, {s.u, s.features}, all, rows, place);
        if (!call.out_features.data) return;
        write_map<T>(
            call.out_features, place, first, valid, [&](T(&block)[kBlockChannels][4], int channel, int position) {
                if (read) add_rows(block, s.u, m.keys + first, plan.width, all, channel, position, place.pitch);
                if (pool)
                    add_rows(block, s.mass, m.grad_sums + first, plan.width, present, channel, position, place.pitch);
                add_scaled(block, s.scale_features, s.features, channel, position, place.pitch);
            });
    });
    for_chunks(m.sum_values ? depth : 0, plan.depth, load_read, [&](int first, int, int rows) {
        contract_positions<T>(m.sum_values + first, plan.deep, {s.weight, s.incoming}, all, rows, place);
    });
    __syncthreads();
}

template <class T, bool read, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks<T, Order::backward, read>)
    backward_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan) {
    const Frame<T>& frame = open_frame<T, Order::backward, read, pool>(call, plan);
    for (std::int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x)
        backward_tile<T, read, pool>(frame.shared, frame.matrices, call, plan, tile_place(tile, call, plan));
    keep_sums(frame, call, plan);
}

}  // namespace pmm
