"""photometric against Pillow and NumPy (``pmm_fast.data.transforms.render``), on every backend."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from pmm_fast import ops
from pmm_fast.data import transforms
from pmm_fast.ops import backends, extension, photometric_reference
from pmm_fast.ops.chain import kernels
from pmm_fast.ops.looks import assert_looks, read_looks
from tests.ops import matrix
from tests.ops.looks import (
    MEAN,
    NOTHING,
    ORDERS,
    STD,
    assert_rendered,
    levels_of,
    photometric,
    random_images,
    random_looks,
    rendered,
)
from tests.ops.matrix import CPU

MODULE = None if extension.missing("_C") else extension.load("_C")
SETS = MODULE.instruction_sets() if MODULE else []
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "sliced": lambda images: torch.stack([images, images], -1).flatten(-2)[..., ::2],
}
# less than a vector and a tile, vectors with a tail, several tiles; a single row, column and pixel
SIZES = [(1, 1), (1, 70), (9, 1), (13, 31), (70, 67)]
SIGMAS = (0.0, 0.15, 0.7, 1.3)


@contextlib.contextmanager
def using(instruction_set):
    before = MODULE.instruction_set()
    MODULE.use_instruction_set(instruction_set)
    try:
        yield
    finally:
        MODULE.use_instruction_set(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", matrix.TARGETS)
def test_all_orders(target, layout):
    # an interpreter takes a quarter of a second for an image
    orders = ORDERS[::7] if target.interpreted and layout != "channels_last" else ORDERS
    images, looks = random_images(len(orders), (13, 31)), random_looks(orders, SIGMAS)
    with matrix.on(target, "photometric"):
        found = photometric(LAYOUTS[layout](images).to(target.device), looks)
    assert_rendered(found, images, looks)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", matrix.TARGETS)
def test_sizes(target, size):
    images, looks = random_images(4, size), random_looks(ORDERS[7::5], SIGMAS, seed=1)
    with matrix.on(target, "photometric"):
        found = photometric(images.to(target.device), looks)
    assert_rendered(found, images, looks)


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_looks_that_leave_out_operations(target):
    rows = [NOTHING, (-1, 3, -1, 1, 1, 0.4, 1, 40, 0), (2, -1, -1, -1, 1, 1, 0, 0, 0), (0, 1, 2, 3, 1, 1, 1, 0, 0)]
    rows += [(0, 1, 2, -1, 0, 2.5, 3, 0, 0), (3, -1, -1, -1, 1, 1, 1, -300, 0), (1, -1, -1, -1, 1, 0, 1, 0, 0.7)]
    images, looks = random_images(len(rows), (13, 31)), torch.tensor(rows, dtype=torch.float32)
    with matrix.on(target, "photometric"):
        found = photometric(images.to(target.device), looks)
    assert_rendered(found, images, looks)
    plain = torch.stack([transforms.normalise(Image.fromarray(image)) for image in images.permute(0, 2, 3, 1).numpy()])
    assert torch.equal(found[0].cpu(), plain[0])


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_wide_blurs(target):
    images, looks = random_images(3, (70, 9)), random_looks([NOTHING[:4]] * 3, (8.1, 3.0, 0.0))
    with matrix.on(target, "photometric"):
        found = photometric(images.to(target.device), looks)
    assert_rendered(found, images, looks)


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_an_empty_batch_and_empty_images(target):
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        with matrix.on(target, "photometric"):
            looks = torch.tensor([NOTHING], dtype=torch.float32).expand(shape[0], -1)
            found = photometric(torch.zeros(shape, dtype=torch.uint8, device=target.device), looks)
        assert found.shape == shape and found.dtype == torch.float32


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_instruction_set(instruction_set, layout):
    images, looks = LAYOUTS[layout](random_images(24, (20, 150))), random_looks(ORDERS, SIGMAS, seed=3)
    with using(instruction_set), matrix.on(CPU):
        assert MODULE.instruction_set() == instruction_set
        assert_rendered(photometric(images, looks), images, looks)


def every_colour(step: int = 1) -> np.ndarray:
    """All colours, or those of every ``step``-th level of blue, uint8 ``[256, columns, 3]``."""
    levels = np.arange(256, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels[::step], indexing="ij"), -1).reshape(256, -1, 3)


@pytest.fixture(scope="module")
def colours_changed():
    """All colours, looks without contrast, and all colours after each."""
    colours = every_colour()
    looks = torch.tensor([[3, -1, -1, -1, 1, 1, 1, -76, 0], [2, -1, -1, -1, 1, 1, 1.7, 0, 0]])
    order = [int(look[0]) for look in looks]
    image = Image.fromarray(colours)
    changed = [
        transforms.colour_jitter(image, look[4:8].tolist(), [code]) for look, code in zip(looks, order, strict=True)
    ]
    return torch.from_numpy(colours), looks, [torch.from_numpy(np.array(image)) for image in changed]


@pytest.mark.parametrize("instruction_set", SETS)
def test_hue_and_saturation_of_every_colour(instruction_set, colours_changed):
    colours, looks, changed = colours_changed
    with using(instruction_set), matrix.on(CPU):
        for look, expected in zip(looks, changed, strict=True):
            # with these statistics the result is the level
            found = ops.photometric(colours.permute(2, 0, 1)[None], look[None], (0.0,) * 3, (1 / 255,) * 3)
            assert torch.equal(found[0].permute(1, 2, 0).byte(), expected)


def test_the_reference_turns_the_hue_of_many_colours():
    colours = every_colour(step=17)
    expected = np.asarray(transforms.shift_hue(Image.fromarray(colours), 31))
    found = photometric_reference.shift_hue(torch.from_numpy(colours).permute(2, 0, 1).float(), 31)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.skipif(MODULE is None, reason=str(extension.missing("_C")))
def test_the_same_bits_for_any_number_of_threads():
    # enough work for every thread to wake up and get tiles
    images, looks = random_images(2, (1000, 500)), random_looks(ORDERS[3::15], (1.3, 0.4))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with matrix.on(CPU):
                results.append(photometric(images, looks))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_an_image_does_not_depend_on_its_batch(target):
    images, looks = random_images(4, (13, 31)), random_looks(ORDERS[::6], (1.3, 0.0, 0.3, 2.0))
    with matrix.on(target, "photometric"):
        together = photometric(images.to(target.device), looks)
        alone = [photometric(images[i : i + 1].to(target.device), looks[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("target", matrix.KERNELS)
def test_nothing_is_read_before_it_is_written(target):
    images, looks = random_images(3, (13, 31)), random_looks(ORDERS[:3], (1.3,))
    with matrix.on(target, "photometric"), matrix.poisoned():
        found = photometric(images.to(target.device), looks)
    assert_rendered(found, images, looks)


@pytest.mark.parametrize("target", matrix.KERNELS)
def test_no_other_memory_is_written(target):
    images, looks = random_images(1, (13, 31)), random_looks(ORDERS[:1], (1.3,))
    with matrix.on(target, "photometric"):
        expected = photometric(images.to(target.device), looks)
    out = torch.full((3, 3, 13, 31), 7.0, device=target.device)
    arguments = (images.to(target.device), looks.to(target.device), [1 / (255 * std) for std in STD])
    shift = [mean / std for mean, std in zip(MEAN, STD, strict=True)]
    kernels("photometric", target.backend).forward(*arguments, shift, 5, True, out[1:2])
    assert torch.equal(out[1:2], expected) and (out[::2] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("target", [pytest.param(target, id=target.backend) for target in matrix.GPU_TARGETS])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_looks_on_the_device(target):
    images, looks = random_images(24, (40, 70)), random_looks(ORDERS, SIGMAS)
    with matrix.on(target, "photometric"):
        found = photometric(images.to(target.device), looks.to(target.device))
        pinned = photometric(images.to(target.device), looks)
    assert_rendered(found, images, looks)
    assert torch.equal(found, pinned)


@pytest.mark.gpu
@pytest.mark.parametrize("target", [pytest.param(target, id=target.backend) for target in matrix.GPU_TARGETS])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_does_not_wait(target):
    images, looks = random_images(4, (40, 70)).to(target.device), random_looks(ORDERS[:4], (1.3, 0.0))
    with matrix.on(target, "photometric"):
        # the first call compiles
        photometric(images, looks)
        torch.cuda.set_sync_debug_mode("error")
        try:
            photometric(images, looks)
        finally:
            torch.cuda.set_sync_debug_mode("default")


GOOD = [0, 1, 2, 3, 1.2, 0.8, 1.1, 5, 0.7]
NUMBERS = [
    ({0: 4}, r"looks\[1\]: expected operations 0\.\.3 or -1 \(none\) in columns 0\.\.3, got \[4"),
    ({0: -2}, r"looks\[1\]: expected operations 0\.\.3"),
    ({2: 0.5}, r"looks\[1\]: expected operations 0\.\.3"),
    ({3: 1}, r"looks\[1\]: expected each operation at most once in columns 0\.\.3, got \[0.0, 1.0, 2.0, 1.0\]"),
    ({5: float("nan")}, r"looks\[1\]: expected finite numbers, got .*nan"),
    ({8: float("inf")}, r"looks\[1\]: expected finite numbers, got .*inf"),
    ({7: 1.5}, r"looks\[1\]: expected a whole number as the shift of the hue \(column 7\), got 1.5"),
    ({8: -0.5}, r"looks\[1\]: expected sigma 0 or positive, .* got -0.5"),
    ({8: 8.125}, r"looks\[1\]: expected sigma 0 or positive, with int\(4 sigma \+ 0.5\) <= 32 \(column 8\), got 8.125"),
]


@pytest.mark.parametrize(("change", "message"), NUMBERS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_wrong_look_is_named(change, message, backend):
    if backends.missing(backend):
        pytest.skip(backends.missing(backend))
    looks = torch.tensor([GOOD, GOOD])
    for column, value in change.items():
        looks[1, column] = value
    with ops.use_backend(backend), pytest.raises(ValueError, match=f"photometric: {message}"):
        photometric(random_images(2, (3, 4)), looks)


def test_the_assertion_on_a_device_demands_the_same():
    good = torch.tensor([GOOD, NOTHING, [3, -1, 0, -1, 0, 0, 0, -300, 8.1]])
    read_looks("photometric", good)
    assert_looks("photometric", good)
    for change, _ in NUMBERS:
        looks = good.clone()
        for column, value in change.items():
            looks[0, column] = value
        with pytest.raises(RuntimeError, match="photometric: looks hold a value that no look has"):
            assert_looks("photometric", looks)


@pytest.mark.parametrize(
    ("images", "looks", "options", "message"),
    [
        (torch.zeros(2, 4, 3, 3, dtype=torch.uint8), torch.zeros(2, 9), {}, r"images must be \[N, 3, h, w\], got .*4"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(3, 9), {}, r"images must be .* got shape \(3, 4, 5\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 9), {}, "images must be uint8, got torch.float32"),
        (random_images(2, (4, 4)), torch.zeros(3, 9), {}, r"looks must be \[N, 9\] = \(2, 9\), got shape \(3, 9\)"),
        (random_images(2, (4, 4)), torch.zeros(2, 8), {}, r"looks must be .* got shape \(2, 8\)"),
        (random_images(2, (4, 4)), torch.zeros(2, 9).double(), {}, "looks must be float32, got torch.float64"),
        (
            random_images(2, (4, 4)),
            torch.zeros(2, 9, device="meta"),
            {},
            "looks must be on the CPU or on .*, got meta",
        ),
        (random_images(2, (4, 4)), torch.zeros(2, 9), {"mean": (0.5, 0.5)}, r"mean must be three numbers, got \(0.5,"),
        (random_images(2, (4, 4)), torch.zeros(2, 9), {"std": (0.5, 0, 1)}, r"std must be positive, got \(0.5, 0, 1\)"),
    ],
)
def test_refused(images, looks, options, message):
    with pytest.raises(ValueError, match=f"photometric: {message}"):
        ops.photometric(images, looks, **({"mean": MEAN, "std": STD} | options))


def test_looks_may_stay_on_the_cpu():
    """The choice of a backend goes by the images alone."""
    images, looks = random_images(2, (4, 4)), torch.zeros(2, 9)
    assert "the tensors are on meta" in ops.explain("photometric", images.to("meta"), looks, MEAN, STD)
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu, meta"):
        ops.explain("photometric", images, looks.to("meta"), MEAN, STD)


@pytest.mark.skipif(MODULE is None, reason=str(extension.missing("_C")))
def test_as_a_registered_op():
    images, looks = random_images(2, (5, 6)), random_looks(ORDERS[:2], (0.7,))
    arguments = (images, looks, MEAN, STD, "cpu")
    torch.library.opcheck(torch.ops.pmm_fast.photometric.default, arguments)
    compiled = torch.compile(torch.ops.pmm_fast.photometric.default, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), photometric(images, looks))


def test_the_comparison_sees_a_level():
    images, looks = random_images(2, (13, 31)), random_looks(ORDERS[:2], (0.0, 1.3))
    for image in range(2):
        found = rendered(images, looks)
        found[image, 1, 3:5] += 1 / (255 * STD[1])
        with pytest.raises(AssertionError):
            assert_rendered(found, images, looks)
    assert levels_of(rendered(images, looks)).sub(levels_of(rendered(images, looks)).round()).abs().max() < 1e-3
