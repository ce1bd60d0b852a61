"""Without a GPU, Triton kernels are interpreted; Triton reads the variable when it is imported, so it is set here.

With one, float32 convolutions are float32: PyTorch lets them round to TF32 unasked, which no tolerance is made for.
"""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.backends.cudnn.allow_tf32 = False
