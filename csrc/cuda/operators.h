// What Python and the kernels agree on: addresses, sizes and strides.  Plain C++, without CUDA and without torch.
//
// B images, C channels, D width of the values, K slots or classes, h x w positions, H x W label pixels.
#pragma once

#include <cstdint>
#include <string>

namespace pmm {

enum class Type : int { float32 = 0, float64, bfloat16, float16, uint8, int8, int16, int32, int64 };

enum class Order : int { forward = 0, backward = 1, double_backward = 2 };

// which axis of a map can be read 16 bytes at a time
enum class Vector : int { none = 0, positions = 1, channels = 2 };

// a tensor [B, channels, h, w] whose last two axes are one; no data: absent.  strides count elements
struct Map {
    void* data = nullptr;
    std::int64_t batch = 0;
    std::int64_t channel = 0;
    std::int64_t position = 0;
    Type type = Type::float32;
    Vector vector = Vector::none;
};

// labels [B, H, W], contiguous
struct Labels {
    const void* data = nullptr;
    Type type = Type::uint8;
    int height = 0;
    int width = 0;
    std::int64_t ignore_index = 255;
};

// One call of masked_average_pool (pool), memory_read (read) or memory_pass of one tensor (both), of any order.
// Names follow docs/ops: `grad_*` comes in from the loss, `grad_grad_*` from the double backward, `out_*` is written.
// Matrices are [K, C] or [K, D] in the compute type, rows padded with zeros to a multiple of kMatrixPad numbers.
struct Call {
    bool read = false;
    bool pool = false;
    bool normalize = true;
    Type compute = Type::float32;
    std::int64_t batch = 0;
    int height = 0;
    int width = 0;
    int channels = 0;
    int depth = 0;
    int slots = 0;
    double temperature = 1.0;
    Labels labels;
    Map features;
    Map noise;
    const std::int64_t* seed = nullptr;
    const void* keys = nullptr;
    const void* values = nullptr;
    Map grad_read;
    Map grad_scores;
    const void* grad_sums = nullptr;
    Map grad_grad_features;
    Map grad_grad_noise;
    const void* grad_grad_keys = nullptr;
    const void* grad_grad_values = nullptr;
    Map out_features;
    Map out_read;
    Map out_scores;
    Map out_noise;
    void* out_sums = nullptr;
    void* out_mass = nullptr;
    void* out_keys = nullptr;
    void* out_values = nullptr;
    void* workspace = nullptr;
    int blocks = 0;
    void* stream = nullptr;
};

constexpr int kMatrixPad = 8;

// blocks of the persistent grid, and numbers of the compute type each needs in the workspace
struct Workspace {
    int blocks;
    std::int64_t per_block;
};

Workspace masked_average_pool_workspace(Order order, const Call& call);
Workspace memory_read_workspace(Order order, const Call& call);
Workspace memory_pass_workspace(Order order, const Call& call);

// All throw std::runtime_error with operator, order and shape when a launch fails.
void masked_average_pool(Order order, const Call& call);
void memory_read(Order order, const Call& call);
void memory_pass(Order order, const Call& call);

// One call of upsample_cross_entropy of any order; logits [B, K, h, w], labels as above.  Scalars are in the compute
// type.
struct Upsample {
    Type compute = Type::float32;
    bool align_corners = true;
    std::int64_t batch = 0;
    int height = 0;
    int width = 0;
    int slots = 0;
    Labels labels;
    Map logits;
    Map grad_grad_logits;
    const void* grad_loss = nullptr;
    void* count = nullptr;
    void* out_loss = nullptr;  // forward: the loss; double backward: the gradient of grad_loss
    Map out_logits;
    void* workspace = nullptr;
    int blocks = 0;
    void* stream = nullptr;
};

Workspace upsample_cross_entropy_workspace(Order order, const Upsample& call);
void upsample_cross_entropy(Order order, const Upsample& call);

// One call of photometric; images [N, 3, h, w] with strides in bytes, looks [N, 9] and out [N, 3, h, w] contiguous.
struct Photometric {
    std::int64_t batch = 0;
    int height = 0;
    int width = 0;
    const unsigned char* images = nullptr;
    std::int64_t strides[4] = {0, 0, 0, 0};
    const float* looks = nullptr;
    float scale[3] = {0, 0, 0};  // result = level * scale - shift
    float shift[3] = {0, 0, 0};
    int radius = 0;         // no look has a larger one
    bool contrast = false;  // whether any look may have it
    float* out = nullptr;
    void* workspace = nullptr;
    void* stream = nullptr;
};

constexpr int kMaxRadius = 32;

// in bytes
std::int64_t photometric_workspace(const Photometric& call);
// throws std::runtime_error with operator and shape when a launch fails
void photometric(const Photometric& call);

// One call of merge_tiles; logits [T, K, h, w] with strides in elements.  Results are contiguous: the average
// [K, H, W], or else classes and, if wanted, confidence [H, W].
struct Merge {
    Type type = Type::float32;
    int tiles = 0;
    int classes = 0;
    int height = 0;
    int width = 0;
    int tile_height = 0;
    int tile_width = 0;
    int image_height = 0;
    int image_width = 0;
    const void* logits = nullptr;
    std::int64_t strides[4] = {0, 0, 0, 0};
    const std::int64_t* tops = nullptr;
    const std::int64_t* lefts = nullptr;
    float* average = nullptr;
    unsigned char* labels = nullptr;
    float* confidence = nullptr;
    void* stream = nullptr;
};

// throws std::runtime_error with operator and shape when a launch fails
void merge_tiles(const Merge& call);

// Why the current device cannot run the kernels, or null: none was compiled for it, or its driver is too old.
const char* unusable();

inline const char* order_name(Order order) {
    constexpr const char* names[] = {"forward", "backward", "double backward"};
    return names[static_cast<int>(order)];
}

}  // namespace pmm
