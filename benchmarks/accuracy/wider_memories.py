"""Would a forward gradient gain by more than one vector of memory, or by directions spent where little is known?

A gradient of N = 900 entries that drifts, h ← ρ h + √(1 − ρ²) ξ with a correlation time of τ estimates, or that stays
and is another one after every 40th. Estimates by b = 32 directions: k are measured exactly, b − k are drawn. What is
known: nothing; the memory of `ForwardGradient(remember=True)`; that and the last r − 1 estimates, orthonormalized; two
memories, one of which learns a quarter as fast; the memory, with directions in proportion to what it did not explain of
the last estimate, as many as the others in the mean. The mean cosine of estimate and gradient over the second
half of the steps, over seeds.

    python benchmarks/accuracy/wider_memories.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.intervals import interval
from support.results import save

SIZE, DIRECTIONS, STEPS = 900, 32, 240
Known = list[Tensor]


class Memory:
    """The memory of :class:`lightning_bilevel.ForwardGradient`, and what may be beside it.

    Args:
        estimates: that are kept besides.
        slow: whether there is a second memory, whose steps are a quarter of the best.
        adaptive: whether the number of directions follows what was not known.
    """

    def __init__(self, estimates: int = 0, slow: bool = False, adaptive: bool = False) -> None:
        self.estimates, self.slow, self.adaptive = estimates, slow, adaptive
        self.vectors: Known = []
        self.open, self.mean, self.spent, self.steps = 1.0, 1.0, 0, 0

    def count(self) -> int:
        """Return how many directions the next estimate takes; all together they are as many as without a choice."""
        self.steps += 1
        if not self.adaptive:
            return DIRECTIONS
        wanted = DIRECTIONS * self.open / self.mean
        owed = self.steps * DIRECTIONS - self.spent - DIRECTIONS
        chosen = max(4, round(wanted + owed / 10))
        self.spent += chosen
        return chosen

    def keep(self, drawn: Tensor, known: Known, count: int) -> None:
        """Keep what an estimate leaves: P ĝ + α (1 − P) ĝ, and with it the estimate itself."""
        inside = sum((q * (q @ drawn) for q in known), torch.zeros_like(drawn))
        alpha = 1 / (1 + (SIZE - len(known)) / (count - len(known)))
        fresh = drawn - inside
        unexplained = alpha * fresh.norm() ** 2  # in expectation, the square of what of ∇h is not known
        self.open = float(unexplained / (inside.norm() ** 2 + unexplained))
        self.mean += (self.open - self.mean) / 20
        before = self.vectors[1] if self.slow and len(self.vectors) > 1 else torch.zeros_like(drawn)
        slow = [before + alpha / 4 * (drawn - before)] if self.slow else []
        past = [drawn, *self.vectors[1:]][: self.estimates] if self.estimates else []
        self.vectors = [inside + alpha * fresh, *slow, *past]


class Nothing(Memory):
    """No memory."""

    def keep(self, drawn: Tensor, known: Known, count: int) -> None:
        """Keep nothing."""


MEMORIES: dict[str, Callable[[], Memory]] = {
    "nothing": Nothing,
    "a memory": Memory,
    "and the last estimate": lambda: Memory(estimates=1),
    "and the last three": lambda: Memory(estimates=3),
    "and the last seven": lambda: Memory(estimates=7),
    "two memories": lambda: Memory(slow=True),
    "a memory, directions by need": lambda: Memory(adaptive=True),
}
GRADIENTS: dict[str, float] = {"drift, τ = 10": 10, "drift, τ = 50": 50, "drift, τ = 250": 250, "jumps": math.inf}


def orthonormal(vectors: Known) -> Known:
    """Return directions that span the vectors, in their order."""
    found: Known = []
    for vector in vectors:
        for q in 2 * found:
            vector = vector - q * (q @ vector)
        if vector.norm() > 1e-6:
            found.append(vector / vector.norm())
    return found


def estimate(h: Tensor, known: Known, count: int, generator: torch.Generator) -> Tensor:
    """Return Σ_j ⟨h, q_j⟩ q_j and the mean of ⟨h, p⟩ p over the other directions, projected off the q_j."""
    drawn = torch.randint(2, (count - len(known), SIZE), generator=generator).double() * 2 - 1
    inside = torch.zeros_like(h)
    for q in known:
        inside += q * (q @ h)
        drawn -= torch.outer(drawn @ q, q)
    return inside + drawn.T @ (drawn @ h) / len(drawn)


def cosine(memory: Memory, tau: float, seed: int) -> float:
    """Return the mean cosine over the second half of the steps."""
    generator = torch.Generator().manual_seed(seed)
    h, cosines = torch.randn(SIZE, generator=generator, dtype=torch.float64), []
    rho = math.exp(-1 / tau)
    for step in range(STEPS):
        if math.isinf(tau):
            h = torch.randn(SIZE, generator=generator, dtype=torch.float64) if step % 40 == 0 else h
        else:
            h = rho * h + math.sqrt(1 - rho**2) * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        count = memory.count()
        known = orthonormal(memory.vectors)[: count - 1]
        drawn = estimate(h, known, count, generator)
        memory.keep(drawn, known, count)
        cosines.append(float(drawn @ h / (drawn.norm() * h.norm())))
    return sum(cosines[STEPS // 2 :]) / (STEPS - STEPS // 2)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    for gradient, tau in GRADIENTS.items():
        results[gradient] = {}
        for name, make in MEMORIES.items():
            found = interval([cosine(make(), tau, seed) for seed in range(args.seeds)])
            results[gradient][name] = found
            print(f"{gradient:16s} {name:30s} {found['mean']:.3f} +- {found['half_width']:.3f}", flush=True)
    save("wider_memories", {"seeds": args.seeds, "N": SIZE, "b": DIRECTIONS, "steps": STEPS}, results)
    return results


if __name__ == "__main__":
    main()
