"""Whether a compiled step computes what the eager one does, seen from two sides.

A compiler that loses the second derivative gives a first-order gradient, which is near the right one and trains.  So it
is not enough that the results are near those of order 2; they must be away from those of order 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pmm_fast.meta.network import State
from pmm_fast.meta.step import StepResult


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do.

    Attributes:
        gradient: |found - expected| / |expected| over all parameters as one vector.
        parameter: the same for one parameter.
        floor: a norm below this share of the largest parameter's counts as that share: a gradient that is zero but for
            rounding has no digits to compare.
        value: max |found - expected| / max |expected| of a loss, of the memory and of a buffer.
    """

    gradient: float
    parameter: float
    floor: float
    value: float


# by the type that the network computes in
TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-7, 1e-6, 1e-9),
    torch.float32: Tolerance(1e-4, 1e-2, 1e-3, 1e-3),
    torch.bfloat16: Tolerance(1e-1, 5e-1, 1e-2, 5e-2),
    torch.float16: Tolerance(3e-2, 3e-1, 1e-2, 1e-2),
}
# order 1 must be farther than this many times the tolerance to be told apart by its distance
APART = 100
# else the second-order term itself is looked at: this much of it may be missing or too much
SHARE = 0.25


@dataclass(frozen=True)
class Agreement:
    """What a comparison found.

    Attributes:
        error: |g - g_2| / |g_2|, g the compiled gradient over all parameters, g_2 the eager one of the order asked for.
        parameter, parameter_error: the parameter that differs most, and by how much of its norm.
        value, value_error: the loss, buffer or memory that differs most, and by how much.
        gap: |g_2 - g_1| / |g_2| with the eager gradient g_1 of order 1; None where there is no second order.
        share: (g - g_1) . (g_2 - g_1) / |g_2 - g_1|^2, the second-order term that is there: 1 all, 0 none of it.
        failure: what is wrong, or None.
        told: whether order 1 is far enough to be told apart.
    """

    error: float
    parameter: str
    parameter_error: float
    value: str
    value_error: float
    gap: float | None
    share: float | None
    failure: str | None
    told: bool

    def __str__(self) -> str:
        parts = [
            f"gradient error {self.error:.1e}, at most {self.parameter_error:.1e} ({self.parameter})",
            f"value error {self.value_error:.1e} ({self.value})",
        ]
        if self.gap is not None:
            parts.append(f"order 1 is {self.gap:.1e} away, {self.share:.3f} of the second-order term is there")
        if not self.told:
            parts.append("order 1 is too near to be told from order 2")
        return "; ".join(parts)


def compare(
    found: StepResult, expected: StepResult, first_order: StepResult | None, autocast: torch.dtype | None
) -> Agreement:
    """Compare a compiled step with the eager one.

    Args:
        found: of the compiled step.
        expected: of the eager step of the order asked for.
        first_order: of the eager step of order 1 where order 2 was asked for, else None.
        autocast: mixed precision of the step, or None.

    Returns:
        The distances and the verdict.
    """
    tolerance = TOLERANCES[autocast or next(iter(expected.grads.values())).dtype]
    square = _squares(found.grads, expected.grads, expected.grads if first_order is None else first_order.grads)
    difference, size = square["difference"].sqrt(), square["size"].sqrt()
    norm = float(square["size"].sum().sqrt().clamp(min=1e-300))
    relative = difference / size.clamp(min=tolerance.floor * float(size.max())).clamp(min=1e-300)
    worst = int(relative.argmax())
    error = float(difference.square().sum().sqrt()) / norm
    value, value_error = _worst_value(found, expected)
    gap = share = None
    told = True
    failures = []
    # not x > tolerance, which a NaN would pass
    if not error <= tolerance.gradient:
        failures.append(f"gradient error {error:.2e} > {tolerance.gradient:.0e}")
    if not float(relative[worst]) <= tolerance.parameter:
        failures.append(f"a parameter's gradient error {float(relative[worst]):.2e} > {tolerance.parameter:.0e}")
    if not value_error <= tolerance.value:
        failures.append(f"value error {value_error:.2e} > {tolerance.value:.0e}")
    if first_order is not None:
        apart = float(square["gap"].sum())
        gap, share = apart**0.5 / norm, float(square["product"].sum()) / max(apart, 1e-300)
        told = gap > tolerance.gradient or (gap > error and abs(share - 1) <= SHARE)
        if gap > tolerance.gradient and gap <= APART * tolerance.gradient and not abs(share - 1) <= SHARE:
            failures.append(f"{share:.3f} of the second-order term is there")
    name = list(expected.grads)[worst]
    failure = ", ".join(failures) or None
    return Agreement(error, name, float(relative[worst]), value, value_error, gap, share, failure, told)


def _squares(found: State, expected: State, first: State) -> dict[str, Tensor]:
    """Sums of squares and products by parameter, ``[parameters]`` float64 on the host: one transfer for all of them."""
    rows = []
    for name, value in expected.items():
        right, seen, other = value.double(), found[name].double(), first[name].double()
        term, present = right - other, seen - other
        rows.append(
            torch.stack(
                [(seen - right).square().sum(), right.square().sum(), term.square().sum(), (present * term).sum()]
            )
        )
    columns = torch.stack(rows).cpu().unbind(1)
    return dict(zip(("difference", "size", "gap", "product"), columns, strict=True))


def _worst_value(found: StepResult, expected: StepResult) -> tuple[str, float]:
    """The loss, buffer or memory that differs most."""
    pairs = {name: (found.losses[name], value) for name, value in expected.losses.items()}
    pairs |= {name: (found.buffers[name], value) for name, value in expected.buffers.items()}
    if expected.memory is not None and found.memory is not None:
        pairs["memory"] = (found.memory, expected.memory)
    errors = torch.stack([_relative(*pair) for pair in pairs.values()]).cpu()
    # a NaN is the largest for argmax too
    worst = int(errors.argmax())
    return list(pairs)[worst], float(errors[worst])


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    found, expected = found.double(), expected.double()
    return (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
