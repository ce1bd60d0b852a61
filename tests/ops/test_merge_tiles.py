"""merge_tiles and segment_tiles on every backend, against PyTorch's upsampling of each tile in float64."""

from __future__ import annotations

import pytest
import torch

from pmm_fast import ops
from pmm_fast.ops import backends, extension
from pmm_fast.ops.chain import kernels
from tests.ops import matrix
from tests.ops.matrix import CPU, INTERPRETED
from tests.ops.test_determinism_and_memory import one_thread, peak_bytes  # noqa: F401
from tests.ops.test_instruction_sets import SETS, using
from tests.ops.tiles import CASES, FEW, GRID, Case, Tiling, assert_merged, average_of, make, some_tiles, whole
from tests.tolerances import FORWARD, relative_error

NEEDS_CPU = pytest.mark.skipif(extension.missing("_C") is not None, reason=str(extension.missing("_C")))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "classes before tiles": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def case_and_target(names, interpreted=FEW):
    """Parameters (case, target): an interpreter, which is slow, gets some of them."""
    return [
        pytest.param(name, *parameter.values, id=f"{name}-{parameter.id}", marks=parameter.marks)
        for parameter in matrix.TARGETS
        for name in names
        if parameter.values[0] != INTERPRETED or name in interpreted
    ]


@pytest.mark.parametrize(("name", "target"), case_and_target(CASES))
def test_values(name, target):
    with matrix.on(target, "merge_tiles"), matrix.poisoned():
        assert_merged(make(CASES[name]).to(target.device), CASES[name].tiling)


@pytest.mark.parametrize(("count", "target"), case_and_target(range(1, 10), interpreted=()))
def test_any_number_of_tiles(count, target):
    case = Case(3, (4, 11), some_tiles(count))
    assert len(case.tiling.tops) == count
    with matrix.on(target, "merge_tiles"):
        assert_merged(make(case).to(target.device), case.tiling)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", matrix.TARGETS)
def test_types(target, dtype):
    if target == CPU and dtype == torch.float16:
        pytest.skip("the cpu backend has no float16")
    case = CASES["small"]
    with matrix.on(target, "merge_tiles"):
        assert_merged(make(case, dtype).to(target.device), case.tiling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "target"), case_and_target(LAYOUTS, interpreted=("transposed",)))
def test_strides(layout, target, dtype):
    case = CASES["small"] if target.interpreted else CASES["grid"]
    logits = LAYOUTS[layout](make(case, dtype)).to(target.device)
    with matrix.on(target, "merge_tiles"):
        assert_merged(logits, case.tiling)
        # the same numbers in another layout give the same bits
        assert torch.equal(ops.merge_tiles(logits, *case.tiling), ops.merge_tiles(logits.contiguous(), *case.tiling))


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_one_tensor_for_all_tiles(target):
    logits = make(Case(4, (2, 3), whole(3, 5))).to(target.device)
    with matrix.on(target, "merge_tiles"):
        assert_merged(logits.expand(2, -1, -1, -1), Tiling([0, 1], [0, 0], (3, 5), (4, 5)))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", ["grid", "wide", "copied", "shrunk", "many classes"])
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_instruction_set(instruction_set, name, dtype):
    with using(instruction_set), matrix.on(CPU):
        assert_merged(make(CASES[name], dtype), CASES[name].tiling)


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_mirrored_tiles_are_turned_round_by_their_caller(target):
    """Logits turned round, with columns counted from the other side, give the image turned round."""
    tiling = Tiling([0, 0], [0, 9], (6, 17), (6, 26))
    logits = make(Case(5, (3, 7), tiling)).to(target.device)
    with matrix.on(target, "merge_tiles"):
        image = ops.merge_tiles(logits, *tiling)
        mirrored = ops.merge_tiles(logits.flip(3), *tiling._replace(lefts=[26 - 17 - left for left in tiling.lefts]))
    assert relative_error(mirrored.flip(2).cpu(), image.cpu()) <= FORWARD[torch.float32]


NAN = float("nan")
# what classes of a pixel have, the others -1, and the class chosen
SPECIAL = [
    ({}, 0),
    ({0: 3.0, 20: 3.0}, 0),
    ({4: 3.0, 7: 3.0, 9: 3.0}, 4),
    ({17: 3.0, 18: 3.0}, 17),
    ({2: 5.0, 19: NAN}, 19),
    ({3: NAN, 9: 5.0, 18: NAN}, 3),
]


def assert_ties_and_nan(target, dtype):
    logits = torch.full((1, 21, 1, 2 * len(SPECIAL)), -1, dtype=dtype)
    for pixel, (values, _) in enumerate(SPECIAL):
        for k, value in values.items():
            # every other pixel: its neighbour's logit is a tap of weight 0, which a NaN passes
            logits[0, k, 0, 2 * pixel] = value
    with matrix.on(target, "merge_tiles"):
        classes, confidence = ops.segment_tiles(logits.to(target.device), *whole(1, logits.shape[3]), confidence=True)
    assert confidence is not None
    for pixel, (values, expected) in enumerate(SPECIAL):
        assert classes[0, 2 * pixel] == expected
        assert bool(confidence[0, 2 * pixel].isnan()) == any(value != value for value in values.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", matrix.TARGETS)
def test_ties_and_nan(target, dtype):
    """The lowest of equal classes, and the first NaN, within a block of classes and across several."""
    assert_ties_and_nan(target, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_ties_and_nan_in_every_instruction_set(instruction_set, dtype):
    with using(instruction_set):
        assert_ties_and_nan(CPU, dtype)


@NEEDS_CPU
def test_the_same_bits_for_any_number_of_threads():
    # enough rows for every thread
    case = Case(9, (20, 30), Tiling([0, 0, 90, 90], [0, 50, 0, 50], (110, 70), (200, 120)))
    logits, before, results = make(case), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with matrix.on(CPU):
                average = ops.merge_tiles(logits, *case.tiling)
                results.append((average, *ops.segment_tiles(logits, *case.tiling, True)))
    finally:
        torch.set_num_threads(before)
    assert relative_error(results[0][0], average_of(logits, case.tiling)) <= FORWARD[torch.float32]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("target", matrix.KERNELS)
def test_no_other_memory_is_written(target):
    case = CASES["small"]
    (height, width), device = case.tiling.size, target.device
    logits = make(case).to(device)
    with matrix.on(target, "merge_tiles"):
        expected = ops.merge_tiles(logits, *case.tiling), *ops.segment_tiles(logits, *case.tiling, True)
    places = torch.tensor([case.tiling.tops, case.tiling.lefts], device=device)
    wide = [torch.full((3, *x.shape), 7, dtype=x.dtype, device=device) for x in expected]
    nothing = torch.empty(0, device=device)
    forward = kernels("merge_tiles", target.backend).forward
    forward(logits, places, case.tiling.tile, (height, width), wide[0][1], nothing, nothing)
    forward(logits, places, case.tiling.tile, (height, width), nothing, wide[1][1], wide[2][1])
    for found, own in zip(wide, expected, strict=True):
        assert torch.equal(found[1], own) and (found[::2] == 7).all()


@NEEDS_CPU
@pytest.mark.usefixtures("one_thread")
def test_peak_memory_on_the_cpu():
    """Classes alone, and rows of logits: far less than the upsampled logits, 12.5 MB."""
    case = Case(19, (64, 128), whole(256, 512))
    logits = make(case)
    with matrix.on(CPU):
        peak, (classes, confidence) = peak_bytes(lambda: ops.segment_tiles(logits, *case.tiling, True))
    results = 5 * classes.numel()
    assert confidence is not None and results <= peak <= results + 100_000


def test_no_gradient():
    logits = make(CASES["whole"]).requires_grad_()
    for backend in ("reference", "cpu"):
        if backends.missing(backend) is None:
            with ops.use_backend(backend):
                assert not ops.merge_tiles(logits, *CASES["whole"].tiling).requires_grad


ONE, TWO = torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2)
REFUSED = [
    (ONE[0], whole(4, 4), r"logits must be \[T, K, h, w\] and not empty, got shape \(3, 2, 2\)"),
    (ONE[None], whole(4, 4), r"logits must be \[T, K, h, w\] and not empty, got shape \(1, 1, 3, 2, 2\)"),
    (ONE[:0], Tiling([], [], (4, 4), (4, 4)), r"and not empty, got shape \(0, 3, 2, 2\)"),
    (ONE[:, :, :0], whole(4, 4), r"and not empty, got shape \(1, 3, 0, 2\)"),
    (ONE.int(), whole(4, 4), "logits must be floating point, got torch.int32"),
    (TWO, Tiling([0], [0, 2], (4, 4), (4, 6)), "tops must be T = 2 numbers, got 1"),
    (TWO, Tiling([0, 0], [0, 2, 2], (4, 4), (4, 6)), "lefts must be T = 2 numbers, got 3"),
    (ONE, Tiling([0], [0], (4, 5), (4, 4)), "a tile must have pixels and fit into the image, got 4 x 5 in 4 x 4"),
    (ONE, Tiling([0], [0], (0, 4), (4, 4)), "a tile must have pixels and fit into the image, got 0 x 4 in 4 x 4"),
    (
        TWO,
        Tiling([0, 0], [0, 3], (4, 4), (4, 6)),
        "tile 1 of 4 x 4 at row 0, column 3 is not inside .* of 4 x 6",
    ),
    (TWO, Tiling([0, -1], [0, 2], (4, 4), (4, 6)), "tile 1 of 4 x 4 at row -1, column 2 is not inside .* 4 x 6"),
    (TWO, Tiling([0, 0], [0, 5], (4, 4), (4, 9)), "no tile covers the pixel at row 0, column 4 of the image of 4 x 9"),
    (TWO, Tiling([0, 2], [0, 2], (4, 4), (6, 6)), "no tile covers the pixel at row 0, column 4 of the image of 6 x 6"),
    (TWO, Tiling([1, 1], [0, 2], (4, 4), (6, 6)), "no tile covers the pixel at row 0, column 0 of the image of 6 x 6"),
    (TWO, Tiling([0, 0], [0, 2], (4, 4), (6, 6)), "no tile covers the pixel at row 4, column 0 of the image of 6 x 6"),
]


@pytest.mark.parametrize(("logits", "tiling", "message"), REFUSED)
def test_refused(logits, tiling, message):
    with pytest.raises(ValueError, match=f"merge_tiles: .*{message}"):
        ops.merge_tiles(logits, *tiling)
    with pytest.raises(ValueError, match=f"segment_tiles: .*{message}"):
        ops.segment_tiles(logits, *tiling)


def test_more_classes_than_a_byte_has():
    logits = make(Case(256, (2, 2), whole(3, 3)))
    logits[:, 255] += 10
    for backend in ("reference", "cpu"):
        if backends.missing(backend) is None:
            with ops.use_backend(backend):
                assert (ops.segment_tiles(logits, *whole(3, 3))[0] == 255).all()
    with pytest.raises(ValueError, match="segment_tiles: logits must have at most 256 classes, got 257"):
        ops.segment_tiles(torch.zeros(1, 257, 2, 2), *whole(3, 3))
    assert ops.merge_tiles(torch.zeros(1, 257, 2, 2), *whole(3, 3)).shape == (257, 3, 3)


@NEEDS_CPU
def test_as_a_registered_op():
    logits = make(CASES["grid"])
    for wanted in range(3):
        arguments = (logits, *map(list, GRID), wanted, "cpu")
        torch.library.opcheck(torch.ops.pmm_fast.merge_tiles.default, arguments)
    compiled = torch.compile(torch.ops.pmm_fast.merge_tiles.default, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments)[1], ops.segment_tiles(logits, *GRID)[0])


def test_the_comparison_sees_a_wrong_pixel():
    logits, tiling = make(CASES["grid"]), CASES["grid"].tiling
    moved = tiling._replace(lefts=[tiling.lefts[0], tiling.lefts[1] - 1, *tiling.lefts[2:]])
    expected = average_of(logits, tiling)
    assert relative_error(ops.merge_tiles(logits, *moved), expected) > 100 * FORWARD[torch.float32]
    assert relative_error(ops.merge_tiles(logits.flip(0), *tiling), expected) > 100 * FORWARD[torch.float32]
