// merge_tiles: logits of overlapping tiles to one map, or straight to classes.
//
// A thread has a pixel, a warp 32 neighbours of a row, which lie between few source columns.  A block lists the tiles
// that reach into its patch of pixels once; a thread adds up those that cover its pixel, some classes at a time, in
// registers, and keeps the best class so far and the sum of a softmax relative to it.  Nothing else is stored.
//
// T tiles, K classes, h x w logits, H x W pixels.
#include "labels.cuh"

namespace pmm {

namespace {

constexpr int kRows = 8;
constexpr int kColumns = 32;
// classes that are added up together: the taps of a tile serve all of them
constexpr int kTogether = 8;
static_assert(kRows * kColumns == kThreads);

template <class S>
struct ComputedIn {
    using type = float;
};
template <>
struct ComputedIn<double> {
    using type = double;
};

// The tiles that reach into the block's patch, in their order; every thread gets their number.  By one warp.
__device__ int list_tiles(const Merge& call, int top, int left, int* list, int* count) {
    const int lane = threadIdx.x;
    if (lane < 32) {
        int found = 0;
        for (int first = 0; first < call.tiles; first += 32) {
            const int tile = first + lane;
            bool reaches = tile < call.tiles;
            if (reaches) {
                const std::int64_t down = call.tops[tile] - top, across = call.lefts[tile] - left;
                reaches = down < kRows && down + call.tile_height > 0 && across < kColumns &&
                          across + call.tile_width > 0;
            }
            const unsigned all = __ballot_sync(kAllLanes, reaches);
            if (reaches) list[found + __popc(all & ((1u << lane) - 1))] = tile;
            found += __popc(all);
        }
        if (lane == 0) *count = found;
    }
    __syncthreads();
    return *count;
}

// sums[j] += class k + j of a tile at a pixel
template <class S, class T>
__device__ void add_tile(const Merge& call, int tile, int k, const Tap<T>& row, const Tap<T>& column,
                         T (&sums)[kTogether]) {
    const std::int64_t* strides = call.strides;
    const S* from = static_cast<const S*>(call.logits) + tile * strides[0] + k * strides[1];
    const S *upper = from + row.lower * strides[2], *lower = from + row.upper * strides[2];
    const std::int64_t near = column.lower * strides[3], far = column.upper * strides[3];
#pragma unroll
    for (int j = 0; j < kTogether; ++j, upper += strides[1], lower += strides[1]) {
        if (k + j >= call.classes) continue;
        const T above_left = to_float(upper[near]), above_right = to_float(upper[far]);
        const T below_left = to_float(lower[near]), below_right = to_float(lower[far]);
        const T above = above_left + column.weight * (above_right - above_left);
        const T below = below_left + column.weight * (below_right - below_left);
        sums[j] += above + row.weight * (below - above);
    }
}

// sums[j] = the average of class k + j over the listed tiles that cover pixel (y, x)
template <class S, class T>
__device__ void average(const Merge& call, const int* list, int count, int y, int x, int k, T (&sums)[kTogether]) {
    int covering = 0;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) sums[j] = T(0);
    for (int n = 0; n < count; ++n) {
        const int tile = list[n];
        const int down = y - static_cast<int>(call.tops[tile]), across = x - static_cast<int>(call.lefts[tile]);
        if (down < 0 || down >= call.tile_height || across < 0 || across >= call.tile_width) continue;
        const Tap<T> row = aligned_tap<T>(down, call.tile_height, call.height);
        const Tap<T> column = aligned_tap<T>(across, call.tile_width, call.width);
        add_tile<S, T>(call, tile, k, row, column, sums);
        ++covering;
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) sums[j] /= T(covering);
}

// The best class so far, its value, and the sum of e^(z - value).
template <class T>
struct Best {
    T value = T(0);
    T sum = T(0);
    int label = 0;

    __device__ void see(T z, int k) {
        // a NaN is larger than all that is none, and the first one stays
        const bool taken = k == 0 || (!(z <= value) && value == value);
        sum = k == 0 ? T(1) : taken ? sum * exponential(value - z) + T(1) : sum + exponential(z - value);
        label = taken ? k : label;
        value = taken ? z : value;
    }
};

template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : 4) merge_kernel(const __grid_constant__ Merge call) {
    using T = typename ComputedIn<S>::type;
    const int patches = (call.image_width + kColumns - 1) / kColumns;
    const int top = blockIdx.x / patches * kRows, left = blockIdx.x % patches * kColumns;
    int* list = reinterpret_cast<int*>(shared_memory());
    const int count = list_tiles(call, top, left, list + 1, list);
    const int y = top + threadIdx.x / kColumns, x = left + threadIdx.x % kColumns;
    if (y >= call.image_height || x >= call.image_width) return;
    const std::int64_t pixel = static_cast<std::int64_t>(y) * call.image_width + x;
    const std::int64_t pixels = static_cast<std::int64_t>(call.image_height) * call.image_width;
    Best<T> best;
    for (int k = 0; k < call.classes; k += kTogether) {
        T sums[kTogether];
        average<S, T>(call, list + 1, count, y, x, k, sums);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            if (k + j >= call.classes) continue;
            if (call.average)
                call.average[(k + j) * pixels + pixel] = static_cast<float>(sums[j]);
            else
                best.see(sums[j], k + j);
        }
    }
    if (call.labels) call.labels[pixel] = static_cast<unsigned char>(best.label);
    if (call.confidence) call.confidence[pixel] = static_cast<float>(T(1) / best.sum);
}

template <class S>
cudaError_t launch_merge(const Merge& call) {
    const int down = (call.image_height + kRows - 1) / kRows, across = (call.image_width + kColumns - 1) / kColumns;
    const size_t shared = (1 + static_cast<size_t>(call.tiles)) * sizeof(int);
    return launch(merge_kernel<S>, down * across, kThreads, shared, call.stream, call);
}

}  // namespace

void merge_tiles(const Merge& call) {
    const std::string what = "merge_tiles of [" + std::to_string(call.tiles) + ", " + std::to_string(call.classes) +
                             ", " + std::to_string(call.height) + ", " + std::to_string(call.width) + "] to [" +
                             std::to_string(call.image_height) + ", " + std::to_string(call.image_width) + "]";
    if (call.type == Type::float32)
        check(launch_merge<float>(call), what);
    else if (call.type == Type::bfloat16)
        check(launch_merge<__nv_bfloat16>(call), what);
    else if (call.type == Type::float16)
        check(launch_merge<__half>(call), what);
    else
        check(launch_merge<double>(call), what);
}

}  // namespace pmm
