"""Nothing is timed that is wrong: outputs and derivatives of an implementation against the float64 reference.

The rule and its numbers are those of the tests, ``tests/tolerances.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases import BASELINES, DTYPES, IGNORE, Case, Inputs, Variant, reference_variant
from pmm_fast import ops
from tests import tolerances

ORDERS = {"fwd": "forward", "bwd": "backward", "bwd2": "double_backward"}

Values = dict[str, list[Tensor]]  # by order: outputs, first derivatives, second derivatives


@dataclass(frozen=True)
class Incoming:
    """What the derivatives are contracted with: gradients of the outputs, and of the leaves' gradients."""

    outputs: list[Tensor]
    leaves: list[Tensor]

    def convert(self, dtype: torch.dtype) -> Incoming:
        return Incoming([g.to(dtype) for g in self.outputs], [g.to(dtype) for g in self.leaves])


def incoming(case: Case, inputs: Inputs) -> Incoming:
    """Random gradients in the shapes and dtypes in which the operator gets them."""
    device, dtype = inputs.labels.device, DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(2)

    def draw(shape: tuple[int, ...], kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(kind)

    scores = (case.batch, case.classes, case.side, case.side)
    outputs = {
        "masked_average_pool": [draw((case.classes, case.channels))],
        "upsample_cross_entropy": [torch.ones((), device=device)],
    }.get(case.op, [draw(tuple(inputs.maps[0].shape), dtype), draw(scores)])
    if case.op == "memory_pass":
        outputs.append(draw((case.classes, case.channels)))
    return Incoming(outputs, [draw(tuple(leaf.shape), leaf.dtype) for leaf in inputs.leaves()])


def differentiable(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs that carry a derivative."""
    return [output for output in outputs if output.requires_grad]


def derive(variant: Variant, inputs: Inputs, noise: Tensor | None, given: Incoming, twice: bool = True) -> Values:
    """Every value of an implementation up to the second derivative, or up to the first."""
    inputs = inputs.convert()
    leaves = inputs.leaves()
    outputs = variant.comparable(variant.function(inputs, noise))
    gradients = [gradient.detach().requires_grad_(twice) for gradient in given.outputs]
    first = torch.autograd.grad(differentiable(outputs), leaves, gradients, create_graph=twice)
    values = {"fwd": [output.detach() for output in outputs], "bwd": [gradient.detach() for gradient in first]}
    if twice:
        values["bwd2"] = list(torch.autograd.grad(first, (*leaves, *gradients), given.leaves))
    return values


def derive_loss(inputs: Inputs, given: Incoming) -> Values:
    """:func:`derive` of the reference's mean cross-entropy, an image at a time: its maps are as large as the labels.

    With n_b labelled pixels in image b and n in all, loss = sum_b n_b/n loss_b.
    """
    variant = reference_variant("upsample_cross_entropy")
    shares = (inputs.labels != IGNORE).sum((1, 2)).double()
    shares = shares / shares.sum().clamp(min=1)
    parts: Values = {"fwd": [], "bwd": [], "logits": [], "gradient": []}
    for b, share in enumerate(shares.tolist()):
        image = replace(inputs, maps=(inputs.maps[0][b : b + 1],), labels=inputs.labels[b : b + 1])
        scaled = Incoming([given.outputs[0] * share], [given.leaves[0][b : b + 1]])
        values = derive(variant, image, None, scaled)
        of_logits, of_gradient = values["bwd2"]
        parts["fwd"].append(values["fwd"][0] * share)
        parts["bwd"].append(values["bwd"][0])
        parts["logits"].append(of_logits)
        parts["gradient"].append(of_gradient * share)
    return {
        "fwd": [torch.stack(parts["fwd"]).sum()],
        "bwd": [torch.cat(parts["bwd"])],
        "bwd2": [torch.cat(parts["logits"]), torch.stack(parts["gradient"]).sum()],
    }


class Gate:
    """Judges the implementations of one case; what they are compared with is computed once."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self.given = incoming(case, inputs)
        self.expected = self._reference(inputs.convert(torch.float64), self.given.convert(torch.float64))
        self.baseline = self._reference(inputs, self.given)

    def _reference(self, inputs: Inputs, given: Incoming) -> Values:
        """The reference's values, in the dtype of the inputs."""
        if self.case.op == "upsample_cross_entropy":
            return derive_loss(inputs, given)
        noise = None if inputs.memory is None else inputs.noise(ops.compute_dtype(inputs.maps[0].dtype))
        return derive(reference_variant(self.case.op), inputs, noise, given)

    def judge(self, variant: Variant, twice: bool = True) -> str | None:
        """What is wrong with an implementation, in a line, or None.

        A backend draws its noise from the seed, as it does when it is timed; a baseline is given the noise that the
        seed stands for.  The released code need not round as a kernel must, only compute the same thing.
        """
        noise = None
        if variant.name in BASELINES and self.inputs.memory is not None:
            noise = self.inputs.noise(torch.float32)
        found = derive(variant, self.inputs, noise, self.given, twice)
        for which, values in found.items():
            references = zip(self.baseline[which], self.expected[which], strict=True)
            for index, (value, (baseline, expected)) in enumerate(zip(values, references, strict=True)):
                try:
                    compare(value, baseline, expected, ORDERS[which], variant.name == "released")
                except AssertionError as error:
                    return f"{which}, value {index}: {error}"
        return None


def compare(value: Tensor, baseline: Tensor, expected: Tensor, order: str, is_released: bool) -> None:
    """An assertion that ``value`` is accurate."""
    if not is_released:
        return tolerances.assert_accurate(value, baseline, expected, order)
    assert value.shape == expected.shape, f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
    error = tolerances.relative_error(value, expected)
    assert error <= tolerances.RELEASED_MEMORY, f"relative error {error:.1e}, allowed {tolerances.RELEASED_MEMORY:.1e}"
