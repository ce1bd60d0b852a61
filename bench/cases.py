"""What ``python bench/memory_ops.py`` measures: sizes, inputs, and the implementations to set beside each other.

Letters: B images, C channels, K classes, h x w feature positions, H x W label pixels; F = B C h w, S = B K h w,
P = B H W, s bytes a feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bench import released_ops
from pmm_fast import ops
from pmm_fast.ops import reference

IGNORE = 255
PASSES = ("fwd", "bwd", "fwd+bwd", "bwd2")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
BASELINES = ("released", "reference", "compiled")


@dataclass(frozen=True)
class Case:
    """One operator on inputs of one size and dtype."""

    op: str
    size: str  # name of the size, and after a slash what distinguishes cases of one op
    batch: int
    channels: int
    classes: int
    side: int  # h = w
    label_side: int  # H = W
    dtype: str = "float32"

    @property
    def title(self) -> str:
        return f"{self.op} {self.size} {self.dtype}"

    @property
    def one_tensor(self) -> bool:
        """Whether memory_pass pools the features themselves."""
        return self.size.endswith("/one")


def _cases_of_size(size: str, batch: int, channels: int, side: int, labels: int, logits: tuple[int, ...]) -> list[Case]:
    base = Case("masked_average_pool", size, batch, channels, 19, side, labels)
    cases = [base, replace(base, op="memory_read")]
    cases += [replace(base, op="upsample_cross_entropy", size=f"{size}/{n}", side=n) for n in logits]
    return cases + [replace(base, op="memory_pass", size=f"{size}/{which}") for which in ("one", "two")]


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case that there is, the paper's sizes first, in float32 and then in bf16."""
    cases = [
        *_cases_of_size("paper", 8, 256, 48, 768, (192, 48)),
        *_cases_of_size("stride8", 8, 256, 96, 768, (96,)),
        *_cases_of_size("small", 2, 64, 12, 96, (24,)),
        *_cases_of_size("fill", 64, 256, 96, 768, (96,)),
    ]
    return tuple(replace(case, dtype=dtype) for dtype in DTYPES for case in cases)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; ``maps`` are the features (and written features), or the logits."""

    maps: tuple[Tensor, ...]
    labels: Tensor
    memory: Tensor | None
    seed: Tensor
    num_classes: int

    def leaves(self) -> tuple[Tensor, ...]:
        """What is differentiated with respect to."""
        return self.maps if self.memory is None else (*self.maps, self.memory)

    def convert(self, dtype: torch.dtype | None = None) -> Inputs:
        """The same values as fresh leaves of autograd, in another dtype if one is given."""
        maps, memory = (
            [tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]
            for tensors in (self.maps, [] if self.memory is None else [self.memory])
        )
        return replace(self, maps=tuple(maps), memory=memory[0] if memory else None)

    def noise(self, dtype: torch.dtype) -> Tensor:
        """The noise that the seed stands for, ``[B, K, h, w]``."""
        batch, _, height, width = self.maps[0].shape
        return ops.seeded_gumbel_noise(self.seed, (batch, self.num_classes, height, width), dtype)


def street_labels(batch: int, side: int, classes: int, generator: torch.Generator) -> Tensor:
    """Labels ``[B, side, side]`` uint8 as a street scene has them: bands with boxes on them, about a tenth ignored.

    The regions are large and constant, so neighbouring pixels mostly agree, as they do in photographs.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    labels = torch.empty(batch, side, side, dtype=torch.uint8)
    for image in labels:
        top = 0
        while top < side:
            height = draw(max(side // 8, 1), max(side // 3, 2))
            image[top : top + height] = draw(0, classes)
            top += height
        for _ in range(40):
            height, width = (draw(max(side // 32, 1), max(side // 5, 2)) for _ in range(2))
            top, left = draw(0, side), draw(0, side)
            image[top : top + height, left : left + width] = draw(0, classes)
        # what is ignored in street scenes: the car's own bonnet, and scattered patches
        image[side - max(side // 16, 1) :] = IGNORE
        for _ in range(12):
            top, left = draw(0, side), draw(0, side)
            image[top : top + max(side // 16, 1), left : left + max(side // 16, 1)] = IGNORE
    return labels


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The inputs of a case: a function of the case and the device alone."""
    generator = torch.Generator().manual_seed(304)
    labels = street_labels(case.batch, case.label_side, case.classes, generator).to(device)
    # where they are wanted: a CPU takes seconds for the largest
    generator = generator if device.type == "cpu" else torch.Generator(device).manual_seed(304)
    is_loss = case.op == "upsample_cross_entropy"
    channels = case.classes if is_loss else case.channels
    count = 2 if case.op == "memory_pass" and not case.one_tensor else 1
    maps = [
        torch.randn(case.batch, channels, case.side, case.side, generator=generator, device=device).to(
            DTYPES[case.dtype]
        )
        for _ in range(count)
    ]
    memory = None
    if case.op in ("memory_read", "memory_pass"):
        memory = ops.normalize(torch.rand(case.classes, case.channels, generator=generator, device=device), 1)
    seed = torch.tensor([20220618], device=device)
    return Inputs(tuple(maps), labels, memory, seed, case.classes)


# inputs, and noise [B, K, h, w] to take instead of drawing any -> every output, those that can be differentiated first
Function = Callable[[Inputs, Tensor | None], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Variant:
    """One implementation of a case's operator."""

    name: str
    function: Function
    # what of its outputs the operator's outputs are
    comparable: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda outputs: outputs


def _together(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


def backend_variant(op: str, backend: str) -> Variant:
    """The operator on one backend; noise, where there is any, is drawn from the seed inside."""

    def run(inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
        drawn = inputs.seed if noise is None else noise
        with ops.use_backend(backend):
            return _together(_call(op, ops, inputs, drawn))

    return Variant(backend, run)


def separate_variant(backend: str) -> Variant:
    """memory_pass as the two calls that it replaces."""

    def run(inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
        assert inputs.memory is not None
        with ops.use_backend(backend):
            read = ops.memory_read(inputs.maps[0], inputs.memory, inputs.seed if noise is None else noise)
            return (*read, *ops.masked_average_pool(inputs.maps[-1], inputs.labels, inputs.num_classes, IGNORE))

    return Variant(f"{backend}, separate", run)


def _call(op: str, module: ModuleType, inputs: Inputs, noise: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """Call an operator of ``pmm_fast.ops`` or of its reference, which have the same signatures."""
    function: Callable[..., Tensor | tuple[Tensor, ...]] = getattr(module, op)
    maps, labels, memory = inputs.maps, inputs.labels, inputs.memory
    if op == "masked_average_pool":
        return function(maps[0], labels, inputs.num_classes, IGNORE)
    if op == "memory_read":
        return function(maps[0], memory, noise)
    if op == "memory_pass":
        return function(maps[0], maps[-1], labels, memory, noise, ignore_index=IGNORE)
    return function(maps[0], labels, IGNORE)


def _drawn(op: str, inputs: Inputs, noise: Tensor | None) -> Tensor | None:
    """Noise as plain PyTorch draws it; regenerating it from a counter is only cheap inside a kernel."""
    if op not in ("memory_read", "memory_pass") or noise is not None:
        return noise
    batch, _, height, width = inputs.maps[0].shape
    return ops.gumbel_noise((batch, inputs.num_classes, height, width), device=inputs.labels.device)


def reference_variant(op: str) -> Variant:
    """Plain PyTorch without the one-hot map."""

    def run(inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
        return _together(_call(op, reference, inputs, _drawn(op, inputs, noise)))

    return Variant("reference", run)


def compiled_variant(op: str) -> Variant:
    """The reference under torch.compile; noise is drawn before the compiled part, so that a gate can give its own."""

    def plain(
        maps: tuple[Tensor, ...], labels: Tensor, memory: Tensor | None, classes: int, noise: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        return _call(op, reference, Inputs(maps, labels, memory, labels, classes), noise)

    compiled = torch.compile(plain, dynamic=False)

    def run(inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
        drawn = _drawn(op, inputs, noise)
        return _together(compiled(inputs.maps, inputs.labels, inputs.memory, inputs.num_classes, drawn))

    return Variant("compiled", run)


def released_variant(op: str) -> Variant:
    """The released code's chain of operators; its read returns the normalised features as well."""

    def run(inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, ...]:
        maps, labels, memory = inputs.maps, inputs.labels, inputs.memory
        draw = released_ops.draw_gumbel
        if noise is not None:
            flat = noise.permute(0, 2, 3, 1).reshape(-1, inputs.num_classes)
            draw = lambda scores: flat  # noqa: E731
        if op == "masked_average_pool":
            return released_ops.masked_average_pool(maps[0], labels, inputs.num_classes, IGNORE)
        if op == "upsample_cross_entropy":
            return (released_ops.upsample_cross_entropy(maps[0], labels, IGNORE),)
        assert memory is not None
        if op == "memory_read":
            return released_ops.memory_read(maps[0], memory, draw)
        return released_ops.memory_pass(maps[0], maps[-1], labels, memory, IGNORE, draw)

    def comparable(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if op not in ("memory_read", "memory_pass"):
            return outputs
        return (outputs[0][:, outputs[0].shape[1] // 2 :], *outputs[1:])

    return Variant("released", run, comparable)


@dataclass(frozen=True)
class Work:
    """The least that one pass must do (docs/ops): bytes moved, exponentials or logarithms taken, multiply-adds."""

    moved: int
    exponentials: int = 0
    products: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.moved + other.moved, self.exponentials + other.exponentials, self.products + other.products)


def work(case: Case, which: str) -> Work:
    """The least work of a case's pass, noise drawn from a seed, labels of one byte."""
    if which == "fwd+bwd":
        return work(case, "fwd") + work(case, "bwd")
    index = ("fwd", "bwd", "bwd2").index(which)
    positions, s = case.batch * case.side**2, DTYPES[case.dtype].itemsize
    pixels = case.batch * case.label_side**2
    if case.op == "upsample_cross_entropy":
        logits = positions * case.classes * s
        return Work((index + 1) * logits + pixels + (4 if index == 0 else 0), pixels * case.classes)
    features, matrix = positions * case.channels * s, 4 * case.classes * case.channels
    if case.op == "masked_average_pool":
        taps = 4 * positions
        rest = (matrix + 4 * case.classes, matrix, 2 * matrix)[index]
        return Work((index + 1) * features + taps + rest)
    scores = 4 * positions * case.classes
    apart = case.op == "memory_pass" and not case.one_tensor
    maps = (3, 5, 8)[index] if apart else (2, 3, 5)[index]
    products = (2, 5, 12)[index] * case.classes * positions * case.channels
    # an exponential of the softmax and two logarithms of the noise for each score
    return Work(maps * features + (1, 1, 2)[index] * scores, 3 * positions * case.classes, products)
