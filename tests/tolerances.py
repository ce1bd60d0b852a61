"""The one table of tolerances.  A change here needs its reason in the commit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# against the released code's float32 numbers (fixtures/README.md): relative to the largest expected value
RELEASED_MEMORY = 1e-4
RELEASED_NETWORK = 1e-3
# released training iteration in the released order of rounding (tests/meta/released_arithmetic.py): of each
# parameter's gradient norm, skipping norms below 1e-5 of the largest
RELEASED_STEP = 2e-3
RELEASED_STEP_SKIP = 1e-5
# gradient of a step under bf16 autocast against float32: 1 - cosine, and of the ratio of the norms; about sixty layers
# each round to 3 digits, forward and backward (0.005 measured with DeepLabV3+ R50, 0.11 with MobileNetV2; unrelated: 1)
AUTOCAST_STEP = 0.3

# an operator of a backend against the reference in float64 (:func:`assert_accurate`), by order of the derivative and
# dtype of the result: error <= FACTOR x (error of the reference in the same dtype) + FLOOR x (largest expected value)
FORWARD = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
BACKWARD = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 3e-3}
DOUBLE_BACKWARD = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
FLOOR = {"forward": FORWARD, "backward": BACKWARD, "double_backward": DOUBLE_BACKWARD}
FACTOR = {"forward": 2, "backward": 3, "double_backward": 4}
# derivatives as vectors: 1 - cosine, and |sum of errors| / sum of |expected|; ten times as much in second order
COSINE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
BIAS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# fewer elements than these say nothing as a vector
VECTOR_ELEMENTS = 16

# plain PyTorch's upsampling in float32, of the largest value: its positions are float32 too, so that a weight is off by
# about a unit in the last place of the column's number (8e-6 measured at 100 columns); kernels have exact ones
UPSAMPLED = 2e-5

# two float64 computations of the same gradient by different routes
EXACT = 1e-9
# losses of several ranks against those of one process, which adds up in another order: float32 at the first iteration,
# float64 after three, since the order-2 gradient of an untrained network multiplies rounding by up to a thousand
RANKS = {torch.float32: 1e-4, torch.float64: 1e-6}
# a step under bf16 autocast on several ranks against one process, of the norm of the gradient and of each loss: both
# round alike, but a sum that differs in its last bit of float32 may round to the next bf16 (0.0023 measured with the
# tiny network; float32 is 0.014 away)
RANKS_BF16 = 1e-2
# a step of the tiny network on a GPU, without TF32, against the one on the CPU in float64, of the norm of the gradient
# and of each value: other kernels add up in another order (CPU float32: 1.2e-7)
DEVICES = {torch.float32: 1e-4, torch.float64: 1e-9}
# a compiled step against the eager one, of the norm of the gradient and of each value: an engine may add up in another
# order, in float32 at the coarsest; a graph that runs the traced operations themselves gives the same bits
COMPILED = 1e-4
# central differences with step 1e-5 of a smooth float64 function
FINITE_DIFFERENCE = 1e-6
# noise recovered from float64 weights by two logarithms: absolute
RECOVERED_NOISE = 1e-9
# share of the levels that a blur may round to the other neighbour, since sums in another order are some 1e-5 of a level
# away (5e-6 measured, portable C++ on random images)
BLUR_TIES = 5e-5
# averaged logits of tiles and views in float32 against the same in float64, upsampled by other code and in other
# batches, of the largest logit; probabilities likewise (7e-7 measured; a batch of another size may take another
# convolution)
MERGED_LOGITS = 5e-6


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected| (absolute where nothing is expected but zeros)."""
    found, expected = found.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def assert_accurate(
    found: Tensor,
    baseline: Tensor,
    expected: Tensor,
    order: str,
    compute_dtype: torch.dtype = torch.float64,
    cancelling: float = 0.0,
) -> None:
    """A backend's result is about as near to the exact one as the reference's in the same dtype.

    Args:
        found: the result of the backend.
        baseline: the result of the reference for the same arguments.
        expected: the result of the reference for the same arguments in float64.
        order: ``forward``, ``backward`` or ``double_backward``.
        compute_dtype: what the operator computes in, where the result was cast to something finer afterwards.
        cancelling: the size of terms that may cancel in the result.  Then errors are relative to them, and nothing is
            asked of the result as a vector.
    """
    assert found.shape == expected.shape and found.dtype == baseline.dtype, (found.shape, found.dtype, baseline.dtype)
    if found.numel() == 0:
        return
    dtype = max(found.dtype, compute_dtype, key=lambda dtype: FORWARD[dtype])
    found, baseline, expected = (tensor.detach().double().flatten() for tensor in (found, baseline, expected))
    scale = max(float(expected.abs().max()), cancelling)
    error, allowed = float((found - expected).abs().max()), float((baseline - expected).abs().max())
    bound = FACTOR[order] * allowed + FLOOR[order][dtype] * scale
    # not error > bound, which a NaN would pass
    assert error <= bound, f"{order}: error {error:.3g} > {bound:.3g} (reference {allowed:.3g}, largest {scale:.3g})"
    if order != "forward" and len(found) >= VECTOR_ELEMENTS and expected.any() and not cancelling:
        decade = 10 if order == "double_backward" else 1
        # divided by the largest value, since tiny vectors would have a cosine of 0
        cosine = 1 - float(F.cosine_similarity(found / scale, expected / scale, dim=0))
        bias = float((found - expected).sum().abs() / expected.abs().sum())
        assert cosine <= decade * COSINE[dtype], f"{order}: 1 - cosine {cosine:.3g}"
        assert bias <= decade * BIAS[dtype], f"{order}: bias {bias:.3g}"
