"""Random directions v with E[v vᵀ] = I: one sampler a file, all drawn again from a key rather than stored."""

from lightning_bilevel.directions.base import DirectionSampler
from lightning_bilevel.directions.blocks import Blocks
from lightning_bilevel.directions.coordinate import Coordinate
from lightning_bilevel.directions.gaussian import Gaussian
from lightning_bilevel.directions.orthogonal import Orthogonal
from lightning_bilevel.directions.rademacher import Rademacher
from lightning_bilevel.directions.sphere import Sphere
from lightning_bilevel.randomness import Key

__all__ = ["Blocks", "Coordinate", "DirectionSampler", "Gaussian", "Key", "Orthogonal", "Rademacher", "Sphere"]
