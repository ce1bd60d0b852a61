"""The meta step: Algorithm 1 as pure functions of parameters, buffers and memory."""

from pmm_fast.meta.compile import CompiledStep, CompileMismatchError, choose_engine
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
from pmm_fast.meta.trace import CompileError

__all__ = [
    "MEMORY_MODES",
    "META_MODES",
    "Batch",
    "CompileError",
    "CompileMismatchError",
    "CompiledStep",
    "Hyper",
    "Network",
    "Noise",
    "State",
    "StepResult",
    "choose_engine",
    "draw_noise",
    "draw_split",
    "initialise_memory",
    "read_losses",
    "rewrite_memory",
    "split_state",
    "step",
]
