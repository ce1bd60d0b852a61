// From a call to launches: the walk over the tiles, then the sums over its blocks.
#pragma once

#include "memory_backward.cuh"
#include "memory_double_backward.cuh"
#include "memory_forward.cuh"

namespace pmm {

// the maps of a call, with the axis that can be read 16 bytes at a time
inline Call with_vectors(Call call) {
    const std::int64_t positions = static_cast<std::int64_t>(call.height) * call.width;
    const auto set = [&](Map& map, int channels) { map.vector = vector_axis(map, positions, channels); };
    for (Map* map : {&call.features, &call.grad_grad_features, &call.out_features}) set(*map, call.channels);
    for (Map* map : {&call.grad_read, &call.out_read}) set(*map, call.depth);
    for (Map* map : {&call.noise, &call.grad_scores, &call.grad_grad_noise}) set(*map, call.slots);
    return call;
}

template <class T>
void add_sums(const Call& call, const Plan& plan, const std::string& what) {
    const int wide = call.slots * plan.width, deep = call.slots * plan.deep;
    const auto part = [&](void* out, int first, int columns, int width) {
        return Part<T>{static_cast<T*>(out), first, out ? call.slots * columns : 0, columns, width};
    };
    const Parts<T> parts = {{part(call.out_sums, 0, call.channels, plan.width),
                             part(call.out_keys, wide, call.channels, plan.width),
                             part(call.out_values, 2 * wide, call.depth, plan.deep),
                             part(call.out_mass, 2 * wide + deep, 1, 1)}};
    int blocks = 0;
    for (const Part<T>& each : parts.part) blocks += round_up(each.elements, 32) / 32;
    if (blocks)
        check(launch(add_blocks<T>, blocks, 32 * kShares, 32 * kShares * sizeof(T), call.stream,
                     static_cast<const T*>(call.workspace), call.blocks, plan.per_block, parts),
              what + " (sums)");
}

template <class T, Order order, bool read, bool pool>
constexpr auto kernel_of() {
    if constexpr (order == Order::forward)
        return forward_kernel<T, read, pool>;
    else if constexpr (order == Order::backward)
        return backward_kernel<T, read, pool>;
    else
        return double_backward_kernel<T, read, pool>;
}

template <class T, Order order, bool read, bool pool>
void run_typed(const char* name, const Call& given) {
    const Call call = with_vectors(given);
    const Plan plan = make_plan<T, order, read, pool>(name, call);
    const std::string what = describe(name, order, call);
    if (call.blocks > 0)
        check(launch(kernel_of<T, order, read, pool>(), call.blocks, kThreads, plan.bytes, call.stream, call, plan),
              what);
    add_sums<T>(call, plan, what);
}

template <class T, bool read, bool pool>
void run_order(const char* name, Order order, const Call& call) {
    if (order == Order::forward)
        run_typed<T, Order::forward, read, pool>(name, call);
    else if (order == Order::backward)
        run_typed<T, Order::backward, read, pool>(name, call);
    else
        run_typed<T, Order::double_backward, read, pool>(name, call);
}

template <bool read, bool pool>
void run(const char* name, Order order, const Call& call) {
    if (call.compute == Type::float64)
        run_order<double, read, pool>(name, order, call);
    else
        run_order<float, read, pool>(name, order, call);
}

template <class T, Order order, bool read, bool pool>
Workspace workspace_of(const char* name, const Call& call) {
    const Plan plan = make_plan<T, order, read, pool>(name, call);
    return {persistent_blocks(plan.tiles, kBlocks<T, order, read>), plan.per_block};
}

template <class T, bool read, bool pool>
Workspace typed_workspace(const char* name, Order order, const Call& call) {
    if (order == Order::forward) return workspace_of<T, Order::forward, read, pool>(name, call);
    if (order == Order::backward) return workspace_of<T, Order::backward, read, pool>(name, call);
    return workspace_of<T, Order::double_backward, read, pool>(name, call);
}

template <bool read, bool pool>
Workspace workspace(const char* name, Order order, const Call& call) {
    if (call.compute == Type::float64) return typed_workspace<double, read, pool>(name, order, call);
    return typed_workspace<float, read, pool>(name, order, call);
}

}  // namespace pmm
