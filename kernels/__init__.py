"""Triton kernels, one file an operator, installed as ``pmm_fast.kernels``: launchers of plain tensors, no autograd."""
