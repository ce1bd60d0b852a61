"""The meta step: Algorithm 1 as pure functions of parameters, buffers and memory."""

from pmm_fast.meta.compile import CompiledStep, CompileMismatchError, choose_engine
from pmm_fast.meta.losses import classifier_loss, cohesion_loss, divergence_loss
from pmm_fast.meta.network import Network, State, copy_tensors, split_state
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
from pmm_fast.meta.whitening import cluster_numbers, covariance, pair_variance, select_covariances, whitening_loss

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
    "classifier_loss",
    "cluster_numbers",
    "cohesion_loss",
    "copy_tensors",
    "covariance",
    "divergence_loss",
    "draw_noise",
    "draw_split",
    "initialise_memory",
    "pair_variance",
    "read_losses",
    "rewrite_memory",
    "select_covariances",
    "split_state",
    "step",
    "whitening_loss",
]
