"""What ``python bench/meta_step.py`` sets beside each other: the variants of an iteration, their data and their work.

One iteration is the step, SGD, and the memory's rewrite, on the same images and from the same weights for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from bench.cases import street_labels
from bench.phases import Clock
from bench.released_step import ReleasedStep
from pmm_fast import meta, ops
from pmm_fast.engine.build import memory_format
from pmm_fast.models import Segmentor, build_model
from pmm_fast.models.mobilenetv2 import InvertedResidual
from pmm_fast.models.resnet import BasicBlock, Bottleneck

CLASSES = 19
DROPOUT = 0.1
LR = 1e-4
# weight of the last batch norm of a residual branch
DAMPING = 0.1
DTYPES = {"float32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """One way to do an iteration.

    Attributes:
        name: of the record.
        mode: of ``meta.Hyper``, or ``released``.
        order: of the meta-gradient; None without one.
        dtype: ``float32``, or ``bf16`` for autocast.
        compiled: through ``meta.CompiledStep``.
        engine: of a compiled one; None: that of the run.
        checkpointed: activations are computed again for the derivatives.
        anomaly: under autograd's anomaly detection, as the released code is shipped.
        alone: the losses' gradient only, without optimiser and rewrite.
        searched: cuDNN measures its kernels and takes the fastest (``torch.backends.cudnn.benchmark``).
    """

    name: str
    mode: str = "pinmem"
    order: int | None = None
    dtype: str = "float32"
    compiled: bool = False
    checkpointed: bool = False
    anomaly: bool = False
    alone: bool = False
    engine: str | None = None
    searched: bool = False

    @property
    def is_released(self) -> bool:
        return self.mode == "released"


def _pinmem_variants() -> list[Variant]:
    """Ours, eager first."""
    kinds = [("", False, False), ("_checkpointed", False, True), ("_compiled", True, False)]
    return [
        Variant(f"order{order}{'_bf16' if dtype == 'bf16' else ''}{suffix}", "pinmem", order, dtype, compiled, again)
        for suffix, compiled, again in kinds
        for dtype in DTYPES
        for order in (1, 2)
    ]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("released", "released", 1, anomaly=True),
        Variant("released_no_anomaly", "released", 1),
        *_pinmem_variants(),
        Variant("agg", "agg"),
        Variant("memory-agg", "memory-agg"),
        Variant("mldg_order1", "mldg", 1),
        Variant("mldg_order2", "mldg", 2),
        Variant("plain", "agg", alone=True),
        Variant("plain_bf16", "agg", dtype="bf16", alone=True),
        Variant("order2_bf16_inductor", "pinmem", 2, "bf16", compiled=True, engine="inductor"),
        Variant("order2_bf16_searched", "pinmem", 2, "bf16", compiled=True, searched=True),
    )
}


@dataclass(frozen=True)
class Setup:
    """What all variants of a run have in common.

    Attributes:
        architecture, channels: of ``build_model``.
        crop: height and width of the images in pixels.
        images: a domain; there are two, one meta-train and one meta-test.
        device: where everything is.
        inner_lr: alpha.
        engine: of ``meta.CompiledStep``.
    """

    architecture: str
    crop: tuple[int, int]
    images: int
    device: torch.device
    channels: int = 256
    inner_lr: float = 0.0025
    engine: str = "graph"


def new_model(setup: Setup, memory: bool = True, dropout: float = DROPOUT) -> Segmentor:
    """The network that every variant starts from, its memory filled with random unit rows.

    Its residual branches are damped: a freshly made network amplifies a rounding error of its first layers until
    nothing of the gradient is left (1e-7 in float32 is 0.3 of the cosine), and no comparison would mean anything.
    """
    torch.manual_seed(0)
    model = build_model(setup.architecture, CLASSES, channels=setup.channels, memory=memory, aux_dropout=dropout)
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck | InvertedResidual):
            branch = module.conv if isinstance(module, InvertedResidual) else module
            last = [child for child in branch.children() if isinstance(child, nn.BatchNorm2d)][-1]
            nn.init.constant_(last.weight, DAMPING)
    if model.memory is not None:
        model.memory.slots.copy_(ops.normalize(torch.rand_like(model.memory.slots), 1))
    return model.to(setup.device).train()


def new_batches(setup: Setup) -> tuple[meta.Batch, meta.Batch]:
    """Meta-train and meta-test images: noise, with labels as street scenes have them."""
    generator = torch.Generator().manual_seed(1)
    height, width = setup.crop

    def batch() -> meta.Batch:
        images = torch.randn(setup.images, 3, height, width, generator=generator)
        labels = street_labels(setup.images, max(height, width), CLASSES, generator)[:, :height, :width]
        return meta.Batch(images.to(setup.device), labels.contiguous().to(setup.device))

    return batch(), batch()


def cudnn_flags(benchmark: bool, deterministic: bool) -> contextlib.AbstractContextManager[None]:
    """How cuDNN chooses its kernels; whether they may round to TF32 stays as it is for the run."""
    tf32 = torch.backends.cudnn.allow_tf32
    return torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, deterministic=deterministic, allow_tf32=tf32)


class Ours:
    """Our iteration, as the trainer does it."""

    def __init__(self, variant: Variant, setup: Setup) -> None:
        self.variant = variant
        self.layout = memory_format(DTYPES[variant.dtype], setup.device)
        self.model = new_model(setup, variant.mode in meta.MEMORY_MODES).to(memory_format=self.layout)
        self.params, self.buffers, self.memory = meta.split_state(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
        self.hyper = meta.Hyper(
            meta.Network(self.model, checkpoint_activations=variant.checkpointed),
            variant.mode,  # type: ignore[arg-type]
            variant.order or 1,
            inner_lr=setup.inner_lr,
            autocast=DTYPES[variant.dtype],
        )
        # what is compiled is checked against the plain step on its first batch, and stops if it differs
        self.step: Callable[..., meta.StepResult] = (
            meta.CompiledStep(variant.engine or setup.engine, strict=True) if variant.compiled else meta.step
        )
        self.generator = torch.Generator(setup.device).manual_seed(2)
        self.train, self.test = self._split(setup)

    def _split(self, setup: Setup) -> tuple[meta.Batch, meta.Batch | None]:
        train, test = new_batches(setup)
        train, test = (
            meta.Batch(batch.images.contiguous(memory_format=self.layout), batch.labels) for batch in (train, test)
        )
        if self.hyper.mode in meta.META_MODES:
            return train, test
        return meta.Batch(*(torch.cat(parts) for parts in zip(train, test, strict=True))), None

    def __call__(self, clock: Clock) -> dict[str, float]:
        """One iteration; returns its losses, which makes it wait for the device, as the trainer does."""
        with cudnn_flags(benchmark=self.variant.searched, deterministic=False):
            return self._iterate(clock)

    def _iterate(self, clock: Clock) -> dict[str, float]:
        sizes = len(self.train.images), len(self.test.images) if self.test else 0
        channels = self.model.aux_head.dropped_channels
        noise = meta.draw_noise(sizes, channels, DROPOUT, self.memory is not None, self.generator)
        gradients = ("inner_gradient", "outer_gradient") if self.test else ("outer_gradient",)
        # a compiled step has no phases; while it is traced, nothing of it may be replaced
        marked = contextlib.nullcontext() if self.variant.compiled else clock.phases_of_step(gradients)
        with marked:
            result = self.step(self.params, self.buffers, self.memory, self.train, self.test, noise, self.hyper)
        if not self.variant.alone:
            self._update(result, clock)
        return dict(zip(result.losses, torch.stack([*result.losses.values()]).tolist(), strict=True))

    def _update(self, result: meta.StepResult, clock: Clock) -> None:
        for name, value in result.buffers.items():
            self.buffers[name].copy_(value)
        with clock.phase("optimizer"):
            for name, parameter in self.params.items():
                parameter.grad = result.grads[name]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.memory is not None:
            with clock.phase("memory"):
                rewritten = meta.rewrite_memory(self.params, self.buffers, self.memory, [self.train], self.hyper)
                self.memory.copy_(rewritten)


class Released:
    """The released iteration, with the released settings of cuDNN."""

    def __init__(self, variant: Variant, setup: Setup) -> None:
        self.variant = variant
        self.step = ReleasedStep(new_model(setup), setup.inner_lr, LR)
        self.train, self.test = new_batches(setup)

    def __call__(self, clock: Clock) -> dict[str, float]:
        """One iteration; returns its losses."""
        with cudnn_flags(benchmark=False, deterministic=True), torch.autograd.set_detect_anomaly(self.variant.anomaly):
            return self.step.iterate(self.train, self.test, clock)


Iteration = Ours | Released


def new_iteration(variant: Variant, setup: Setup) -> Iteration:
    """A variant ready to run."""
    return Released(variant, setup) if variant.is_released else Ours(variant, setup)


@dataclass(frozen=True)
class Products:
    """Multiply-adds of the convolutions of one image, in millions, by part of the network.

    Attributes:
        encoder, writer: of the two parts that a rewrite of the memory needs; ``aux``: of the auxiliary head.
        rest: fusion and decoder.
        first: of the first convolution, a part of ``encoder``: the image needs no gradient.
    """

    encoder: float
    writer: float
    aux: float
    rest: float
    first: float

    @property
    def whole(self) -> float:
        return self.encoder + self.writer + self.aux + self.rest


@cache
def count_products(setup: Setup, memory: bool = True) -> Products:
    """Counts by the formula B C_out h w C_in k^2 / groups of every convolution, on the meta device."""
    with torch.device("meta"):
        model = build_model(setup.architecture, CLASSES, channels=setup.channels, memory=memory).eval()
    counted: list[float] = []

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        counted.append(output.numel() * module.weight[0].numel() / 1e6)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)

    def take() -> float:
        total = sum(counted)
        counted.clear()
        return total

    with torch.no_grad():
        features = model.encoder(torch.empty(1, 3, *setup.crop, device="meta"))
        first, encoder, writer = counted[0], take(), 0.0
        if model.memory is not None:
            model.memory.writer(features.feature)
            writer = take()
            model.memory.fusion(features.feature, features.feature)
        model.decoder(features.feature, features.low_level)
        rest = take()
        model.aux_head(features.aux)
        return Products(encoder, writer, take(), rest, first)


def products_of(variant: Variant, setup: Setup) -> float | None:
    """Multiply-adds, in millions, of the convolutions of one iteration; None where blocks are computed again.

    A convolution is one product forward and two backward, of which the first one of the network needs one.  The exact
    second derivative needs six more of every convolution of the inner pass, the tangent of each of the three factors
    product by product: R(x*w) = x*Rw + Rx*w, and as many for the gradient of the data and for that of the weights.
    """
    if variant.checkpointed:
        return None
    p, n = count_products(setup, variant.mode not in ("mldg", "agg")), setup.images
    rewrite = p.encoder + p.writer
    if variant.is_released:
        second_write, third_pass = p.whole + p.writer, p.whole - p.aux
        return n * (3 * p.whole - p.first + second_write + 3 * (p.whole - p.writer) - p.first + third_pass)
    if variant.mode not in meta.META_MODES:
        return 2 * n * (3 * p.whole - p.first + (rewrite if variant.mode == "memory-agg" else 0))
    inner, outer = 3 * p.whole - p.first, 3 * (p.whole - p.writer) - p.first
    writes = 2 * rewrite + p.writer if variant.mode == "pinmem" else 0.0
    # of the first convolution R(x*w) and the weight gradient have one term each, since the image has no tangent
    second = 6 * p.whole - 4 * p.first if variant.order == 2 else 0.0
    return n * (inner + outer + writes + second)
