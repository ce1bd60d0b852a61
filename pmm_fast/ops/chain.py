"""What the registered operators share.

An operator of this package is a chain of three registered ops, X, X_backward and X_double_backward: the first two have
an autograd formula that calls the next, the third refuses to be differentiated.  So the second derivative is exact in
eager mode, in traced graphs and under ``torch.compile`` (docs/design.md, Derivatives).  Each takes the name of the
backend as its last argument, so that a graph differentiates with the backend it was built with.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from pmm_fast.ops.checks import is_seed
from pmm_fast.ops.reference import compute_dtype

_PACKAGES = {"cpu": "pmm_fast.ops.cpu", "triton": "pmm_fast.kernels", "cuda": "pmm_fast.ops.cuda"}


def kernels(operator: str, backend: str) -> Any:
    """``forward``, ``backward`` and ``double_backward`` of an operator on a backend."""
    module = importlib.import_module(f"{_PACKAGES[backend]}.{operator}")
    return _OnDevice(module) if backend == "triton" else module


class _OnDevice:
    """A module whose functions run with the device of their first tensor as the current one, where Triton launches."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def launch(*args: Any) -> Any:
            first = next(arg for arg in args if isinstance(arg, Tensor))
            with torch.cuda.device_of(first):
                return function(*args)

        return launch


def empty_map(like: Tensor, channels: int) -> Tensor:
    """An uninitialised ``[B, channels, h, w]``, channels last where ``like`` is (and only is) that."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (like.shape[0], channels, *like.shape[2:]),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def empty_map_if(wanted: bool, like: Tensor | None, features: Tensor, channels: int) -> Tensor:
    """A fresh gradient of the map ``like``, or an empty tensor where there is no such map or it is not wanted."""
    return empty_map(like, channels) if wanted and like is not None else features.new_empty((0,))


def empty_if(wanted: bool, like: Tensor) -> Tensor:
    """A fresh gradient of a ``[K, C]`` matrix, or an empty tensor where it is not wanted."""
    return like.new_empty(like.shape if wanted else (0,))


def wanted(gradient: Tensor | None, mask: bool) -> Tensor | None:
    """A registered op must return tensors, empty for what was not computed; autograd takes None for those."""
    return gradient if mask else None


def empty_noise_gradient(wanted: bool, noise: Tensor | None, features: Tensor) -> Tensor:
    """A fresh gradient of the noise, or an empty tensor where there is none."""
    if wanted and noise is not None and not is_seed(noise):
        return noise.new_empty(noise.shape)
    return features.new_empty((0,), dtype=compute_dtype(features.dtype))


def refuse_third_order(operator: str) -> Callable[..., NoReturn]:
    """The autograd formula of a double backward: an error that names the operator."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{operator}: third derivatives are not supported; the reference backend has them: "
            'with pmm_fast.ops.use_backend("reference")'
        )

    return refuse
