"""Without a GPU, Triton kernels are interpreted; Triton reads the variable when it is imported, so it is set here."""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
