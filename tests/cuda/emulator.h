// A GPU in plain C++, for tests: the kernels of csrc/cuda compile against it with g++ and run on the CPU.
//
// Blocks run one after another; the threads of a block are fibers that switch at __syncthreads, shuffles and ballots.
// Shared memory is filled with NaN before every block, so that a read before a write shows.  Threads between two
// barriers, and blocks, run in ascending, descending or random order (set_emulation), so that a missing barrier shows
// in one of them; what is copied asynchronously arrives as late as it can, as early, or either.  A barrier or shuffle
// that some threads of its block or warp do not reach, or reach at another place of the sources, is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__
#define PMM_OUTLINE

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorAssert = 2,
    cudaErrorLaunchFailure = 3,
    cudaErrorNoKernelImageForDevice = 4,
    cudaErrorMisalignedAddress = 5,
    cudaErrorInvalidDeviceFunction = 6,
    cudaErrorUnsupportedPtxVersion = 7,
    cudaErrorInsufficientDriver = 8,
};
struct cudaFuncAttributes {};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};

namespace emulator {

enum class State { ready, at_block, at_warp, done };

// orders of threads and blocks; larger numbers are seeds of random ones
constexpr unsigned kAscending = 0, kDescending = 1;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Fiber {
    ucontext_t context;
    jmp_buf jump;
    std::unique_ptr<char[]> stack;
    State state = State::done;
    bool started = false;
    int parity = 0;
    int line = 0;  // where it waits
    unsigned thread = 0;
    std::vector<Copy> copies;
};

constexpr size_t kStack = 128 * 1024;

struct Device {
    std::vector<Fiber> fibers;
    std::vector<unsigned char> shared;
    std::vector<double> slots;  // two of eight bytes a thread, for shuffles
    jmp_buf jump;
    std::function<void()> body;
    Fiber* current = nullptr;
    Dim thread, block, block_size, grid_size;
    int wrong_labels = 0;
    int multiprocessors = 2;
    int shared_limit = 99 * 1024;
    unsigned order = kAscending;
    std::mt19937 random;
    long launches = 0;
    bool missing_code = false;
    bool misaligned = false;  // an asynchronous copy from or to an address that is no multiple of 16
};

inline Device& device() {
    static Device instance;
    return instance;
}

inline void enter() {
    Device& gpu = device();
    gpu.body();
    gpu.current->state = State::done;
    _longjmp(gpu.jump, 1);
}

inline void resume(Fiber& fiber) {
    Device& gpu = device();
    gpu.current = &fiber;
    gpu.thread.x = fiber.thread;
    if (_setjmp(gpu.jump)) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    // a fiber's first entry needs a stack of its own; later ones only jump
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

inline void wait(State state, int line) {
    Device& gpu = device();
    gpu.current->state = state;
    gpu.current->line = line;
    if (!_setjmp(gpu.current->jump)) _longjmp(gpu.jump, 1);
}

inline bool release(size_t first, size_t last, State waiting) {
    auto& fibers = device().fibers;
    for (size_t i = first; i < last; ++i)
        if (fibers[i].state != waiting || fibers[i].line != fibers[first].line) return false;
    for (size_t i = first; i < last; ++i) fibers[i].state = State::ready;
    return true;
}

// 0 .. count in the order that is asked for
inline std::vector<unsigned> ordered(size_t count) {
    Device& gpu = device();
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0u);
    if (gpu.order == kDescending) std::reverse(numbers.begin(), numbers.end());
    if (gpu.order > kDescending) std::shuffle(numbers.begin(), numbers.end(), gpu.random);
    return numbers;
}

// true when every thread finished, false on a barrier that not all threads reach
inline bool run_warps(size_t threads) {
    Device& gpu = device();
    for (;;) {
        bool progress = false;
        for (unsigned i : ordered(threads)) {
            Fiber& fiber = gpu.fibers[i];
            if (fiber.state != State::ready) continue;
            resume(fiber);
            progress = true;
        }
        for (size_t warp = 0; warp < threads; warp += 32)
            progress |= release(warp, std::min(warp + 32, threads), State::at_warp);
        progress |= release(0, threads, State::at_block);
        if (progress) continue;
        return std::all_of(gpu.fibers.begin(), gpu.fibers.begin() + threads,
                           [](const Fiber& fiber) { return fiber.state == State::done; });
    }
}

inline bool run_block(unsigned block, size_t threads, size_t shared) {
    Device& gpu = device();
    gpu.block.x = block;
    // 0xff everywhere is NaN in float and double and an impossible index in int; the guard shows writes past the end
    gpu.shared.assign(shared + 64, 0xff);
    for (size_t i = 0; i < threads; ++i) {
        Fiber& fiber = gpu.fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[kStack]);
        fiber.state = State::ready;
        fiber.started = false;
        fiber.parity = 0;
        fiber.copies.clear();
        fiber.thread = static_cast<unsigned>(i);
    }
    if (!run_warps(threads)) return false;
    const auto guard = gpu.shared.end() - 48;
    return std::all_of(guard, gpu.shared.end(), [](unsigned char byte) { return byte == 0xff; });
}

template <class V>
std::array<V, 32> exchange(V value, int line) {
    static_assert(sizeof(V) <= sizeof(double));
    Device& gpu = device();
    Fiber& self = *gpu.current;
    const size_t bank = self.parity * gpu.block_size.x;
    // two banks in turn: a lane cannot be two shuffles ahead of another
    self.parity ^= 1;
    std::memcpy(&gpu.slots[bank + self.thread], &value, sizeof(V));
    wait(State::at_warp, line);
    std::array<V, 32> values;
    for (size_t lane = 0; lane < 32; ++lane)
        std::memcpy(&values[lane], &gpu.slots[bank + self.thread / 32 * 32 + lane], sizeof(V));
    return values;
}

inline void arrive() {
    auto& copies = device().current->copies;
    for (const Copy& copy : copies) {
        std::memset(copy.to, 0, 16);
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    copies.clear();
}

}  // namespace emulator

#define threadIdx (::emulator::device().thread)
#define blockIdx (::emulator::device().block)
#define blockDim (::emulator::device().block_size)
#define gridDim (::emulator::device().grid_size)

inline void __syncthreads(int line = __builtin_LINE()) { ::emulator::wait(::emulator::State::at_block, line); }

template <class V>
V __shfl_xor_sync(unsigned, V value, int offset, int line = __builtin_LINE()) {
    return ::emulator::exchange(value, line)[(threadIdx.x % 32) ^ offset];
}

inline unsigned __ballot_sync(unsigned, bool predicate, int line = __builtin_LINE()) {
    unsigned mask = 0;
    const auto values = ::emulator::exchange(static_cast<int>(predicate), line);
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(values[lane] != 0) << lane;
    return mask;
}

// rounded by itself: not fused with a sum that follows, also where g++ would
inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;
    return product;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((std::uint64_t(a) * b) >> 32); }

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const auto& gpu = ::emulator::device();
    *value = attribute == cudaDevAttrMultiProcessorCount ? gpu.multiprocessors : gpu.shared_limit;
    // a multiprocessor has the kilobyte that a block takes for itself besides
    if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) *value += 1024;
    return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) {
    return ::emulator::device().missing_code ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
    constexpr const char* texts[] = {"no error", "invalid argument", "device-side assert triggered",
                                     "a barrier that not all threads reach, or a write past the shared memory",
                                     "no kernel image is available for execution on the device",
                                     "misaligned address"};
    return texts[error];
}

// 16-bit floats, by their bits
struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct __half {
    std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    float magnitude = exponent ? std::ldexp(float(fraction + 1024), exponent - 25) : std::ldexp(float(fraction), -24);
    if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
    return x.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
    const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (x != x) return {0x7fff};
    const float magnitude = std::fabs(x);
    if (magnitude == 0) return {sign};
    if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    // numbers below 2^-14 share the spacing 2^-24; the default rounding of nearbyint is to even
    const int scale = std::max(exponent - 11, -24);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -scale)));
    if (scale == -24) return {static_cast<std::uint16_t>(sign | units)};
    return {static_cast<std::uint16_t>(sign | (((scale + 24) << 10) + units))};
}

namespace pmm {

inline unsigned char* shared_memory() {
    auto address = reinterpret_cast<std::uintptr_t>(::emulator::device().shared.data());
    return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

inline void assume_shared(const void*) {}

inline void copy_sixteen(void* to, const void* from, bool wanted) {
    auto& gpu = ::emulator::device();
    const bool random = gpu.order > ::emulator::kDescending;
    const bool early = random ? gpu.random() % 2 : gpu.order == ::emulator::kDescending;
    for (const void* address : {static_cast<const void*>(to), from})
        gpu.misaligned |= reinterpret_cast<std::uintptr_t>(address) % 16 != 0;
    gpu.current->copies.push_back({to, from, wanted ? size_t(16) : 0});
    if (early) ::emulator::arrive();
}

inline void await_copies() { ::emulator::arrive(); }

inline void wrong_label() { ++::emulator::device().wrong_labels; }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, void*,
                   const Arguments&... arguments) {
    auto& gpu = ::emulator::device();
    if (blocks < 1 || threads < 1 || threads > 1024 || shared > size_t(gpu.shared_limit)) return cudaErrorInvalidValue;
    if (gpu.fibers.size() < size_t(threads)) gpu.fibers = std::vector<::emulator::Fiber>(threads);
    gpu.slots.assign(2 * threads, 0);
    gpu.block_size.x = threads;
    gpu.grid_size.x = blocks;
    gpu.wrong_labels = 0;
    gpu.misaligned = false;
    ++gpu.launches;
    gpu.body = [&] { kernel(arguments...); };
    gpu.random.seed(gpu.order);
    for (unsigned block : ::emulator::ordered(blocks))
        if (!::emulator::run_block(block, threads, shared)) return cudaErrorLaunchFailure;
    if (gpu.misaligned) return cudaErrorMisalignedAddress;
    return gpu.wrong_labels ? cudaErrorAssert : cudaSuccess;
}

}  // namespace pmm
