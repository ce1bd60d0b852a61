"""No iteration is timed that is wrong: what ``python bench/meta_step.py`` checks before it measures.

1. The released iteration and ours of order 1 are the same mathematics: gradients, losses, memory and batch-norm
   statistics agree in float64.
2. Order 2 equals order 1 where the inner step is empty, and is far from it where it is not.
3. Under autocast the gradient points where that of float32 points.

The network is the bench's, damped; for half precision the gate also lifts what the rectifiers see, most of which then
passes them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.phases import Clock
from bench.released_step import Labels, ReleasedStep
from bench.step_variants import DTYPES, LR, Setup, Variant, new_batches, new_model
from pmm_fast import meta
from pmm_fast.models import Segmentor
from tests import tolerances

# the weights with which labels are sampled are exact in float32, in which the released code computes them
EXACT_CROP = (35, 34)
# as many positions as batch-norm statistics in half precision need
AUTOCAST_CROP, AUTOCAST_IMAGES = (67, 66), 4
# the two orders are apart by more than this many times what is allowed between equals
APART = 100
# an inner step in which half precision can follow
AUTOCAST_INNER_LR = 1e-4
LIFT = 2.0


def lifted_model(setup: Setup, dtype: torch.dtype) -> Segmentor:
    """The network of the bench without dropout, in which roundings do not grow from layer to layer.

    Float32 is what half precision is compared with; equality is checked in float64.
    """
    model = new_model(setup, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and dtype == torch.float32:
            nn.init.constant_(module.bias, LIFT)
    return model.to(dtype)


def _batches(setup: Setup, dtype: torch.dtype) -> list[meta.Batch]:
    return [meta.Batch(batch.images.to(dtype), batch.labels) for batch in new_batches(setup)]


class Outcome:
    """What an iteration without noise gave: losses and gradients, and after SGD the memory and the statistics."""

    def __init__(self, losses: dict[str, Tensor], grads: meta.State, memory: Tensor, buffers: meta.State) -> None:
        self.losses, self.grads, self.memory, self.buffers = losses, grads, memory, buffers

    def distance(self, other: Outcome) -> dict[str, float]:
        """How far ``other`` is from this one, by kind of value; see :func:`distance`."""
        found = {"gradients": distance(other.grads, self.grads)}
        shared = self.losses.keys() & other.losses.keys()
        found["losses"] = distance({k: other.losses[k] for k in shared}, {k: self.losses[k] for k in shared})
        found["memory"] = distance({"memory": other.memory}, {"memory": self.memory})
        statistics = [name for name, value in self.buffers.items() if value.is_floating_point()]
        ours, theirs = ({name: which.buffers[name] for name in statistics} for which in (self, other))
        return found | {"statistics": distance(theirs, ours)}


def distance(found: meta.State, expected: meta.State) -> float:
    """Largest |found - expected| of a tensor, relative to its norm; of tiny ones, to a share of the largest norm."""
    norms = torch.stack([value.double().norm() for value in expected.values()])
    errors = torch.stack([(found[name].double() - value.double()).norm() for name, value in expected.items()])
    return float((errors / norms.clamp(min=tolerances.RELEASED_STEP_SKIP * float(norms.max()))).max())


def one_minus_cosine(found: meta.State, expected: meta.State) -> float:
    """1 - cosine of two gradients as vectors; 1 for unrelated ones."""
    a, b = (torch.cat([which[name].double().flatten() for name in expected]) for which in (found, expected))
    return 1 - float(nn.functional.cosine_similarity(a, b, dim=0))


def run_ours(setup: Setup, order: int, dtype: torch.dtype = torch.float64, variant: Variant | None = None) -> Outcome:
    """One iteration of ours; ``variant`` says what else than order and dtype of the weights is asked."""
    model = lifted_model(setup, dtype)
    params, buffers, memory = meta.split_state(model)
    assert memory is not None
    train, test = _batches(setup, dtype)
    network = meta.Network(model, checkpoint_activations=variant is not None and variant.checkpointed)
    autocast = None if variant is None else DTYPES[variant.dtype]
    hyper = meta.Hyper(network, order=order, inner_lr=setup.inner_lr, autocast=autocast)
    result = meta.step(params, buffers, memory, train, test, meta.Noise(), hyper)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    for name, parameter in params.items():
        parameter.grad = result.grads[name]
    optimizer.step()
    rewritten = meta.rewrite_memory(params, result.buffers, memory, [train], hyper)
    return Outcome(result.losses, result.grads, rewritten, result.buffers)


def run_released(setup: Setup) -> Outcome:
    """One released iteration in float64."""
    model = lifted_model(setup, torch.float64)
    step = ReleasedStep(model, setup.inner_lr, LR, gumbel=False)
    train, test = _batches(setup, torch.float64)
    labels = Labels(train.labels.long(), train.labels.long())
    inner, outer = step.differentiate(train, labels, test, Clock(setup.device))
    grads = {
        name: parameter.grad.clone() for name, parameter in step.net.named_parameters() if parameter.grad is not None
    }
    step.optimizer.step()
    step.rewrite(train.images, labels)
    losses = {f"train/{name}": value.detach() for name, value in inner.losses.items()}
    losses |= {f"test/{name}": value.detach() for name, value in outer.losses.items()}
    return Outcome(losses, grads, step.memory, dict(step.net.named_buffers()))


def check_released(setup: Setup, first: Outcome) -> tuple[bool, str]:
    """The released iteration against ours of order 1."""
    found = first.distance(run_released(setup))
    text = ", ".join(f"{kind} {value:.1e}" for kind, value in found.items())
    allowed = tolerances.EXACT
    return all(value < allowed for value in found.values()), f"released is order 1: {text} (allowed {allowed:.0e})"


def check_orders(setup: Setup, first: Outcome, second: Outcome) -> tuple[bool, str]:
    """Order 2 against order 1, with an empty inner step and with one."""
    still = replace(setup, inner_lr=0.0)
    equal = run_ours(still, 1).distance(run_ours(still, 2))["gradients"]
    apart = first.distance(second)["gradients"]
    least = APART * tolerances.EXACT
    text = f"order 2 is order 1 at inner lr 0: {equal:.1e} (allowed {tolerances.EXACT:.0e}), "
    text += f"and is not at {setup.inner_lr:g}: {apart:.1e} (at least {least:.0e})"
    return equal < tolerances.EXACT and apart > least, text


def check_checkpointed(setup: Setup, variant: Variant, expected: Outcome) -> tuple[bool, str]:
    """Recomputed blocks against kept ones, in float64."""
    assert variant.order is not None
    found = expected.distance(run_ours(setup, variant.order, variant=replace(variant, dtype="float32")))["gradients"]
    allowed = tolerances.EXACT
    return found < allowed, f"order {variant.order}, checkpointed: gradients {found:.1e} (allowed {allowed:.0e})"


def check_autocast(setup: Setup, variant: Variant) -> tuple[bool, str]:
    """The gradient under autocast against that in float32."""
    assert variant.order is not None
    found, expected = (run_ours(setup, variant.order, torch.float32, which).grads for which in (variant, None))
    cosine, allowed = one_minus_cosine(found, expected), tolerances.AUTOCAST_STEP
    norms = [float(torch.cat([value.flatten() for value in which.values()]).norm()) for which in (found, expected)]
    ratio = norms[0] / norms[1]
    text = f"order {variant.order}, {variant.dtype}: 1 - cosine {cosine:.1e}, norm {ratio:.2f} times that of float32"
    return cosine < allowed and abs(ratio - 1) < allowed, f"{text} (allowed {allowed:.0e})"


def autocast_setup(setup: Setup) -> Setup:
    """What autocast is checked on."""
    return replace(setup, crop=AUTOCAST_CROP, images=AUTOCAST_IMAGES, inner_lr=AUTOCAST_INNER_LR)


def judge(setup: Setup, variants: list[Variant]) -> list[tuple[bool, str]]:
    """Whether each check passed, with a line of numbers; what is checked depends on what is to be timed."""
    exact = replace(setup, crop=EXACT_CROP, images=2)
    outcomes = {order: run_ours(exact, order) for order in (1, 2)}
    found = [check_released(exact, outcomes[1]), check_orders(exact, outcomes[1], outcomes[2])]
    ours = [variant for variant in variants if variant.mode == "pinmem"]
    for order, expected in outcomes.items():
        of_order = [variant for variant in ours if variant.order == order]
        again = [variant for variant in of_order if variant.checkpointed][:1]
        found += [check_checkpointed(exact, variant, expected) for variant in again]
        # what is compiled is checked against the eager step on its first batch, by itself
        low = [variant for variant in of_order if variant.dtype == "bf16"][:1]
        found += [check_autocast(autocast_setup(setup), replace(variant, checkpointed=False)) for variant in low]
    return found
