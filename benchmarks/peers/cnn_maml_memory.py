"""Peak memory of one meta-gradient of MAML: with and without checkpoints, against higher, TorchOpt and learn2learn.

The net, the tasks and the programs are those of `maml_speed.py`: 4 tasks of 5 ways and 5 shots on 28×28 images, 4
blocks of 32 channels; T inner steps. Memory is the most that tensors hold at once. The seconds are CPU seconds, the
least of some, in turns.

    python benchmarks/peers/cnn_maml_memory.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_bilevel import ReverseUnroll, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.few_shot_problems import images
from support.maml_peers import PEERS
from support.measure import least_seconds, tensor_peak
from support.results import save

STRATEGIES = {
    "lightning_bilevel": ReverseUnroll(),
    "lightning_bilevel, checkpoint='sqrt'": ReverseUnroll(checkpoint="sqrt"),
    "lightning_bilevel, checkpoint=1": ReverseUnroll(checkpoint=1),
}


def contenders(inner_steps: int) -> dict[str, Callable[[], Any]]:
    """Return, by name, what takes one meta-gradient."""
    module, loader = images()
    module.inner_steps = inner_steps
    tasks = next(iter(loader))

    def of_peer(name: str) -> Callable[[], Any]:
        def run() -> None:
            module.zero_grad()
            PEERS[name](module, tasks)

        return run

    ours = {name: lambda s=strategy: hypergradient(module, s, tasks) for name, strategy in STRATEGIES.items()}
    return ours | {name: of_peer(name) for name in PEERS}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[5, 20], help="T (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender for the time (%(default)s)")
    args = script.begin(parser, argv)
    results: dict[str, Any] = {}
    for steps in args.inner_steps:
        runs = contenders(steps)
        memory = {name: tensor_peak(run)[1] for name, run in runs.items()}
        seconds = least_seconds(runs, args.repeats)
        rows = {name: {"MiB": memory[name], "cpu seconds": seconds[name]} for name in runs}
        least = min(memory[name] for name in PEERS)
        results[str(steps)] = {"rows": rows, "of the best peer": {name: memory[name] / least for name in STRATEGIES}}
        for name, row in rows.items():
            print(f"T = {steps:3d} {name:38s} {row['MiB']:7.1f} MiB {row['cpu seconds']:7.3f} s", flush=True)
        save("cnn_maml_memory", vars(args), results)
    return results


if __name__ == "__main__":
    main()
