"""Where bilevel optimization wins, by kind of problem: every cell from a committed result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from tables import cleaning_baselines, data_condensation, difference, few_shot, half_width, markdown, results


class Case(NamedTuple):
    """A problem, with one number for each seed.

    Attributes:
        problem: what it is, for the table.
        sizes: outer variables, and inner steps.
        method: what is learned.
        ours: its numbers.
        others: those of every baseline, by name, of the same seeds in the same order.
        unit: of the numbers, for the table.
        digits: behind the point.
        larger_is_better: otherwise it is an error.
    """

    problem: str
    sizes: str
    method: str
    ours: Sequence[float]
    others: Mapping[str, Sequence[float]]
    unit: str
    digits: int = 1
    larger_is_better: bool = True

    @property
    def strongest(self) -> str:
        """The baseline of the best mean."""
        best = max if self.larger_is_better else min
        return best(self.others, key=lambda name: mean(self.others[name]))

    @property
    def gain(self) -> list[float]:
        """By how much ours is better than the strongest baseline, for each seed."""
        sign = 1 if self.larger_is_better else -1
        return [sign * (a - b) for a, b in zip(self.ours, self.others[self.strongest], strict=True)]

    @property
    def winner(self) -> str:
        """Who is better by more than the interval."""
        if abs(mean(self.gain)) <= half_width(self.gain):
            return "neither"
        return "bilevel" if mean(self.gain) > 0 else "the baseline"


def tables() -> dict[str, str]:
    """Return the table of all problems, those where bilevel optimization gains first."""
    order = ("bilevel", "neither", "the baseline")
    rows = [
        [
            case.problem,
            case.sizes,
            case.method,
            f"{mean(case.ours):.{case.digits}f}",
            case.strongest,
            f"{mean(case.others[case.strongest]):.{case.digits}f}",
            f"{difference(case.gain, [0.0] * len(case.gain), case.digits)} {case.unit}",
            f"{len(case.ours)}",
            f"**{case.winner}**" if case.winner == "bilevel" else case.winner,
        ]
        for case in sorted(cases(), key=lambda case: order.index(case.winner))
    ]
    heads = ("problem", "outer variables, T", "learned", "", "strongest baseline", "", "gain", "seeds", "who wins")
    return {"does_it_pay": markdown(heads, rows)}


def cases() -> list[Case]:
    """Return all problems that were run against baselines over seeds."""
    return [
        learned_start(),
        *cleaning(),
        *condensation(),
        *hyperparameters(),
        few_hyperparameters(),
        sinusoids(),
        *few_shot_images(),
        *representations(),
        camels(),
        pde(),
    ]


def learned_start() -> Case:
    runs = [run["psnr"] for run in results("learned_start")["results"]["reverse"].values()]
    names = [name for name in runs[0] if name != "learned start and rate"]
    after = "3"
    return Case(
        "drawing a digit in 3 steps",
        "2,146, T = 3",
        "start and rate",
        [run["learned start and rate"][after] for run in runs],
        {name: [run[name][after] for run in runs] for name in names},
        "dB",
    )


def cleaning() -> list[Case]:
    """Return, for each setting, the kind of weights that is right for its wrong labels."""
    chosen = {
        "any 50%, 50": ("half of 1,200 labels any other, 50 trusted", "net, trusted inside", "417, T = 10"),
        "any 60%, 50": ("60% of them any other, 50 trusted", "net, trusted inside", "417, T = 10"),
        "next 60%, 100": ("60% of them the next, 100 trusted", "matrix, trusted inside", "100, T = 10"),
        "any 50%, 400": ("half of 900 labels any other, 400 trusted", "net, trusted inside", "417, T = 10"),
    }
    found = results("cleaning_baselines")["results"]
    made = []
    for setting, (problem, ours, sizes) in chosen.items():
        runs = cleaning_baselines.accuracies(found[setting])
        others = {
            name: runs[name] for name in runs if name not in (*cleaning_baselines.LEARNED, cleaning_baselines.CEILING)
        }
        made.append(Case(f"cleaning: {problem}", sizes, ours, runs[ours], others, "points"))
    runs = cleaning_baselines.accuracies(found["any 50%, 50"])
    others = made[0].others
    made.append(Case(made[0].problem, "1,200, T = 10", "a weight each", runs["table"], others, "points"))
    return made


def condensation() -> list[Case]:
    made = []
    for case, problem, sizes in (
        ("digits-1", "digits in one image per class", "640, T = 100"),
        ("digits-10", "digits in ten images per class", "6,400, T = 100"),
    ):
        runs = data_condensation.by_seed(results("data_condensation")["results"][case])
        ours = runs.pop("learned")
        made.append(Case(problem, sizes, "images, from centres on", ours, runs, "points"))
    return made


def hyperparameters() -> list[Case]:
    """Return both tasks, on both data sets; accuracies after refitting, as one would use what was found."""
    made = []
    for data, seeds in results("hyperparameters")["results"].items():
        strategies = ("reverse", "aid-fp", "aid-cg", "pzobo", "hozog", "forward")
        size = {"digits": "128, T = 10", "newsgroups": "4,000, T = 10"}[data]
        for task, key, label, sizes in (
            ("penalties", "refitted test loss", f"a penalty for each feature, {data}", size),
            ("learning rate", "test loss", f"learning rate and momentum, {data}", "2, T = 20"),
        ):
            runs = [{row["method"]: row[key] for row in seed[task]} for seed in seeds.values()]
            names = [name for name in runs[0] if name not in strategies and all(name in run for run in runs)]
            others = {name: [run[name] for run in runs] for name in names}
            ours = [run["reverse"] for run in runs]
            made.append(Case(label, sizes, "`ReverseUnroll`", ours, others, "nats", 3, larger_is_better=False))
    return made


def few_hyperparameters() -> Case:
    """Return seven hyperparameters of a perceptron, by the way that is better on validation images; their test loss."""
    seeds = results("few_hyperparameters")["results"].values()
    runs = {name: [run[name]["test loss"] for run in seeds] for name in next(iter(seeds)) if name != "warm"}
    ours = runs.pop("fresh")
    return Case("7 hyperparameters, digits", "7, T = 100", "`ReverseUnroll`, fresh", ours, runs, "nats", 3, False)


def sinusoids() -> Case:
    runs = results("sinusoid_maml")["results"]["runs"]
    others: dict[str, list[float]] = {"pretrained, fine-tuned": [min(run["pretrained"]) for run in runs]}
    for seed in results("few_shot_baselines")["results"]["sinusoids"].values():
        for name, row in seed.items():
            others.setdefault(name, []).append(row["score"])
    ours = [run["MAML"][-1] for run in runs]
    return Case("sinusoids, 10 points", "1,761, T = 1", "MAML, 10 steps", ours, others, "squared", 2, False)


def few_shot_images() -> list[Case]:
    """Return features under a head fitted to a task of five classes, beside heads on pixels and a classifier."""
    made = []
    for data, problem in (("digits", "new digits, 10 of each"), ("omniglot", "new characters, 10 of each")):
        (_, ours), *others = few_shot.of_images(data).items()
        runs = {name: [100 * run["score"] for run in rows] for name, rows in others if "FirstOrder" not in name}
        learned = [100 * run["score"] for run in ours]
        made.append(Case(problem, "19,008, T = 10", "features, `ReverseUnroll`", learned, runs, "points"))
    return made


def representations() -> list[Case]:
    """Return features under a head, beside one level; no strategy is as good on test data as that."""
    rows = results("hyper_representation")["results"]
    settings = (
        ("linear", "a linear embedding", "8,192, T = 20", "ridge", "test_loss", 1e3, "e-3", False),
        ("two-layer", "a net of two layers", "262,144, T = 10", "ridge", "test_loss", 1, "squared", False),
        ("digits", "a LeNet under a head, digits", "60,856, T = 10", "jointly", "test_accuracy", 100, "points", True),
        ("mnist", "a LeNet under a head, MNIST", "60,856, T = 10", "jointly", "test_accuracy", 100, "points", True),
    )
    names = {"ridge": "ridge regression", "jointly": "body and head together"}
    made = []
    for case, problem, sizes, other, key, scale, unit, larger in settings:
        seeds = {
            strategy: {
                row["seed"]: scale * row[key] for row in rows if (row["case"], row["strategy"]) == (case, strategy)
            }
            for strategy in ("reverse", other)
        }
        ours, others = ([seeds[name][seed] for seed in sorted(seeds[other])] for name in ("reverse", other))
        made.append(Case(problem, sizes, "`ReverseUnroll`", ours, {names[other]: others}, unit, 1, larger))
    return made


def camels() -> Case:
    found: dict[str, Any] = results("camels_baselines")["results"]
    nll = {name: found[name]["answer_nll"]["values"] for name in ("no adaptation", "uniform", "IDF", "TF-IDF")}
    ours = found["learned"]["answer_nll"]["values"]
    return Case("which tokens to train on", "a small GPT-2, T = 6", "CaMeLS", ours, nll, "nats", 3, False)


def pde() -> Case:
    """Return the coefficient of Burgers' equation, from five starts; the search has none."""
    found = results("pde_discovery")["results"]
    ours = [1e4 * row["error of nu"] for row in found["burgers"]["rows"]]
    others = {
        "grid and Brent's method": [1e4 * found["search"]["burgers"]["error of nu"]] * len(ours),
        "Adam on central differences": [1e4 * row["error of nu"] for row in found["differences"]["burgers"]],
    }
    return Case("ν of Burgers' equation", "1, a solver", "`ZerothOrder`", ours, others, "e-4", 2, False)
