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

// [K][threads + 1] for every thread's column, so that neither neighbouring columns nor neighbouring classes share a
// bank; [K][columns] for the source positions
template <class T>
struct UpsampleShared {
    T *upper, *lower;              // logits at the cell's upper and lower row less the row's largest, in units of log 2
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
    const size_t own = static_cast<size_t>(slots) * (plan.threads + 1);
    const size_t source = static_cast<size_t>(slots) * plan.columns;
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

// blocks of 128 threads that the registers allow a multiprocessor
template <class T, Order order>
constexpr int kUpsampleBlocks = sizeof(T) == 8 ? 2 : order == Order::forward ? 6 : order == Order::backward ? 5 : 4;

// pixels computed together
constexpr int kRun = kLabels;

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

// so many units of log 2 are 1: powers of two are what the hardware computes
constexpr double kLog2e = 1.4426950408889634, kLog2 = 0.6931471805599453;

// numbers from a class to the next in a thread's column
__device__ inline int column_step() { return static_cast<int>(blockDim.x) + 1; }

// returns the largest of the numbers
template <class S, class T>
__device__ T interpolate_as(T* to, const Map& map, std::int64_t image, int row, int width, const Tap<T>& tap, T scale,
                            int slots) {
    T most = -T(INFINITY);
    const S* from =
        static_cast<const S*>(map.data) + image * map.batch + static_cast<std::int64_t>(row) * width * map.position;
    for (int k = 0; k < slots; ++k, from += map.channel) {
        const T left = T(to_float(from[tap.lower * map.position])), right = T(to_float(from[tap.upper * map.position]));
        const T value = scale * ((T(1) - tap.weight) * left + tap.weight * right);
        to[k * column_step()] = value;
        most = larger(most, value);
    }
    return most;
}

// One source row of a map at the thread's column, times `scale`, for all classes; returns the largest.
template <class T>
__device__ PMM_OUTLINE T interpolate_row(T* to, const Map& map, std::int64_t image, int row, int width, Tap<T> tap,
                                         T scale, int slots) {
    assume_shared(to);
    if (map.type == Type::float32) return interpolate_as<float>(to, map, image, row, width, tap, scale, slots);
    if (map.type == Type::bfloat16) return interpolate_as<__nv_bfloat16>(to, map, image, row, width, tap, scale, slots);
    if (map.type == Type::float16) return interpolate_as<__half>(to, map, image, row, width, tap, scale, slots);
    return interpolate_as<double>(to, map, image, row, width, tap, scale, slots);
}

// up to kRun labelled pixels of a column below each other, in one cell
template <class T>
struct Pixels {
    T weight[kRun];   // of the lower row
    int label[kRun];  // -1: none
    bool any = false;
};

template <class T>
__device__ Pixels<T> load_pixels(const Upsample& call, std::int64_t image, int x, int y, const Span<T>& rows) {
    const std::int64_t width = call.labels.width, first = (image * call.labels.height + y) * width + x;
    std::int64_t index[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) index[i] = y + i < rows.end ? first + i * width : -1;
    const Classes found = load_classes(call.labels, index, call.slots);
    Pixels<T> pixels;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        pixels.weight[i] = rows.weight(y + i);
        pixels.label[i] = found.k[i];
        pixels.any |= found.k[i] >= 0;
    }
    return pixels;
}

// of the pixels: the largest logit, the inverse of the softmax's denominator, and the mean of a~ over the softmax
template <class T>
struct Softmax {
    T most[kRun];
    T inverse[kRun];
    T along[kRun];
    bool right = true;
};

// a value of the pixel between the two rows of its cell
template <class T>
__device__ T between(T upper, T lower, T weight) {
    return upper + weight * (lower - upper);
}

// the compiler loses sight of it where the rows change places
template <class T>
__device__ void assume_rows_shared(const UpsampleShared<T>& s) {
    assume_shared(s.upper);
    assume_shared(s.lower);
    assume_shared(s.along_upper);
    assume_shared(s.along_lower);
}

// A pixel's logits are at most 0, since each row's are; that largest is the pixel's too where both rows have it in one
// class.  So powers are taken of the logits as they are, and only where they are so far below 0 that some may have been
// lost is the softmax computed as usual, from the largest (`exact`).
constexpr double kLeastSum = 1e-24;

template <class T, Order order, bool exact>
__device__ Softmax<T> softmax_of(const UpsampleShared<T>& s, const Pixels<T>& pixels, int slots) {
    assume_rows_shared(s);
    Softmax<T> of;
    T sum[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        of.most[i] = exact ? -T(INFINITY) : T(0);
        sum[i] = of.along[i] = T(0);
    }
    const int step = column_step();
    if constexpr (exact)
        for (int k = 0, at = threadIdx.x; k < slots; ++k, at += step)
#pragma unroll
            for (int i = 0; i < kRun; ++i)
                of.most[i] = larger(of.most[i], between(s.upper[at], s.lower[at], pixels.weight[i]));
    for (int k = 0, at = threadIdx.x; k < slots; ++k, at += step) {
        const T upper = s.upper[at], lower = s.lower[at];
        const T along_upper = order == Order::double_backward ? s.along_upper[at] : T(0);
        const T along_lower = order == Order::double_backward ? s.along_lower[at] : T(0);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const T power = power_of_two(between(upper, lower, pixels.weight[i]) - of.most[i]);
            sum[i] += power;
            if (order == Order::double_backward)
                of.along[i] += power * between(along_upper, along_lower, pixels.weight[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        // a NaN is not right either
        of.right &= pixels.label[i] < 0 || sum[i] >= T(kLeastSum);
        of.inverse[i] = T(1) / sum[i];
        of.along[i] *= of.inverse[i];
    }
    return of;
}

// What the pixels add to the block's two sums: the loss, or sum_k (p_k - [k = label]) a~_k; and their number.
template <class T, Order order>
__device__ void add_scalars(const UpsampleShared<T>& s, const Pixels<T>& pixels, const Softmax<T>& of, T (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        if (pixels.label[i] < 0) continue;
        const int at = pixels.label[i] * column_step() + threadIdx.x;
        if (order == Order::forward)
            sums[0] += T(kLog2) * (of.most[i] - between(s.upper[at], s.lower[at], pixels.weight[i])) -
                       logarithm(of.inverse[i]);
        else
            sums[0] += of.along[i] - between(s.along_upper[at], s.along_lower[at], pixels.weight[i]);
        sums[1] += T(1);
    }
}

// What the pixels give for the two rows of their cell.
template <class T, Order order>
__device__ void add_rows_of(const UpsampleShared<T>& s, const Pixels<T>& pixels, const Softmax<T>& of, T scale,
                            int slots) {
    assume_rows_shared(s);
    const int step = column_step();
    T factor[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) factor[i] = scale * of.inverse[i];
    for (int k = 0, at = threadIdx.x; k < slots; ++k, at += step) {
        const T upper = s.upper[at], lower = s.lower[at];
        const T along_upper = order == Order::double_backward ? s.along_upper[at] : T(0);
        const T along_lower = order == Order::double_backward ? s.along_lower[at] : T(0);
        T all = T(0), to_lower = T(0);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            T slope = factor[i] * power_of_two(between(upper, lower, pixels.weight[i]) - of.most[i]);
            if (order == Order::double_backward)
                slope *= between(along_upper, along_lower, pixels.weight[i]) - of.along[i];
            // chosen, not multiplied: what an ignored pixel sees may be infinite
            slope = pixels.label[i] < 0 ? T(0) : slope;
            all += slope;
            to_lower += pixels.weight[i] * slope;
        }
        s.to_upper[at] += all - to_lower;
        s.to_lower[at] += to_lower;
    }
    if constexpr (order == Order::backward) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (pixels.label[i] < 0) continue;
            const int at = pixels.label[i] * step + threadIdx.x;
            s.to_upper[at] -= (T(1) - pixels.weight[i]) * scale;
            s.to_lower[at] -= pixels.weight[i] * scale;
        }
    }
}

// The softmax of the pixels and what they give; false, and nothing given, where it has to be exact.
template <class T, Order order, bool exact>
__device__ bool visit_pixels(const UpsampleShared<T>& s, const Pixels<T>& pixels, bool counted, T scale, int slots,
                             T (&sums)[2]) {
    const Softmax<T> of = softmax_of<T, order, exact>(s, pixels, slots);
    if (!exact && !of.right) return false;
    if (order != Order::backward && counted) add_scalars<T, order>(s, pixels, of, sums);
    if (order != Order::forward) add_rows_of<T, order>(s, pixels, of, scale, slots);
    return true;
}

// The logits at the thread's column x between the rows `row` and the one below.  Those of the upper row may be there:
// the lower ones of the row before.
template <class T, Order order>
__device__ void load_column(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, int row,
                            const Tap<T>& tap, bool upper_too) {
    const int below = row + 1 < call.height ? row + 1 : row, own = threadIdx.x;
    const auto load = [&](T* to, const Map& map, int from, T scale) {
        return interpolate_row(to + own, map, tile.image, from, call.width, tap, scale, call.slots);
    };
    const auto load_logits = [&](T* to, int from) {
        const T most = load(to, call.logits, from, T(kLog2e));
        for (int k = 0; k < call.slots; ++k) to[k * column_step() + own] -= most;
    };
    if (upper_too) load_logits(s.upper, row);
    load_logits(s.lower, below);
    if (order != Order::double_backward) return;
    if (upper_too) load(s.along_upper, call.grad_grad_logits, row, T(1));
    load(s.along_lower, call.grad_grad_logits, below, T(1));
}

// All pixels of one cell row in the thread's column x.
template <class T, Order order>
__device__ void visit_column(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, int row, int x,
                             const Span<T>& rows, bool upper_too, T scale, T (&sums)[2]) {
    const Axis columns{call.width, call.labels.width, call.align_corners};
    const Tap<T> tap = source_tap<T>(x, columns);
    load_column<T, order>(s, call, tile, row, tap, upper_too);
    s.right[threadIdx.x] = tap.weight;
    // pixels of the cells above and left of the tile count in the tile that has them
    const bool counted = row >= tile.top && tap.lower >= tile.left;
    for (int y = rows.begin; y < rows.end; y += kRun) {
        const Pixels<T> pixels = load_pixels<T>(call, tile.image, x, y, rows);
        if (!pixels.any) continue;
        if (!visit_pixels<T, order, false>(s, pixels, counted, scale, call.slots, sums))
            visit_pixels<T, order, true>(s, pixels, counted, scale, call.slots, sums);
    }
}

// Calls `use(i, j)` for the pairs of i < inner and j < outer that are the thread's, neighbours for neighbouring i.
template <class Use>
__device__ void for_pairs(int inner, int outer, Use use) {
    const int rest = blockDim.x % inner, rows = blockDim.x / inner;
    int i = threadIdx.x % inner, j = threadIdx.x / inner;
    while (j < outer) {
        use(i, j);
        i += rest;
        j += rows;
        if (i < inner) continue;
        i -= inner;
        ++j;
    }
}

// The columns' sums of one batch to the source positions: row += upper row, next += lower row.  A position is the right
// end of a cell and the left end of the next; at the border it is both.
template <class T>
__device__ void gather(const UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, int batch, T* row,
                       T* next) {
    const int count = tile.right - tile.left;
    for_pairs(call.slots, count, [&](int k, int j) {
        const int first = s.first[j + 1] - batch, columns = blockDim.x;
        const int begin = s.first[j] > batch ? s.first[j] - batch : 0;
        const int end = s.first[j + 2] - batch < columns ? s.first[j + 2] - batch : columns;
        const bool border = tile.left + j == call.width - 1;
        const T *upper = s.to_upper + k * column_step(), *lower = s.to_lower + k * column_step();
        T to_row = T(0), to_next = T(0);
        for (int i = begin; i < end; ++i) {
            const T right = s.right[i], weight = i < first ? right : border ? T(1) : T(1) - right;
            to_row += weight * upper[i];
            to_next += weight * lower[i];
        }
        row[k * count + j] += to_row;
        next[k * count + j] += to_next;
    });
}

template <class S, class T>
__device__ void store_row_as(const Map& map, const CellTile& tile, int row, int width, int slots, const T* values,
                             const T* more) {
    const int count = tile.right - tile.left;
    S* to = static_cast<S*>(map.data) + tile.image * map.batch +
            (static_cast<std::int64_t>(row) * width + tile.left) * map.position;
    for_pairs(count, slots, [&](int j, int k) {
        const T value = more ? values[k * count + j] + more[k * count + j] : values[k * count + j];
        to[k * map.channel + j * map.position] = Rounded<S>::from(value);
    });
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

template <class T>
__device__ void exchange(T*& a, T*& b) {
    T* other = a;
    a = b;
    b = other;
}

template <class T, Order order>
__device__ void visit_row(UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, int row,
                          const Span<T>& rows, bool first_row, T scale, T* gathered, T* next, T (&sums)[2]) {
    const Axis columns{call.width, call.labels.width, call.align_corners};
    const int first = first_pixel(order == Order::forward ? tile.left : tile.left - 1, columns);
    const int end = first_pixel(tile.right, columns);
    const bool upper_too = first_row || end - first > static_cast<int>(blockDim.x);
    if (!upper_too) {
        exchange(s.upper, s.lower);
        exchange(s.along_upper, s.along_lower);
    }
    for (int batch = first; batch < end; batch += blockDim.x) {
        const int x = batch + threadIdx.x;
        if (order != Order::forward)
            for (int k = 0, at = threadIdx.x; k < call.slots; ++k, at += column_step())
                s.to_upper[at] = s.to_lower[at] = T(0);
        if (x < end) visit_column<T, order>(s, call, tile, row, x, rows, upper_too, scale, sums);
        if (order == Order::forward) continue;
        __syncthreads();
        gather(s, call, tile, batch, gathered, next);
        __syncthreads();
    }
}

// Forward: every pixel of the tile's own cells.
template <class T>
__device__ void visit_cells(UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, T (&sums)[2]) {
    const Axis axis{call.height, call.labels.height, call.align_corners};
    int begin = first_pixel(tile.top, axis);
    for (int row = tile.top; row < tile.bottom; ++row) {
        const Span<T> rows = span_of<T>(row, begin, axis);
        visit_row<T, Order::forward>(s, call, tile, row, rows, row == tile.top, T(0), static_cast<T*>(nullptr),
                                     static_cast<T*>(nullptr), sums);
        begin = rows.end;
    }
}

// Both backwards: the gradient of the tile's source positions, row by row; the row above the tile is computed for what
// it gives below.
template <class T, Order order>
__device__ void visit_sources(UpsampleShared<T>& s, const Upsample& call, const CellTile& tile, T scale,
                              T (&sums)[2]) {
    const Axis columns{call.width, call.labels.width, call.align_corners};
    const int count = call.slots * (tile.right - tile.left);
    T *gathered = s.row, *next = s.carried;
    for (int i = threadIdx.x; i < tile.right - tile.left + 2; i += blockDim.x)
        s.first[i] = first_pixel(tile.left - 1 + i, columns);
    for (int i = threadIdx.x; i < count; i += blockDim.x) gathered[i] = T(0);
    const Axis axis{call.height, call.labels.height, call.align_corners};
    const int above = tile.top > 0 ? tile.top - 1 : 0;
    int begin = first_pixel(above, axis);
    for (int row = above; row < tile.bottom; ++row) {
        for (int i = threadIdx.x; i < count; i += blockDim.x) next[i] = T(0);
        __syncthreads();
        const Span<T> rows = span_of<T>(row, begin, axis);
        begin = rows.end;
        visit_row<T, order>(s, call, tile, row, rows, row == above, scale, gathered, next, sums);
        const T* more = row == call.height - 1 ? next : nullptr;
        if (row >= tile.top) store_row(call.out_logits, tile, row, call.width, call.slots, gathered, more);
        __syncthreads();
        exchange(gathered, next);
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
__global__ void __launch_bounds__(128, kUpsampleBlocks<T, order>)
    upsample_kernel(const __grid_constant__ Upsample call, const __grid_constant__ UpsamplePlan plan) {
    UpsampleShared<T> s;
    carve_upsample<T, order>(s, reinterpret_cast<T*>(shared_memory()), plan, call.slots);
    const bool backward = order != Order::forward;
    const T scale = backward ? *static_cast<const T*>(call.grad_loss) / *static_cast<const T*>(call.count) : T(0);
    T sums[2] = {T(0), T(0)};
    for (std::int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
        if constexpr (order == Order::forward)
            visit_cells(s, call, cell_tile(tile, call, plan), sums);
        else
            visit_sources<T, order>(s, call, cell_tile(tile, call, plan), scale, sums);
    }
    if (order != Order::backward) keep_scalars(s.partial, sums, static_cast<T*>(call.workspace));
}

}  // namespace pmm
