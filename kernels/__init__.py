"""Triton kernels, one file per op, installed as ``mmfast.kernels``."""
