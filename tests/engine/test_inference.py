"""Segmenting one image: every protocol against the plain implementation, on networks of known and of random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pmm_fast import ops
from pmm_fast.config import EVAL_PROTOCOLS, EvalProtocol
from pmm_fast.data import normalise
from pmm_fast.engine.inference import TILE_BATCHES, image_seed, is_out_of_memory, predict_logits, segment, tile_starts
from pmm_fast.models import Segmentor, build_model
from tests.engine import plain_evaluation as plain
from tests.tiny_network import fill_memory
from tests.tolerances import MERGED_LOGITS, relative_error

CPU = torch.device("cpu")
WHOLE, SLIDING, POOLING = (EVAL_PROTOCOLS[name] for name in ("whole", "sliding", "pooling"))


class Output(NamedTuple):
    logits: Tensor


class Network(nn.Module):
    """A network that is a function of the images; remembers what it was shown."""

    num_classes, memory = 3, None

    def __init__(self, make_logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make_logits, self.shapes = make_logits, []

    def predict_coarse(self, images: Tensor, noise: Tensor | None = None) -> Output:
        assert noise is None
        self.shapes.append(tuple(images.shape))
        return Output(self.make_logits(images))


def pointwise(images: Tensor) -> Tensor:
    """The three channels as logits of three classes."""
    return images.clone()


def columns(images: Tensor) -> Tensor:
    """Logit 0 counts the columns from the left, so that it knows nothing of the image but its width; logit 1 is 0."""
    count, _, height, width = images.shape
    ramp = torch.arange(width, dtype=torch.float32).expand(count, 1, height, width)
    return torch.cat([ramp, torch.zeros_like(ramp)], 1)


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def logits_of(network: nn.Module, image: Image.Image, protocol: EvalProtocol, size: tuple[int, int] | None = None):
    return predict_logits(network, image, size or (image.height, image.width), protocol, CPU)


@pytest.fixture(scope="module")
def model() -> Segmentor:
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_mobilenet_v2", 5, channels=8).eval()
    model.memory.slots.copy_(F.normalize(torch.rand(5, 8), dim=1))
    # batch norms that do something, so that logits vary
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("weight") and tensor.dim() == 1:
                tensor.uniform_(0.8, 2)
    return model


# --- against the plain implementation -----------------------------------------------------------------------------


def shrunk(name: str) -> EvalProtocol:
    """A named protocol with tiles and scales that suit images of some 60 x 90 pixels."""
    protocol = EVAL_PROTOCOLS[name]
    return replace(protocol, crop=protocol.crop // 20) if protocol.method == "sliding" else protocol


CASES = {
    **{name: shrunk(name) for name in EVAL_PROTOCOLS},
    "tiles of several scales": replace(SLIDING, crop=40, scales=(0.75, 1.25), flip=True, resample="bilinear"),
    "height": replace(WHOLE, height=48, scales=(1.0, 1.5), flip=True),
    "one pooled view": replace(POOLING, scales=(1.0,), flip=False),
    "two pooled views": replace(POOLING, scales=(1.0,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(57, 90), (70, 41)])
def test_equals_the_plain_implementation(model: Segmentor, name: str, shape: tuple[int, int]) -> None:
    protocol, image = CASES[name], random_image(*shape)
    expected = plain.scores(model, image, shape, protocol, seed=5)
    logits = predict_logits(model, image, shape, protocol, CPU, seed=5, tile_batch=3)
    found = logits.softmax(0) if protocol.method == "pooling" else logits
    assert found.dtype == torch.float32 and relative_error(found, expected) < MERGED_LOGITS
    classes, confidence = segment(model, image, shape, protocol, CPU, seed=5, confidence=True)
    sure = expected if protocol.method == "pooling" else expected.softmax(0)
    best = sure.topk(2, 0).values
    # two classes may be as good as equal
    ties = best[0] - best[1] < MERGED_LOGITS
    assert ties.float().mean() < 0.01 and classes.dtype == torch.uint8
    assert torch.equal(classes[~ties].long(), expected.argmax(0)[~ties]) and len(classes.unique()) > 1
    assert confidence.dtype == torch.float32 and relative_error(confidence, best[0]) < MERGED_LOGITS
    assert segment(model, image, shape, protocol, CPU, seed=5).confidence is None


def test_released_tiles_give_the_released_classes(model: Segmentor) -> None:
    # tiles of 24 at 0, 16, 32, 36: the last is moved back, so mirrored tiles are not those of the image
    protocol, image = replace(SLIDING, crop=24, flip=True), random_image(48, 60)
    both = plain.views(model, image, protocol, 1.0, [])
    assert [left for _, left, _ in both[0]][:4] == [0, 16, 32, 36]
    expected = plain.released_sliding(both, (48, 60))
    best = plain.scores(model, image, (48, 60), protocol).topk(2, 0).values
    clear = (best[0] - best[1] > 1e-4 * best[0].abs().max()).numpy()
    found = segment(model, image, (48, 60), protocol, CPU).classes.numpy()
    assert clear.mean() > 0.95 and np.array_equal(found[clear], expected[clear])
    # the average of the two averages, which the released code seems to mean, is another one
    means = []
    for number, tiles in enumerate(both):
        total, count = torch.zeros(5, 48, 60, dtype=torch.float64), torch.zeros(48, 60)
        for top, left, tile in tiles:
            total[:, top : top + 24, left : left + 24] += tile
            count[top : top + 24, left : left + 24] += 1
        means.append((total / count).flip(-1) if number else total / count)
    assert (torch.stack(means).mean(0).argmax(0).numpy() != expected)[clear].any()


def test_released_tiles_of_a_portrait_image_are_wrong_below_its_width(model: Segmentor) -> None:
    protocol, image = replace(SLIDING, crop=24), random_image(60, 48)
    released = plain.released_sliding(plain.views(model, image, protocol, 1.0, []), (60, 48))
    wrong = segment(model, image, (60, 48), protocol, CPU).classes.numpy() != released
    assert not wrong[:48].any() and wrong[48:].mean() > 0.5


@pytest.mark.parametrize("name", ["whole", "sliding", "released-sliding"])
def test_one_call_of_the_operator_without_a_map_of_scores(
    model: Segmentor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "merge_tiles", None)
    assert segment(model, random_image(40, 60), (40, 60), shrunk(name), CPU).classes.shape == (40, 60)
    with pytest.raises(TypeError):
        segment(model, random_image(40, 60), (41, 60), shrunk(name), CPU)


# --- noise --------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_its_seed_and_of_nothing_else(model: Segmentor) -> None:
    image, protocol = random_image(48, 64), replace(SLIDING, crop=32, noise=True, flip=True)
    first, again, other = (predict_logits(model, image, (48, 64), protocol, CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, rtol=1e-3)
    one_by_one = predict_logits(model, image, (48, 64), protocol, CPU, seed=1, tile_batch=1)
    assert relative_error(one_by_one, first) < MERGED_LOGITS
    quiet = predict_logits(model, image, (48, 64), replace(protocol, noise=False), CPU, seed=1)
    assert not torch.allclose(quiet, first, rtol=1e-3)


def test_every_pass_has_noise_of_its_own(model: Segmentor) -> None:
    seen = []

    def watch(feature: Tensor, noise: Tensor) -> None:
        seen.extend(noise.unbind())

    handle = model.memory.register_forward_pre_hook(lambda module, arguments: watch(*arguments))
    predict_logits(model, random_image(48, 48), (48, 48), replace(SLIDING, crop=32, noise=True, flip=True), CPU)
    handle.remove()
    assert len(seen) == 8 and len({tuple(noise.flatten().tolist()) for noise in seen}) == 8
    # Gumbel's mean is Euler's constant
    assert float(torch.stack(seen).mean()) == pytest.approx(0.577, abs=0.3)


def test_a_network_without_a_memory_has_no_noise() -> None:
    image = random_image(10, 14)
    noisy = logits_of(Network(pointwise), image, replace(WHOLE, noise=True))
    assert torch.equal(noisy, logits_of(Network(pointwise), image, WHOLE))


def test_seeds_of_images() -> None:
    seeds = {image_seed(seed, image) for seed in (0, 304) for image in range(50)}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds) and image_seed(304, 7) == image_seed(304, 7)


# --- networks whose logits are known ------------------------------------------------------------------------------


def test_whole_image_is_one_pass() -> None:
    image, network = random_image(10, 14), Network(pointwise)
    assert torch.equal(logits_of(network, image, WHOLE), normalise(image)) and network.shapes == [(1, 3, 10, 14)]


@pytest.mark.parametrize(("crop", "overlap"), [(4, 1 / 3), (5, 0.5), (6, 0.0), (100, 1 / 3), (1, 0.9)])
def test_sliding_equals_whole_for_a_pointwise_network(crop: int, overlap: float) -> None:
    image, network = random_image(10, 14), Network(pointwise)
    logits = logits_of(network, image, replace(SLIDING, crop=crop, overlap=overlap))
    assert torch.allclose(logits, normalise(image), atol=1e-6)
    assert all(shape[2:] == (min(crop, 10), min(crop, 14)) for shape in network.shapes)


def test_tiles_are_averaged_where_they_overlap() -> None:
    # tiles of 6 columns start at 0, 4 and 4 + 4 moved back to 5: column c has the mean of c - start
    logits = logits_of(Network(columns), random_image(3, 11), replace(SLIDING, crop=6))
    expected = [0, 1, 2, 3, (4 + 0) / 2, (5 + 1 + 0) / 3, (2 + 1) / 2, (3 + 2) / 2, (4 + 3) / 2, (5 + 4) / 2, 5]
    assert logits[0].tolist() == [pytest.approx(expected)] * 3


def test_mirrored_tiles_are_those_of_the_mirrored_image() -> None:
    # mirrored tiles start at 0, 4 and 5 too, which is 5, 1 and 0 in the image; there they count from the right
    logits = logits_of(Network(columns), random_image(3, 11), replace(SLIDING, crop=6, flip=True))
    sums = [[] for _ in range(11)]
    for start in (0, 4, 5):
        for offset in range(6):
            sums[start + offset].append(offset)
            sums[10 - start - offset].append(offset)
    assert logits[0, 0].tolist() == pytest.approx([np.mean(values) for values in sums])


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "starts"),
    [
        (11, 6, 1 / 3, [0, 4, 5]),
        # 9 * (1 - 1/3) is a little over 6 in floating point
        (30, 9, 1 / 3, [0, 6, 12, 18, 21]),
        (2048, 768, 1 / 3, [0, 512, 1024, 1280]),
        (1792, 768, 1 / 3, [0, 512, 1024]),
        (12, 6, 0.0, [0, 6]),
        (13, 6, 0.0, [0, 6, 7]),
        (6, 6, 0.5, [0]),
        (5, 6, 0.5, [0]),
        (8, 5, 0.5, [0, 3]),
    ],
)
def test_tile_starts(length: int, tile: int, overlap: float, starts: list[int]) -> None:
    assert tile_starts(length, tile, overlap) == starts == plain.starts(length, tile, overlap)


@pytest.mark.parametrize("tile_batch", [0, 1, 3, 99])
def test_tiles_grow_with_scales_above_one_only_and_go_in_batches(tile_batch: int) -> None:
    network = Network(pointwise)
    protocol = replace(SLIDING, crop=8, overlap=0.0, scales=(0.5, 1.0, 2.0))
    predict_logits(network, random_image(16, 16), (16, 16), protocol, CPU, tile_batch=tile_batch)
    assert [shape[2:] for shape in network.shapes] == sorted(shape[2:] for shape in network.shapes)
    tiles = {side: sum(shape[0] for shape in network.shapes if shape[2] == side) for side in (8, 16)}
    assert tiles == {8: 1 + 4, 16: 4} and max(shape[0] for shape in network.shapes) == min(
        4, tile_batch or TILE_BATCHES["cpu"]
    )


def test_the_mirrored_image_is_mirrored_back() -> None:
    image, network = random_image(10, 14), Network(pointwise)
    logits = logits_of(network, image, replace(WHOLE, flip=True))
    assert torch.allclose(logits, normalise(image), atol=1e-6) and network.shapes == 2 * [(1, 3, 10, 14)]
    # a network that looks at positions only: (c + (width - 1 - c)) / 2 everywhere
    logits = logits_of(Network(columns), image, replace(WHOLE, flip=True))
    assert torch.allclose(logits[0], torch.full((10, 14), 6.5))


def test_scales_are_averaged_after_resizing_to_the_label() -> None:
    image = random_image(10, 15)
    small = image.resize((7, 5), Image.Resampling.BICUBIC)
    enlarged = F.interpolate(normalise(small)[None], (10, 15), mode="bilinear", align_corners=False)[0]
    logits = logits_of(Network(pointwise), image, replace(WHOLE, scales=(1.0, 0.5)))
    assert torch.allclose(logits, (normalise(image) + enlarged) / 2, atol=1e-6)


def test_height_resizes_the_image_and_keeps_its_shape() -> None:
    image, network = random_image(10, 15), Network(pointwise)
    logits = logits_of(network, image, replace(WHOLE, height=4, scales=(1.0, 2.0)))
    assert network.shapes == [(1, 3, 4, 6), (1, 3, 8, 12)] and logits.shape == (3, 10, 15)


def test_labels_of_another_size_than_the_image() -> None:
    image = random_image(4, 6)
    logits = logits_of(Network(pointwise), image, WHOLE, (8, 12))
    expected = F.interpolate(normalise(image)[None], (8, 12), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(logits, expected, atol=1e-6)


def test_mixed_precision_is_on_in_the_network_and_over_after_it() -> None:
    def matrix_product(images: Tensor) -> Tensor:
        return torch.einsum("nchw,ck->nkhw", images, torch.eye(3))

    seen = []
    network = Network(lambda images: seen.append(matrix_product(images)) or seen[-1])
    logits = predict_logits(network, random_image(4, 6), (4, 6), WHOLE, CPU, torch.bfloat16)
    assert seen[0].dtype == torch.bfloat16 and logits.dtype == torch.float32


def test_an_image_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ValueError, match="image: expected mode RGB, got L"):
        segment(Network(pointwise), random_image(4, 6).convert("L"), (4, 6), WHOLE, CPU)


@pytest.mark.parametrize(
    ("protocol", "calls"), [(WHOLE, 1), (replace(WHOLE, scales=(0.5, 1.0)), 2), (replace(SLIDING, crop=6), 6)]
)
@pytest.mark.parametrize(
    ("amp_dtype", "hint"), [(None, "not finite$"), (torch.float16, "not finite; they overflow in fp16: .* bf16")]
)
def test_logits_that_are_not_finite_are_refused(
    protocol: EvalProtocol, calls: int, amp_dtype: torch.dtype | None, hint: str
) -> None:
    def broken_at_last(images: Tensor) -> Tensor:
        logits = images.clone()
        if len(network.shapes) == calls:
            logits[0, -1, -1, -1] = torch.inf
        return logits

    network = Network(broken_at_last)
    with pytest.raises(ValueError, match=f"the network gives logits that are {hint}"):
        segment(network, random_image(10, 14), (10, 14), protocol, CPU, amp_dtype, tile_batch=1)
    assert len(network.shapes) == calls


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_more_classes_than_fit_eight_bits_are_refused(scales: tuple[float, ...]) -> None:
    network = Network(lambda images: images[:, :1].repeat(1, network.num_classes, 1, 1))
    protocol, image = replace(WHOLE, scales=scales), random_image(4, 6)
    network.num_classes = 257
    with pytest.raises(ValueError, match="segment: the network must have at most 256 classes, got 257"):
        segment(network, image, (4, 6), protocol, CPU)
    network.num_classes = 256
    assert segment(network, image, (4, 6), protocol, CPU).classes.shape == (4, 6)


def test_too_little_memory_is_known_on_every_device() -> None:
    with pytest.raises(RuntimeError) as caught:
        fill_memory()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    for message in ("CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("bad_alloc"))
