"""Whether a compiled step computes what the eager one does, seen from two sides.

A compiler that loses the second derivative gives a first-order gradient, which is near the right one and trains.  So it
is not enough that the results are near those of order 2; they must be away from those of order 1.  Where eager mode
does not repeat itself, the compiled step need not be nearer to it than it is to itself.
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
        value: max |found - expected| / max |expected| of a loss, of the memory and of a buffer.  A loss below
            ``LOSS_FLOOR`` of the total counts as that: one that is zero but for rounding has no digits to compare.
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
# of a loss, as a share of the total loss
LOSS_FLOOR = 1e-3
# so many times the distance between two runs of eager mode may be rounding: one pair is one sample of it
REPEATS = 3
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
        repeat: |g_2' - g_2| / |g_2| of two runs of eager mode; None where it was run once.
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
    repeat: float | None
    gap: float | None
    share: float | None
    failure: str | None
    told: bool

    def __str__(self) -> str:
        parts = [
            f"gradient error {self.error:.1e}, at most {self.parameter_error:.1e} ({self.parameter})",
            f"value error {self.value_error:.1e} ({self.value})",
        ]
        if self.repeat is not None:
            parts.append(f"eager mode repeats its gradient to {self.repeat:.1e}, {REPEATS} times that may be rounding")
        if self.gap is not None:
            parts.append(f"order 1 is {self.gap:.1e} away, {self.share:.3f} of the second-order term is there")
        if not self.told:
            parts.append("order 1 is too near to be told from order 2")
        return "; ".join(parts)


def compare(
    found: StepResult,
    expected: StepResult,
    first_order: StepResult | None,
    autocast: torch.dtype | None,
    repeat: StepResult | None = None,
) -> Agreement:
    """Compare a compiled step with the eager one.

    Args:
        found: of the compiled step.
        expected: of the eager step of the order asked for.
        first_order: of the eager step of order 1 where order 2 was asked for, else None.
        autocast: mixed precision of the step, or None.
        repeat: of the same eager step once more, where it may give other bits; errors of up to three times its distance
            from ``expected`` are then allowed too.  The second-order term is looked at as strictly as without it.

    Returns:
        The distances and the verdict.
    """
    tolerance = TOLERANCES[autocast or next(iter(expected.grads.values())).dtype]
    square = _squares(found.grads, expected.grads, expected.grads if first_order is None else first_order.grads)
    norm = float(square["size"].sum().sqrt().clamp(min=1e-300))
    error, parameters = _gradient_errors(square, tolerance)
    values = _value_errors(found, expected)
    spread, noise_parameters, noise_values = 0.0, torch.zeros_like(parameters), torch.zeros_like(values)
    if repeat is not None:
        spread, noise_parameters = _gradient_errors(_squares(repeat.grads, expected.grads, expected.grads), tolerance)
        noise_values = _value_errors(repeat, expected)
    allowed = max(tolerance.gradient, REPEATS * spread)
    worst, parameter_error, parameter_allowed = _worst(parameters, noise_parameters, tolerance.parameter)
    worst_value, value_error, value_allowed = _worst(values, noise_values, tolerance.value)
    checks = [
        ("gradient error", error, allowed),
        ("a parameter's gradient error", parameter_error, parameter_allowed),
        ("value error", value_error, value_allowed),
    ]
    # not x > most, which a NaN would pass
    failures = [f"{what} {size:.2e} > {most:.1e}" for what, size, most in checks if not size <= most]
    gap = share = None
    told = True
    if first_order is not None:
        apart = float(square["gap"].sum())
        gap, share = apart**0.5 / norm, float(square["product"].sum()) / max(apart, 1e-300)
        told = gap > tolerance.gradient or (gap > error and abs(share - 1) <= SHARE)
        if tolerance.gradient < gap <= APART * allowed and not abs(share - 1) <= SHARE:
            failures.append(f"{share:.3f} of the second-order term is there")
    return Agreement(
        error=error,
        parameter=list(expected.grads)[worst],
        parameter_error=parameter_error,
        value=list(_values(expected))[worst_value],
        value_error=value_error,
        repeat=None if repeat is None else spread,
        gap=gap,
        share=share,
        failure=", ".join(failures) or None,
        told=told,
    )


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


def _gradient_errors(square: dict[str, Tensor], tolerance: Tolerance) -> tuple[float, Tensor]:
    """Of the gradient as one vector, and of each parameter ``[parameters]``."""
    difference, size = square["difference"].sqrt(), square["size"].sqrt()
    error = difference.square().sum().sqrt() / size.square().sum().sqrt().clamp(min=1e-300)
    return float(error), difference / size.clamp(min=tolerance.floor * float(size.max())).clamp(min=1e-300)


def _values(result: StepResult) -> dict[str, Tensor]:
    """What a step returns besides the gradient."""
    return result.losses | result.buffers | ({} if result.memory is None else {"memory": result.memory})


def _value_errors(found: StepResult, expected: StepResult) -> Tensor:
    """Of each loss, buffer and the memory ``[values]``, float64 on the host."""
    seen, floor = _values(found), LOSS_FLOOR * expected.losses["total"].double().abs()
    errors = []
    for name, value in _values(expected).items():
        right = value.double()
        size = right.abs().max()
        if name in expected.losses:
            size = torch.maximum(size, floor)
        errors.append((seen[name].double() - right).abs().max() / size.clamp(min=1e-12))
    return torch.stack(errors).cpu()


def _worst(errors: Tensor, noise: Tensor, tolerance: float) -> tuple[int, float, float]:
    """The position of the error that is largest beside what is allowed for it, the error, and what is allowed."""
    allowed = (REPEATS * noise).clamp(min=tolerance)
    # a NaN is the largest for argmax too
    worst = int((errors / allowed).argmax())
    return worst, float(errors[worst]), float(allowed[worst])
