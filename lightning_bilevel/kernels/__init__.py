"""Kernels that stand in for PyTorch's functions while a hypergradient is computed, and what else they need to agree on.

One function of PyTorch a file. They import nothing of this package but its errors. Read
:mod:`~lightning_bilevel.kernels.safe` first: it says when each of them takes its place. Then
:mod:`~lightning_bilevel.kernels.inner_gradient`: an inner optimizer may see a gradient that is no derivative.
"""
