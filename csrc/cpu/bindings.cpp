// pmm_fast._C: the CPU kernels by address, and what was built.  Tensors stay in Python (pmm_fast/ops/cpu), which
// registers the operators, checks arguments and owns all memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "args.h"

namespace py = pybind11;

namespace pmm {

#define PMM_DECLARE(ISA)                                 \
  namespace ISA {                                        \
  int64_t pass_workspace(const PassArgs&);               \
  bool pass(const PassArgs&);                            \
  int64_t loss_workspace(const LossArgs&);               \
  bool loss(const LossArgs&);                            \
  int64_t photometric_workspace(const PhotometricArgs&); \
  void photometric(const PhotometricArgs&);              \
  int64_t merge_workspace(const MergeArgs&);             \
  void merge_tiles(const MergeArgs&);                    \
  void resized_crop(const CropArgs&);                    \
  }
#define PMM_KERNELS(ISA)                                                                   \
  {                                                                                        \
    #ISA, ISA::pass_workspace, ISA::pass, ISA::loss_workspace, ISA::loss,                  \
        ISA::photometric_workspace, ISA::photometric,                                      \
        ISA::merge_workspace, ISA::merge_tiles, ISA::resized_crop                          \
  }
PMM_DECLARE(portable)
#if defined(__x86_64__)
PMM_DECLARE(avx2)
PMM_DECLARE(avx512)
#endif

namespace {

// best first
std::vector<Kernels> supported() {
  std::vector<Kernels> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(PMM_KERNELS(avx512));
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(PMM_KERNELS(avx2));
#endif
  found.push_back(PMM_KERNELS(portable));
  return found;
}

Kernels& active() {
  static Kernels kernels = supported().front();
  return kernels;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& kernels : supported()) names.push_back(kernels.name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Kernels& kernels : supported())
    if (name == kernels.name) {
      active() = kernels;
      return;
    }
  std::string all;
  for (const std::string& other : instruction_sets()) all += (all.empty() ? "" : ", ") + other;
  throw py::value_error("instruction set " + name + " is not to be had here; expected one of " + all);
}

// keyword arguments become fields of the same names; a name that no field has is an error
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <class T>
  void number(const char* name, T& field) {
    if (auto value = find(name)) field = py::cast<T>(value);
  }

  template <class Enum>
  void choice(const char* name, Enum& field) {
    if (auto value = find(name)) field = static_cast<Enum>(py::cast<int>(value));
  }

  template <class T>
  void address(const char* name, T*& field) {
    if (auto value = find(name)) field = reinterpret_cast<T*>(py::cast<uintptr_t>(value));
  }

  // (address, four strides)
  void map(const char* name, Map& field) {
    auto value = find(name);
    if (!value) return;
    const py::tuple parts = py::reinterpret_borrow<py::tuple>(value);
    field.data = reinterpret_cast<void*>(py::cast<uintptr_t>(parts[0]));
    for (int i = 0; i < 4; ++i) field.strides[i] = py::cast<int64_t>(parts[i + 1]);
  }

  void finish() const {
    if (found_ != given_.size()) throw py::type_error("a keyword that is no field of the kernel's arguments");
  }

 private:
  const py::kwargs& given_;
  size_t found_ = 0;

  // null for what is absent or None
  py::handle find(const char* name) {
    PyObject* value = PyDict_GetItemString(given_.ptr(), name);
    found_ += value != nullptr;
    return value && value != Py_None ? py::handle(value) : py::handle();
  }
};

PassArgs pass_args(const py::kwargs& given) {
  PassArgs a;
  Fields f(given);
  f.number("order", a.order), f.choice("type", a.type), f.choice("label_type", a.label_type);
  f.number("batch", a.batch), f.number("channels", a.channels), f.number("depth", a.depth);
  f.number("classes", a.classes), f.number("height", a.height), f.number("width", a.width);
  f.number("label_height", a.label_height), f.number("label_width", a.label_width);
  f.number("ignore_index", a.ignore_index), f.number("temperature", a.temperature);
  f.number("normalize", a.normalize), f.number("threads", a.threads);
  f.map("features", a.features), f.map("written", a.written), f.address("labels", a.labels);
  f.address("keys", a.keys), f.address("values", a.values), f.map("noise", a.noise), f.address("seed", a.seed);
  f.map("grad_read", a.grad_read), f.map("grad_scores", a.grad_scores), f.address("grad_sums", a.grad_sums);
  f.map("grad_grad_features", a.grad_grad_features), f.map("grad_grad_written", a.grad_grad_written);
  f.address("grad_grad_keys", a.grad_grad_keys), f.address("grad_grad_values", a.grad_grad_values);
  f.map("grad_grad_noise", a.grad_grad_noise);
  f.map("read", a.read), f.map("scores", a.scores), f.map("features_out", a.features_out);
  f.map("written_out", a.written_out), f.map("noise_out", a.noise_out);
  f.address("keys_out", a.keys_out), f.address("values_out", a.values_out);
  f.address("sums_out", a.sums_out), f.address("mass_out", a.mass_out);
  f.address("workspace", a.workspace);
  f.finish();
  return a;
}

LossArgs loss_args(const py::kwargs& given) {
  LossArgs a;
  Fields f(given);
  f.number("order", a.order), f.choice("type", a.type), f.choice("label_type", a.label_type);
  f.number("batch", a.batch), f.number("classes", a.classes), f.number("height", a.height);
  f.number("width", a.width), f.number("label_height", a.label_height), f.number("label_width", a.label_width);
  f.number("ignore_index", a.ignore_index), f.number("align_corners", a.align_corners), f.number("threads", a.threads);
  f.map("logits", a.logits), f.map("grad_grad_logits", a.grad_grad_logits), f.address("labels", a.labels);
  f.address("grad_loss", a.grad_loss), f.address("count", a.count);
  f.address("loss_out", a.loss_out), f.address("count_out", a.count_out), f.map("logits_out", a.logits_out);
  f.address("workspace", a.workspace);
  f.finish();
  return a;
}

PhotometricArgs photometric_args(const py::kwargs& given) {
  PhotometricArgs a;
  Fields f(given);
  f.number("batch", a.batch), f.number("height", a.height), f.number("width", a.width);
  f.number("radius", a.radius), f.number("threads", a.threads);
  f.map("images", a.images), f.address("looks", a.looks), f.address("scale", a.scale), f.address("shift", a.shift);
  f.address("out", a.out), f.address("workspace", a.workspace);
  f.finish();
  return a;
}

MergeArgs merge_args(const py::kwargs& given) {
  MergeArgs a;
  Fields f(given);
  f.choice("type", a.type), f.number("batch", a.batch), f.number("classes", a.classes);
  f.number("height", a.height), f.number("width", a.width);
  f.number("tile_height", a.tile_height), f.number("tile_width", a.tile_width);
  f.number("image_height", a.image_height), f.number("image_width", a.image_width), f.number("threads", a.threads);
  f.map("logits", a.logits), f.address("tops", a.tops), f.address("lefts", a.lefts);
  f.address("average", a.average), f.address("labels", a.labels), f.address("confidence", a.confidence);
  f.address("workspace", a.workspace);
  f.finish();
  return a;
}

CropArgs crop_args(const py::kwargs& given) {
  CropArgs a;
  Fields f(given);
  f.address("part", a.part), f.number("part_stride", a.part_stride);
  f.number("part_left", a.part_left), f.number("part_top", a.part_top);
  f.number("part_width", a.part_width), f.number("part_height", a.part_height);
  f.number("image_width", a.image_width), f.number("image_height", a.image_height);
  f.number("scaled_width", a.scaled_width), f.number("scaled_height", a.scaled_height);
  f.number("left", a.left), f.number("top", a.top), f.number("width", a.width), f.number("height", a.height);
  f.number("mirror", a.mirror), f.address("out", a.out);
  f.finish();
  return a;
}

template <class Args, class Result>
Result without_lock(Result (*kernel)(const Args&), const Args& args) {
  py::gil_scoped_release unlocked;
  return kernel(args);
}

}  // namespace
}  // namespace pmm

PYBIND11_MODULE(_C, module) {
  using namespace pmm;
  module.doc() = "CPU kernels of pmm_fast.  Arguments are the fields of csrc/cpu/args.h.";
  module.attr("compiler") = PMM_COMPILER;
  module.def("instruction_sets", instruction_sets, "Those of this processor that kernels are built for, best first.");
  module.def("instruction_set", [] { return std::string(active().name); }, "The one in use.");
  module.def("use_instruction_set", use_instruction_set, py::arg("name"), "Use another one (for tests and benches; not while a kernel runs).");
  module.def("pass_workspace", [](py::kwargs given) { return active().pass_workspace(pass_args(given)); },
             "Bytes of scratch memory that memory_pass needs for these arguments.");
  module.def("memory_pass", [](py::kwargs given) { return without_lock(active().pass, pass_args(given)); },
             "memory_pass, memory_read or masked_average_pool in any order; False for a label out of range.");
  module.def("loss_workspace", [](py::kwargs given) { return active().loss_workspace(loss_args(given)); },
             "Bytes of scratch memory that upsample_cross_entropy needs for these arguments.");
  module.def("upsample_cross_entropy", [](py::kwargs given) { return without_lock(active().loss, loss_args(given)); },
             "upsample_cross_entropy in any order; False for a label out of range.");
  module.def("photometric_workspace",
             [](py::kwargs given) { return active().photometric_workspace(photometric_args(given)); },
             "Bytes of scratch memory that photometric needs for these arguments.");
  module.def("photometric",
             [](py::kwargs given) { without_lock(active().photometric, photometric_args(given)); }, "photometric.");
  module.def("merge_workspace", [](py::kwargs given) { return active().merge_workspace(merge_args(given)); },
             "Bytes of scratch memory that merge_tiles needs for these arguments.");
  module.def("merge_tiles", [](py::kwargs given) { without_lock(active().merge_tiles, merge_args(given)); },
             "merge_tiles.");
  module.def("resized_crop", [](py::kwargs given) { without_lock(active().resized_crop, crop_args(given)); },
             "resized_crop.");
}
