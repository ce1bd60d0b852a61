// The walk of upsample_cross_entropy over tiles of source cells; see upsample_cross_entropy.cu.
#pragma once

#include "cells.cuh"
#include "plan.cuh"

namespace pmm {

struct UpsamplePlan {
    int threads = 0;
    int rows = 0;  // source positions of a tile, down and across
    int columns = 0;
    std::int64_t tiles_across = 0;
    std::int64_t tiles_down = 0;
    std::int64_t tiles = 0;
    size_t bytes = 0;
};

// [K][threads] for every thread's column; [K][columns] for the source positions
template <class T>
struct UpsampleShared {
    T *upper, *lower;              // logits at the cell's upper and lower row
    T *along_upper, *along_lower;  // a there
    T *to_upper, *to_lower;        // what the column's pixels give for the two rows
    T* right;                      // [threads]: weight of the cell's right end
    T *row, *carried;              // [K][columns]: the row's gradient, and what the cells above gave for it
    T* partial;
    int* first;  // [columns + 3]: first pixels of the cells
};

template <class T, Order order>
__host__ __device__ size_t carve_upsample(UpsampleShared<T>& s, T* base, const UpsamplePlan& plan, int slots) {
    Arena<T> arena{base};
    constexpr bool backward = order != Order::forward, twice = order == Order::double_backward;
    const size_t own = static_cast<size_t>(slots) * plan.threads, source = static_cast<size_t>(slots) * plan.columns;
    s.upper = arena.take(own);
    s.lower = arena.take(own);
    s.along_upper = arena.take(twice ? own : 0);
    s.along_lower = arena.take(twice ? own : 0);
    s.to_upper = arena.take(backward ? own : 0);
    s.to_lower = arena.take(backward ? own : 0);
    s.right = arena.take(plan.threads);
    s.row = arena.take(backward ? source : 0);
    s.carried = arena.take(backward ? source : 0);
    s.partial = arena.take(2 * 4);
    s.first = reinterpret_cast<int*>(arena.take(plan.columns + 3));
    return arena.used * sizeof(T);
}

// pixels computed together
constexpr int kRun = 4;

struct CellTile {
    std::int64_t image;
    int top, bottom, left, right;  // source rows and columns, the end excluded
};

__device__ inline CellTile cell_tile(std::int64_t tile, const Upsample& call, const UpsamplePlan& plan) {
    const int across = static_cast<int>(tile % plan.tiles_across);
    const int down = static_cast<int>(tile / plan.tiles_across % plan.tiles_down);
    const int top = down * plan.rows, left = across * plan.columns;
    const int bottom = top + plan.rows, right = left + plan.columns;
    return {tile / plan.tiles_across / plan.tiles_down, top, bottom < call.height ? bottom : call.height, left,
            right < call.width ? right : call.width};
}

template <class S, class T>
__device__ void interpolate_as(T* to, const Map& map, std::int64_t image, int row, int width, const Tap<T>& tap,
                               int slots) {
    const S* from =
        static_cast<const S*>(map.data) + image * map.batch + static_cast<std::int64_t>(row) * width * map.position;
    for (int k = 0; k < slots; ++k, from += map.channel) {
        const T left = T(to_float(from[tap.lower * map.position])), right = T(to_float(from[tap.upper * map.position]));
        to[k * static_cast<int>(blockDim.x)] = (T(1) - tap.weight) * left + tap.weight * right;
    }
}

// One source row of a map at the thread's column, for all classes.
template <class T>
__device__ PMM_OUTLINE void interpolate_row(T* to, const Map& map, std::int64_t image, int row, int width, Tap<T> tap,
                                            int slots) {
    if (map.type == Type::float32)
        interpolate_as<float>(to, map, image, row, width, tap, slots);
    else if (map.type == Type::bfloat16)
        interpolate_as<__nv_bfloat16>(to, map, image, row, width, tap, slots);
    else if (map.type == Type::float16)
        interpolate_as<__half>(to, map, image, row, width, tap, slots);
    else
        interpolate_as<double>(to, map, image, row, width, tap, slots);
}

// up to kRun labelled pixels of a column below each other, in one cell
template <class T>
struct Pixels {
    T weight[kRun];   // of the lower row
    int label[kRun];  // -1: none
};

template <class T>
__device__ Pixels<T> load_pixels(const Upsample& call, std::int64_t image, int x, int y, int end) {
    const Axis rows{call.height, call.labels.height, call.align_corners};
    Pixels<T> pixels;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        pixels.label[i] = -1;
        pixels.weight[i] = T(0);
        if (y + i >= end) continue;
        const std::int64_t label =
            load_label(call.labels, (image * call.labels.height + y + i) * call.labels.width + x);
        pixels.weight[i] = source_tap<T>(y + i, rows).weight;
        if (label == call.labels.ignore_index) continue;
        if (label < 0 || label >= call.slots)
            wrong_label();
        else
            pixels.label[i] = static_cast<int>(label);
    }
    return pixels;
}

// log-sum-exp of the pixels in two parts, and the mean of a~ over the softmax
template <class T>
struct Softmax {
    T most[kRun];
    T sum[kRun];
    T along[kRun];
};

// a value of the pixel between the two rows of its cell
template <class T>
__device__ T between(T upper, T lower, T weight) {
    return upper + weight * (lower - upper);
}

template <class T, Order order>
__device__ Softmax<T> softmax_of(const UpsampleShared<T>& s, const Pixels<T>& pixels, int slots) {
    Softmax<T> of;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        of.most[i] = -T(INFINITY);
        of.sum[i] = of.along[i] = T(0);
    }
    const int step = blockDim.x;
    for (int k = 0, at = threadIdx.x; k < slots; ++k, at += step) {
        const T upper = s.upper[at], lower = s.lower[at];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const T z = between(upper, lower, pixels.weight[i]);
            of.most[i] = z > of.most[i] ? z : of.most[i];
        }
    }
    for (int k = 0, at = threadIdx.x; k < slots; ++k, at += step) {
        const T upper = s.upper[at], lower = s.lower[at];
        const T along_upper = order == Order::double_backward ? s.along_upper[at] : T(0);
        const T along_lower = order == Order::double_backward ? s.along_lower[at] : T(0);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const T power = exponential(between(upper, lower, pixels.weight[i]) - of.most[i]);
            of.sum[i] += power;
            if (order == Order::double_backward)
                of.along[i] += power * between(along_upper, along_lower, pixels.weight[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) of.along[i] /= of.sum[i];
    return of;
}

// What the pixels add to the block's two sums: the loss, or sum_k (p_k - [k = label]) a~_k; and their number.
template <class T, Order order>
__device__ void add_scalars(const UpsampleShared<T>& s, const Pixels<T>& pixels, const Softmax<T>& of, T (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        if (pixels.label[i] < 0) continue;
        const int at = pixels.label[i] * static_cast<int>(blockDim.x) + threadIdx.x;
        if (order == Order::forward)
            sums[0] += of.most[i] + logarithm(of.sum[i]) - between(s.upper[at], s.lower[at], pixels.weight[i]);
        else
            sums[0] += of.along[i] - between(s.along_upper[at], s.along_lower[at], pixels.weight[i]);
        sums[1] += T(1);
    }
}

// What the pixels give for the two rows of their cell.
template <class T, Order order>
__device__ void add_rows_of(const UpsampleShared<T>& s, const Pixels<T>& pixels, const Softmax<T>& of, T scale,
                            int slots) {
    const int step = blockDim.x;
    for (int k = 0, at = threadIdx.x; k < slots; ++k, at += step) {
        const T upper = s.upper[at], lower = s.lower[at];
        T to_upper = T(0), to_lower = T(0);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const T p = exponential(between(upper, lower, pixels.weight[i]) - of.most[i]) / of.sum[i];
            T slope = p - (k == pixels.label[i] ? T(1) : T(0));
            if (order == Order::double_backward)
                slope = p * (between(s.along_upper[at], s.along_lower[at], pixels.weight[i]) - of.along[i]);
            // chosen, not multiplied: what an ignored pixel sees may be infinite
            slope = pixels.label[i] < 0 ? T(0) : scale * slope;
            to_upper += (T(1) - pixels.weight[i]) * slope;
            to_lower += pixels.weight[i] * slope;
        }
        s.to_upper[at] += to_upper;
        s.to_lower[at] += to_lower;
    }
}

// All pixels of one cell row in the thread's column x.
template <class T, Order order>
__device__ void visit_column(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, int row, int x,
                             T scale, bool counted, T (&sums)[2]) {
    const Axis rows{call.height, call.labels.height, call.align_corners};
    const Axis columns{call.width, call.labels.width, call.align_corners};
    const Tap<T> tap = source_tap<T>(x, columns);
    const int below = row + 1 < call.height ? row + 1 : row, own = threadIdx.x;
    interpolate_row(s.upper + own, call.logits, tile.image, row, call.width, tap, call.slots);
    interpolate_row(s.lower + own, call.logits, tile.image, below, call.width, tap, call.slots);
    if (order == Order::double_backward) {
        interpolate_row(s.along_upper + own, call.grad_grad_logits, tile.image, row, call.width, tap, call.slots);
        interpolate_row(s.along_lower + own, call.grad_grad_logits, tile.image, below, call.width, tap, call.slots);
    }
    s.right[own] = tap.weight;
    // pixels of the cells left of the tile count in the tile that has them
    counted = counted && tap.lower >= tile.left;
    const int end = first_pixel(row + 1, rows);
    for (int y = first_pixel(row, rows); y < end; y += kRun) {
        const Pixels<T> pixels = load_pixels<T>(call, tile.image, x, y, end);
        const Softmax<T> of = softmax_of<T, order>(s, pixels, call.slots);
        if (order != Order::backward && counted) add_scalars<T, order>(s, pixels, of, sums);
        if (order != Order::forward) add_rows_of<T, order>(s, pixels, of, scale, call.slots);
    }
}

// One end's share: columns of the cell from `first` to `end` that this batch has, with the weights of its left or right
// end, or with both at the border.
template <class T>
__device__ T gather_cell(const T* column, const T* right, int first, int end, int batch, bool left_end,
                         bool right_end) {
    const int stop = end - batch < static_cast<int>(blockDim.x) ? end - batch : static_cast<int>(blockDim.x);
    T sum = T(0);
    for (int i = first < batch ? 0 : first - batch; i < stop; ++i)
        sum += ((left_end ? T(1) - right[i] : T(0)) + (right_end ? right[i] : T(0))) * column[i];
    return sum;
}

// The columns' sums of one batch to the source positions: row += upper row, carried += lower row.
template <class T>
__device__ void gather(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, int batch, T* row,
                       T* next) {
    const int count = tile.right - tile.left;
    for (int unit = threadIdx.x; unit < call.slots * count; unit += blockDim.x) {
        const int j = unit % count, k = unit / count, column = tile.left + j;
        const int before = s.first[j], first = s.first[j + 1], end = s.first[j + 2];
        const bool last = column == call.width - 1;
        const T* upper = s.to_upper + k * static_cast<int>(blockDim.x);
        const T* lower = s.to_lower + k * static_cast<int>(blockDim.x);
        row[unit] += gather_cell(upper, s.right, before, first, batch, false, true) +
                     gather_cell(upper, s.right, first, end, batch, true, last);
        next[unit] += gather_cell(lower, s.right, before, first, batch, false, true) +
                      gather_cell(lower, s.right, first, end, batch, true, last);
    }
}

template <class S, class T>
__device__ void store_row_as(const Map& map, const CellTile& tile, int row, int width, int slots, const T* values,
                             const T* more) {
    const int count = tile.right - tile.left;
    S* to = static_cast<S*>(map.data) + tile.image * map.batch +
            (static_cast<std::int64_t>(row) * width + tile.left) * map.position;
    for (int unit = threadIdx.x; unit < slots * count; unit += blockDim.x) {
        const T value = more ? values[unit] + more[unit] : values[unit];
        to[unit / count * map.channel + unit % count * map.position] = Rounded<S>::from(value);
    }
}

// A source row's gradient; at the lower border what went below belongs to it too.
template <class T>
__device__ PMM_OUTLINE void store_row(const Map& map, const CellTile& tile, int row, int width, int slots,
                                      const T* values, const T* more) {
    if (map.type == Type::float32)
        store_row_as<float>(map, tile, row, width, slots, values, more);
    else if (map.type == Type::bfloat16)
        store_row_as<__nv_bfloat16>(map, tile, row, width, slots, values, more);
    else if (map.type == Type::float16)
        store_row_as<__half>(map, tile, row, width, slots, values, more);
    else
        store_row_as<double>(map, tile, row, width, slots, values, more);
}

template <class T, Order order>
__device__ void visit_row(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, int row, T scale,
                          T* gathered, T* next, T (&sums)[2]) {
    const Axis columns{call.width, call.labels.width, call.align_corners};
    const int first = first_pixel(order == Order::forward ? tile.left : tile.left - 1, columns);
    const int end = first_pixel(tile.right, columns);
    for (int batch = first; batch < end; batch += blockDim.x) {
        const int x = batch + threadIdx.x;
        if (order != Order::forward)
            for (int k = 0, at = threadIdx.x; k < call.slots; ++k, at += blockDim.x)
                s.to_upper[at] = s.to_lower[at] = T(0);
        if (x < end) visit_column<T, order>(s, call, tile, row, x, scale, row >= tile.top, sums);
        if (order == Order::forward) continue;
        __syncthreads();
        gather(s, call, tile, batch, gathered, next);
        __syncthreads();
    }
}

// Forward: every pixel of the tile's own cells.
template <class T>
__device__ void visit_pixels(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, T (&sums)[2]) {
    for (int row = tile.top; row < tile.bottom; ++row)
        visit_row<T, Order::forward>(s, call, tile, row, T(0), static_cast<T*>(nullptr), static_cast<T*>(nullptr),
                                     sums);
}

// Both backwards: the gradient of the tile's source positions, row by row; the row above the tile is computed for what
// it gives below.
template <class T, Order order>
__device__ void visit_sources(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, T scale,
                              T (&sums)[2]) {
    const Axis columns{call.width, call.labels.width, call.align_corners};
    const int count = call.slots * (tile.right - tile.left);
    T *gathered = s.row, *next = s.carried;
    for (int i = threadIdx.x; i < tile.right - tile.left + 2; i += blockDim.x)
        s.first[i] = first_pixel(tile.left - 1 + i, columns);
    for (int i = threadIdx.x; i < count; i += blockDim.x) gathered[i] = T(0);
    for (int row = tile.top > 0 ? tile.top - 1 : 0; row < tile.bottom; ++row) {
        for (int i = threadIdx.x; i < count; i += blockDim.x) next[i] = T(0);
        __syncthreads();
        visit_row<T, order>(s, call, tile, row, scale, gathered, next, sums);
        const T* more = row == call.height - 1 ? next : nullptr;
        if (row >= tile.top) store_row(call.out_logits, tile, row, call.width, call.slots, gathered, more);
        __syncthreads();
        T* swapped = gathered;
        gathered = next;
        next = swapped;
    }
}

// Both sums of the block to its place in the workspace.
template <class T>
__device__ void keep_scalars(T* partial, const T (&sums)[2], T* workspace) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    for (int i = 0; i < 2; ++i) {
        const T sum = sum_lanes(sums[i], 32);
        if (threadIdx.x % 32 == 0) partial[2 * warp + i] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= 2) return;
    T total = T(0);
    for (int other = 0; other < warps; ++other) total += partial[2 * other + threadIdx.x];
    workspace[2 * blockIdx.x + threadIdx.x] = total;
}

template <class T, Order order>
__global__ void __launch_bounds__(128, sizeof(T) == 8 ? 2 : 4)
    upsample_kernel(const __grid_constant__ Upsample call, const __grid_constant__ UpsamplePlan plan) {
    UpsampleShared<T> s;
    carve_upsample<T, order>(s, reinterpret_cast<T*>(shared_memory()), plan, call.slots);
    const bool backward = order != Order::forward;
    const T scale = backward ? *static_cast<const T*>(call.grad_loss) / *static_cast<const T*>(call.count) : T(0);
    T sums[2] = {T(0), T(0)};
    for (std::int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
        if constexpr (order == Order::forward)
            visit_pixels(s, call, cell_tile(tile, call, plan), sums);
        else
            visit_sources<T, order>(s, call, cell_tile(tile, call, plan), scale, sums);
    }
    if (order != Order::backward) keep_scalars(s.partial, sums, static_cast<T*>(call.workspace));
}

}  // namespace pmm
