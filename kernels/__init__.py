"""Triton kernels, one file an operator, installed as ``pmm_fast.kernels``: launchers only, no autograd."""
