"""One iteration of Algorithm 1 as one pure function.

    inner:  L_in(theta) on the meta-train images: read with M, then write M^ and judge it
    theta' = theta - alpha grad L_in(theta)
    M'    = M updated from the meta-train images with the encoder of theta' held constant, the writing net live
    outer:  L_out(theta') on the meta-test images, read with M'
    returned gradient:  d/dtheta [ L_in(theta) + L_out(theta') ]

Order 2 (default) differentiates through theta' = theta - alpha grad L_in exactly, which adds -alpha H_in g_out; order 1
treats grad L_in as a constant, which is what the released code does (``train.py:530-583``).

No module is changed and nothing is written into the arguments: parameters, buffers and memory come in, gradients,
buffers and memory go out.  What is random comes in too (:class:`Noise`).

With a process group (``hyper.network.group``) every rank brings a part of the two batches and gets what one process
with all of them would: a rank differentiates its share of each loss; shares, class sums and gradients are summed over
the ranks (docs/distributed.md).  Every function here is then a collective, to be called by all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pmm_fast import ops
from pmm_fast.meta import losses as L
from pmm_fast.meta.network import Network, State
from pmm_fast.meta.whitening import whitening_loss
from pmm_fast.ops.collective import count_ranks, sum_over_ranks

Mode = Literal["pinmem", "memory-agg", "mldg", "agg"]
MEMORY_MODES = ("pinmem", "memory-agg")
META_MODES = ("pinmem", "mldg")


class Batch(NamedTuple):
    """Images ``[B, 3, H, W]`` (normalised) and labels ``[B, H, W]`` (integers, classes or the ignore index)."""

    images: Tensor
    labels: Tensor


class Noise(NamedTuple):
    """All that is random in a step.

    ``train``, ``test``: Gumbel noise ``[B, K, h, w]`` of the meta-train and the meta-test read, or its seed (int64, one
    element); None: plain softmax.
    ``train_keep``, ``test_keep``: ``[B, D]`` the dropout of the auxiliary head, what its channels are multiplied by;
    None: the module draws it (torch's global generator).
    """

    train: Tensor | None = None
    test: Tensor | None = None
    train_keep: Tensor | None = None
    test_keep: Tensor | None = None


@dataclass(frozen=True)
class Hyper:
    """What a step does besides its data.

    Args:
        network: the structure that the parameters fill.
        mode: ``pinmem`` | ``memory-agg`` (memory, no meta-learning) | ``mldg`` (meta-learning, no memory) | ``agg``.
        order: 2, exact; 1, the inner gradient is a constant.
        inner_lr: alpha, of the inner gradient step; a scalar tensor where it is an input of a compiled step.
        memory_momentum: weight of the old memory in an update.
        temperature: of the read.
        cohesion_temperature: of the cosines in the cohesion loss.
        aux_weight, cohesion_weight, divergence_weight, classifier_weight, whitening_weight: of the losses.
        loss_scale: factor on both losses while they are differentiated, taken out again of both gradients (fp16);
            a scalar tensor where it is an input of a compiled step.
        autocast: type of mixed precision, or None.
    """

    network: Network
    mode: Mode = "pinmem"
    order: int = 2
    inner_lr: float | Tensor = 0.0025
    memory_momentum: float = 0.8
    temperature: float = 1.0
    cohesion_temperature: float = 1.0
    aux_weight: float = 0.4
    cohesion_weight: float = 0.02
    divergence_weight: float = 0.4
    classifier_weight: float = 0.2
    whitening_weight: float = 0.6
    loss_scale: float | Tensor = 1.0
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("pinmem", "memory-agg", "mldg", "agg"):
            raise ValueError(f"mode must be pinmem, memory-agg, mldg or agg, got {self.mode!r}")
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order!r}")
        if (self.mode in MEMORY_MODES) != self.network.has_memory:
            state = "has" if self.network.has_memory else "has no"
            raise ValueError(f"mode {self.mode!r} does not fit a network that {state} memory")
        if self.network.masks and self.mode != "agg":
            raise ValueError(f"mode {self.mode!r} has no whitening loss: a network that needs it is trained with agg")


class StepResult(NamedTuple):
    """What :func:`step` returns.

    ``losses``: detached scalars ``train/seg``, ``train/aux``, ... ``test/seg``, ..., ``train``, ``test`` and ``total``
    (the value whose gradient ``grads`` is), and ``train/top_weight``, the mean largest weight of the read; of the whole
    batch, whatever part of it this process has.
    ``grads``: by parameter name, detached.  ``memory``: as written inside the step (M', detached), None without one.
    ``buffers``: with the batch-norm statistics of the meta-train pass.
    """

    losses: dict[str, Tensor]
    grads: State
    memory: Tensor | None
    buffers: State


class _Forward(NamedTuple):
    losses: dict[str, Tensor]  # seg, aux, cohesion, whitening: this rank's share of each
    written: tuple[Tensor, Tensor] | None  # this rank's class sums, masses
    top_weight: Tensor | None


def step(
    params: State,
    buffers: State,
    memory: Tensor | None,
    batch_mtr: Batch,
    batch_mte: Batch | None,
    noise: Noise,
    hyper: Hyper,
) -> StepResult:
    """Losses and gradients of one iteration.

    Args:
        params: every parameter of the model by name.
        buffers: every buffer but the memory by name (batch-norm statistics, whitening masks).
        memory: ``[K, C]`` M, or None in the modes without memory.
        batch_mtr: meta-train images; in ``agg`` and ``memory-agg`` all images.
        batch_mte: meta-test images; None in ``agg`` and ``memory-agg``.
        noise: see :class:`Noise`.
        hyper: see :class:`Hyper`.

    Returns:
        :class:`StepResult`.  The optimiser step is the caller's, and after it :func:`rewrite_memory`.

    Raises:
        ValueError: a batch or memory that the mode needs is missing, or one that it cannot use is given.
    """
    _check_arguments(memory, batch_mte, hyper)
    theta = {name: value.detach().requires_grad_() for name, value in params.items()}
    new_buffers = {name: value.clone() for name, value in buffers.items()}
    inner, new_memory, report = _inner_loss(theta, new_buffers, memory, batch_mtr, noise, hyper)
    if hyper.mode not in META_MODES:
        grads = _gradient(inner, theta, hyper)
        return StepResult(_report(report, inner, hyper), _detached(grads), _detach(new_memory), new_buffers)

    assert batch_mte is not None
    second_order = hyper.order == 2
    inner_grads = _gradient(inner, theta, hyper, create_graph=second_order)
    adapted = _adapted(theta, inner_grads, hyper.inner_lr)
    if not second_order:
        adapted = {name: value.detach().requires_grad_() for name, value in adapted.items()}

    if memory is not None:
        new_memory = _write_with_constant_encoder(adapted, buffers, memory, batch_mtr, hyper)
    scratch = {name: value.clone() for name, value in buffers.items()}
    outer_noise = Noise(noise.test, None, noise.test_keep)
    outer_forward = _forward(adapted, scratch, new_memory, batch_mte, outer_noise, hyper, write=False)
    outer = _weighted(outer_forward.losses, hyper)
    if not second_order and not _is_shared_or_scaled(hyper):
        grads = _add_gradient(inner_grads, outer, adapted)
    else:
        outer_grads = _gradient(outer, theta if second_order else adapted, hyper)
        del adapted
        # memory is at its fullest here: each sum takes the place of its terms
        grads = {name: inner_grads.pop(name).detach() + outer_grads.pop(name) for name in theta}

    report |= {f"test/{name}": value for name, value in outer_forward.losses.items()} | {"test": outer}
    return StepResult(_report(report, inner + outer, hyper), _detached(grads), _detach(new_memory), new_buffers)


def rewrite_memory(params: State, buffers: State, memory: Tensor, batches: list[Batch], hyper: Hyper) -> Tensor:
    """M*, which the next iteration starts from: M updated from the meta-train images after the optimiser step.

    The network is in evaluation mode (running statistics), only its encoder and writing net run, nothing is
    differentiated (Algorithm 1, last line; released code ``train.py:578-583``).

    Args:
        params, buffers: as after the optimiser step.
        memory: ``[K, C]``, the memory before the iteration.
        batches: the iteration's meta-train micro-batches; their class sums are added.
        hyper: see :class:`Hyper`.

    Returns:
        ``[K, C]``, unit rows.
    """
    with torch.no_grad():
        pooled = [_pool(params, params, buffers, batch, memory.shape[0], hyper, training=False) for batch in batches]
        sums, mass = (torch.stack(parts).sum(0) for parts in zip(*pooled, strict=True))
        return _updated(memory, sums, mass, hyper)


def read_losses(params: State, buffers: State, memory: Tensor | None, batch: Batch, hyper: Hyper) -> dict[str, Tensor]:
    """The losses (seg, aux, cohesion, whitening) of a training forward without noise or gradient, for diagnosis."""
    with torch.no_grad():
        scratch = {name: value.clone() for name, value in buffers.items()}
        return _global(_forward(params, scratch, memory, batch, Noise(), hyper, write=False).losses, hyper)


def _check_arguments(memory: Tensor | None, batch_mte: Batch | None, hyper: Hyper) -> None:
    if (memory is None) != (hyper.mode not in MEMORY_MODES):
        raise ValueError(f"mode {hyper.mode!r} {'needs a' if memory is None else 'takes no'} memory")
    if (batch_mte is None) != (hyper.mode not in META_MODES):
        raise ValueError(f"mode {hyper.mode!r} {'needs a' if batch_mte is None else 'takes no'} meta-test batch")


def autocast(hyper: Hyper, device: torch.device) -> torch.autocast:
    """The mixed precision of a forward pass; losses, sums and updates stay outside it."""
    # no cache of cast weights: each weight is cast once a pass, and a cached cast would outlive its graph
    return torch.autocast(device.type, dtype=hyper.autocast, enabled=hyper.autocast is not None, cache_enabled=False)


def _forward(
    params: State,
    buffers: State,
    memory: Tensor | None,
    batch: Batch,
    noise: Noise,
    hyper: Hyper,
    write: bool,
) -> _Forward:
    """Read losses of a training forward with the meta-train part of the noise.

    With ``write`` also the class sums, and the mean largest weight of the read.
    """
    net, labels = hyper.network, batch.labels
    written = top_weight = None
    with autocast(hyper, batch.images.device):
        feature, low_level, aux, *whitened = net("encoder", params, buffers, batch.images)
        decoded = feature
        if memory is not None:
            if write:
                output = net("memory.writer", params, buffers, feature)
                read, scores, *pooled = ops.memory_pass(feature, output, labels, memory, noise.train, hyper.temperature)
                written = (pooled[0], pooled[1])
                top_weight = ops.assignment(scores.detach(), noise.train, hyper.temperature).amax(1).mean()
            else:
                read, scores = ops.memory_read(feature, memory, noise.train, hyper.temperature)
            decoded = net("memory.fusion", params, buffers, feature, read)
        logits = net("decoder", params, buffers, decoded, low_level)
        keep = () if noise.train_keep is None else (noise.train_keep,)
        aux_logits = net("aux_head", params, buffers, aux, *keep)
    found = {"seg": ops.upsample_cross_entropy(logits, labels), "aux": L.auxiliary_loss(aux_logits, labels)}
    if memory is not None:
        found["cohesion"] = L.cohesion_loss(scores, labels, hyper.cohesion_temperature)
    if net.masks:
        found["whitening"] = whitening_loss(whitened[0], [buffers[name] for name in net.masks])
    if net.group is not None:
        shares = L.shares_of_rank(labels, (aux_logits.shape[2], aux_logits.shape[3]), net.group)
        weights = {"seg": shares.labelled, "aux": shares.auxiliary, "cohesion": shares.labelled}
        weights["whitening"] = shares.images
        found = {name: value * weights[name].to(value.dtype) for name, value in found.items()}
        top_weight = None if top_weight is None else top_weight * shares.images.to(top_weight.dtype)
    return _Forward(found, written, top_weight)


def _inner_loss(
    theta: State, buffers: State, memory: Tensor | None, batch: Batch, noise: Noise, hyper: Hyper
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """This rank's share of L_in, the memory M^ that it judges, and the parts to report."""
    forward = _forward(theta, buffers, memory, batch, noise, hyper, write=memory is not None)
    losses, updated = dict(forward.losses), None
    if memory is not None:
        assert forward.written is not None and forward.top_weight is not None
        updated = _updated(memory, *forward.written, hyper)
        losses["divergence"] = L.divergence_loss(updated)
        losses["classifier"] = L.classifier_loss(hyper.network("memory.classifier", theta, buffers, updated))
        if hyper.network.group is not None:
            # the memory is the same on every rank: each takes an equal share of what is said about it
            ranks = count_ranks(hyper.network.group)
            losses |= {name: losses[name] / ranks for name in ("divergence", "classifier")}
    total = _weighted(losses, hyper)
    report = {f"train/{name}": value for name, value in losses.items()} | {"train": total}
    if forward.top_weight is not None:
        report["train/top_weight"] = forward.top_weight
    return total, updated, report


def _adapted(theta: State, grads: State, inner_lr: float | Tensor) -> State:
    """theta - alpha g."""
    # the sign on alpha, or the derivative would turn that of each parameter
    opposite = -inner_lr
    return {name: value + opposite * grads[name] for name, value in theta.items()}


def _write_with_constant_encoder(adapted: State, buffers: State, memory: Tensor, batch: Batch, hyper: Hyper) -> Tensor:
    """M' = update(M, X_mtr; copy(theta'_E), theta'_U): its gradient reaches the writing net alone."""
    constant = {name: value.detach() for name, value in adapted.items()}
    scratch = {name: value.clone() for name, value in buffers.items()}
    return _updated(memory, *_pool(constant, adapted, scratch, batch, memory.shape[0], hyper, training=True), hyper)


def _updated(memory: Tensor, sums: Tensor, mass: Tensor, hyper: Hyper) -> Tensor:
    """The memory after an update from the class sums and masses of all ranks."""
    return ops.update_memory(memory, *add_class_sums(sums, mass, hyper), hyper.memory_momentum)


def add_class_sums(sums: Tensor, mass: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """Class sums ``[K, C]`` and masses ``[K]`` added up over the ranks, in one collective; differentiable."""
    group = hyper.network.group
    if group is None:
        return sums, mass
    together = sum_over_ranks(torch.cat([sums, mass[:, None]], 1), group)
    return together[:, :-1], together[:, -1]


def _pool(
    encoder_params: State,
    writer_params: State,
    buffers: State,
    batch: Batch,
    num_classes: int,
    hyper: Hyper,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """This rank's class sums and masses of the writing net's output; only encoder and writing net run."""
    with autocast(hyper, batch.images.device):
        with torch.no_grad():
            feature = hyper.network("encoder", encoder_params, buffers, batch.images, training=training)[0]
        written = hyper.network("memory.writer", writer_params, buffers, feature, training=training)
        return ops.masked_average_pool(written, batch.labels, num_classes)


def _weighted(losses: dict[str, Tensor], hyper: Hyper) -> Tensor:
    weights = {
        "seg": 1.0,
        "aux": hyper.aux_weight,
        "cohesion": hyper.cohesion_weight,
        "divergence": hyper.divergence_weight,
        "classifier": hyper.classifier_weight,
        "whitening": hyper.whitening_weight,
    }
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum()


def _gradient(loss: Tensor, params: State, hyper: Hyper, create_graph: bool = False) -> State:
    """Gradient by parameter name, of all ranks' shares; zero for a parameter that the loss does not reach."""
    scale = hyper.loss_scale if _is_scaled(hyper) else None
    found = torch.autograd.grad(
        loss if scale is None else loss * scale, list(params.values()), create_graph=create_graph, allow_unused=True
    )
    grads = {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(params.items(), found, strict=True)
    }
    if hyper.network.group is not None:
        grads = _sum_as_one(grads, hyper.network.group)
    # dividing by one would copy every gradient
    return grads if scale is None else {name: grad / scale for name, grad in grads.items()}


def _add_gradient(grads: State, loss: Tensor, params: State) -> State:
    """``grads`` plus the gradient of a loss, each added in place as soon as it is known."""
    # a gradient that two parameters share would take both sums
    if len({grad.untyped_storage()._cdata for grad in grads.values()}) < len(grads):
        grads = {name: grad.clone() for name, grad in grads.items()}
    for name, value in params.items():
        value.grad = grads[name]
    torch.autograd.backward(loss, inputs=list(params.values()))
    return grads


def _is_scaled(hyper: Hyper) -> bool:
    return isinstance(hyper.loss_scale, Tensor) or hyper.loss_scale != 1


def _is_shared_or_scaled(hyper: Hyper) -> bool:
    """Whether a gradient needs something done to it before it can be added to another."""
    return hyper.network.group is not None or _is_scaled(hyper)


def _sum_as_one(values: State, group: str) -> State:
    """Tensors of one dtype summed over the ranks as one flat buffer; differentiable."""
    flat = sum_over_ranks(torch.cat([value.reshape(-1) for value in values.values()]), group)
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


def _detach(memory: Tensor | None) -> Tensor | None:
    return None if memory is None else memory.detach()


def _detached(grads: State) -> State:
    return {name: value.detach() for name, value in grads.items()}


def _report(parts: dict[str, Tensor], total: Tensor, hyper: Hyper) -> dict[str, Tensor]:
    return _global({name: value.detach() for name, value in (parts | {"total": total}).items()}, hyper)


def _global(losses: dict[str, Tensor], hyper: Hyper) -> dict[str, Tensor]:
    """The ranks' shares of some scalars added up."""
    if hyper.network.group is None:
        return losses
    found = sum_over_ranks(torch.stack(list(losses.values())), hyper.network.group)
    return dict(zip(losses, found.unbind(), strict=True))
