"""A network as functions of its parameters: what the meta step calls instead of a module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.recompute import recompute_blocks

State = dict[str, Tensor]
MEMORY_BUFFER = "memory.slots"
MASK_PREFIX = "whitening."


class Network:
    """The structure of a :class:`~pmm_fast.models.Segmentor` without its values.

    Holds two copies on the meta device, one in training and one in evaluation mode, so that nothing is ever switched
    and a call that forgets a parameter fails instead of using a stale one.

    Args:
        model: whose structure is taken; it is neither changed nor kept.
        group: name of the process group whose ranks work on one batch together; None: this process has all of it.
        checkpoint_activations: keep the input of each block alone and compute the rest again for its derivatives.

    Attributes:
        has_memory: whether the model has a memory.
        masks: names of the buffers that say which covariances are whitened, in the order of the maps; empty where the
            encoder hands out none.
    """

    def __init__(self, model: nn.Module, group: str | None = None, checkpoint_activations: bool = False) -> None:
        skeleton = copy.deepcopy(model).to("meta")
        self.group = group
        for module in skeleton.modules():
            if isinstance(module, BatchNorm2d):
                module.group = group
        self._modules = {True: skeleton.train(), False: copy.deepcopy(skeleton).eval()}
        if checkpoint_activations:
            recompute_blocks(self._modules[True])
        self.has_memory = getattr(model, "memory", None) is not None
        self.masks = tuple(name for name, _ in model.named_buffers() if name.startswith(MASK_PREFIX))

    def __call__(self, name: str, params: State, buffers: State, *inputs: Any, training: bool = True) -> Any:
        """Run the sub-module ``name`` on ``inputs``.

        Args:
            name: dotted name, e.g. ``encoder`` or ``memory.writer``.
            params: parameters of the whole model by name.
            buffers: buffers of the whole model by name; batch-norm statistics in them are updated in place when
                ``training``.
            inputs: the sub-module's inputs.
            training: batch statistics and dropout, or running statistics and none.
        """
        prefix = f"{name}."
        state = {
            key.removeprefix(prefix): value
            for source in (params, buffers)
            for key, value in source.items()
            if key.startswith(prefix)
        }
        return functional_call(self._modules[training].get_submodule(name), state, inputs, strict=True)


def split_state(model: nn.Module) -> tuple[State, State, Tensor | None]:
    """The values of a model: parameters, buffers without the memory, memory (None without one); nothing is copied."""
    buffers = dict(model.named_buffers())
    memory = buffers.pop(MEMORY_BUFFER, None)
    return dict(model.named_parameters()), buffers, memory


def copy_tensors(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy ``sources`` into ``targets``, one by one the same shapes, in a launch or two for each type of the targets.

    ``torch._foreach_copy_`` would copy a list of several types tensor by tensor.
    """
    for dtype in {target.dtype for target in targets}:
        pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target.dtype == dtype]
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
