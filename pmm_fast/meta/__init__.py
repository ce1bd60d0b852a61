"""The meta step: Algorithm 1 as pure functions of parameters, buffers and memory."""

from pmm_fast.meta.network import Network, State, split_state
from pmm_fast.meta.schedule import draw_noise, draw_split, initialise_memory
from pmm_fast.meta.step import (
    MEMORY_MODES,
    META_MODES,
    Batch,
    Hyper,
    Noise,
    StepResult,
    read_losses,
    rewrite_memory,
    step,
)

__all__ = [
    "MEMORY_MODES",
    "META_MODES",
    "Batch",
    "Hyper",
    "Network",
    "Noise",
    "State",
    "StepResult",
    "draw_noise",
    "draw_split",
    "initialise_memory",
    "read_losses",
    "rewrite_memory",
    "split_state",
    "step",
]
