// How a call is cut: positions a tile, channels a chunk, and what lies in shared memory.
#pragma once

#include "tiles.cuh"

namespace pmm {

// matrices that lie in shared memory when there is room, else in global memory; in the order in which room is given
enum Slot { kSumOfKeys, kSumOfValues, kSumOfSums, kKeys, kValues, kGradSums, kGradGradKeys, kGradGradValues, kSlots };
constexpr int kAccumulators = 3;

struct Plan {
    int size = 0;      // positions a tile
    int channels = 0;  // a chunk of the features' channels, a multiple of 8
    int depth = 0;     // a chunk of the values' width
    int width = 0;     // numbers a row of a matrix [K, C]
    int deep = 0;      // and [K, D]
    unsigned in_shared = 0;
    std::int64_t tiles_per_image = 0;
    std::int64_t tiles = 0;
    size_t bytes = 0;
    int per_block = 0;  // numbers of the compute type that a block leaves in the workspace
};

// Addresses in shared memory, handed out one after another.  The host runs the same code to count.
template <class T>
struct Arena {
    T* base;
    size_t used = 0;
    __host__ __device__ T* take(size_t count) {
        T* address = base ? base + used : nullptr;
        used += (count + 3) / 4 * 4;
        return address;
    }
};

// Everything a tile's computation names.  [K][P] arrays hold first what is summed and then what is made of it, as the
// kernels say; those of an order or a half that is not compiled in take no room.
template <class T>
struct Shared {
    T *features, *direction, *incoming;                   // tiles: f, a, A
    T *score, *weight, *product, *u;                      // keys.f, noise -> w, values.A, e -> u
    T *along_keys, *along_score, *along, *along_values;   // keys.a, P.f, n, Q.A
    T *mass, *pooled, *pooled_along;                      // y, G.f, G.a
    T *squared, *dot, *scale_features, *scale_direction;  // [P]: f.f, f.a and factors of f and a
    T *partial, *total_mass;
    int *present, *list, *count;
    T* matrix[kSlots];  // only those in shared memory
};

// where matrices and sums are, in shared or in global memory
template <class T>
struct Matrices {
    const T *keys, *values, *grad_sums, *grad_grad_keys, *grad_grad_values;
    T *sums, *sum_keys, *sum_values;
};

// The names of a block's arrays stand in shared memory themselves: some thirty addresses are too many for registers.
template <class T>
struct Frame {
    Shared<T> shared;
    Matrices<T> matrices;
};

constexpr size_t kFrameBytes = round_up(sizeof(Frame<double>), 16);

__host__ __device__ inline int slot_numbers(int slot, const Plan& plan, int slots) {
    const bool deep = slot == kSumOfValues || slot == kValues || slot == kGradGradValues;
    return slots * (deep ? plan.deep : plan.width);
}

// Blocks a multiprocessor holds, so that some compute while others load: two leave a thread 128 registers and three 80,
// which is enough where little is computed; float64 needs more and is not for speed.
template <class T, Order order, bool read>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : read || order != Order::forward ? 2 : 3;

// the shared memory that leaves room for so many blocks; each costs 1 KB beside what it asks for
inline size_t share_of_multiprocessor(int blocks) {
    const size_t share = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / blocks - 1024;
    const size_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return share < most ? share : most;
}

// What may take room at all; a matrix that an order does not have is absent from `wanted`.
template <class T, Order order, bool read, bool pool>
__host__ __device__ size_t carve(Shared<T>& s, T* base, const Plan& plan, int slots) {
    Arena<T> arena{base};
    const int pitch = plan.size + 4;
    constexpr bool backward = order != Order::forward, twice = order == Order::double_backward;
    const size_t rows = static_cast<size_t>(slots) * pitch;
    s.features = arena.take(static_cast<size_t>(plan.channels) * pitch);
    s.direction = arena.take(twice ? static_cast<size_t>(plan.channels) * pitch : 0);
    s.incoming = arena.take(read && backward ? static_cast<size_t>(plan.depth) * pitch : 0);
    s.score = arena.take(read ? rows : 0);
    s.weight = arena.take(read ? rows : 0);
    s.product = arena.take(read && backward ? rows : 0);
    s.u = arena.take(read && backward ? rows : 0);
    s.along_keys = arena.take(read && twice ? rows : 0);
    s.along_score = arena.take(read && twice ? rows : 0);
    s.along = arena.take(read && twice ? rows : 0);
    s.along_values = arena.take(read && twice ? rows : 0);
    s.mass = arena.take(pool ? rows : 0);
    s.pooled = arena.take(pool && backward ? rows : 0);
    s.pooled_along = arena.take(pool && twice ? rows : 0);
    s.squared = arena.take(pitch);
    s.dot = arena.take(pitch);
    s.scale_features = arena.take(pitch);
    s.scale_direction = arena.take(pitch);
    s.partial = arena.take(partial_sums(pitch));
    s.total_mass = arena.take(pool ? slots : 0);
    const size_t indices = pool ? (static_cast<size_t>(2 * slots + 1) * sizeof(int) + sizeof(T) - 1) / sizeof(T) : 0;
    s.present = reinterpret_cast<int*>(arena.take(indices));
    s.list = base ? s.present + slots : nullptr;
    s.count = base ? s.present + 2 * slots : nullptr;
    for (int slot = 0; slot < kSlots; ++slot)
        s.matrix[slot] = plan.in_shared >> slot & 1 ? arena.take(slot_numbers(slot, plan, slots)) : nullptr;
    return kFrameBytes + arena.used * sizeof(T);
}

// The matrices that a call has, as bits of Slot.
inline unsigned present_matrices(Order order, const Call& call) {
    const bool forward = order == Order::forward;
    const void* matrices[kSlots] = {call.out_keys,
                                    call.out_values,
                                    call.out_sums,
                                    call.read ? call.keys : nullptr,
                                    call.read ? call.values : nullptr,
                                    forward ? nullptr : call.grad_sums,
                                    call.grad_grad_keys,
                                    call.grad_grad_values};
    unsigned bits = 0;
    for (int slot = 0; slot < kSlots; ++slot)
        if (matrices[slot]) bits |= 1u << slot;
    return bits;
}

template <class T, Order order, bool read, bool pool>
bool fits(Plan& plan, const Call& call, int size, int chunks, unsigned in_shared, size_t limit) {
    plan.size = size;
    plan.channels = round_up((call.channels + chunks - 1) / chunks, kMatrixPad);
    plan.depth = round_up((call.depth + chunks - 1) / chunks, kMatrixPad);
    plan.in_shared = in_shared;
    Shared<T> shared;
    plan.bytes = carve<T, order, read, pool>(shared, nullptr, plan, call.slots);
    return plan.bytes <= limit;
}

// First with the sums in shared memory and whole features, then with what remains: eight positions are too few to be
// worth the sums.  A feature in chunks is loaded twice.
template <class T, Order order, bool read, bool pool>
bool choose_tile(Plan& plan, const Call& call, unsigned matrices) {
    const size_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const size_t target = share_of_multiprocessor(kBlocks<T, order, read>);
    const unsigned sums = matrices & ((1u << kAccumulators) - 1);
    for (int size : {32, 16})
        if (fits<T, order, read, pool>(plan, call, size, 1, sums, target)) return true;
    for (size_t limit : {target, most})
        for (int chunks : {1, 2, 4, 8, 16, 64, 1024})
            for (int size : {32, 16, 8})
                if (fits<T, order, read, pool>(plan, call, size, chunks, 0, limit)) return true;
    return false;
}

// Adds matrices to shared memory while the target allows.
template <class T, Order order, bool read, bool pool>
void fill_shared(Plan& plan, const Call& call, unsigned matrices) {
    const size_t target = share_of_multiprocessor(kBlocks<T, order, read>);
    for (int slot = 0; slot < kSlots; ++slot) {
        const unsigned bit = 1u << slot;
        if (!(matrices & bit) || plan.in_shared & bit) continue;
        Plan larger = plan;
        larger.in_shared |= bit;
        Shared<T> shared;
        larger.bytes = carve<T, order, read, pool>(shared, nullptr, larger, call.slots);
        if (larger.bytes <= target) plan = larger;
    }
}

inline std::string describe(const char* name, Order order, const Call& call) {
    return std::string(name) + " " + order_name(order) + " of [" + std::to_string(call.batch) + ", " +
           std::to_string(call.channels) + ", " + std::to_string(call.height) + ", " + std::to_string(call.width) +
           "], " + std::to_string(call.slots) + (call.read ? " slots of " + std::to_string(call.depth) : " classes");
}

template <class T, Order order, bool read, bool pool>
Plan make_plan(const char* name, const Call& call) {
    Plan plan;
    plan.width = round_up(call.channels, kMatrixPad);
    plan.deep = round_up(call.depth, kMatrixPad);
    const unsigned matrices = present_matrices(order, call);
    if (!choose_tile<T, order, read, pool>(plan, call, matrices))
        throw std::runtime_error("pmm_fast: " + describe(name, order, call) + ": too many slots for the shared memory");
    fill_shared<T, order, read, pool>(plan, call, matrices);
    const std::int64_t positions = static_cast<std::int64_t>(call.height) * call.width;
    plan.tiles_per_image = (positions + plan.size - 1) / plan.size;
    plan.tiles = call.batch * plan.tiles_per_image;
    plan.per_block = call.slots * (2 * plan.width + plan.deep + 1);
    return plan;
}

// as many blocks as the device holds walk over all tiles
inline int persistent_blocks(std::int64_t tiles, int blocks) {
    const std::int64_t most = blocks * device_attribute(cudaDevAttrMultiProcessorCount);
    return static_cast<int>(tiles < most ? tiles : most);
}

}  // namespace pmm
