// pmm_fast._CUDA: the CUDA kernels for Python.  Addresses are integers, an absent tensor is 0 or None; a map is
// (address, type, batch stride, channel stride, position stride).  Knows no torch, and imports without a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "operators.h"
#ifdef PMM_EMULATED
#include "emulator.h"
#endif

namespace py = pybind11;
using pmm::Call;
using pmm::Labels;
using pmm::Map;
using pmm::Merge;
using pmm::Order;
using pmm::Photometric;
using pmm::Upsample;
using pmm::Workspace;

namespace {

Map to_map(const py::object& given) {
    if (given.is_none()) return {};
    const auto [address, type, batch, channel, position] =
        given.cast<std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t>>();
    Map map;
    map.data = reinterpret_cast<void*>(address);
    map.batch = batch;
    map.channel = channel;
    map.position = position;
    map.type = static_cast<pmm::Type>(type);
    return map;
}

Labels to_labels(const std::tuple<std::uintptr_t, int, int, int, std::int64_t>& given) {
    const auto [address, type, height, width, ignore_index] = given;
    return {reinterpret_cast<const void*>(address), static_cast<pmm::Type>(type), height, width, ignore_index};
}

// fields are written from Python, never read
template <class Bound, class Owner>
void maps(Bound& bound, std::initializer_list<std::pair<const char*, Map Owner::*>> fields) {
    for (const auto& [name, field] : fields)
        bound.def_property(
            name, [](const Owner&) { return py::none(); },
            [field = field](Owner& call, const py::object& value) { call.*field = to_map(value); });
}

template <class Bound, class Owner, class Pointer>
void address(Bound& bound, const char* name, Pointer Owner::* field) {
    bound.def_property(
        name, [](const Owner&) { return py::none(); },
        [field](Owner& call, std::uintptr_t value) { call.*field = reinterpret_cast<Pointer>(value); });
}

template <class Bound, class Owner, class T, std::size_t size>
void array(Bound& bound, const char* name, T (Owner::*field)[size]) {
    bound.def_property(
        name, [](const Owner&) { return py::none(); },
        [field](Owner& call, const std::array<T, size>& value) {
            std::copy(value.begin(), value.end(), call.*field);
        });
}

template <class Bound, class Owner>
void shared_fields(Bound& bound) {
    bound.def_property(
        "compute", [](const Owner&) { return py::none(); },
        [](Owner& call, int type) { call.compute = static_cast<pmm::Type>(type); });
    bound.def_property(
        "labels", [](const Owner&) { return py::none(); },
        [](Owner& call, const std::tuple<std::uintptr_t, int, int, int, std::int64_t>& given) {
            call.labels = to_labels(given);
        });
    bound.def_readwrite("batch", &Owner::batch).def_readwrite("height", &Owner::height);
    bound.def_readwrite("width", &Owner::width).def_readwrite("slots", &Owner::slots);
    bound.def_readwrite("blocks", &Owner::blocks);
    address(bound, "workspace", &Owner::workspace);
    address(bound, "stream", &Owner::stream);
}

// two builds of this module, the emulated one beside the installed one, may be loaded in one process
const py::module_local local;

void bind_call(py::module_& module) {
    py::class_<Call> call(module, "Call", local, "One call of a memory operator; fields as in operators.h.");
    call.def(py::init<>());
    shared_fields<py::class_<Call>, Call>(call);
    call.def_readwrite("read", &Call::read).def_readwrite("pool", &Call::pool);
    call.def_readwrite("normalize", &Call::normalize).def_readwrite("temperature", &Call::temperature);
    call.def_readwrite("channels", &Call::channels).def_readwrite("depth", &Call::depth);
    maps<py::class_<Call>, Call>(call, {{"features", &Call::features},
                                        {"noise", &Call::noise},
                                        {"grad_read", &Call::grad_read},
                                        {"grad_scores", &Call::grad_scores},
                                        {"grad_grad_features", &Call::grad_grad_features},
                                        {"grad_grad_noise", &Call::grad_grad_noise},
                                        {"out_features", &Call::out_features},
                                        {"out_read", &Call::out_read},
                                        {"out_scores", &Call::out_scores},
                                        {"out_noise", &Call::out_noise}});
    address(call, "seed", &Call::seed);
    address(call, "keys", &Call::keys);
    address(call, "values", &Call::values);
    address(call, "grad_sums", &Call::grad_sums);
    address(call, "grad_grad_keys", &Call::grad_grad_keys);
    address(call, "grad_grad_values", &Call::grad_grad_values);
    address(call, "out_sums", &Call::out_sums);
    address(call, "out_mass", &Call::out_mass);
    address(call, "out_keys", &Call::out_keys);
    address(call, "out_values", &Call::out_values);
}

void bind_upsample(py::module_& module) {
    py::class_<Upsample> call(module, "Upsample", local,
                              "One call of upsample_cross_entropy; fields as in operators.h.");
    call.def(py::init<>());
    shared_fields<py::class_<Upsample>, Upsample>(call);
    call.def_readwrite("align_corners", &Upsample::align_corners);
    maps<py::class_<Upsample>, Upsample>(call, {{"logits", &Upsample::logits},
                                                {"grad_grad_logits", &Upsample::grad_grad_logits},
                                                {"out_logits", &Upsample::out_logits}});
    address(call, "grad_loss", &Upsample::grad_loss);
    address(call, "count", &Upsample::count);
    address(call, "out_loss", &Upsample::out_loss);
}

void bind_photometric(py::module_& module) {
    py::class_<Photometric> call(module, "Photometric", local, "One call of photometric; fields as in operators.h.");
    call.def(py::init<>());
    call.def_readwrite("batch", &Photometric::batch).def_readwrite("height", &Photometric::height);
    call.def_readwrite("width", &Photometric::width).def_readwrite("radius", &Photometric::radius);
    call.def_readwrite("contrast", &Photometric::contrast);
    array(call, "strides", &Photometric::strides);
    array(call, "scale", &Photometric::scale);
    array(call, "shift", &Photometric::shift);
    address(call, "images", &Photometric::images);
    address(call, "looks", &Photometric::looks);
    address(call, "out", &Photometric::out);
    address(call, "workspace", &Photometric::workspace);
    address(call, "stream", &Photometric::stream);
    module.def("photometric", pmm::photometric);
    module.def("photometric_workspace", pmm::photometric_workspace);
}

void bind_merge(py::module_& module) {
    py::class_<Merge> call(module, "Merge", local, "One call of merge_tiles; fields as in operators.h.");
    call.def(py::init<>());
    call.def_property(
        "type", [](const Merge&) { return py::none(); },
        [](Merge& merge, int type) { merge.type = static_cast<pmm::Type>(type); });
    call.def_readwrite("tiles", &Merge::tiles).def_readwrite("classes", &Merge::classes);
    call.def_readwrite("height", &Merge::height).def_readwrite("width", &Merge::width);
    call.def_readwrite("tile_height", &Merge::tile_height).def_readwrite("tile_width", &Merge::tile_width);
    call.def_readwrite("image_height", &Merge::image_height).def_readwrite("image_width", &Merge::image_width);
    array(call, "strides", &Merge::strides);
    address(call, "logits", &Merge::logits);
    address(call, "tops", &Merge::tops);
    address(call, "lefts", &Merge::lefts);
    address(call, "average", &Merge::average);
    address(call, "labels", &Merge::labels);
    address(call, "confidence", &Merge::confidence);
    address(call, "stream", &Merge::stream);
    module.def("merge_tiles", pmm::merge_tiles);
}

template <class Owner>
void bind_operator(py::module_& module, const char* name, void (*run)(Order, const Owner&),
                   Workspace (*workspace)(Order, const Owner&)) {
    module.def(name, [run](int order, const Owner& call) { run(static_cast<Order>(order), call); });
    module.def((std::string(name) + "_workspace").c_str(), [workspace](int order, const Owner& call) {
        const Workspace needed = workspace(static_cast<Order>(order), call);
        return std::make_pair(needed.blocks, needed.per_block);
    });
}

#ifdef PMM_EMULATED
void bind_emulator(py::module_& module) {
    module.def("set_emulation", [](int shared_limit, int multiprocessors, unsigned order) {
        auto& gpu = emulator::device();
        gpu.shared_limit = shared_limit;
        gpu.multiprocessors = multiprocessors;
        gpu.order = order;
    });
    module.def("set_missing_code", [](bool missing) { emulator::device().missing_code = missing; });
    module.def("launches", [] { return emulator::device().launches; });
}
#endif

}  // namespace

PYBIND11_MODULE(_CUDA, module) {
#ifdef PMM_COMPILER
    module.attr("compiler") = PMM_COMPILER;
#endif
    module.doc() = "CUDA kernels of pmm_fast; orders: 0 forward, 1 backward, 2 double backward.";
    bind_call(module);
    bind_upsample(module);
    bind_photometric(module);
    bind_merge(module);
    bind_operator<Call>(module, "masked_average_pool", pmm::masked_average_pool, pmm::masked_average_pool_workspace);
    bind_operator<Call>(module, "memory_read", pmm::memory_read, pmm::memory_read_workspace);
    bind_operator<Call>(module, "memory_pass", pmm::memory_pass, pmm::memory_pass_workspace);
    bind_operator<Upsample>(module, "upsample_cross_entropy", pmm::upsample_cross_entropy,
                            pmm::upsample_cross_entropy_workspace);
    module.def("unusable", pmm::unusable);
#ifdef PMM_EMULATED
    bind_emulator(module);
#endif
}
