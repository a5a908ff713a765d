"""Learn a start from which a net adapts to a new task in a few steps (MAML).

A task has a support set and a query set. The net is adapted on the support set (inner level: all parameters, a few
gradient steps from the learned start) and judged on the query set (outer level: the start).

    python examples/maml.py                                             # sinusoid regression
    python examples/maml.py --data digits --strategy first-order        # digits and turned digits
    python examples/maml.py --data omniglot --data-dir FOLDER --shots 5
    python examples/maml.py --data cifar100 --data-dir FOLDER
    python examples/maml.py --data learn2learn:omniglot --data-dir FOLDER

`--strategy reverse` is MAML, `first-order` FOMAML, `implicit` iMAML. Tasks of evaluation are of classes that training
never sees. The curve is the score on the query set after 0, 1, 2, … steps on the support set. Below it stands what
needs no outer level: a Gaussian process on sinusoids, heads on the pixels of images. Finn et al. (ICML 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from few_shot import run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    return run.main("maml", "all", "sinusoid", __doc__, argv)


if __name__ == "__main__":
    main()
