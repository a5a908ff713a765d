"""Hypergradient strategies: one estimator of ∇h a file."""

from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.first_order import FirstOrder
from lightning_bilevel.strategies.forward_gradient import ForwardGradient
from lightning_bilevel.strategies.forward_unroll import ForwardUnroll
from lightning_bilevel.strategies.reverse_unroll import ReverseUnroll
from lightning_bilevel.strategies.truncated_reverse import TruncatedReverse

__all__ = [
    "FirstOrder",
    "ForwardGradient",
    "ForwardUnroll",
    "HypergradientStrategy",
    "ReverseUnroll",
    "TruncatedReverse",
]
