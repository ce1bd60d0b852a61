// upsample_cross_entropy: mean cross-entropy of bilinearly upsampled logits, three orders.
//
// A block takes a tile of source cells, a row of cells at a time; a thread a column of pixels in it.  The logits at the
// thread's column are interpolated along the row once and kept in shared memory, where every pixel of the column reads
// them; four pixels are computed together, so that a load serves four.  What the pixels of a column give for the row
// above and below is summed by their thread; then the columns' sums are gathered by the source positions, in a fixed
// order.  The cells left of and above a tile are computed by both its neighbours: nothing is added across blocks.
//
// B images, K classes, h x w logits, H x W pixels.
#include "upsample_tile.cuh"

namespace pmm {

namespace {

constexpr int kFinishThreads = 256;
constexpr int kMostRows = 16;

// out = the sum over blocks, in a fixed order and in float64, divided by the number of labelled pixels
template <class T>
__global__ void finish(const T* workspace, int blocks, bool count_pixels, T* out, T* count) {
    double* partial = reinterpret_cast<double*>(shared_memory());
    double sum[2] = {0, 0};
#pragma unroll 4
    for (int block = threadIdx.x; block < blocks; block += kFinishThreads)
        for (int i = 0; i < 2; ++i) sum[i] += static_cast<double>(workspace[2 * block + i]);
    for (int i = 0; i < 2; ++i) {
        sum[i] = sum_lanes(sum[i], 32);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32 * 2 + i] = sum[i];
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kFinishThreads / 32; ++warp)
        for (int i = 0; i < 2; ++i) sum[i] += partial[2 * warp + i];
    if (count_pixels) *count = T(sum[1] < 1 ? 1 : sum[1]);
    *out = T(sum[0] / (count_pixels ? (sum[1] < 1 ? 1 : sum[1]) : static_cast<double>(*count)));
}

std::string describe(Order order, const Upsample& call) {
    return std::string("upsample_cross_entropy ") + order_name(order) + " of [" + std::to_string(call.batch) + ", " +
           std::to_string(call.slots) + ", " + std::to_string(call.height) + ", " + std::to_string(call.width) +
           "] to [" + std::to_string(call.labels.height) + ", " + std::to_string(call.labels.width) + "]";
}

template <class T, Order order>
bool fits(UpsamplePlan& plan, const Upsample& call, int threads, size_t limit) {
    plan.threads = threads;
    // as many cells as the threads have columns for, and one more beside them; a cell is wider with aligned corners
    const std::int64_t aligned = call.align_corners && call.labels.width > 1 ? 1 : 0;
    const std::int64_t pixels = call.labels.width > 1 ? call.labels.width - aligned : 1;
    const std::int64_t cells = static_cast<std::int64_t>(threads) * (call.width - aligned) / pixels;
    const std::int64_t most = cells - 1 < threads ? cells - 1 : threads;
    plan.columns = static_cast<int>(most < 1 ? 1 : most < call.width ? most : call.width);
    UpsampleShared<T> shared;
    plan.bytes = carve_upsample<T, order>(shared, nullptr, plan, call.slots);
    return plan.bytes <= limit;
}

// How many rows a tile has: few and the rows between two tiles, which both compute, are many; many and there are too
// few tiles to keep the device busy, or a few left for a round of their own.  What costs least by that count.
template <class T, Order order>
void choose_rows(UpsamplePlan& plan, const Upsample& call) {
    const size_t shared = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (plan.bytes + 1024);
    const size_t most = kUpsampleBlocks<T, order> * (128 / plan.threads), blocks = shared < most ? shared : most;
    const std::int64_t resident = (blocks ? blocks : 1) * device_attribute(cudaDevAttrMultiProcessorCount);
    const std::int64_t twice = order == Order::forward ? 0 : 4;  // of a row above the tile, in quarters
    std::int64_t least = 0;
    for (int rows = 1; rows <= kMostRows && rows <= call.height; ++rows) {
        const std::int64_t tiles = (call.height + rows - 1) / rows * plan.tiles_across * call.batch;
        const std::int64_t cost = (tiles + resident - 1) / resident * (4 * rows + 1 + twice);
        if (rows > 1 && cost >= least) continue;
        least = cost;
        plan.rows = rows;
        plan.tiles = tiles;
        plan.tiles_down = (call.height + rows - 1) / rows;
    }
}

template <class T, Order order>
UpsamplePlan make_plan(const Upsample& call) {
    UpsamplePlan plan;
    const size_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    bool fit = false;
    for (size_t limit : {share_of_multiprocessor(3), most})
        for (int threads : {128, 64, 32}) fit = fit || fits<T, order>(plan, call, threads, limit);
    if (!fit)
        throw std::runtime_error("pmm_fast: " + describe(order, call) + ": too many classes for the shared memory");
    plan.tiles_across = (call.width + plan.columns - 1) / plan.columns;
    choose_rows<T, order>(plan, call);
    return plan;
}

template <class T, Order order>
void run_typed(const Upsample& call) {
    const UpsamplePlan plan = make_plan<T, order>(call);
    const std::string what = describe(order, call);
    if (call.blocks > 0)
        check(launch(upsample_kernel<T, order>, call.blocks, plan.threads, plan.bytes, call.stream, call, plan), what);
    if (!call.out_loss) return;
    check(launch(finish<T>, 1, kFinishThreads, kFinishThreads / 16 * sizeof(double), call.stream,
                 static_cast<const T*>(call.workspace), call.blocks, order == Order::forward,
                 static_cast<T*>(call.out_loss), static_cast<T*>(call.count)),
          what + " (sum)");
}

template <class T>
void run_order(Order order, const Upsample& call) {
    if (order == Order::forward)
        run_typed<T, Order::forward>(call);
    else if (order == Order::backward)
        run_typed<T, Order::backward>(call);
    else
        run_typed<T, Order::double_backward>(call);
}

template <class T>
UpsamplePlan plan_order(Order order, const Upsample& call) {
    if (order == Order::forward) return make_plan<T, Order::forward>(call);
    if (order == Order::backward) return make_plan<T, Order::backward>(call);
    return make_plan<T, Order::double_backward>(call);
}

}  // namespace

Workspace upsample_cross_entropy_workspace(Order order, const Upsample& call) {
    const bool twice = call.compute == Type::float64;
    const UpsamplePlan plan = twice ? plan_order<double>(order, call) : plan_order<float>(order, call);
    const std::int64_t most = 16 * device_attribute(cudaDevAttrMultiProcessorCount);
    return {static_cast<int>(plan.tiles < most ? plan.tiles : most), 2};
}

void upsample_cross_entropy(Order order, const Upsample& call) {
    if (call.compute == Type::float64)
        run_order<double>(order, call);
    else
        run_order<float>(order, call);
}

}  // namespace pmm
