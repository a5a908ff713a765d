"""Bilevel optimization for PyTorch Lightning: hypergradients as callbacks."""

from lightning_bilevel import directions, few_shot, inner_optimizers, linear_solvers, strategies
from lightning_bilevel.auditing import StrategyAudit, audit
from lightning_bilevel.data.datamodule import bilevel_data
from lightning_bilevel.data.loaders import EpisodeLoader
from lightning_bilevel.data.numbered import NumberedBatch, numbered
from lightning_bilevel.inner_optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, RAdam, RMSprop
from lightning_bilevel.problem import Carry, Episode, Hypergradient
from lightning_bilevel.strategies import (
    BOME,
    DARTS,
    FSLA,
    MEHA,
    PES,
    PZOBO,
    SOBA,
    EvoGrad,
    FirstOrder,
    ForwardGradient,
    ForwardUnroll,
    GammaGreedy,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    PenaltyGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
)
from lightning_bilevel.training.hypergradient import hypergradient
from lightning_bilevel.training.module import BilevelModule
from lightning_bilevel.training.monitor import HypergradientMonitor
from lightning_bilevel.training.parallel import DirectionParallelStrategy
from lightning_bilevel.training.wrap import bilevel

__version__ = "0.1.0"

__all__ = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "BOME",
    "BilevelModule",
    "Carry",
    "DARTS",
    "DirectionParallelStrategy",
    "Episode",
    "EpisodeLoader",
    "EvoGrad",
    "FSLA",
    "FirstOrder",
    "ForwardGradient",
    "ForwardUnroll",
    "GammaGreedy",
    "Hypergradient",
    "HypergradientMonitor",
    "HypergradientSchedule",
    "HypergradientStrategy",
    "ImplicitGradient",
    "Lion",
    "NAdam",
    "MEHA",
    "NumberedBatch",
    "PES",
    "PZOBO",
    "PenaltyGradient",
    "RAdam",
    "RMSprop",
    "ReverseUnroll",
    "SGD",
    "SOBA",
    "StrategyAudit",
    "TruncatedReverse",
    "ZerothOrder",
    "audit",
    "bilevel",
    "bilevel_data",
    "directions",
    "few_shot",
    "hypergradient",
    "inner_optimizers",
    "linear_solvers",
    "numbered",
    "strategies",
]
