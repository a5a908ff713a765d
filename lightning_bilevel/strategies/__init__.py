"""Hypergradient strategies: one estimator of ∇h a file."""

from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.bome import BOME
from lightning_bilevel.strategies.darts import DARTS
from lightning_bilevel.strategies.evograd import EvoGrad
from lightning_bilevel.strategies.first_order import FirstOrder
from lightning_bilevel.strategies.forward_gradient import ForwardGradient
from lightning_bilevel.strategies.forward_unroll import ForwardUnroll
from lightning_bilevel.strategies.fsla import FSLA
from lightning_bilevel.strategies.gamma_greedy import GammaGreedy
from lightning_bilevel.strategies.implicit_gradient import ImplicitGradient
from lightning_bilevel.strategies.meha import MEHA
from lightning_bilevel.strategies.penalty_gradient import PenaltyGradient
from lightning_bilevel.strategies.pes import PES
from lightning_bilevel.strategies.pzobo import PZOBO
from lightning_bilevel.strategies.reverse_unroll import ReverseUnroll
from lightning_bilevel.strategies.schedule import HypergradientSchedule
from lightning_bilevel.strategies.soba import SOBA
from lightning_bilevel.strategies.truncated_reverse import TruncatedReverse
from lightning_bilevel.strategies.zeroth_order import ZerothOrder

__all__ = [
    "BOME",
    "DARTS",
    "EvoGrad",
    "FSLA",
    "FirstOrder",
    "ForwardGradient",
    "ForwardUnroll",
    "GammaGreedy",
    "HypergradientSchedule",
    "HypergradientStrategy",
    "ImplicitGradient",
    "MEHA",
    "PES",
    "PZOBO",
    "PenaltyGradient",
    "ReverseUnroll",
    "SOBA",
    "TruncatedReverse",
    "ZerothOrder",
]
