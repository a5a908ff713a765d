"""Kernels that stand in for PyTorch's functions while a hypergradient is computed.

One function of PyTorch a file. They import nothing of this package. Read :mod:`~lightning_bilevel.kernels.safe` first:
it says when each of them takes its place.
"""
