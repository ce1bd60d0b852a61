// Gumbel noise from a seed, the same as pmm_fast.ops.seeded_gumbel_noise draws (docs/ops/memory_read.md, Noise).
#pragma once

#include "maps.cuh"

namespace pmm {

struct Words {
    unsigned v[4];
};

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011
__device__ inline Words philox(Words counter, unsigned key0, unsigned key1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, counter.v[0]), low0 = 0xD2511F53u * counter.v[0];
        const unsigned high2 = __umulhi(0xCD9E8D57u, counter.v[2]), low2 = 0xCD9E8D57u * counter.v[2];
        counter = {high2 ^ counter.v[1] ^ key0, low2, high0 ^ counter.v[3] ^ key1, low0};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// noise [K][P] of a tile; the seed is read on the device, so that a captured graph draws anew when it changes
template <class T>
__device__ void draw_noise(T* noise, const Call& call, const Place& place) {
    const std::uint64_t seed = static_cast<std::uint64_t>(*call.seed);
    const std::int64_t positions = static_cast<std::int64_t>(call.height) * call.width;
    const int groups = (call.slots + 3) / 4;
    for (int unit = threadIdx.x; unit < groups * place.size; unit += kThreads) {
        const int group = place.row(unit), p = place.position(unit);
        const std::uint64_t i = static_cast<std::uint64_t>(place.image * positions + place.first + p);
        const Words counter = {static_cast<unsigned>(i), static_cast<unsigned>(i >> 32), static_cast<unsigned>(group),
                               0};
        const Words words = philox(counter, static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const T uniform = (T(words.v[j] >> 9) + T(0.5)) * T(1.0 / 8388608.0);
            if (4 * group + j < call.slots) noise[(4 * group + j) * place.pitch + p] = -logarithm(-logarithm(uniform));
        }
    }
}

// noise [K][P] of a tile, whatever form it is given in
template <class T>
__device__ void stage_noise(T* noise, const Call& call, const Place& place) {
    if (call.seed)
        draw_noise(noise, call, place);
    else
        stage(noise, call.noise, place, 0, call.slots, call.slots);
}

}  // namespace pmm
