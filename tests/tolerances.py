"""The one table of tolerances.  A change here needs its reason in the commit."""

from __future__ import annotations

import torch
from torch import Tensor

# against the released code's float32 numbers (fixtures/README.md): relative to the largest expected value
RELEASED_MEMORY = 1e-4
RELEASED_NETWORK = 1e-3
# released training iteration in the released order of rounding (tests/meta/released_arithmetic.py): of each
# parameter's gradient norm, skipping norms below 1e-5 of the largest
RELEASED_STEP = 2e-3
RELEASED_STEP_SKIP = 1e-5

# forward and first derivative of an operator against the float64 reference, relative to the largest value
FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
BACKWARD = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 3e-3}

# two float64 computations of the same gradient by different routes
EXACT = 1e-9
# central differences with step 1e-5 of a smooth float64 function
FINITE_DIFFERENCE = 1e-6


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected| (absolute where nothing is expected but zeros)."""
    found, expected = found.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
