// Colour jitter, Gaussian blur and normalisation of 8-bit images: docs/ops/photometric.md.
//
// An image is walked down in tiles of rows.  A row is unpacked to three rows of floats, which hold whole levels and stay
// in the first-level cache while the operations of its look pass over them; the rows that a blur needs wait in a ring.
// Tiles compute the rows above and below them again, so that a pixel's value does not depend on how the image is cut.
#include <algorithm>
#include <cmath>

#include "entry.h"
#include "vec.h"
#include "workspace.h"

namespace pmm::PMM_ISA {
namespace {

using V = Vec<float>;
using I = Vec<int32_t>;

constexpr int L = kLanes<float>;
// vectors that are blurred together: their sums do not wait for each other
constexpr int kTogether = 4;
constexpr int64_t kBlock = kTogether * L;
constexpr int64_t kTileRows = 64;

enum Operation { kBrightness, kContrast, kSaturation, kHue };

// The result of a product that is added to something next.  Pillow rounds both, so they must not become one operation.
inline V rounded(V product) {
#if defined(__x86_64__)
  asm("" : "+v"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

inline V whole(V x) { return __builtin_convertvector(__builtin_convertvector(x, I), V); }

inline V min(V a, V b) { return a < b ? a : b; }

// to the nearest whole number, for numbers of at most 22 bits: adding 1.5 * 2^23 leaves no room for a fraction
inline V nearest(V x) { return (x + 12582912.0f) - 12582912.0f; }

inline V blend(V degenerate, V level, float factor) {
  const V moved = degenerate + rounded((level - degenerate) * factor);
  return whole(min(max<float>(moved, V{}), splat(255.0f)));
}

// every product and sum is a whole number below 2^24
inline V luminance(V red, V green, V blue) {
  return whole((red * 19595.0f + green * 38470.0f + blue * 7471.0f + 32768.0f) * (1.0f / 65536.0f));
}

// through 8-bit hue, saturation and value, which are what Pillow's conversions give for every colour
inline void turn_hue(V& red, V& green, V& blue, float shift) {
  const V value = max<float>(max<float>(red, green), blue), least = min(min(red, green), blue);
  const V chroma = value - least, middle = red + green + blue - value - least;
  const V part = (value - middle) / max<float>(chroma, splat(1.0f));
  // in sixths of the circle; between red and blue Pillow's comes from below zero, which rounds upwards
  const auto no_blue = blue == least, no_red = red == least;
  const V corner = no_blue ? splat(1.0f) : no_red ? splat(3.0f) : red == value ? splat(5.0000005f) : splat(5.0f);
  const V largest = no_blue ? red : no_red ? green : blue;
  const V sixths = largest == value ? corner - part : corner + part;
  V hue = whole(sixths / 6.0f * 255.0f) + shift;
  hue = hue >= splat(256.0f) ? hue - 256.0f : hue;
  const V saturation = whole(chroma / max<float>(value, splat(1.0f)) * 255.0f);
  // how far each channel is below the value, of 85: the circle has 510 steps
  const V amount = value * saturation, at = hue + hue;
  const auto lower = [&](V distance) {
    return value - nearest(amount * min(max<float>(distance, V{}), splat(85.0f)) * (1.0f / 21675.0f));
  };
  const auto away = [&](float from) { return max<float>(at - from, from - at); };
  red = lower(170.0f - away(255.0f));
  green = lower(away(170.0f) - 85.0f);
  blue = lower(away(340.0f) - 85.0f);
}

struct Look {
  int order[4];
  float brightness, contrast, saturation, shift;
  double sigma;
  int64_t radius;
  int before_contrast = 0;  // operations; 4 where there is no contrast

  explicit Look(const float* row)
      : brightness(row[4]),
        contrast(row[5]),
        saturation(row[6]),
        // of a circle of 256 steps
        shift(row[7] - 256.0f * std::floor(row[7] / 256.0f)),
        sigma(row[8]),
        radius(int64_t(4 * sigma + 0.5)) {
    for (int i = 0; i < 4; ++i) order[i] = int(row[i]);
    while (before_contrast < 4 && order[before_contrast] != kContrast) ++before_contrast;
  }

  bool has_contrast() const { return before_contrast < 4; }

  void fill_weights(float* weights) const {
    double total = 0;
    const auto tap = [&](int64_t i) { return std::exp(-0.5 * (double(i) / sigma) * (double(i) / sigma)); };
    for (int64_t i = -radius; i <= radius; ++i) total += tap(i);
    for (int64_t i = -radius; i <= radius; ++i) weights[i + radius] = float(tap(i) / total);
  }
};

// What a thread works in.
struct Scratch {
  float *ring, *down, *weights;  // rows of three channels; one channel of one row, with its borders

  Scratch(Arena& arena, int64_t row_size, int64_t radius)
      : ring(arena.take<float>((2 * radius + 1) * 3 * row_size)),
        down(arena.take<float>(row_size + 2 * radius)),
        weights(arena.take<float>(2 * radius + 1)) {}
};

class Photometric {
 public:
  Photometric(const PhotometricArgs& args, Arena& arena)
      : a(args),
        tiles((a.height + kTileRows - 1) / kTileRows),
        row_size((a.width + kBlock - 1) / kBlock * kBlock),
        sums(arena.take<int64_t>(a.batch * tiles)),
        shared_bytes(arena.used()) {}

  int64_t workspace() const { return shared_bytes + a.threads * thread_bytes(); }

  void run() {
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) if (a.batch * tiles > 1)
    for (int64_t tile = 0; tile < a.batch * tiles; ++tile) add_up(tile);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) if (a.batch * tiles > 1)
    for (int64_t tile = 0; tile < a.batch * tiles; ++tile) render(tile);
  }

 private:
  const PhotometricArgs& a;
  const int64_t tiles, row_size;
  int64_t* sums;  // of the grey levels that contrast sees, of each tile
  const int64_t shared_bytes;

  int64_t thread_bytes() const {
    Arena arena(nullptr);
    Scratch(arena, row_size, a.radius);
    return arena.used();
  }

  Scratch scratch() const {
    Arena arena(static_cast<char*>(a.workspace) + shared_bytes + thread_number() * thread_bytes());
    return Scratch(arena, row_size, a.radius);
  }

  Look look_of(int64_t tile) const { return Look(a.looks + tile / tiles * 9); }

  int64_t first_row(int64_t tile) const { return tile % tiles * kTileRows; }

  int64_t end_row(int64_t tile) const { return std::min(first_row(tile) + kTileRows, a.height); }

  void add_up(int64_t tile) const {
    const Look look = look_of(tile);
    if (!look.has_contrast()) return;
    float* row = scratch().ring;
    sums[tile] = 0;
    for (int64_t y = first_row(tile); y < end_row(tile); ++y) {
      load_row(tile / tiles, y, row);
      change(look, look.before_contrast, 0, row);
      I total = {};
      for (int64_t x = 0; x < row_size; x += L)
        total += __builtin_convertvector(
            luminance(load(row + x), load(row + row_size + x), load(row + 2 * row_size + x)), I);
      for (int lane = 0; lane < L; ++lane) sums[tile] += total[lane];
    }
  }

  float grey_of(int64_t image) const {
    int64_t total = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) total += sums[image * tiles + tile];
    return float(std::floor(double(total) / double(a.height * a.width) + 0.5));
  }

  void render(int64_t tile) const {
    const Look look = look_of(tile);
    const Scratch s = scratch();
    const int64_t image = tile / tiles, slots = 2 * look.radius + 1;
    const float grey = look.has_contrast() ? grey_of(image) : 0;
    look.fill_weights(s.weights);
    for (int64_t y = first_row(tile), next = std::max(y - look.radius, int64_t(0)); y < end_row(tile); ++y) {
      for (; next <= std::min(y + look.radius, a.height - 1); ++next) {
        float* row = s.ring + next % slots * 3 * row_size;
        load_row(image, next, row);
        change(look, 4, grey, row);
      }
      for (int64_t channel = 0; channel < 3; ++channel) {
        float* out = a.out + ((image * 3 + channel) * a.height + y) * a.width;
        if (look.radius == 0)
          normalise(s.ring + channel * row_size, channel, out);
        else
          blur(look, s, y, channel, out);
      }
    }
  }

  // three rows of levels; zeros beyond the width, which are grey 0 until contrast changes them
  void load_row(int64_t image, int64_t y, float* row) const {
    const int64_t* strides = a.images.strides;
    const uint8_t* from = static_cast<const uint8_t*>(a.images.data) + image * strides[0] + y * strides[2];
    float *red = row, *green = row + row_size, *blue = green + row_size;
    if (strides[3] == 3 && strides[1] == 1)
      for (int64_t x = 0; x < a.width; ++x) {
        red[x] = from[3 * x];
        green[x] = from[3 * x + 1];
        blue[x] = from[3 * x + 2];
      }
    else
      for (int64_t channel = 0; channel < 3; ++channel)
        unpack(from + channel * strides[1], strides[3], row + channel * row_size);
    for (int64_t channel = 0; channel < 3; ++channel)
      std::fill(row + channel * row_size + a.width, row + (channel + 1) * row_size, 0.0f);
  }

  void unpack(const uint8_t* from, int64_t step, float* to) const {
    if (step == 1)
      for (int64_t x = 0; x < a.width; ++x) to[x] = from[x];
    else
      for (int64_t x = 0; x < a.width; ++x) to[x] = from[x * step];
  }

  // the first `count` operations of a look
  void change(const Look& look, int count, float grey, float* row) const {
    for (int i = 0; i < count; ++i) switch (look.order[i]) {
        case kBrightness:
          for (int64_t x = 0; x < 3 * row_size; x += L) store(row + x, blend(V{}, load(row + x), look.brightness));
          break;
        case kContrast:
          for (int64_t x = 0; x < 3 * row_size; x += L)
            store(row + x, blend(splat(grey), load(row + x), look.contrast));
          break;
        case kSaturation:
          each_pixel(row, [&](V& red, V& green, V& blue) {
            const V own = luminance(red, green, blue);
            for (V* channel : {&red, &green, &blue}) *channel = blend(own, *channel, look.saturation);
          });
          break;
        case kHue:
          each_pixel(row, [&](V& red, V& green, V& blue) { turn_hue(red, green, blue, look.shift); });
          break;
      }
  }

  template <class Function>
  void each_pixel(float* row, Function function) const {
    for (int64_t x = 0; x < row_size; x += L) {
      V red = load(row + x), green = load(row + row_size + x), blue = load(row + 2 * row_size + x);
      function(red, green, blue);
      store(row + x, red), store(row + row_size + x, green), store(row + 2 * row_size + x, blue);
    }
  }

  // down the columns into one row, its ends repeated beyond it, then across
  void blur(const Look& look, const Scratch& s, int64_t y, int64_t channel, float* out) const {
    const int64_t radius = look.radius, taps = 2 * radius + 1;
    const float* rows[2 * kMaxRadius + 1];
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t at = std::min(std::max(y - radius + i, int64_t(0)), a.height - 1);
      rows[i] = s.ring + (at % taps * 3 + channel) * row_size;
    }
    float* inside = s.down + radius;
    for (int64_t x = 0; x < row_size; x += kBlock) {
      V sum[kTogether] = {};
      for (int64_t i = 0; i < taps; ++i)
        for (int j = 0; j < kTogether; ++j) sum[j] += load(rows[i] + x + j * L) * s.weights[i];
      for (int j = 0; j < kTogether; ++j) store(inside + x + j * L, sum[j]);
    }
    std::fill_n(s.down, radius, inside[0]);
    std::fill_n(inside + a.width, radius, inside[a.width - 1]);
    for (int64_t x = 0; x < row_size; x += kBlock) {
      V sum[kTogether] = {};
      for (int64_t i = 0; i < taps; ++i)
        for (int j = 0; j < kTogether; ++j) sum[j] += load(s.down + x + i + j * L) * s.weights[i];
      for (int j = 0; j < kTogether; ++j) sum[j] = nearest(sum[j]);
      write(sum, x, channel, out);
    }
  }

  void normalise(const float* row, int64_t channel, float* out) const {
    for (int64_t x = 0; x < row_size; x += kBlock) {
      V levels[kTogether];
      for (int j = 0; j < kTogether; ++j) levels[j] = load(row + x + j * L);
      write(levels, x, channel, out);
    }
  }

  void write(const V* levels, int64_t x, int64_t channel, float* out) const {
    V result[kTogether];
    for (int j = 0; j < kTogether; ++j) result[j] = rounded(levels[j] * a.scale[channel]) - a.shift[channel];
    if (x + kBlock <= a.width) {
      for (int j = 0; j < kTogether; ++j) store(out + x + j * L, result[j]);
    } else {
      float last[kBlock];
      for (int j = 0; j < kTogether; ++j) store(last + j * L, result[j]);
      std::copy_n(last, a.width - x, out + x);
    }
  }
};

}  // namespace

int64_t photometric_workspace(const PhotometricArgs& args) {
  Arena arena(nullptr);
  return Photometric(args, arena).workspace();
}

void photometric(const PhotometricArgs& args) {
  Arena arena(args.workspace);
  Photometric(args, arena).run();
}

}  // namespace pmm::PMM_ISA
