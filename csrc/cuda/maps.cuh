// Tiles of feature maps: from global memory into shared memory, converted to the compute type, and back.
//
// A tile is [channels][P positions] of one image, rows `pitch` numbers apart.  pitch = P + 4 keeps every row on 16
// bytes and lets eight neighbouring rows be read 16 bytes each without two of them in one bank.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace pmm {

// where a tile lies: image b, positions p0 .. p0 + count, in a tile of `size` = 2^shift positions (divisions by it
// would cost as much as the accesses they address)
struct Place {
    std::int64_t image;
    std::int64_t first;
    int count;
    int size;
    int shift;
    int pitch;
    __device__ int row(int unit) const { return unit >> shift; }
    __device__ int position(int unit) const { return unit & (size - 1); }
};

constexpr int element_size(Type type) {
    constexpr int sizes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8};
    return sizes[static_cast<int>(type)];
}

// Which axis of a map allows 16-byte accesses wherever a tile and a chunk of channels may begin.
inline Vector vector_axis(const Map& map, std::int64_t positions, int channels) {
    if (!map.data) return Vector::none;
    const int count = 16 / element_size(map.type);
    if (reinterpret_cast<std::uintptr_t>(map.data) % 16 || map.batch % count) return Vector::none;
    if (map.position == 1 && map.channel % count == 0 && positions % count == 0) return Vector::positions;
    if (map.channel == 1 && map.position % count == 0 && channels % count == 0) return Vector::channels;
    return Vector::none;
}

template <class T>
__device__ void fill_zero(T* values, int count) {
    for (int i = threadIdx.x; i < count; i += kThreads) values[i] = T(0);
}

// several independent loads are in flight before the first is used
constexpr int kInFlight = 4;

template <class S, class T>
__device__ void stage_positions(T* tile, const S* from, const Map& map, const Place& place, int valid, int rows) {
    constexpr int wide = Sixteen<S>::count;
    constexpr int wide_shift = wide == 8 ? 3 : wide == 4 ? 2 : 1;
    const int row_shift = place.shift - wide_shift, in_row = (1 << row_shift) - 1;
    const int units = rows << row_shift;
    for (int start = threadIdx.x; start < units; start += kInFlight * kThreads) {
        Sixteen<S> loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int unit = start + i * kThreads, row = unit >> row_shift, position = (unit & in_row) * wide;
            if (unit < units && row < valid && position < place.count)
                loaded[i] = *reinterpret_cast<const Sixteen<S>*>(from + row * map.channel + position);
            else
                loaded[i] = Sixteen<S>{};
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int unit = start + i * kThreads, row = unit >> row_shift, position = (unit & in_row) * wide;
            if (unit >= units) continue;
#pragma unroll
            for (int j = 0; j < wide; ++j) tile[row * place.pitch + position + j] = T(to_float(loaded[i].v[j]));
        }
    }
}

// Nothing to convert: the copies pass no registers and are all in flight at once.
template <class T>
__device__ void copy_positions(T* tile, const T* from, const Map& map, const Place& place, int valid, int rows) {
    constexpr int wide = Sixteen<T>::count;
    const int row_shift = place.shift - (wide == 4 ? 2 : 1), in_row = (1 << row_shift) - 1;
    for (int unit = threadIdx.x; unit < rows << row_shift; unit += kThreads) {
        const int row = unit >> row_shift, position = (unit & in_row) * wide;
        const bool wanted = row < valid && position < place.count;
        copy_sixteen(tile + row * place.pitch + position, wanted ? from + row * map.channel + position : from, wanted);
    }
}

// Neighbouring lanes have neighbouring positions, so that what they write lies in different banks, and groups of them
// neighbouring channels, so that what they read fills sectors.
template <class S, class T>
__device__ void stage_channels(T* tile, const S* from, const Map& map, const Place& place, int valid, int rows) {
    constexpr int wide = Sixteen<S>::count;
    constexpr int group_shift = wide == 8 ? 4 : wide == 4 ? 3 : 2, together = 32 >> group_shift;
    const int shift = place.shift < group_shift ? place.shift : group_shift, group = (1 << shift) - 1;
    const int columns = (rows + wide * together - 1) / (wide * together), units = columns * together << place.shift;
    for (int start = threadIdx.x; start < units; start += kInFlight * kThreads) {
        Sixteen<S> loaded[kInFlight];
        int position[kInFlight], row[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            // of a unit: its place in a group of positions, its channels within `together`, the group, the rest
            const int unit = start + i * kThreads, rest = unit >> shift, apart = rest / together;
            const int groups = place.shift - shift;
            position[i] = (unit & group) + ((apart & ((1 << groups) - 1)) << shift);
            row[i] = (rest % together + (apart >> groups) * together) * wide;
            if (unit < units && row[i] < valid && position[i] < place.count)
                loaded[i] = *reinterpret_cast<const Sixteen<S>*>(from + position[i] * map.position + row[i]);
            else
                loaded[i] = Sixteen<S>{};
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (start + i * kThreads >= units) continue;
#pragma unroll
            for (int j = 0; j < wide; ++j)
                if (row[i] + j < rows) tile[(row[i] + j) * place.pitch + position[i]] = T(to_float(loaded[i].v[j]));
        }
    }
}

template <class S, class T>
__device__ void stage_any(T* tile, const S* from, const Map& map, const Place& place, int valid, int rows) {
    const bool channels_first = map.position <= map.channel;
    for (int unit = threadIdx.x; unit < rows * place.size; unit += kThreads) {
        const int row = channels_first ? place.row(unit) : unit % rows;
        const int position = channels_first ? place.position(unit) : unit / rows;
        T value = T(0);
        if (row < valid && position < place.count)
            value = T(to_float(from[row * map.channel + position * map.position]));
        tile[row * place.pitch + position] = value;
    }
}

template <class S, class T>
__device__ void stage_as(T* tile, const Map& map, const Place& place, int channel, int valid, int rows) {
    const S* from =
        static_cast<const S*>(map.data) + place.image * map.batch + place.first * map.position + channel * map.channel;
    constexpr bool same = std::is_same_v<S, T>;
    if (same && map.vector == Vector::positions)
        copy_positions(tile, reinterpret_cast<const T*>(from), map, place, valid, rows);
    else if (map.vector == Vector::positions)
        stage_positions(tile, from, map, place, valid, rows);
    else if (map.vector == Vector::channels)
        stage_channels(tile, from, map, place, valid, rows);
    else
        stage_any(tile, from, map, place, valid, rows);
}

// Channels channel .. channel + valid of a map into a tile of `rows` >= valid rows; what lies outside is zero, and so
// is an absent map.  It is there after `arrive`.  The type is a uniform branch, so that kernels need not be compiled
// once a type.
template <class T>
__device__ PMM_OUTLINE void stage(T* tile, const Map& map, Place place, int channel, int valid, int rows) {
    assume_shared(tile);
    if (!map.data)
        fill_zero(tile, rows * place.pitch);
    else if (map.type == Type::float32)
        stage_as<float>(tile, map, place, channel, valid, rows);
    else if (map.type == Type::bfloat16)
        stage_as<__nv_bfloat16>(tile, map, place, channel, valid, rows);
    else if (map.type == Type::float16)
        stage_as<__half>(tile, map, place, channel, valid, rows);
    else
        stage_as<double>(tile, map, place, channel, valid, rows);
}

// Begins and ends what others may see: after it all that was staged is there.
__device__ inline void arrive() {
    await_copies();
    __syncthreads();
}

constexpr int kBlockChannels = 8;

// neighbouring results of one thread, written 16 bytes at a time where they make 16 bytes, else 8 (four 16-bit floats)
template <class S, int count, class Get>
__device__ void store_run(S* to, Get get) {
    constexpr int wide = Sixteen<S>::count < count ? Sixteen<S>::count : count;
    struct alignas(wide * sizeof(S)) Run {
        S v[wide];
    };
#pragma unroll
    for (int i = 0; i < count; i += wide) {
        Run run;
#pragma unroll
        for (int j = 0; j < wide; ++j) run.v[j] = Rounded<S>::from(get(i + j));
        *reinterpret_cast<Run*>(to + i) = run;
    }
}

template <class S, class T>
__device__ void store_block_as(const Map& map, const Place& place, int channel, int channels, int position,
                               const T (&block)[kBlockChannels][4]) {
    S* to = static_cast<S*>(map.data) + place.image * map.batch + (place.first + position) * map.position +
            channel * map.channel;
    const bool whole = position + 4 <= place.count;
    if (map.vector == Vector::positions && whole) {
#pragma unroll
        for (int j = 0; j < kBlockChannels; ++j)
            if (channel + j < channels) store_run<S, 4>(to + j * map.channel, [&](int i) { return block[j][i]; });
    } else if (map.vector == Vector::channels && channel + kBlockChannels <= channels) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (position + i < place.count)
                store_run<S, kBlockChannels>(to + i * map.position, [&](int j) { return block[j][i]; });
    } else {
#pragma unroll
        for (int j = 0; j < kBlockChannels; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (channel + j < channels && position + i < place.count)
                    to[j * map.channel + i * map.position] = Rounded<S>::from(block[j][i]);
    }
}

// Eight channels at four positions of a map.
template <class T>
__device__ void store_block(const Map& map, const Place& place, int channel, int channels, int position,
                            const T (&block)[kBlockChannels][4]) {
    if (map.type == Type::float32)
        store_block_as<float>(map, place, channel, channels, position, block);
    else if (map.type == Type::bfloat16)
        store_block_as<__nv_bfloat16>(map, place, channel, channels, position, block);
    else if (map.type == Type::float16)
        store_block_as<__half>(map, place, channel, channels, position, block);
    else
        store_block_as<double>(map, place, channel, channels, position, block);
}

// A tile [rows][P] in shared memory to a map in the compute type, such as the scores.
template <class T>
__device__ void store_rows(const Map& map, const Place& place, const T* tile, int rows) {
    T* to = static_cast<T*>(map.data) + place.image * map.batch + place.first * map.position;
    for (int unit = threadIdx.x; unit < rows * place.size; unit += kThreads) {
        const int row = place.row(unit), position = place.position(unit);
        if (position < place.count)
            to[row * map.channel + position * map.position] = tile[row * place.pitch + position];
    }
}

}  // namespace pmm
