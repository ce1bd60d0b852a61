// The few things of a GPU that the kernels use.  Under g++ tests/cuda/emulator.h supplies them, so that the same
// sources run on a machine without a GPU.
#pragma once

#include <stdexcept>
#include <string>

#include "operators.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#else
#include "emulator.h"
#endif

namespace pmm {

#ifndef PMM_THREADS
#define PMM_THREADS 256
#endif

constexpr int kThreads = PMM_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__
// functions called from many places: inlined everywhere they would take minutes to compile
#define PMM_OUTLINE __noinline__

// tells a function that is not inlined what it cannot see: shared memory has cheaper loads than memory at large
__device__ __forceinline__ void assume_shared(const void* address) { __builtin_assume(__isShared(address)); }

__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

// 16 bytes from memory at large into shared memory, zeros where they are not wanted; the thread goes on meanwhile
__device__ __forceinline__ void copy_sixteen(void* to, const void* from, bool wanted) {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(wanted ? 16 : 0)
                 : "memory");
}

// until the thread's own copies are there; a barrier after it shows them to the others
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// as PyTorch's losses do: the message appears, the stream is lost, and the host has not waited
__device__ inline void wrong_label() { assert(false && "a label is neither a class nor ignored"); }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, void* stream,
                   const Arguments&... arguments) {
    // above 48 KB a kernel has to ask
    if (shared > 48 * 1024) {
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared));
        // which also forgets it, so that no later launch finds it
        if (error != cudaSuccess) return cudaGetLastError();
    }
    kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}
#endif

inline void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess) throw std::runtime_error("pmm_fast: " + what + ": " + cudaGetErrorString(error));
}

// a number of the current device, such as its multiprocessors
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "the current device");
    check(cudaDeviceGetAttribute(&value, attribute, device), "an attribute of the device");
    return value;
}

// numbers

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline double to_float(double x) { return x; }

template <class S>
struct Rounded;
template <>
struct Rounded<float> {
    __device__ static float from(double x) { return static_cast<float>(x); }
};
template <>
struct Rounded<double> {
    __device__ static double from(double x) { return x; }
};
template <>
struct Rounded<__nv_bfloat16> {
    __device__ static __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Rounded<__half> {
    __device__ static __half from(float x) { return __float2half_rn(x); }
};

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
// of two, an instruction instead of nine: 2 units in the last place, zero below 2^-126
__device__ inline float power_of_two(float x) {
#ifdef __CUDACC__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}
__device__ inline double power_of_two(double x) { return exp2(x); }
// the other one where one is NaN
__device__ inline float larger(float x, float y) { return fmaxf(x, y); }
__device__ inline double larger(double x, double y) { return fmax(x, y); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

// below this squared norm a feature counts as zero, with zero derivatives (pmm_fast/ops/reference.py)
template <class T>
__device__ T inverse_norm(T squared) {
    return squared <= T(1e-24) ? T(0) : T(1) / square_root(squared);
}

__host__ __device__ constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// 16 bytes at a time

template <class S>
struct alignas(16) Sixteen {
    static constexpr int count = 16 / sizeof(S);
    S v[count];
};

// four neighbouring numbers: one 16-byte access of floats, two of doubles
template <class T>
struct Quad {
    T v[4];
};

template <class T>
__device__ Quad<T> load_quad(const T* from) {
    Quad<T> quad;
    constexpr int step = Sixteen<T>::count;
#pragma unroll
    for (int i = 0; i < 4; i += step) {
        const auto part = *reinterpret_cast<const Sixteen<T>*>(from + i);
#pragma unroll
        for (int j = 0; j < step; ++j) quad.v[i + j] = part.v[j];
    }
    return quad;
}

template <class T>
__device__ void store_quad(T* to, const Quad<T>& quad) {
    constexpr int step = Sixteen<T>::count;
#pragma unroll
    for (int i = 0; i < 4; i += step) {
        Sixteen<T> part;
#pragma unroll
        for (int j = 0; j < step; ++j) part.v[j] = quad.v[i + j];
        *reinterpret_cast<Sixteen<T>*>(to + i) = part;
    }
}

// sums over neighbouring lanes (a power of two of them); every lane gets the sum

template <class T>
__device__ T sum_lanes(T x, int lanes) {
    for (int offset = 1; offset < lanes; offset <<= 1) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}

template <class T>
__device__ T max_lanes(T x, int lanes) {
    for (int offset = 1; offset < lanes; offset <<= 1) {
        const T other = __shfl_xor_sync(kAllLanes, x, offset);
        x = other > x ? other : x;
    }
    return x;
}

}  // namespace pmm
