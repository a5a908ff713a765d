"""Sinusoid regression: MAML against a net that was trained on all tasks at once, then fine-tuned.

The setting of Finn et al. (ICML 2017, section 5.1): 10 points of a sinusoid, one inner step at rate 0.01, 25 tasks in a
meta-step, an MLP 1-40-40-1. The baseline sees as many points, for as many steps. Its fine-tuning rate is the best of
several by the error after 10 steps, on the test tasks themselves, in its favour.

    python benchmarks/papers/sinusoid_maml.py
    python benchmarks/papers/sinusoid_maml.py --seeds 5 --more        (keeps the first seeds, which are there)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.intervals import interval
from support.results import earlier, plot, save

import report
from few_shot import data, run
from few_shot.learners import adaptation_curve

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
STEPS = (0, 1, 2, 3, 5, 10)
COLORS = {"MAML": report.BLUE, "pretrained": report.VERMILION}


def curves(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the test error after 0, 1, … steps of both, and what they took."""
    common = ["--quiet", "--steps", str(args.steps), "--test-tasks", str(args.test_tasks), "--output", str(args.output)]
    options = run.settled(run.parser(None, "sinusoid").parse_args([*common, "--seed", str(seed)]))
    _, maml, _ = run.train(options, f"sinusoid_maml_{seed}", "all")
    options.test_steps = [0]
    # At inner rate 0 the meta-gradient is the plain gradient of the query points: 20 of them, so as many as MAML sees.
    options.inner_lr, options.queries = 0.0, options.shots + options.queries
    module, _, _ = run.train(options, f"sinusoid_pretrained_{seed}", "all")
    tasks = data.load(options).test
    tried = {}
    for rate in RATES:
        module.hparams.inner_lr = rate
        try:
            tried[rate] = adaptation_curve(module, [tasks[index] for index in range(len(tasks))], STEPS)["mean"]
        except FloatingPointError:  # too large a rate: fine-tuning diverges
            break
    best = min(tried, key=lambda rate: tried[rate][-1])
    return {
        "MAML": maml["curve"]["mean"],
        "pretrained": tried[best],
        "fine-tuning rate": best,
        "seconds": maml["seconds"],
        "cpu seconds": maml["cpu seconds"],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--more", action="store_true", help="only the seeds that are not among the results yet")
    parser.add_argument("--test-tasks", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for logs and checkpoints")
    args = script.begin(parser, argv)
    args.output.mkdir(parents=True, exist_ok=True)
    with report.screen():
        there = earlier("sinusoid_maml")["runs"] if args.more else []
        runs = [*there, *(curves(args, seed) for seed in range(len(there), args.seeds))]
        results: dict[str, Any] = {"runs": runs, "steps": STEPS}
        for name in COLORS:
            found = [interval(errors) for errors in zip(*(run[name] for run in runs), strict=True)]
            means, halves = [each["mean"] for each in found], [each["half_width"] or 0.0 for each in found]
            results[name] = {"mean": means, "95%": halves}
            both = zip(STEPS, means, halves, strict=True)
            shown = [f"{steps}: {mean:.3f} ± {half:.3f}" for steps, mean, half in both]
            print(f"{name:12s} error after inner steps  {'   '.join(shown)}")
        settings = {"steps": args.steps, "seeds": args.seeds, "test tasks": args.test_tasks, "rates": RATES}
        save("sinusoid_maml", settings, results)
        with plot("sinusoid_maml", size=(5.6, 3.6)) as (_, axes):
            for name, color in COLORS.items():
                axes.errorbar(STEPS, *results[name].values(), color=color, marker="o", ms=4, label=name)
            axes.set(title="Held-out sinusoids, 10 points", xlabel="inner steps", ylabel="squared error")
            axes.set_ylim(bottom=0)
            axes.legend()
    return results


if __name__ == "__main__":
    main()
