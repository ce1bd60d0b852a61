// Double backward of the memory operators: the letters are those of docs/ops/memory_read.md and masked_average_pool.md.
// The incoming gradient a of d f is the same for both halves, and what they give for f adds:
//   d f = sum_k (r sigma_k keys_k + r u_k P_k - r^2 beta y_k G_k) + scale_direction a + scale_features f
#pragma once

#include "memory_walk.cuh"

namespace pmm {

// factors of f and of a in d f
template <class T>
struct Scales {
    T features;
    T direction;
};

template <class T>
struct Means {
    T d;   // sum_k w_k d_k
    T us;  // sum_k u_k s_k
    T h;   // sum_k w_k h_k
};

// First half: score -> s, weight -> w, u: e -> u, along_score: b -> rho, along: n -> h; sums kappa and u.b on the way.
template <class T>
__device__ Means<T> read_first(const Shared<T>& s, const Call& call, const Place& place, const Own& own, T r, T beta,
                               T& kappa, T& ub) {
    const T temperature = T(call.temperature);
    for (int k = own.lane; k < call.slots; k += own.lanes) own.at(s.score, place, k) *= r;
    softmax(s.weight, s.score, own, place, call.slots, temperature);
    Means<T> mean{T(0), T(0), T(0)};
    for (int k = own.lane; k < call.slots; k += own.lanes)
        mean.d += own.at(s.weight, place, k) * own.at(s.product, place, k);
    mean.d = sum_lanes(mean.d, own.lanes);
    for (int k = own.lane; k < call.slots; k += own.lanes) {
        const T score = own.at(s.score, place, k), w = own.at(s.weight, place, k);
        const T u = own.at(s.u, place, k) + w * (own.at(s.product, place, k) - mean.d) / temperature;
        const T along = own.at(s.along_keys, place, k) - score * beta, b = r * own.at(s.along_score, place, k);
        const T rho = r * along + b, h = rho + own.at(s.along, place, k);
        own.at(s.u, place, k) = u;
        own.at(s.along_score, place, k) = rho;
        own.at(s.along, place, k) = h;
        mean.us += u * score;
        mean.h += w * h;
        kappa += u * along;
        ub += u * b;
    }
    mean.us = sum_lanes(mean.us, own.lanes);
    mean.h = sum_lanes(mean.h, own.lanes);
    kappa = sum_lanes(kappa, own.lanes);
    ub = sum_lanes(ub, own.lanes);
    return mean;
}

// Second half: score -> r sigma, u -> r u, along_keys -> t, along -> q
template <class T>
__device__ Scales<T> double_read(const Shared<T>& s, const Call& call, const Place& place, const Own& own, T r,
                                 T beta) {
    const T temperature = T(call.temperature);
    T kappa = T(0), ub = T(0), y_mean = T(0), sigma_s = T(0);
    const Means<T> mean = read_first(s, call, place, own, r, beta, kappa, ub);
    for (int k = own.lane; k < call.slots; k += own.lanes) {
        const T d = own.at(s.product, place, k), h = own.at(s.along, place, k), w = own.at(s.weight, place, k);
        // less d- h-, which is the same for all slots and cancels in q: around the means nothing large has to
        const T y = (d - mean.d) * (h - mean.h) / temperature + own.at(s.along_values, place, k);
        own.at(s.along_keys, place, k) = w * (h - mean.h) / temperature;
        own.at(s.along_values, place, k) = y;
        y_mean += w * y;
    }
    y_mean = sum_lanes(y_mean, own.lanes);
    for (int k = own.lane; k < call.slots; k += own.lanes) {
        const T q = own.at(s.weight, place, k) * (own.at(s.along_values, place, k) - y_mean) / temperature;
        const T u = own.at(s.u, place, k), sigma = q - r * beta * u;
        sigma_s += sigma * own.at(s.score, place, k);
        own.at(s.along, place, k) = q;
        own.at(s.score, place, k) = r * sigma;
        own.at(s.u, place, k) = r * u;
    }
    const T gamma = sum_lanes(sigma_s, own.lanes) + ub - r * mean.us * beta;
    return {-r * r * (gamma + r * kappa), -r * r * mean.us};
}

// mass: y -> -r^2 beta y, pooled -> r y: the factors of f and of a in d G
template <class T>
__device__ Scales<T> double_pool(const Shared<T>& s, const Call& call, const Place& place, const Own& own, T r,
                                 T beta) {
    T phi = T(0), along = T(0);
    for (int i = own.lane; i < *s.count; i += own.lanes) {
        const int k = s.list[i];
        const T y = own.at(s.mass, place, k);
        phi += y * r * own.at(s.pooled, place, k);
        along += y * own.at(s.pooled_along, place, k);
        own.at(s.mass, place, k) = call.normalize ? -r * r * beta * y : T(0);
        own.at(s.pooled, place, k) = r * y;
    }
    phi = sum_lanes(phi, own.lanes);
    along = sum_lanes(along, own.lanes);
    if (!call.normalize) return {T(0), T(0)};
    return {-r * r * r * (along - T(3) * beta * phi), -r * r * phi};
}

template <class T, bool read, bool pool>
__device__ PMM_OUTLINE void double_position(const Shared<T>& s, const Call& call, Place place) {
    const Own own(place);
    const T r = call.normalize ? inverse_norm(s.squared[own.position]) : T(1);
    const T beta = r * s.dot[own.position];
    Scales<T> scales{T(0), T(0)};
    if (read) scales = double_read(s, call, place, own, r, beta);
    if (pool) {
        const Scales<T> of_pool = double_pool(s, call, place, own, r, beta);
        scales = {scales.features + of_pool.features, scales.direction + of_pool.direction};
    }
    if (own.lane != 0) return;
    s.scale_features[own.position] = scales.features;
    s.scale_direction[own.position] = scales.direction;
}

template <class T, bool read, bool pool>
__device__ PMM_OUTLINE void double_start(const Shared<T>& s, const Call& call, Place place) {
    fill_zero(s.squared, place.pitch);
    fill_zero(s.dot, place.pitch);
    if (read) {
        zero_rows(s.score, call, place);
        zero_rows(s.product, call, place);
        zero_rows(s.along_keys, call, place);
        zero_rows(s.along_score, call, place);
        zero_rows(s.along_values, call, place);
        stage_noise(s.weight, call, place);
        stage(s.u, call.grad_scores, place, 0, call.slots, call.slots);
        stage(s.along, call.grad_grad_noise, place, 0, call.slots, call.slots);
    }
    if (pool) {
        zero_rows(s.pooled, call, place);
        zero_rows(s.pooled_along, call, place);
        prepare_classes(s, call, place);
    }
    arrive();
}

// the sums over channels of one chunk of f and a
template <class T, bool read, bool pool>
__device__ void double_contract(const Shared<T>& s, const Matrices<T>& m, const Call& call, const Plan& plan,
                                const Place& place, const Rows& present, int first, int rows) {
    const Rows all{nullptr, call.slots};
    const bool moved = call.grad_grad_features.data;
    const auto contract = [&](T* out, const T* tile, const T* matrix, const Rows& which) {
        if (matrix) contract_channels(out, tile, matrix + first, plan.width, which, rows, place, s.partial);
    };
    contract_maps(s.squared, s.features, s.features, rows, place, s.partial);
    if (moved) contract_maps(s.dot, s.features, s.direction, rows, place, s.partial);
    if (read) {
        contract(s.score, s.features, m.keys, all);
        contract(s.along_score, s.features, m.grad_grad_keys, all);
        if (moved) contract(s.along_keys, s.direction, m.keys, all);
    }
    if (pool && moved) {
        contract(s.pooled, s.features, m.grad_sums, present);
        contract(s.pooled_along, s.direction, m.grad_sums, present);
    }
}

// what one chunk of f and a gives: d f, d keys, d G
template <class T, bool read, bool pool>
__device__ void double_give(const Shared<T>& s, const Matrices<T>& m, const Call& call, const Plan& plan,
                            const Place& place, const Rows& present, int first, int valid, int rows) {
    const Rows all{nullptr, call.slots};
    const auto sum = [&](T* sums, const T* of_direction, const T* of_features, const Rows& which) {
        contract_positions<T>(sums + first, plan.width, {of_direction, s.direction}, {of_features, s.features}, true,
                              which, rows, place);
    };
    if (read && m.sum_keys) sum(m.sum_keys, s.u, s.score, all);
    if (pool && m.sums) sum(m.sums, s.pooled, s.mass, present);
    if (!call.out_features.data) return;
    write_map<T>(call.out_features, place, first, valid, [&](T(&block)[kBlockChannels][4], int channel, int position) {
        if (read) add_rows(block, s.score, m.keys + first, plan.width, all, channel, position, place.pitch);
        if (read && m.grad_grad_keys)
            add_rows(block, s.u, m.grad_grad_keys + first, plan.width, all, channel, position, place.pitch);
        if (pool) add_rows(block, s.mass, m.grad_sums + first, plan.width, present, channel, position, place.pitch);
        add_scaled(block, s.scale_features, s.features, channel, position, place.pitch);
        add_scaled(block, s.scale_direction, s.direction, channel, position, place.pitch);
    });
}

// the half that sees the values: its sums over their width, and what it gives for A and for the values
template <class T, class Load>
__device__ void double_values(const Shared<T>& s, const Matrices<T>& m, const Call& call, const Plan& plan,
                              const Place& place, bool before, Load load) {
    const Rows all{nullptr, call.slots};
    const int depth = call.grad_read.data && (before || m.sum_values) ? call.depth : 0;
    for_chunks(depth, plan.depth, load, [&](int first, int, int rows) {
        if (!before)
            return contract_positions<T>(m.sum_values + first, plan.deep, {s.along_keys, s.incoming}, all, rows,
                                         place);
        contract_channels(s.product, s.incoming, m.values + first, plan.deep, all, rows, place, s.partial);
        if (!m.grad_grad_values) return;
        contract_channels(s.along_values, s.incoming, m.grad_grad_values + first, plan.deep, all, rows, place,
                          s.partial);
    });
    if (before || !call.out_read.data) return;
    write_map<T>(call.out_read, place, 0, call.depth, [&](T(&block)[kBlockChannels][4], int channel, int position) {
        add_rows(block, s.along_keys, m.values, plan.deep, all, channel, position, place.pitch);
        if (!m.grad_grad_values) return;
        add_rows(block, s.weight, m.grad_grad_values, plan.deep, all, channel, position, place.pitch);
    });
}

template <class T, bool read, bool pool>
__device__ __forceinline__ void double_tile(const Shared<T>& s, const Matrices<T>& m, const Call& call,
                                            const Plan& plan, const Place& place) {
    const auto load = [&](int first, int valid, int rows) {
        stage(s.features, call.features, place, first, valid, rows);
        stage(s.direction, call.grad_grad_features, place, first, valid, rows);
    };
    const auto load_read = [&](int first, int valid, int rows) {
        stage(s.incoming, call.grad_read, place, first, valid, rows);
    };
    load_ahead(call.channels, plan.channels, load);
    if (read && call.grad_read.data) load_ahead(call.depth, plan.depth, load_read);
    double_start<T, read, pool>(s, call, place);
    const Rows present{s.list, pool ? *s.count : 0};
    for_chunks(call.channels, plan.channels, load, [&](int first, int, int rows) {
        double_contract<T, read, pool>(s, m, call, plan, place, present, first, rows);
    });
    if (read) double_values(s, m, call, plan, place, true, load_read);
    double_position<T, read, pool>(s, call, place);
    __syncthreads();
    if (read && call.out_scores.data) store_rows(call.out_scores, place, s.along_score, call.slots);
    if (read && call.out_noise.data) store_rows(call.out_noise, place, s.along, call.slots);
    const int channels = call.out_features.data || m.sum_keys || m.sums ? call.channels : 0;
    for_chunks(channels, plan.channels, load, [&](int first, int valid, int rows) {
        double_give<T, read, pool>(s, m, call, plan, place, present, first, valid, rows);
    });
    if (read) double_values(s, m, call, plan, place, false, load_read);
    __syncthreads();
}

template <class T, bool read, bool pool>
__global__ void __launch_bounds__(kThreads, kBlocks<T, Order::double_backward, read>)
    double_backward_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan) {
    const Frame<T>& frame = open_frame<T, Order::double_backward, read, pool>(call, plan);
    for (std::int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x)
        double_tile<T, read, pool>(frame.shared, frame.matrices, call, plan, tile_place(tile, call, plan));
    keep_sums(frame, call, plan);
}

}  // namespace pmm
