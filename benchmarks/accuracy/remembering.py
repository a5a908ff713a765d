"""What are guides and a memory worth in outer optimization, at equal directions and at equal seconds?

Each estimator drives an outer optimization of its own, from the same start. Problems: `cleaning` (a weight for each of
900 digits, half of them mislabelled, T = 5), `rates` (a learning rate for each of four tensors at each of 25 steps),
`penalties` (a log penalty for each of 128 features, half of them noise, T = 10), `condensation` (ten images of 64
pixels, a new net at every step, T = 20), `camels` (the weights of a document's tokens, by a net of 60,000 parameters
inside of a small GPT-2, T = 4 documents). Estimators: plain directions, a memory, a guide, both; `exact` is reverse
mode.

Slopes are reckoned from the exact gradient, ⟨∇h, v⟩: to an estimator the same numbers as its tangents give, in a
fraction of the time. What an estimate costs is measured apart, with tangents, in CPU seconds, so that "equal seconds"
are the outer steps that an estimator takes in the time in which plain directions take all of theirs.

    python benchmarks/accuracy/remembering.py
    python benchmarks/accuracy/remembering.py --problems cleaning --seeds 5
    python benchmarks/accuracy/remembering.py --quick
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from lightning_bilevel import (
    BilevelModule,
    Episode,
    ForwardGradient,
    GammaGreedy,
    Hypergradient,
    HypergradientStrategy,
    ReverseUnroll,
    TruncatedReverse,
    hypergradient,
    tree,
)
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.problem import BilevelProblem, Carry, InnerState
from lightning_bilevel.randomness import Call, Key
from lightning_bilevel.strategies.slopes import Slopes
from lightning_bilevel.training.estimating import estimated
from lightning_bilevel.tree import Params

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.intervals import interval
from support.measure import cpu_seconds
from support.results import keep

import data_condensation
import hyperparameters
import report
from camels_lm import synthetic
from camels_lm.documents import Splits
from camels_lm.encoding import Encoder, new_tokenizer
from camels_lm.models import WeightModel, small_lm
from camels_lm.stages import LanguageModelTraining, MetaTraining, episodes, text_batches
from data_cleaning import CleaningData, DataCleaning

NAME = "remembering"


class Reckoning(Slopes):
    """⟨∇h, v⟩ of a gradient that is known; notes the cosine of what comes of it."""

    def __init__(self, exact: Hypergradient, cosines: list[float]) -> None:
        self.exact, self.cosines = exact, cosines

    def chunk_size(self) -> int:
        return 64

    def along(self, directions: Params) -> Tensor:
        return tree.rows_dot(directions, self.exact.grads)

    def result(self, grads: Params) -> Hypergradient:
        exact = self.exact.grads
        length = (tree.norm(exact) * tree.norm(grads)).clamp_min(1e-38)
        self.cosines.append((tree.dot(grads, exact) / length).item())
        return self.exact._replace(grads=grads)


class Reckoned(ForwardGradient):
    """A forward gradient whose slopes are reckoned from the gradient of reverse mode; notes its cosines with that."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cosines: list[float] = []

    def slopes(self, problem: BilevelProblem, start: InnerState, phi: Params, episode: Episode) -> Slopes:
        return Reckoning(ReverseUnroll().estimate(problem, Carry(start), phi, episode, Call()), self.cosines)


GUIDES: dict[str, Callable[[], HypergradientStrategy]] = {
    "TruncatedReverse(1)": lambda: TruncatedReverse(1),
    "GammaGreedy(0.99)": lambda: GammaGreedy(0.99),
}
EXACT = "exact"


def estimators(guides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options of ``ForwardGradient`` by what they are called; the first stands for reverse mode."""
    found: dict[str, dict[str, Any]] = {EXACT: {}, "plain": {}, "memory": {"remember": True}}
    for name in guides:
        found[name] = {"guide": GUIDES[name]()}
        found[f"{name} and memory"] = {"guide": GUIDES[name](), "remember": True}
    return found


class StepRates(InnerOptimizer):
    """Gradient descent with a rate for each parameter at each step.

    Args:
        rates: (steps, parameters), in the order of the parameters.
    """

    elementwise = True

    def __init__(self, rates: Tensor) -> None:
        self.rates = rates

    def update(self, params: Params, grads: Params, opt_state: Any, step: int) -> tuple[Params, Any]:
        rates = dict(zip(params, self.rates[step - 1], strict=True))
        return {name: value - rates[name] * grads[name] for name, value in params.items()}, opt_state


class Rates(BilevelModule):
    """N = 100 learning rates, one for each of four tensors at each of T = 25 steps, from a fixed start."""

    def __init__(self) -> None:
        super().__init__(inner_steps=25, inner_start="reset")
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.logits = nn.Parameter(torch.full((25, 4), -1.5))

    def inner_parameters(self) -> nn.Module:
        return self.net

    def outer_parameters(self) -> list[nn.Parameter]:
        return [self.logits]

    def inner_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> StepRates:
        return StepRates(0.6 * self.logits.sigmoid())


@cache
def language_model(seed: int, steps: int = 300) -> tuple[Any, Encoder, Splits]:
    """Return a small GPT-2 that was trained on synthetic documents and their questions, and other documents."""
    torch.manual_seed(seed)
    splits = synthetic.documents((200, 120, 1, 1), seed)
    tokenizer = new_tokenizer(splits.pretraining, vocabulary=512, window=64)
    lm, encoder = small_lm(len(tokenizer), 64, 48, 1, tokenizer.eos_token_id), Encoder(tokenizer, 64)
    documents = Splits(**{name: encoder.documents(getattr(splits, name), name) for name in Splits._fields})
    batches = text_batches(encoder, documents.pretraining, steps, 16, seed, questions=True)
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with report.screen():
        trainer.fit(LanguageModelTraining(lm, steps, lr=3e-3), batches)
    return lm.eval(), encoder, documents


class Problem(NamedTuple):
    """A problem, and what suits it.

    Attributes:
        make: from a seed to a module, an episode for each outer step, and a score of the module at the end.
        directions: b.
        steps: outer steps.
        rates: learning rates of Adam, of SGD, and of SGD with momentum 0.9.
        guide: that is run by default.
    """

    make: Callable[[int], tuple[BilevelModule, Callable[[int], Episode], Callable[[], dict[str, float]]]]
    directions: int
    steps: int
    rates: dict[str, Sequence[float]]
    guide: str = "TruncatedReverse(1)"


def cleaning(seed: int) -> Any:
    data = CleaningData(seed=seed)
    data.setup()
    module = DataCleaning(inner_steps=5)
    episode = Episode([data.train.tensors], data.validation.tensors)
    return module, lambda step: episode, lambda: {"auroc": binary_auroc(-module.logits, data.is_wrong.long()).item()}


def rates(seed: int) -> Any:
    split = data_condensation.load_digits(seed)
    x, y = split.train_x, split.train_y
    episode = Episode([(x[:200], y[:200])], (x[200:500], y[200:500]))
    return Rates(), lambda step: episode, dict


def penalties(seed: int) -> Any:
    data = hyperparameters.noisy_digits(seed)
    module = hyperparameters.Penalties(*data.sizes, data.inner_lr, outer_lr=0.0)
    episode = Episode([hyperparameters.tensors(data.train)], hyperparameters.tensors(data.validation))
    return module, lambda step: episode, dict


def condensation(seed: int) -> Any:
    data = data_condensation.load(None, None, seed)
    labels = data_condensation.labels_of(1)
    start = data_condensation.real_images(data, 1, seed)
    module = data_condensation.Condensation(start, 8, inner_steps=20, inner_lr=0.1, outer_lr=0.0)

    def episode(step: int) -> Episode:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        chosen = torch.randperm(len(data.train_y), generator=generator)[:256]
        return Episode([(torch.arange(len(labels)), labels)], (data.train_x[chosen], data.train_y[chosen]))

    return module, episode, dict


def camels(seed: int) -> Any:
    lm, encoder, documents = language_model(seed)
    weights = WeightModel(copy.deepcopy(lm.base_model))
    module = MetaTraining(copy.deepcopy(lm), weights, inner_lr=0.1, outer_lr=0.0, locality=1.0)
    module.inner_steps, module.inner_start = 4, "reset"
    batches = episodes(encoder, documents.training, documents.pretraining, [4] * 1_000, seed).dataset
    return module, lambda step: module.episodes(batches[step])[0], dict


PROBLEMS = {
    "cleaning": Problem(cleaning, 32, 100, {"Adam": (0.1,), "SGD": (1000,), "momentum": (100,)}),
    "rates": Problem(rates, 8, 30, {"Adam": (0.15,), "SGD": (100,), "momentum": (10,)}, "GammaGreedy(0.99)"),
    "penalties": Problem(penalties, 8, 40, {"Adam": (0.3,), "SGD": (1000,), "momentum": (100,)}),
    "condensation": Problem(condensation, 16, 40, {"Adam": (0.05,), "SGD": (3,), "momentum": (0.3,)}),
    "camels": Problem(camels, 12, 40, {"Adam": (5e-4,), "SGD": (4e-4,), "momentum": (4e-5,)}),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "Adam": lambda phi, lr: torch.optim.Adam(phi, lr),
    "SGD": lambda phi, lr: torch.optim.SGD(phi, lr),
    "momentum": lambda phi, lr: torch.optim.SGD(phi, lr, momentum=0.9),
}


def run(
    problem: Problem, options: dict[str, Any] | None, optimizer: str, lr: float, steps: int, seed: int
) -> dict[str, Any]:
    """Return the outer losses and the cosine of one run, and the score at its end; without options, of reverse mode."""
    torch.manual_seed(seed)
    module, episode, score = problem.make(seed)
    strategy = ReverseUnroll() if options is None else Reckoned(problem.directions, **options)
    functional, memory, phi = module.functional(), module.fit_context.memory, module.outer_parameters()
    memory.begin(functional, seed)
    outer = OPTIMIZERS[optimizer](phi, lr)
    losses: list[float] = []
    carry: Carry | None = None
    try:
        for step in range(steps):
            result = estimated(functional, memory, strategy, [episode(step)], Call(Key((seed, step))), carry=carry)
            losses.append(result.value.item())
            for parameter, grad in zip(phi, result.grads.values(), strict=True):
                parameter.grad = grad.clone()
            outer.step()
            carry, memory.estimates = result.carry, step + 1
    except FloatingPointError:  # a rate that is too high
        losses += [math.inf] * (steps - len(losses))
    cosines = strategy.cosines[steps // 2 :] if isinstance(strategy, Reckoned) else [1.0]
    return {"losses": losses, "cosine": statistics.fmean(cosines or [math.nan]), **score()}


def seconds_of(problem: Problem, contenders: dict[str, dict[str, Any]], repeats: int) -> dict[str, float]:
    """Return the CPU seconds of one estimate of each, with tangents: the least of several, in turns."""
    torch.manual_seed(0)
    module, episode, _ = problem.make(0)
    first = episode(0)
    made: dict[str, HypergradientStrategy] = {
        name: ReverseUnroll() if name == EXACT else ForwardGradient(problem.directions, **options)
        for name, options in contenders.items()
    }
    carries = {name: hypergradient(module, strategy, first).carry for name, strategy in made.items()}
    best = dict.fromkeys(made, math.inf)
    for _ in range(repeats):
        for name, strategy in made.items():
            carry = carries[name]
            spent = cpu_seconds(
                lambda strategy=strategy, carry=carry: hypergradient(module, strategy, first, carry=carry)
            )
            best[name] = min(best[name], spent)
    return best


def around(losses: Sequence[float], step: int) -> float:
    """Return the mean of the last five losses up to a step."""
    return statistics.fmean(losses[max(0, step - 5) : max(1, step)])


def summary(runs: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """Return means and intervals over seeds: at the end, and after a share of the steps."""
    found = {
        "outer loss": interval([around(each["losses"], len(each["losses"])) for each in runs]),
        "outer loss, equal seconds": interval(
            [around(each["losses"], round(share * len(each["losses"]))) for each in runs]
        ),
    }
    others = [name for name in runs[0] if name != "losses"]
    return {**found, **{name: interval([each[name] for each in runs]) for name in others}}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--guides", nargs="+", choices=GUIDES, help="default: one, which suits the problem")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="of the measurement of time")
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps, and nothing is kept")
    args = script.begin(parser, argv)
    seeds = min(args.seeds, 2) if args.quick else args.seeds
    results: dict[str, Any] = {}
    for name in args.problems:
        problem = PROBLEMS[name]
        steps = 4 if args.quick else problem.steps
        contenders = estimators(args.guides or [problem.guide])
        seconds = seconds_of(problem, contenders, 1 if args.quick else args.repeats)
        found: dict[str, Any] = {"directions": problem.directions, "steps": steps, "seconds": seconds}
        for optimizer, all_rates in problem.rates.items():
            for lr in all_rates[:1] if args.quick else all_rates:
                at = found.setdefault(optimizer, {}).setdefault(str(lr), {})
                for estimator, options in contenders.items():
                    given = None if estimator == EXACT else options
                    runs = [run(problem, given, optimizer, lr, steps, seed) for seed in range(seeds)]
                    share = min(1.0, seconds["plain"] / seconds[estimator])
                    at[estimator] = summary(runs, share)
                    loss, cosine = at[estimator]["outer loss"]["mean"], at[estimator]["cosine"]["mean"]
                    print(f"{name:13s} {optimizer:9s} {lr:<6g} {estimator:30s} {loss:9.4f} {cosine:6.3f}", flush=True)
                if not args.quick:  # so that what was found is not lost
                    keep(NAME, {"seeds": seeds}, found, name, order=PROBLEMS)
        results[name] = found
    return results


if __name__ == "__main__":
    main()
