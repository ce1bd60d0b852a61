// A crop of an image resized by Pillow's bicubic filter, from the part of the image that the crop depends on: the same
// integers as resizing the whole image (columns, then rows, each rounded to 8 bits) and cropping.
//
// A pass multiplies bytes by coefficients of 22 bits and adds them up in 32.  Columns: as many rows as a vector has
// quads are laid side by side, a pixel a quad, so that a tap is one load, one product and one sum for all of them.
// Rows: long sums over bytes that lie side by side, which compilers vectorise better than we could with vectors of bytes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "entry.h"
#include "vec.h"

namespace pmm::PMM_ISA {
namespace {

constexpr int kBits = 22;
constexpr int kQuads = PMM_BYTES / 16;

typedef int32_t Words __attribute__((vector_size(PMM_BYTES), aligned(4), may_alias));

// the cubic convolution filter with a = -1/2
double cubic(double x) {
  x = std::fabs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

// for each of `count` target pixels: its first source pixel, and as many coefficients as the widest of them has
struct Taps {
  int64_t width;
  std::vector<int64_t> first;
  std::vector<int32_t> coefficients;

  // pixels begin ... begin + count of `target`, into which `source` pixels are resized; the first source pixels are
  // counted from `origin`
  Taps(int64_t source, int64_t target, int64_t begin, int64_t count, int64_t origin) {
    const double step = double(source) / double(target), shrink = std::max(step, 1.0), support = 2 * shrink;
    width = int64_t(std::ceil(support)) * 2 + 1;
    first.resize(count);
    coefficients.assign(count * width, 0);
    std::vector<double> weights(width);
    for (int64_t i = 0; i < count; ++i) {
      const double centre = (double(begin + i) + 0.5) * step;
      // truncated, not floored: what is below zero is cut off anyway
      const int64_t low = std::max<int64_t>(int64_t(centre - support + 0.5), 0);
      const int64_t taps = std::min<int64_t>(int64_t(centre + support + 0.5), source) - low;
      double sum = 0;
      for (int64_t t = 0; t < taps; ++t) sum += weights[t] = cubic((double(t + low) - centre + 0.5) * (1.0 / shrink));
      for (int64_t t = 0; t < taps; ++t) {
        const double scaled = weights[t] / sum * (1 << kBits);
        coefficients[i * width + t] = int32_t(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
      }
      first[i] = low - origin;
    }
    trim();
  }

  // most rows end in zeros: the longest that does not decides
  void trim() {
    int64_t used = 1;
    for (size_t i = 0; i < first.size(); ++i)
      for (int64_t t = width; t > used; --t)
        if (coefficients[i * width + t - 1]) {
          used = t;
          break;
        }
    for (size_t i = 0; i < first.size(); ++i)
      std::copy_n(&coefficients[i * width], used, &coefficients[i * used]);
    width = used;
  }
};

inline int32_t level(int32_t sum) { return std::clamp(sum >> kBits, 0, 255); }

// columns of kQuads rows at a time, mirrored or not; `packed` holds a quad a pixel of each
void resize_columns(const CropArgs& a, const Taps& taps, std::vector<int32_t>& packed, uint8_t* out, int64_t pitch) {
  const int64_t count = int64_t(taps.first.size()), quads = 4 * kQuads;
  packed.assign((a.part_width + taps.width) * quads, 0);
  for (int64_t top = 0; top < a.part_height; top += kQuads) {
    const int64_t rows = std::min<int64_t>(kQuads, a.part_height - top);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* row = a.part + (top + r) * a.part_stride;
      int32_t* to = packed.data() + 4 * r;
      for (int64_t x = 0; x < a.part_width; ++x, to += quads)
        to[0] = row[3 * x], to[1] = row[3 * x + 1], to[2] = row[3 * x + 2];
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* from = packed.data() + taps.first[i] * quads;
      const int32_t* k = &taps.coefficients[i * taps.width];
      Words sum = Words{} + (1 << (kBits - 1));
      for (int64_t t = 0; t < taps.width; ++t) sum += *reinterpret_cast<const Words*>(from + t * quads) * k[t];
      sum >>= kBits;
      sum = sum < 0 ? Words{} : sum;
      sum = sum > 255 ? Words{} + 255 : sum;
      uint8_t* to = out + top * pitch + 3 * (a.mirror ? count - 1 - i : i);
      for (int64_t r = 0; r < rows; ++r, to += pitch)
        to[0] = uint8_t(sum[4 * r]), to[1] = uint8_t(sum[4 * r + 1]), to[2] = uint8_t(sum[4 * r + 2]);
    }
  }
}

// one row of the result from rows of the first pass, four taps at a time
void resize_row(const uint8_t* rows, int64_t pitch, const int32_t* k, int64_t taps, int64_t bytes, int32_t* sums,
                uint8_t* out) {
  std::fill_n(sums, bytes, 1 << (kBits - 1));
  int64_t t = 0;
  for (; t + 4 <= taps; t += 4) {
    const uint8_t *a = rows + t * pitch, *b = a + pitch, *c = b + pitch, *d = c + pitch;
    for (int64_t j = 0; j < bytes; ++j) sums[j] += a[j] * k[t] + b[j] * k[t + 1] + c[j] * k[t + 2] + d[j] * k[t + 3];
  }
  for (; t < taps; ++t)
    for (int64_t j = 0; j < bytes; ++j) sums[j] += rows[t * pitch + j] * k[t];
  for (int64_t j = 0; j < bytes; ++j) out[j] = uint8_t(level(sums[j]));
}

}  // namespace

void resized_crop(const CropArgs& a) {
  const int64_t x0 = std::max<int64_t>(a.left, 0), x1 = std::min(a.left + a.width, a.scaled_width);
  const int64_t y0 = std::max<int64_t>(a.top, 0), y1 = std::min(a.top + a.height, a.scaled_height);
  const Taps across(a.image_width, a.scaled_width, x0, x1 - x0, a.part_left);
  const Taps down(a.image_height, a.scaled_height, y0, y1 - y0, a.part_top);
  // the last taps of the last row may lie below the part, with coefficients of zero
  const int64_t bytes = 3 * (x1 - x0);
  std::vector<int32_t> packed, sums(bytes);
  std::vector<uint8_t> middle((a.part_height + down.width) * bytes);
  resize_columns(a, across, packed, middle.data(), bytes);

  const int64_t before = 3 * (a.mirror ? a.left + a.width - x1 : x0 - a.left);
  for (int64_t y = 0; y < a.height; ++y) {
    uint8_t* row = a.out + 3 * y * a.width;
    const int64_t i = y + a.top - y0;
    if (i < 0 || i >= y1 - y0) {
      std::memset(row, 0, 3 * a.width);
      continue;
    }
    std::memset(row, 0, before);
    resize_row(middle.data() + down.first[i] * bytes, bytes, &down.coefficients[i * down.width], down.width, bytes,
               sums.data(), row + before);
    std::memset(row + before + bytes, 0, 3 * a.width - before - bytes);
  }
}

}  // namespace pmm::PMM_ISA
