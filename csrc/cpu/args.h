// What bindings.cpp hands to the kernels.  Addresses and sizes only: the kernels know no tensor library.
#pragma once

#include <cstdint>

namespace pmm {

enum class Type { kFloat32, kFloat64, kBFloat16 };
enum class LabelType { kUInt8, kInt16, kInt32, kInt64 };

// A map [B, channels, h, w]; strides in elements.  No data: not given, or not wanted.
struct Map {
  void* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
  explicit operator bool() const { return data != nullptr; }
};

// memory_pass in any order of differentiation.  masked_average_pool has no keys, memory_read no labels.  "features'
// type" is `type`; matrices, scores and noise have the type that it is computed in (float64 for float64, else float32).
// Letters as in docs/ops/memory_read.md and docs/ops/masked_average_pool.md.
struct PassArgs {
  int order = 0;  // 0 forward, 1 backward, 2 double backward
  Type type = Type::kFloat32;
  LabelType label_type = LabelType::kUInt8;
  int64_t batch = 0, channels = 0, depth = 0, classes = 0, height = 0, width = 0;
  int64_t label_height = 0, label_width = 0, ignore_index = 255;
  double temperature = 1;
  bool normalize = true;
  int threads = 1;

  Map features, written;            // the same map twice: read and pooled
  const void* labels = nullptr;     // [B, H, W] contiguous
  const void* keys = nullptr;       // [K, C]
  const void* values = nullptr;     // [K, D]
  Map noise;                        // [B, K, h, w]
  const int64_t* seed = nullptr;

  Map grad_read, grad_scores;       // A, e
  const void* grad_sums = nullptr;  // G [K, C]

  Map grad_grad_features, grad_grad_written;                           // a
  const void *grad_grad_keys = nullptr, *grad_grad_values = nullptr;   // P, Q
  Map grad_grad_noise;                                                 // n

  // results; of what is given, exactly that is computed.  In order 2 read and scores are the gradients of grad_read
  // and grad_scores, and sums that of grad_sums
  Map read, scores, features_out, written_out, noise_out;
  void *keys_out = nullptr, *values_out = nullptr, *sums_out = nullptr, *mass_out = nullptr;
  void* workspace = nullptr;
};

// upsample_cross_entropy in any order of differentiation.
struct LossArgs {
  int order = 0;
  Type type = Type::kFloat32;
  LabelType label_type = LabelType::kUInt8;
  int64_t batch = 0, classes = 0, height = 0, width = 0, label_height = 0, label_width = 0, ignore_index = 255;
  bool align_corners = true;
  int threads = 1;
  Map logits, grad_grad_logits;
  const void* labels = nullptr;
  const void *grad_loss = nullptr, *count = nullptr;  // numbers of the computing type
  void *loss_out = nullptr, *count_out = nullptr;     // in order 2 loss_out is the gradient of grad_loss
  Map logits_out;
  void* workspace = nullptr;
};

// photometric; N images of h x w pixels.
struct PhotometricArgs {
  int64_t batch = 0, height = 0, width = 0;
  int64_t radius = 0;  // the largest of all looks, at most kMaxRadius
  int threads = 1;
  Map images;                                      // uint8 [N, 3, h, w]
  const float* looks = nullptr;                    // [N, 9] contiguous
  const float *scale = nullptr, *shift = nullptr;  // of each channel: result = level * scale - shift
  float* out = nullptr;                            // [N, 3, h, w] contiguous
  void* workspace = nullptr;
};

constexpr int64_t kMaxRadius = 32;

// merge_tiles of T tiles.
struct MergeArgs {
  Type type = Type::kFloat32;
  int64_t batch = 0, classes = 0, height = 0, width = 0;  // T, and of the logits
  int64_t tile_height = 0, tile_width = 0, image_height = 0, image_width = 0;
  int threads = 1;
  Map logits;  // [T, K, h, w]
  const int64_t *tops = nullptr, *lefts = nullptr;
  // results: the average [K, H, W], or else classes and, optional, confidence [H, W]; contiguous
  float* average = nullptr;
  uint8_t* labels = nullptr;
  float* confidence = nullptr;
  void* workspace = nullptr;
};

// resized_crop of one image, by one thread; sizes and places in pixels.
struct CropArgs {
  const uint8_t* part = nullptr;  // what is at hand of the image, [part_height, part_width, 3], rows part_stride apart
  int64_t part_stride = 0, part_left = 0, part_top = 0, part_width = 0, part_height = 0;
  int64_t image_width = 0, image_height = 0, scaled_width = 0, scaled_height = 0;
  int64_t left = 0, top = 0, width = 0, height = 0;  // the crop in the scaled image
  bool mirror = false;
  uint8_t* out = nullptr;  // [height, width, 3]
};

// One instruction set's kernels.  `run` returns false when a label was neither a class nor ignored.
struct Kernels {
  const char* name;
  int64_t (*pass_workspace)(const PassArgs&);
  bool (*pass)(const PassArgs&);
  int64_t (*loss_workspace)(const LossArgs&);
  bool (*loss)(const LossArgs&);
  int64_t (*photometric_workspace)(const PhotometricArgs&);
  void (*photometric)(const PhotometricArgs&);
  int64_t (*merge_workspace)(const MergeArgs&);
  void (*merge_tiles)(const MergeArgs&);
  void (*resized_crop)(const CropArgs&);
};

}  // namespace pmm
