// Gumbel noise from a seed: docs/ops/memory_read.md, Noise.
#pragma once

#include "tile.h"

namespace pmm::PMM_ISA {

// noise[k][i] for `count` slots of the tile whose first position has number `first`
template <class R>
void seeded_noise(int64_t seed, int64_t first, int64_t slots, R* noise) {
  constexpr int P = kTile<R>;
  uint32_t word[4][P];
  for (int64_t group = 0; group * 4 < slots; ++group) {
    for (int i = 0; i < P; ++i) {
      word[0][i] = uint32_t(uint64_t(first + i));
      word[1][i] = uint32_t(uint64_t(first + i) >> 32);
      word[2][i] = uint32_t(group);
      word[3][i] = 0;
    }
    uint32_t key0 = uint32_t(uint64_t(seed)), key1 = uint32_t(uint64_t(seed) >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
      for (int i = 0; i < P; ++i) {
        const uint64_t product0 = uint64_t(word[0][i]) * 0xD2511F53u, product2 = uint64_t(word[2][i]) * 0xCD9E8D57u;
        word[0][i] = uint32_t(product2 >> 32) ^ word[1][i] ^ key0;
        word[2][i] = uint32_t(product0 >> 32) ^ word[3][i] ^ key1;
        word[1][i] = uint32_t(product2);
        word[3][i] = uint32_t(product0);
      }
    for (int k = 0; k < 4 && group * 4 + k < slots; ++k) {
      R* out = noise + (group * 4 + k) * P;
      for (int i = 0; i < P; ++i) out[i] = (R(int32_t(word[k][i] >> 9)) + R(0.5)) * R(1.0 / 8388608.0);
      for (int t = 0; t < kVectors; ++t) {
        const Vec<R> u = load(out + t * kLanes<R>);
        store<R>(out + t * kLanes<R>, -log_positive<R>(-log_positive<R>(u)));
      }
    }
  }
}

}  // namespace pmm::PMM_ISA
