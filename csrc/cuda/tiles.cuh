// The sums that the memory operators consist of, over tiles in shared memory.
//
//   contract_channels    out[k][p] += sum_c matrix[k][c] tile[c][p]        scores
//   contract_maps        out[p]    += sum_c x[c][p] y[c][p]                norms
//   contract_positions   sums[k][c] += sum_p coefficient[k][p] tile[c][p]  gradients of matrices, class sums
//   add_rows             block += sum_k coefficient[k][p] matrix[k][c]     reads, gradients of features
//
// A thread owns small blocks of results in registers and reads shared memory 16 bytes at a time, so that there are at
// least five multiplications to a load.  Every sum has a fixed order: the same bits each time.
#pragma once

#include "maps.cuh"

namespace pmm {

// which rows of a matrix take part: all, or those of a list
struct Rows {
    const int* list;
    int count;
    __device__ int operator[](int i) const { return list ? list[i] : i; }
};

constexpr int kRows = 5;

// room for the partial sums of contract_channels, in numbers
__host__ __device__ constexpr int partial_sums(int pitch) { return kWarps * kRows * pitch; }

// How the threads of a warp share a tile: P/4 quads of positions beside each other, the rest along the channels.
struct Lanes {
    int quads;
    int quad;
    int along;
    int alongs;
    int warp;
    __device__ explicit Lanes(const Place& place) {
        const int lane = threadIdx.x % 32;
        quads = place.size / 4;
        quad = lane & (quads - 1);
        along = lane / quads;
        alongs = 32 / quads;
        warp = threadIdx.x / 32;
    }
};

template <class T>
__device__ void sum_along(const Lanes& lanes, T (&values)[4]) {
    for (int offset = lanes.quads; offset < 32; offset <<= 1)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
}

template <class T>
__device__ PMM_OUTLINE void contract_maps(T* out, const T* x, const T* y, int channels, Place place, T* partial) {
    assume_shared(x);
    assume_shared(y);
    assume_shared(partial);
    const Lanes lanes(place);
    T sum[4] = {};
    for (int c = lanes.warp * lanes.alongs + lanes.along; c < channels; c += kWarps * lanes.alongs) {
        const Quad<T> a = load_quad(x + c * place.pitch + 4 * lanes.quad);
        const Quad<T> b = load_quad(y + c * place.pitch + 4 * lanes.quad);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += a.v[i] * b.v[i];
    }
    sum_along(lanes, sum);
    if (lanes.along == 0)
        store_quad(partial + lanes.warp * place.pitch + 4 * lanes.quad, {sum[0], sum[1], sum[2], sum[3]});
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < place.size) {
        T total = T(0);
        for (int warp = 0; warp < kWarps; ++warp) total += partial[warp * place.pitch + threadIdx.x];
        out[threadIdx.x] += total;
    }
    __syncthreads();
}

// One thread's share: kRows rows from `first` on, every step-th quad of channels.
template <class T>
__device__ void contract_block(T (&sum)[kRows][4], const T* tile, const T* matrix, int width, const Rows& rows,
                               int first, int start, int step, int channels, int pitch) {
    const T* row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r] = matrix + (first + r < rows.count ? rows[first + r] : 0) * width;
    for (int c = start; c < channels; c += step) {
        Quad<T> x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = load_quad(tile + (c + j) * pitch);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (first + r >= rows.count) continue;
            const Quad<T> m = load_quad(row[r] + c);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[r][i] += m.v[j] * x[j].v[i];
        }
    }
}

// `matrix` has rows of `width` numbers and starts at the tile's first channel; `channels` is a multiple of four, and
// tile and matrix are zero beyond the last one.  Begins and ends with all threads past a barrier.
template <class T>
__device__ PMM_OUTLINE void contract_channels(T* out, const T* tile, const T* matrix, int width, Rows rows,
                                              int channels, Place place, T* partial) {
    assume_shared(out);
    assume_shared(tile);
    assume_shared(partial);
    const Lanes lanes(place);
    for (int base = 0; base < rows.count; base += 4 * kRows) {
        // few rows: more warps share the channels; many: the rows
        const int left = rows.count - base;
        const int groups = left > 2 * kRows ? (kWarps < 4 ? kWarps : 4) : left > kRows ? 2 : 1;
        const int splits = kWarps / groups, group = lanes.warp % groups, split = lanes.warp / groups;
        T sum[kRows][4] = {};
        const int start = 4 * (split * lanes.alongs + lanes.along), step = 4 * splits * lanes.alongs;
        contract_block(sum, tile + 4 * lanes.quad, matrix, width, rows, base + group * kRows, start, step, channels,
                       place.pitch);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            sum_along(lanes, sum[r]);
            T* own = partial + (lanes.warp * kRows + r) * place.pitch + 4 * lanes.quad;
            if (lanes.along == 0) store_quad(own, {sum[r][0], sum[r][1], sum[r][2], sum[r][3]});
        }
        __syncthreads();
        for (int unit = threadIdx.x; unit < groups * kRows * place.size; unit += kThreads) {
            const int p = place.position(unit), row = place.row(unit);
            if (base + row >= rows.count) continue;
            T total = T(0);
            for (int s = 0; s < splits; ++s) total += partial[(s * groups * kRows + row) * place.pitch + p];
            out[rows[base + row] * place.pitch + p] += total;
        }
        __syncthreads();
    }
}

// coefficients [K][P] of a tile [channels][P]
template <class T>
struct Factors {
    const T* coefficient;
    const T* tile;
};

template <int most, class T>
__device__ void add_positions(T (&sum)[most][2], const int (&at)[most], const Factors<T>& factors, int lower, int upper,
                              int positions) {
    for (int p = 0; p < positions; p += 4) {
        const Quad<T> x = load_quad(factors.tile + lower + p), y = load_quad(factors.tile + upper + p);
#pragma unroll
        for (int r = 0; r < most; ++r) {
            const Quad<T> weight = load_quad(factors.coefficient + at[r] + p);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[r][0] += weight.v[i] * x.v[i];
                sum[r][1] += weight.v[i] * y.v[i];
            }
        }
    }
}

// A thread's share: `most` rows at two channels.  Rows beyond the last are computed as the first is and not stored, so
// that nothing branches between the multiplications.
template <int most, class T>
__device__ void contract_positions_of(T* sums, int width, const Factors<T>& one, const Factors<T>& other, bool both,
                                      const Rows& rows, int channels, const Place& place) {
    const int half = channels / 2, groups = (rows.count + most - 1) / most;
    for (int unit = threadIdx.x; unit < groups * half; unit += kThreads) {
        const int c = unit % half, first = unit / half * most;
        int at[most];
#pragma unroll
        for (int r = 0; r < most; ++r) at[r] = rows[first + r < rows.count ? first + r : 0] * place.pitch;
        T sum[most][2] = {};
        add_positions(sum, at, one, c * place.pitch, (c + half) * place.pitch, place.size);
        if (both) add_positions(sum, at, other, c * place.pitch, (c + half) * place.pitch, place.size);
#pragma unroll
        for (int r = 0; r < most; ++r) {
            if (first + r >= rows.count) continue;
            T* own = sums + rows[first + r] * width + c;
            own[0] += sum[r][0];
            own[half] += sum[r][1];
        }
    }
}

// `sums` has rows of `width` numbers, in shared or global memory; a thread alone adds to its elements.  One tile gives
// something, or both.  A tile holds few classes as a rule, and all slots.
template <class T>
__device__ PMM_OUTLINE void contract_positions(T* sums, int width, Factors<T> one, Factors<T> other, bool both,
                                               Rows rows, int channels, Place place) {
    assume_shared(one.coefficient);
    assume_shared(one.tile);
    assume_shared(other.coefficient);
    assume_shared(other.tile);
    if (rows.count > kRows)
        contract_positions_of<2 * kRows>(sums, width, one, other, both, rows, channels, place);
    else
        contract_positions_of<kRows>(sums, width, one, other, both, rows, channels, place);
}

template <class T>
__device__ void contract_positions(T* sums, int width, const Factors<T>& one, const Rows& rows, int channels,
                                   const Place& place) {
    contract_positions(sums, width, one, one, false, rows, channels, place);
}

template <class T>
__device__ void add_rows(T (&block)[kBlockChannels][4], const T* coefficient, const T* matrix, int width,
                         const Rows& rows, int channel, int position, int pitch) {
    for (int r = 0; r < rows.count; ++r) {
        const int k = rows[r];
        const Quad<T> weight = load_quad(coefficient + k * pitch + position);
#pragma unroll
        for (int half = 0; half < kBlockChannels; half += 4) {
            const Quad<T> m = load_quad(matrix + k * width + channel + half);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) block[half + j][i] += m.v[j] * weight.v[i];
        }
    }
}

// block += scale[p] tile[c][p]
template <class T>
__device__ void add_scaled(T (&block)[kBlockChannels][4], const T* scale, const T* tile, int channel, int position,
                           int pitch) {
    const Quad<T> weight = load_quad(scale + position);
#pragma unroll
    for (int j = 0; j < kBlockChannels; ++j) {
        const Quad<T> x = load_quad(tile + (channel + j) * pitch + position);
#pragma unroll
        for (int i = 0; i < 4; ++i) block[j][i] += weight.v[i] * x.v[i];
    }
}

// Calls `fill(block, channel, position)` for every block of a chunk of `valid` channels and stores what it made.
template <class T, class Fill>
__device__ void write_map(const Map& map, const Place& place, int chunk, int valid, Fill fill) {
    const int quads = place.size / 4;
    const int units = round_up(valid, kBlockChannels) / kBlockChannels * quads;
    for (int unit = threadIdx.x; unit < units; unit += kThreads) {
        const int position = (unit & (quads - 1)) * 4, channel = (unit >> (place.shift - 2)) * kBlockChannels;
        T block[kBlockChannels][4] = {};
        fill(block, channel, position);
        store_block(map, place, chunk + channel, chunk + valid, position, block);
    }
}

}  // namespace pmm
