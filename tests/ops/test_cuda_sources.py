"""The CUDA kernels without a GPU: the same sources, compiled for the CPU and run thread by thread; and nvcc's opinion.

What only a GPU shows (speed, races between warps, what the compiler made of it) is in ``tests/ops/test_gpu.py``.
"""

import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pmm_fast import ops
from pmm_fast.ops import backends, cuda
from tests.cuda import build
from tests.ops import matrix, tiles
from tests.ops.inputs import make_inputs
from tests.ops.looks import NOTHING, ORDERS, assert_rendered, photometric, random_images, random_looks
from tests.ops.matrix import CASES, FEW
from tests.ops.test_merge_tiles import assert_ties_and_nan

EMULATED = matrix.Target("cuda", "cpu")
SMALL = {"batch": 1, "channels": 3, "classes": 3, "size": (2, 2), "label_size": (3, 5)}
# orders in which threads and blocks run; larger numbers are seeds of random ones
ASCENDING, DESCENDING = 0, 1
# shared memory of a block in bytes, multiprocessors, and the order
USUAL = (99 * 1024, 2, ASCENDING)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if not shutil.which("g++") or platform.system() != "Linux":
        pytest.skip("the emulator is compiled with g++ for Linux")
    return build.emulated_module(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def gpu(emulated, monkeypatch):
    """The emulated module as the cuda backend."""
    monkeypatch.setattr(matrix, "why_absent", lambda target, operator: None)
    emulated.set_emulation(*USUAL)
    with build.on_cpu(emulated):
        yield emulated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_three_orders(gpu, name, dtype):
    before = gpu.launches()
    matrix.compare(name, matrix.make(CASES[name], dtype=dtype), EMULATED)
    assert gpu.launches() - before >= 3


@pytest.mark.parametrize("name", CASES)
def test_finite_differences(gpu, name):
    case = CASES[name]
    function, point = matrix.function(case, matrix.make(case, **SMALL))
    with matrix.on(EMULATED, case.operator):
        assert torch.autograd.gradcheck(function, point)
        assert torch.autograd.gradgradcheck(function, point, fast_mode=True)


# from whole features in shared memory to eight positions at a time, in many chunks, and sums in global memory
@pytest.mark.parametrize("emulation", [(227 * 1024, 3, DESCENDING), (36 * 1024, 1, 2), (20 * 1024, 2, 3)], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_however_the_call_is_cut(gpu, name, emulation):
    gpu.set_emulation(*emulation)
    sizes = {"batch": 1, "channels": 250, "classes": 19, "size": (5, 8), "label_size": (31, 47)}
    matrix.compare(name, matrix.make(CASES[name], dtype=torch.float32, **sizes), EMULATED)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    ("batch", "channels", "classes", "size", "label_size"),
    [
        (1, 1, 1, (1, 1), (1, 1)),
        (2, 3, 2, (1, 1), (9, 4)),
        (3, 16, 23, (4, 8), (4, 8)),
        (1, 24, 70, (9, 8), (5, 3)),
        (1, 8, 33, (2, 3), (150, 140)),
        (1, 256, 19, (6, 6), (36, 36)),
        (1, 4, 5, (17, 40), (33, 250)),
        (0, 5, 4, (3, 4), (6, 8)),
    ],
    ids=str,
)
def test_shapes(gpu, name, batch, channels, classes, size, label_size):
    sizes = {"batch": batch, "channels": channels, "classes": classes, "size": size, "label_size": label_size}
    gpu.set_emulation(227 * 1024, 2, 2)
    matrix.compare(name, matrix.make(CASES[name], dtype=torch.float32, **sizes), EMULATED, cancelling=0.1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("align_corners", [True, False])
def test_logits_that_leap(gpu, dtype, align_corners):
    """The classes of two neighbouring rows are so far apart that between them no power of two is left of either."""
    sizes = {"batch": 1, "classes": 5, "size": (3, 4), "label_size": (17, 29)}
    arguments = matrix.make(CASES["loss"], dtype=dtype, **sizes) | {"align_corners": align_corners}
    arguments["logits"] *= 1000
    matrix.compare("loss", arguments, EMULATED)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x):
    return torch.cat([x, x], 1)[:, : x.shape[1]]


def transposed(x):
    return x.mT.contiguous().mT


def shifted(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [last, sliced, transposed], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", FEW)
def test_layouts_that_are_loaded_16_bytes_at_a_time(gpu, name, layout, dtype):
    case = CASES[name]
    arguments = matrix.make(case, dtype=dtype, channels=16, classes=8, size=(4, 8), label_size=(9, 17))
    maps = [key for key in case.tensors if arguments[key].dim() == 4]
    arguments = matrix.changed(case, arguments, layout, maps)
    found = matrix.compare(name, arguments, EMULATED)
    if layout is last:
        grads = [grad for grad in found["backward"].values() if grad.dim() == 4 and grad.shape[1] == 16]
        assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_addresses_that_16_bytes_cannot_be_loaded_from(gpu, name, dtype):
    case = CASES[name]
    arguments = matrix.make(case, dtype=dtype, channels=16, classes=8, size=(4, 8), label_size=(9, 17))
    matrix.compare(name, matrix.changed(case, arguments, shifted), EMULATED)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str
)
@pytest.mark.parametrize("name", ["pool", "pass-one", "loss"])
def test_label_types(gpu, name, dtype):
    case = CASES[name]
    arguments = matrix.make(case, dtype=torch.float32) | {"ignore_index": 100}
    labels = arguments["labels"].long()
    arguments["labels"] = labels.masked_fill(labels == 255, 100).to(dtype)
    with ops.use_backend("reference"):
        # int64, since PyTorch cannot compare all of them
        expected = matrix.call(case, arguments | {"labels": arguments["labels"].long()})
    with matrix.on(EMULATED, case.operator):
        for found, other in zip(matrix.call(case, arguments), expected, strict=True):
            torch.testing.assert_close(found, other)


@pytest.mark.parametrize("position", [(0, 0), (2, 4), (5, 7)])
@pytest.mark.parametrize("name", ["pool", "pass-one", "loss"])
def test_one_labelled_pixel(gpu, name, position):
    """A class that one position of a tile sees, the first or another, is in the tile's list."""
    arguments = matrix.make(CASES[name], dtype=torch.float32, size=(6, 8), label_size=(6, 8))
    arguments["labels"].fill_(255)
    arguments["labels"][:, position[0], position[1]] = 2
    matrix.compare(name, arguments, EMULATED)


@pytest.mark.parametrize("value", [4, -1, 2**32 + 1])
@pytest.mark.parametrize("name", ["pool", "pass-values", "pass-one", "loss"])
def test_a_wrong_label_is_a_device_assertion(gpu, name, value):
    case = CASES[name]
    arguments = matrix.make(case, label_dtype=torch.int64)
    arguments["labels"][1, -1, -1] = value
    operator = "(masked_average_pool|memory_pass|upsample_cross_entropy)"
    message = rf"{operator} forward of \[2, \d, 3, 5\].*device-side assert"
    with matrix.on(EMULATED, case.operator), pytest.raises(RuntimeError, match=message):
        matrix.call(case, arguments)


def test_too_many_slots(gpu):
    gpu.set_emulation(6 * 1024, 2, ASCENDING)
    arguments = matrix.make(CASES["read"], classes=64)
    with matrix.on(EMULATED), pytest.raises(RuntimeError, match=r"memory_read forward of .* 64 slots.* too many slots"):
        matrix.call(CASES["read"], arguments)


@pytest.mark.parametrize("name", FEW)
def test_same_bits_each_time_and_in_any_order_of_threads_and_blocks(gpu, name):
    case = CASES[name]
    arguments = matrix.make(case, dtype=torch.float32, channels=40, size=(9, 8), label_size=(20, 30))
    incoming, tangents = matrix.directions(case, arguments)
    results = []
    for order in (ASCENDING, DESCENDING, 2, 2, 3):
        gpu.set_emulation(*USUAL[:2], order)
        with matrix.on(EMULATED, case.operator):
            results.append(matrix.orders(case, arguments, incoming, tangents))
    for other in results[1:]:
        for order, named in results[0].items():
            assert all(torch.equal(value, other[order][key]) for key, value in named.items())


@pytest.mark.parametrize("seed", [0, 2**40 + 17, -5])
def test_noise_of_a_seed(gpu, seed):
    """Read off the operator itself: with equal keys, the log of the weights is the noise less a constant."""
    features = torch.ones(2, 1, 5, 7, dtype=torch.float64)
    zero, values = torch.zeros(6, 1, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    given = torch.tensor([seed])
    with matrix.on(EMULATED):
        weights, _ = ops.memory_read(features, zero, given, values=values)
    noise = ops.seeded_gumbel_noise(given, tuple(weights.shape), torch.float64)
    torch.testing.assert_close(weights.log(), noise - noise.logsumexp(1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_one_tensor_is_one_walk(gpu):
    """A pass of one tensor is one walk and then the sums over its blocks; of two, the read's walk sums nothing."""
    inputs = make_inputs()
    counts = []
    for written in (inputs.features, inputs.written):
        before = gpu.launches()
        with matrix.on(EMULATED):
            ops.memory_pass(inputs.features, written, inputs.labels, inputs.memory)
        counts.append(gpu.launches() - before)
    assert counts == [2, 3]


# the largest radius takes 54 KiB of a block's shared memory
@pytest.mark.parametrize("order", [ASCENDING, 2])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last, sliced, transposed], ids=lambda f: f.__name__)
def test_looks(gpu, layout, order):
    gpu.set_emulation(*USUAL[:2], order)
    images, looks = random_images(len(ORDERS), (13, 31)), random_looks(ORDERS, (0.0, 0.15, 0.7, 1.3))
    with matrix.on(EMULATED, "photometric"), matrix.poisoned():
        found = photometric(layout(images), looks)
    assert_rendered(found, images, looks)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (33, 129), (65, 64)], ids=str)
def test_looks_in_tiles(gpu, size):
    images, looks = random_images(3, size), random_looks(ORDERS[7::6], (8.1, 0.0, 1.3))
    with matrix.on(EMULATED, "photometric"):
        found = photometric(images, looks)
    assert_rendered(found, images, looks)


def test_looks_take_no_more_launches_than_they_need(gpu):
    """The sums that contrast needs are a launch of their own, the taps another, and all the rest is one."""
    images, counts = random_images(1, (5, 6)), []
    for look in ([0, 1, 2, 3, 1.2, 0.8, 1.1, 5, 0.7], NOTHING):
        before = gpu.launches()
        with matrix.on(EMULATED, "photometric"):
            photometric(images, torch.tensor([look], dtype=torch.float32))
        counts.append(gpu.launches() - before)
    assert counts == [3, 2]


@pytest.mark.parametrize("order", [ASCENDING, 2])
@pytest.mark.parametrize("name", tiles.CASES)
def test_tiles(gpu, name, order):
    gpu.set_emulation(*USUAL[:2], order)
    case, before = tiles.CASES[name], gpu.launches()
    with matrix.on(EMULATED, "merge_tiles"), matrix.poisoned():
        tiles.assert_merged(tiles.make(case), case.tiling)
    # the average, the classes, and these with their confidence
    assert gpu.launches() - before == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed], ids=lambda layout: layout.__name__)
def test_tiles_of_any_type(gpu, layout, dtype):
    case = tiles.CASES["grid"]
    with matrix.on(EMULATED, "merge_tiles"):
        tiles.assert_merged(layout(tiles.make(case, dtype)), case.tiling)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_tiles_with_ties_and_nan(gpu, dtype):
    assert_ties_and_nan(EMULATED, dtype)


def test_too_many_tiles(gpu):
    gpu.set_emulation(256, 2, ASCENDING)
    case = tiles.CASES["many tiles"]
    message = r"merge_tiles of \[70, 2, 2, 3\] to \[3, 78\]: invalid argument"
    with matrix.on(EMULATED, "merge_tiles"), pytest.raises(RuntimeError, match=message):
        ops.merge_tiles(tiles.make(case), *case.tiling)


def test_matrices_are_padded_and_aligned_and_else_not_copied(gpu):
    call, whole = cuda.memory_call(torch.zeros(1, 3, 2, 2), 2), torch.zeros(2, 8)
    call.matrix("keys", torch.zeros(7)[1:].view(2, 3))
    call.matrix("values", torch.zeros(17)[1:].view(2, 8))
    call.matrix("grad_sums", whole)
    assert all(tensor.data_ptr() % 16 == 0 and tensor.shape[-1] == 8 for tensor in call._alive[1:])
    assert call._alive[-1].data_ptr() == whole.data_ptr()


def test_a_device_that_the_module_has_no_code_for(gpu, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: None)
    for missing, message in ((True, "no kernel image is available"), (False, None)):
        gpu.set_missing_code(missing)
        monkeypatch.setattr(cuda, "_reasons", {})
        reason = backends.refuses("cuda", SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32))
        assert reason is None if message is None else message in reason and "cuda:0" in reason


def test_two_builds_in_one_process(emulated, tmp_path):
    second = build.load(Path(shutil.copy(emulated.__file__, tmp_path)), "second._CUDA")
    assert second.Call is not emulated.Call


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The module that nvcc builds, with the seconds it took."""
    nvcc = shutil.which("nvcc")
    if not nvcc or not shutil.which("g++"):
        pytest.skip("no nvcc on the path")
    folder = tmp_path_factory.mktemp("nvcc")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    flags = ["-O3", "-std=c++17", "--threads=2", "-Xptxas=-v", "-Xcompiler=-fPIC", *codes]
    start = time.perf_counter()

    def compile_one(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.name}.o"
        kind = [] if source.suffix == ".cu" else ["-x", "c++", *build.includes()]
        return target, build.run([nvcc, *flags, *kind, "-c", source, "-o", target])

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compile_one, [*build.KERNELS, build.SOURCES / "bindings.cpp"]))
    library = folder / "_CUDA.so"
    build.run([nvcc, "-shared", "-cudart=static", *(target for target, _ in results), "-o", library])
    print(f"nvcc took {time.perf_counter() - start:.0f} s")
    return library, "".join(text for _, text in results)


@pytest.mark.slow
def test_nvcc_compiles_without_spills(built):
    _, said = built
    properties = [line for line in said.splitlines() if "bytes spill stores" in line]
    assert len(properties) >= 2 * 3 * 6
    assert [line for line in properties if "0 bytes spill stores, 0 bytes spill loads" not in line] == []
    assert "warning" not in said


@pytest.mark.slow
def test_the_module_imports_without_a_gpu(built):
    library, _ = built
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _CUDA; print(*sorted(dir(_CUDA)))"
    run = subprocess.run([sys.executable, "-c", code, str(library.parent)], capture_output=True, text=True, check=True)
    names = set(run.stdout.split())
    operators = {name for case in CASES.values() for name in (case.operator, f"{case.operator}_workspace")}
    operators |= {"photometric", "photometric_workspace", "merge_tiles"}
    assert operators | {"Call", "Upsample", "Photometric", "Merge"} <= names and "set_emulation" not in names
