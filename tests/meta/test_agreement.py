"""The comparison of a compiled step with the eager one, on made-up results."""

from __future__ import annotations

import pytest
import torch

from pmm_fast import meta
from pmm_fast.meta.agreement import compare


def made_of(large, small):
    """A result with two parameters."""
    return meta.StepResult({"total": torch.ones(())}, {"large": large, "small": small}, None, {})


def test_a_small_parameter_counts_by_itself():
    expected = made_of(torch.tensor([1.0, 0.0]), torch.tensor([5e-5, 0.0]))
    nearly = made_of(torch.tensor([1.0, 5e-5]), torch.tensor([5e-5, 5e-6]))
    assert compare(nearly, expected, None, None).failure is None
    agreement = compare(made_of(torch.tensor([1.0, 0.0]), torch.zeros(2)), expected, None, None)
    assert agreement.error < 1e-4 and agreement.parameter == "small" and "a parameter's" in (agreement.failure or "")
    broken = made_of(torch.tensor([1.0, 0.0]), torch.tensor([float("nan"), 0.0]))
    assert compare(broken, expected, None, None).failure is not None


@pytest.mark.parametrize(("share", "right"), [(0.4, False), (0.9, True), (1.1, True)])
def test_the_second_order_term_is_looked_at_where_the_orders_are_near(share, right):
    """Orders 1.2 tolerances apart: a gradient with half of the term is within one tolerance of either."""
    small = torch.tensor([1e-2, 0.0])
    expected = made_of(torch.tensor([1.0, 1.2e-4]), small)
    agreement = compare(
        made_of(torch.tensor([1.0, 1.2e-4 * share]), small), expected, made_of(torch.tensor([1.0, 0.0]), small), None
    )
    assert agreement.error < 1e-4 and agreement.told
    assert agreement.share == pytest.approx(share, abs=1e-3) and (agreement.failure is None) == right


def test_eager_mode_that_does_not_repeat_itself():
    """Two runs 1e-3 apart, ten tolerances: a graph as near as that is right, the same for each parameter and value."""
    expected = made_of(torch.tensor([1.0, 0.0]), torch.tensor([1e-2, 0.0]))
    repeat = made_of(torch.tensor([1.0, 1e-3]), torch.tensor([1e-2, 1e-3]))
    repeat.losses["total"] += 2e-3
    near = made_of(torch.tensor([1.0, 2e-3]), torch.tensor([1e-2, 2e-3]))
    near.losses["total"] += 5e-3
    assert "value error" in (compare(near, expected, None, None).failure or "")
    agreement = compare(near, expected, None, None, repeat)
    assert agreement.failure is None and agreement.repeat == pytest.approx(1.4e-3, rel=0.02)
    assert "eager mode repeats its gradient to 1.4e-03, 3 times that may be rounding" in str(agreement)
    far = made_of(torch.tensor([1.0, 6e-3]), torch.tensor([1e-2, 0.0]))
    assert "gradient error" in (compare(far, expected, None, None, repeat).failure or "")
    # the noise of one parameter allows nothing to another
    repeat.grads.update(large=torch.tensor([1.0, 0.1]), small=expected.grads["small"])
    agreement = compare(near, expected, None, None, repeat)
    assert agreement.parameter == "small" and agreement.failure == "a parameter's gradient error 2.00e-01 > 1.0e-02"


@pytest.mark.parametrize(("share", "right"), [(0.0, False), (0.5, False), (1.0, True)])
def test_the_second_order_term_counts_where_eager_mode_does_not_repeat_itself(share, right):
    """Orders 5e-2 apart, far more than the tolerance and less than the noise: only the term itself tells."""
    small, first = torch.tensor([1e-2, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    expected = made_of(torch.tensor([1.0, 5e-2, 0.0]), small)
    repeat = made_of(torch.tensor([1.0, 5e-2, 6e-2]), small)
    found = made_of(torch.tensor([1.0, 5e-2 * share, 6e-2]), small)
    agreement = compare(found, expected, made_of(first, small), None, repeat)
    assert agreement.told and agreement.share == pytest.approx(share, abs=1e-6)
    assert agreement.failure == (None if right else f"{share:.3f} of the second-order term is there")


@pytest.mark.parametrize(("error", "right"), [(1e-8, True), (1e-4, False)])
def test_a_loss_that_is_zero_but_for_rounding(error, right):
    expected, found = (made_of(torch.ones(2), torch.ones(2)) for _ in range(2))
    expected.losses.update(total=torch.tensor(2.0), divergence=torch.tensor(5e-9))
    found.losses.update(total=torch.tensor(2.0), divergence=torch.tensor(5e-9 - error))
    agreement = compare(found, expected, None, None)
    assert agreement.value == "divergence" and (agreement.failure is None) == right
