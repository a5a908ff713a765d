"""MAML and ANIL on Omniglot, 5-way, one thread: accuracy on held-out characters, and how long it took.

964 background characters and their quarter turns to train on; 659 evaluation characters, unturned, 600 tasks of 15
queries a class, to test on. What learned from tasks of 1 shot is tested on tasks of 5 shots too. Every run is one of
`examples/maml.py` or `examples/anil.py` under the settings below.

    python benchmarks/papers/omniglot.py --data-dir FOLDER
    python benchmarks/papers/omniglot.py --data-dir FOLDER --only "MAML, 1-shot"
    python benchmarks/papers/omniglot.py --data-dir FOLDER --only "MAML, 1-shot" --resume CHECKPOINT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import ORANGE, earlier, keep, plot

import report
from few_shot import run
from few_shot.learners import adaptation_curve

MAML, ANIL = {"inner": "all"}, {"inner": "head"}
ONE, FIVE = {"shots": 1, "tasks": 16, "steps": 4500}, {"shots": 5, "tasks": 16, "steps": 4500}
RUNS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "MAML, 1-shot": (MAML, ONE),
    "MAML, 5-shot": (MAML, FIVE),
    "ANIL, 1-shot": (ANIL, ONE),
    "ANIL, 5-shot": (ANIL, FIVE),
}

COLORS = dict(zip(RUNS, (report.VERMILION, report.BLUE, ORANGE, report.GREEN), strict=True))


def draw(results: Mapping[str, Any]) -> None:
    """Draw all runs there are."""
    with report.screen(), plot("omniglot", 1, 2, size=(9, 3.6)) as (_, (left, right)):
        for name, result in results.items():
            steps, accuracy = result["during the run"]
            minutes = [result["cpu seconds"] / 60 * step / steps[-1] for step in steps]
            left.plot(minutes, [100 * value for value in accuracy], color=COLORS[name], label=name)
            curve = result["curve"]
            means, halves = ([100 * value for value in curve[key]] for key in ("mean", "95%"))
            right.errorbar(curve["steps"], means, halves, color=COLORS[name], marker="o", ms=4, label=name)
        left.set(title="Held-out characters during the run", xlabel="CPU minutes", ylabel="accuracy, %", ylim=(85, 100))
        right.set(title="Adaptation, 600 tasks", xlabel="inner steps", ylabel="accuracy, %", ylim=(0, 102))
        left.legend(loc="lower right")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with Omniglot's npz files; without it, nothing is run")
    parser.add_argument("--only", choices=RUNS, help="one run; the others keep their results")
    parser.add_argument("--steps", type=int, help="outer steps in place of those of the setting")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for logs and checkpoints")
    parser.add_argument("--resume", type=Path, help="checkpoint of that run to go on from")
    parser.add_argument("--judge", type=Path, help="checkpoint of that 1-shot run: no training, only tasks of 5 shots")
    args = script.begin(parser, argv)
    if args.data_dir is None:
        print("Skipped: name the folder of Omniglot's npz files with --data-dir.")
        return {}
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in [args.only] if args.only else RUNS:
        levels, settings = RUNS[name]
        options = settled(settings, args)
        with report.screen():
            if args.judge:
                result = earlier("omniglot")[name]
            else:
                _, result, _ = run.train(options, name.replace(", ", "_"), **levels)
                run.show(name, result, [])
            if options.shots != 5:
                checkpoint = args.judge or args.output / f"{name.replace(', ', '_')}.ckpt"
                result["curve at 5 shots"] = with_five_shots(options, levels, checkpoint)
        results = keep("omniglot", {"test queries of each class": 15}, result, name)
        draw(results)
    return results


def settled(settings: Mapping[str, Any], args: argparse.Namespace) -> argparse.Namespace:
    options = run.parser(None, "omniglot").parse_args(["--quiet", "--learn-rates", "--test-steps", "0", "1", "3", "5"])
    shared = {"queries": 3, "data_dir": args.data_dir, "output": args.output, "resume": args.resume}
    for key, value in {**shared, **settings}.items():
        setattr(options, key, value)
    options.steps = args.steps or options.steps
    return run.settled(options)


def with_five_shots(options: argparse.Namespace, levels: Mapping[str, Any], checkpoint: Path) -> dict[str, list[float]]:
    """Return the adaptation curve on tasks of 5 shots, of what was trained on tasks of fewer."""
    five = argparse.Namespace(**{**vars(options), "shots": 5})
    problem = run.data.load(five)
    module = run.learner(five, problem, **levels)
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    tasks = [problem.test[index] for index in range(len(problem.test))]
    curve = adaptation_curve(module, tasks, options.test_steps)
    print("At 5 shots:", ", ".join(f"{100 * mean:.2f}%" for mean in curve["mean"]), f"after {options.test_steps} steps")
    return curve


if __name__ == "__main__":
    main()
