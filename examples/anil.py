"""Learn features on which a linear head adapts to a new task in a few steps (ANIL).

As `maml.py`, but only the head is adapted to a task (inner level); the features and the start of the head are learned
(outer level). Second derivatives are those of the head alone, so that a meta-step takes about a third of the time.

    python examples/anil.py                                             # digits and turned digits
    python examples/anil.py --strategy gamma-greedy
    python examples/anil.py --data omniglot --data-dir FOLDER

Raghu et al. (ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from few_shot import run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    return run.main("anil", "head", "digits", __doc__, argv)


if __name__ == "__main__":
    main()
