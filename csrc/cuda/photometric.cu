// photometric: colour jitter, Gaussian blur and normalisation of 8-bit images in one pass.
//
// A block loads a tile of pixels with the halo that its image's blur reads, changes their colours on the way into
// shared memory, as bytes, and blurs from there: down the columns of a channel, then across, rounded, normalised and
// written.  What is one for an image is prepared before: the taps of the blur, and the mean grey level that contrast
// needs, from sums of integers over the blocks of a kernel of its own.
//
// N images of h x w pixels.
#include "device.cuh"

namespace pmm {

namespace {

constexpr int kRows = 32;
constexpr int kColumns = 64;
constexpr int kGreyBlocks = 32;

enum Operation { kNone = -1, kBrightness, kContrast, kSaturation, kHue };

struct Look {
    int order[4];
    float brightness, contrast, saturation, shift;
};

// what is computed once for an image
struct Prepared {
    float grey;
    int radius;
    float weights[2 * kMaxRadius + 1];
};

__device__ Look load_look(const Photometric& call, std::int64_t image) {
    const float* row = call.looks + image * 9;
    Look look;
    for (int i = 0; i < 4; ++i) look.order[i] = static_cast<int>(row[i]);
    look.brightness = row[4];
    look.contrast = row[5];
    look.saturation = row[6];
    // of a circle of 256 steps
    look.shift = row[7] - 256 * floorf(row[7] / 256);
    return look;
}

struct Pixel {
    float red, green, blue;
};

__device__ Pixel load_pixel(const Photometric& call, std::int64_t image, int y, int x) {
    const unsigned char* from = call.images + image * call.strides[0] + y * call.strides[2] + x * call.strides[3];
    return {static_cast<float>(from[0]), static_cast<float>(from[call.strides[1]]),
            static_cast<float>(from[2 * call.strides[1]])};
}

// Pillow rounds the product before it is added, so the two must not become one operation
__device__ float blend(float degenerate, float level, float factor) {
    const float moved = degenerate + __fmul_rn(level - degenerate, factor);
    return truncf(fminf(fmaxf(moved, 0.0f), 255.0f));
}

__device__ Pixel blend(const Pixel& degenerate, const Pixel& p, float factor) {
    return {blend(degenerate.red, p.red, factor), blend(degenerate.green, p.green, factor),
            blend(degenerate.blue, p.blue, factor)};
}

// every product and sum is a whole number below 2^24
__device__ float luminance(const Pixel& p) {
    return floorf((p.red * 19595.0f + p.green * 38470.0f + p.blue * 7471.0f + 32768.0f) * (1.0f / 65536.0f));
}

// `distance` of 85 below the value
__device__ float lowered(float value, float amount, float distance) {
    return value - rintf(amount * fminf(fmaxf(distance, 0.0f), 85.0f) * (1.0f / 21675.0f));
}

// through 8-bit hue, saturation and value, which are what Pillow's conversions give for every colour
__device__ Pixel turn_hue(const Pixel& p, float shift) {
    const float value = fmaxf(fmaxf(p.red, p.green), p.blue), least = fminf(fminf(p.red, p.green), p.blue);
    const float chroma = value - least, middle = p.red + p.green + p.blue - value - least;
    const float part = (value - middle) / fmaxf(chroma, 1.0f);
    // in sixths of the circle; between red and blue Pillow's comes from below zero, which rounds upwards
    const bool no_blue = p.blue == least, no_red = p.red == least;
    const float corner = no_blue ? 1.0f : no_red ? 3.0f : p.red == value ? 5.0000005f : 5.0f;
    const float largest = no_blue ? p.red : no_red ? p.green : p.blue;
    const float sixths = largest == value ? corner - part : corner + part;
    float hue = truncf(sixths / 6.0f * 255.0f) + shift;
    hue = hue >= 256 ? hue - 256 : hue;
    const float saturation = truncf(chroma / fmaxf(value, 1.0f) * 255.0f);
    // how far each channel is below the value, of 85: the circle has 510 steps
    const float amount = value * saturation, at = hue + hue;
    return {lowered(value, amount, 170 - fabsf(at - 255)), lowered(value, amount, fabsf(at - 170) - 85),
            lowered(value, amount, fabsf(at - 340) - 85)};
}

// the operations of a look, or only those before contrast
__device__ Pixel change(Pixel p, const Look& look, float grey, bool before_contrast) {
    for (int i = 0; i < 4; ++i) {
        if (look.order[i] == kBrightness) p = blend({0, 0, 0}, p, look.brightness);
        if (look.order[i] == kContrast) {
            if (before_contrast) return p;
            p = blend({grey, grey, grey}, p, look.contrast);
        }
        if (look.order[i] == kSaturation) {
            const float own = luminance(p);
            p = blend({own, own, own}, p, look.saturation);
        }
        if (look.order[i] == kHue) p = turn_hue(p, look.shift);
    }
    return p;
}

__device__ bool has_contrast(const Look& look) {
    return look.order[0] == kContrast || look.order[1] == kContrast || look.order[2] == kContrast ||
           look.order[3] == kContrast;
}

// sums[image][block] of the grey levels that contrast sees
__global__ void __launch_bounds__(kThreads) add_up_grey(const Photometric call, long long* sums) {
    const std::int64_t image = blockIdx.x / kGreyBlocks, pixels = static_cast<std::int64_t>(call.height) * call.width;
    const Look look = load_look(call, image);
    if (!has_contrast(look)) return;
    long long* partial = reinterpret_cast<long long*>(shared_memory());
    long long sum = 0;
    const int part = blockIdx.x % kGreyBlocks;
    for (std::int64_t i = part * kThreads + threadIdx.x; i < pixels; i += kGreyBlocks * kThreads) {
        const int y = static_cast<int>(i / call.width), x = static_cast<int>(i % call.width);
        sum += static_cast<long long>(luminance(change(load_pixel(call, image, y, x), look, 0, true)));
    }
    partial[threadIdx.x] = sum;
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// one block an image
__global__ void __launch_bounds__(kThreads) prepare(const Photometric call, const long long* sums, Prepared* prepared) {
    const std::int64_t image = blockIdx.x;
    Prepared& result = prepared[image];
    double* taps = reinterpret_cast<double*>(shared_memory());
    const double sigma = call.looks[image * 9 + 8];
    const int radius = static_cast<int>(4 * sigma + 0.5);
    for (int i = threadIdx.x; i <= 2 * radius; i += kThreads) {
        const double at = radius ? (i - radius) / sigma : 0.0;
        taps[i] = exp(-0.5 * at * at);
    }
    __syncthreads();
    double total = 0;
    for (int i = 0; i <= 2 * radius; ++i) total += taps[i];
    for (int i = threadIdx.x; i <= 2 * radius; i += kThreads) result.weights[i] = static_cast<float>(taps[i] / total);
    if (threadIdx.x != 0) return;
    result.radius = radius;
    result.grey = 0;
    if (!call.contrast || !has_contrast(load_look(call, image))) return;
    long long sum = 0;
    for (int i = 0; i < kGreyBlocks; ++i) sum += sums[image * kGreyBlocks + i];
    const double pixels = static_cast<double>(call.height) * call.width;
    result.grey = static_cast<float>(floor(static_cast<double>(sum) / pixels + 0.5));
}

__device__ void write(const Photometric& call, std::int64_t image, int channel, int y, int x, float level) {
    const std::int64_t row = (image * 3 + channel) * call.height + y;
    call.out[row * call.width + x] = __fmul_rn(level, call.scale[channel]) - call.shift[channel];
}

__device__ int within(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// The tile of a block, and where it keeps what.
struct Tile {
    std::int64_t image;
    int top, left, rows, columns;   // of the results
    int radius, stride, levels_of;  // halo; columns with halo; bytes of a channel
    float* weights;                 // [2 radius + 1]
    float* down;                    // [rows][stride]
    unsigned char* levels;          // [3][rows + 2 radius][stride]
};

__device__ void load_tile(const Photometric& call, const Tile& tile, const Prepared& prepared) {
    const Look look = load_look(call, tile.image);
    for (int i = threadIdx.x; i <= 2 * tile.radius; i += kThreads) tile.weights[i] = prepared.weights[i];
    for (int i = threadIdx.x; i < tile.levels_of; i += kThreads) {
        const int y = within(tile.top + i / tile.stride - tile.radius, call.height);
        const int x = within(tile.left + i % tile.stride - tile.radius, call.width);
        const Pixel p = change(load_pixel(call, tile.image, y, x), look, prepared.grey, false);
        tile.levels[i] = static_cast<unsigned char>(p.red);
        tile.levels[tile.levels_of + i] = static_cast<unsigned char>(p.green);
        tile.levels[2 * tile.levels_of + i] = static_cast<unsigned char>(p.blue);
    }
}

__device__ void blur_tile(const Photometric& call, const Tile& tile, int channel) {
    const unsigned char* levels = tile.levels + channel * tile.levels_of;
    for (int i = threadIdx.x; i < tile.rows * tile.stride; i += kThreads) {
        float sum = 0;
        for (int tap = 0; tap <= 2 * tile.radius; ++tap)
            sum += static_cast<float>(levels[i + tap * tile.stride]) * tile.weights[tap];
        tile.down[i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.rows * tile.columns; i += kThreads) {
        const int y = i / tile.columns, x = i % tile.columns;
        float sum = 0;
        for (int tap = 0; tap <= 2 * tile.radius; ++tap)
            sum += tile.down[y * tile.stride + x + tap] * tile.weights[tap];
        write(call, tile.image, channel, tile.top + y, tile.left + x, rintf(sum));
    }
    // the next channel overwrites `down`
    __syncthreads();
}

__device__ void plain_tile(const Photometric& call, const Tile& tile, float grey) {
    const Look look = load_look(call, tile.image);
    for (int i = threadIdx.x; i < tile.rows * tile.columns; i += kThreads) {
        const int y = tile.top + i / tile.columns, x = tile.left + i % tile.columns;
        const Pixel p = change(load_pixel(call, tile.image, y, x), look, grey, false);
        write(call, tile.image, 0, y, x, p.red);
        write(call, tile.image, 1, y, x, p.green);
        write(call, tile.image, 2, y, x, p.blue);
    }
}

__host__ __device__ int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

__global__ void __launch_bounds__(kThreads) render(const Photometric call, const Prepared* all_prepared) {
    const int across = tiles_of(call.width, kColumns), tiles = across * tiles_of(call.height, kRows);
    const int number = blockIdx.x % tiles;
    Tile tile;
    tile.image = blockIdx.x / tiles;
    const Prepared& prepared = all_prepared[tile.image];
    tile.top = number / across * kRows;
    tile.left = number % across * kColumns;
    tile.rows = call.height - tile.top < kRows ? call.height - tile.top : kRows;
    tile.columns = call.width - tile.left < kColumns ? call.width - tile.left : kColumns;
    tile.radius = prepared.radius;
    if (tile.radius == 0) return plain_tile(call, tile, prepared.grey);
    tile.stride = tile.columns + 2 * tile.radius;
    tile.levels_of = (tile.rows + 2 * tile.radius) * tile.stride;
    tile.weights = reinterpret_cast<float*>(shared_memory());
    tile.down = tile.weights + 2 * tile.radius + 1;
    tile.levels = reinterpret_cast<unsigned char*>(tile.down + tile.rows * tile.stride);
    load_tile(call, tile, prepared);
    __syncthreads();
    for (int channel = 0; channel < 3; ++channel) blur_tile(call, tile, channel);
}

// for the largest radius of the call
size_t shared_bytes(int radius) {
    if (radius == 0) return 0;
    const size_t stride = kColumns + 2 * radius;
    return (2 * radius + 1 + kRows * stride) * sizeof(float) + 3 * (kRows + 2 * radius) * stride;
}

}  // namespace

std::int64_t photometric_workspace(const Photometric& call) {
    return call.batch * static_cast<std::int64_t>(sizeof(Prepared) + kGreyBlocks * sizeof(long long));
}

void photometric(const Photometric& call) {
    const std::string what = "photometric of [" + std::to_string(call.batch) + ", 3, " + std::to_string(call.height) +
                             ", " + std::to_string(call.width) + "]";
    const int batch = static_cast<int>(call.batch);
    auto* sums = static_cast<long long*>(call.workspace);
    auto* prepared = reinterpret_cast<Prepared*>(sums + call.batch * kGreyBlocks);
    if (call.contrast)
        check(launch(add_up_grey, batch * kGreyBlocks, kThreads, kThreads * sizeof(long long), call.stream, call, sums),
              what + " (grey)");
    check(launch(prepare, batch, kThreads, (2 * kMaxRadius + 1) * sizeof(double), call.stream, call, sums, prepared),
          what + " (taps)");
    const int tiles = tiles_of(call.width, kColumns) * tiles_of(call.height, kRows);
    check(launch(render, batch * tiles, kThreads, shared_bytes(call.radius), call.stream, call, prepared), what);
}

}  // namespace pmm
