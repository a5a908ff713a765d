"""Learn which tokens to train on, so that a language model keeps up with a stream of documents (CaMeLS).

A language model reads one document after another, one gradient step each, and is then asked questions. Training on
all tokens alike mostly learns what nobody asks. A second model weights the tokens: it is the outer level, trained so
that the language model (the inner level), after steps on weighted documents, answers questions about them, and
changes little on other text.

    python examples/camels.py
    python examples/camels.py --strategy two-phase
    python examples/camels.py --data-dir FOLDER_WITH_SQUAD
    python examples/camels.py --data-dir FOLDER_WITH_SQUAD --base distilgpt2 --precision bf16-mixed --inner-lr 5e-4 \\
        --outer-lr 1e-5 --adapt-lr 1e-5 1e-4 1e-3

By default everything is made here: short documents about invented lands, whose facts are asked for and whose other
sentences are not, a BPE tokenizer, and a GPT-2 of 137 thousand parameters. Four stages, each with a progress bar:
pretrain the language model, tune it on questions, train the weights, adapt to a stream of unseen documents. A run that
was cut off goes on with --resume.

Hu et al., Meta-Learning Online Adaptation of Language Models (EMNLP 2023); (FG)^2U (arXiv 2406.14095), section 4, whose
recipe is --strategy two-phase: exact through 6 documents first, then random directions through 24.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torchmetrics.functional.classification import binary_auroc
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import report
from camels_lm import figures, readers, synthetic
from camels_lm.documents import Splits
from camels_lm.encoding import EncodedDocument, Encoder, new_tokenizer
from camels_lm.loading import Batches, Numbered
from camels_lm.models import WeightModel, load, number_of_parameters, small_lm, window_of
from camels_lm.salience import Salience
from camels_lm.stages import (
    OPTIMIZERS,
    LanguageModelTraining,
    MetaTraining,
    OnlineAdaptation,
    Weighting,
    asked,
    episodes,
    text_batches,
)
from lightning_bilevel import (
    PZOBO,
    ForwardGradient,
    HypergradientMonitor,
    HypergradientSchedule,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
)
from lightning_bilevel.errors import value_error
from lightning_bilevel.linear_solvers import Identity

Arguments = argparse.Namespace


class Setting(NamedTuple):
    """A strategy, the documents of an episode, and outer steps."""

    strategy: Callable[[Arguments], HypergradientStrategy]
    depth: int
    steps: int


SETTINGS = {
    "reverse": Setting(lambda args: ReverseUnroll(), 6, 200),
    "checkpointed": Setting(lambda args: ReverseUnroll(checkpoint="sqrt"), 24, 80),
    "truncated": Setting(lambda args: TruncatedReverse(steps=6), 24, 80),
    "forward": Setting(lambda args: ForwardGradient(num_directions=args.directions), 24, 50),
    "guided": Setting(
        lambda args: ForwardGradient(num_directions=args.directions, guide=TruncatedReverse(steps=6)), 24, 50
    ),
    # After many more steps its weights are too large: it does not see that an inner step can be too long.
    "identity": Setting(lambda args: ImplicitGradient(Identity(scale=args.inner_lr)), 6, 20),
    "pzobo": Setting(lambda args: PZOBO(num_directions=args.directions, mu=0.01), 6, 100),
    "two-phase": Setting(
        lambda args: HypergradientSchedule(
            [(ReverseUnroll(), args.first_steps), (ForwardGradient(num_directions=args.directions), None)]
        ),
        24,
        220,
    ),
}

FIRST_DEPTH = 6
"""Documents of an episode in the first of two phases: (FG)²U, section F.2."""

SIZES = (1600, 400, 64, 64)
"""Of the four splits of synthetic documents."""


class Run:
    """One run: its folder, its data, its language model.

    Args:
        args: of the command line.
    """

    def __init__(self, args: Arguments) -> None:
        self.args, self.folder = args, args.output / "camels"
        self._begin()
        self.seconds: dict[str, float] = known(self.folder / "seconds.json")
        splits = readers.read(args.data_dir, args.seed) if args.data_dir else synthetic.documents(args.sizes, args.seed)
        self.lm, self.encoder = self._language_model(splits)
        self.documents = self._encoded(splits)

    def trained_language_model(self) -> PreTrainedModel:
        """Pretrain the language model and tune it on questions; keep it in a folder that ``--base`` takes."""
        for name, steps in (("pretrain", self.args.pretrain_steps), ("tune", self.args.tune_steps)):
            if steps:
                module = LanguageModelTraining(self.lm.train(), steps, self.args.lm_lr)
                documents, seed = self.documents.pretraining, self.args.seed
                batches = text_batches(
                    self.encoder, documents, steps, self.args.batch_size, seed, questions=name == "tune"
                )
                self.fit(name, module, batches)
        self.lm.eval()
        self.lm.save_pretrained(self.folder / "lm")
        self.encoder.tokenizer.save_pretrained(self.folder / "lm")
        return self.lm

    def trained_weights(self) -> WeightModel:
        """Train the weight model."""
        args, setting = self.args, SETTINGS[self.args.strategy]
        two, spare = args.strategy == "two-phase", int(args.strategy == "identity")
        depths = [args.depth] * args.steps
        if two:
            depths[: args.first_steps] = [FIRST_DEPTH] * min(args.first_steps, args.steps)
        depths = [depth for depth in depths for _ in range(args.accumulate)]
        body = load(args.weight_base)[0].base_model if args.weight_base else copy.deepcopy(self.lm.base_model)
        weights = WeightModel(body)
        if args.weights:
            weights.load_state_dict(torch.load(args.weights, weights_only=True))
        module = MetaTraining(
            copy.deepcopy(self.lm),
            weights,
            inner_lr=args.inner_lr,
            outer_lr=args.outer_lr,
            locality=args.locality,
            reset_every=args.reset_every,
            phase_steps=args.first_steps if two else args.steps,
            dropout=args.dropout,
            spare=spare,
        )
        batches = episodes(
            self.encoder, self.documents.training, self.documents.pretraining, depths, args.seed, spare=spare
        )
        options = {"accumulate_grad_batches": args.accumulate, "gradient_clip_val": args.clip}
        compare = [HypergradientMonitor(every_n_steps=args.monitor, samples=0)] if args.monitor else []
        self.fit("weights", module, batches, setting.strategy(args), *compare, **options)
        torch.save(weights.state_dict(), self.folder / "weights.pt")
        return weights

    def chosen_rate(self, weighting: Weighting, weights: WeightModel) -> float:
        """Return the learning rate of adaptation with the least answer NLL on the validation documents."""
        if len(self.args.adapt_lr) == 1:
            return self.args.adapt_lr[0]
        path = self.folder / "rates.json"
        found = known(path)
        nlls = found.setdefault(weighting, {})
        for lr in self.args.adapt_lr:
            if str(lr) not in nlls:
                module = self._adaptation(weighting, weights, self.documents.validation, lr)
                trainer = self._trainer(logger=False, enable_checkpointing=False)
                trainer.fit(module, self._stream(self.documents.validation), asked(self.encoder, module.questions))
                nlls[str(lr)] = mean(module.curve[-1][1])
                report.write_json(path, found)
        kept = [lr for lr in self.args.adapt_lr if math.isfinite(nlls[str(lr)])]
        if not kept:
            tried = f"{list(self.args.adapt_lr)}, at all of which {weighting} weights diverge"
            raise value_error("--adapt-lr", "learning rates of which one does not diverge", tried, "Add lower ones.")
        return min(kept, key=lambda lr: nlls[str(lr)])

    def adapted(self, weighting: Weighting, weights: WeightModel, lr: float) -> dict[str, Any]:
        """Adapt to the stream of unseen documents and ask all its questions.

        At learning rate 0 nothing is adapted.
        """
        documents = self.documents.test
        module = self._adaptation(weighting, weights, documents, lr)
        questions = asked(self.encoder, module.questions)
        if lr:
            every = max(1, len(documents) // 12)
            self.fit(
                f"stream-{weighting}", module, self._stream(documents), questions=questions, val_check_interval=every
            )
        scores = self._trainer(logger=False, enable_checkpointing=False).test(module, questions, verbose=False)[0]
        rates = self.args.adapt_lr
        return {
            "lr": lr,
            "at an end of the rates": len(rates) > 1 and lr in (min(rates), max(rates)),
            **scores,
            "curve": module.curve,
            "answers": module.answers,
        }

    def fit(
        self,
        name: str,
        module: pl.LightningModule,
        batches: Batches,
        *callbacks: pl.Callback,
        questions: Any = None,
        **options: Any,
    ) -> None:
        """Run a stage, from its last checkpoint if it has one."""
        print(f"{name}: {len(batches)} steps", flush=True)
        folder = self.folder / name
        last = folder / "last.ckpt"
        # Along a stream, after each look at the questions: before it, a resumed run would miss that look.
        keep = checkpoints(folder, None if questions else max(1, len(batches) // 8))
        trainer = self._trainer(
            callbacks=[*callbacks, keep],
            logger=CSVLogger(self.folder, f"log/{name}", ""),
            log_every_n_steps=1,
            **options,
        )
        began = time.process_time()
        try:
            trainer.fit(module, batches, questions, ckpt_path=last if last.exists() else None)
            trainer.save_checkpoint(last)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
            report.write_json(self.folder / "seconds.json", self.seconds)

    def _trainer(self, **options: Any) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=1,
            accelerator=self.args.accelerator,
            devices=1,
            precision=self.args.precision,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=not self.args.quiet,
            **options,
        )

    def _begin(self) -> None:
        """Make the folder anew, or see that it holds the same run."""
        passing = ("output", "resume", "quiet", "accelerator")
        settings = {name: str(value) for name, value in vars(self.args).items() if name not in passing}
        path = self.folder / "settings.json"
        if self.args.resume and path.exists():
            before = json.loads(path.read_text())
            changed = sorted(name for name in settings if settings[name] != before.get(name))
            if changed:
                was = {name: before.get(name) for name in changed}
                hint = "Give the same options, or start anew without --resume."
                raise value_error(
                    "--resume", f"with the options of the run in {self.folder}", f"others than {was}", hint
                )
            return
        if self.args.base and self.folder.resolve() in Path(self.args.base).resolve().parents:
            hint = "Name another one with --output, or go on with --resume."
            raise value_error(
                "--output", f"a folder that --base {self.args.base} is not in", str(self.args.output), hint
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        report.write_json(path, settings)

    def _language_model(self, splits: Splits) -> tuple[PreTrainedModel, Encoder]:
        pl.seed_everything(self.args.seed, verbose=False)
        if self.args.base:
            lm, tokenizer = load(self.args.base)
            return lm, Encoder(tokenizer, window_of(lm, self.args.window))
        small = self.args.data_dir is None
        vocabulary, width, layers = (512, 64, 2) if small else (4096, 96, 3)
        window = self.args.window or (64 if small else 256)
        tokenizer = new_tokenizer(splits.pretraining, vocabulary, window)
        lm = small_lm(len(tokenizer), window, width, layers, tokenizer.eos_token_id)
        return lm, Encoder(tokenizer, window)

    def _encoded(self, splits: Splits) -> Splits:
        """Return the splits encoded, the three later ones cut to their sizes."""
        encoded = {name: self.encoder.documents(getattr(splits, name), name) for name in Splits._fields}
        for name, most in (("validation", self.args.stream), ("test", self.args.stream)):
            if most:
                encoded[name] = encoded[name][:most]
        return Splits(**encoded)

    def _adaptation(
        self, weighting: Weighting, weights: WeightModel, documents: Sequence[EncodedDocument], lr: float
    ) -> OnlineAdaptation:
        questions = [question for document in documents for question in document.questions]
        given = self._salience(weighting == "TF-IDF") if weighting in ("IDF", "TF-IDF") else weights
        return OnlineAdaptation(self.lm, weighting, given, questions, self.encoder, self.args.adapt_optimizer, lr)

    def _salience(self, counted: bool) -> Salience:
        rows = [document.row.ids for document in self.documents.pretraining]
        return Salience(rows, self.lm.config.vocab_size, counted)

    def _stream(self, documents: Sequence[EncodedDocument]) -> Batches:
        return Batches(Numbered(lambda number: self.encoder.padded([documents[number].row]), len(documents)))


def known(path: Path) -> dict[str, Any]:
    """Return what a run that was cut off had written to a JSON file; nothing if it had not."""
    return json.loads(path.read_text()) if path.exists() else {}


def checkpoints(folder: Path, every: int | None = None) -> ModelCheckpoint:
    """Return a callback that keeps the last checkpoint, of each so many steps or of each validation."""
    return ModelCheckpoint(
        folder,
        filename="last",
        every_n_train_steps=every,
        save_on_train_epoch_end=None if every else False,
        enable_version_counter=False,
    )


def train_and_compare(args: Arguments) -> dict[str, Any]:
    """Go through all stages; return what came out."""
    run = Run(args)
    documents = run.documents
    run.trained_language_model()
    weights = run.trained_weights()

    methods: dict[str, dict[str, Any]] = {"no adaptation": run.adapted("uniform", weights, 0.0)}
    marked = any(any(document.row.marked) for document in documents.test)
    weightings: list[Weighting] = [name for name in args.weightings if marked or name != "oracle"]
    for weighting in weightings:
        methods[weighting] = run.adapted(weighting, weights, run.chosen_rate(weighting, weights))

    numbers = [number for number, document in enumerate(documents.test) for _ in document.questions]
    curves = {name: result.pop("curve") for name, result in methods.items()}
    before = curves.pop("no adaptation")[-1][1]
    gains = {name: gain_along(curve, before, numbers) for name, curve in curves.items()}
    said = {name: result.pop("answers") for name, result in methods.items()}
    for name, curve in curves.items():
        methods[name]["gain"] = gains[name][1][-1]
        methods[name]["gain by document"] = gain_by_document(curve[-1][1], before, numbers)
    questions = [question for document in documents.test for question in document.questions]
    examples = [
        {"question": q.text, "answer": q.answers[0], **{name: answers[number] for name, answers in said.items()}}
        for number, q in enumerate(questions[:20])
    ]
    passages = [weighted_tokens(run.encoder, document, weights) for document in documents.test]
    everything = [token for passage in passages for token in passage[1:]]
    on = [token.weight for token in everything if token.is_fact]
    off = [token.weight for token in everything if not token.is_fact]
    auroc = binary_auroc(torch.tensor(on + off), torch.tensor([1] * len(on) + [0] * len(off))).item() if on else None
    files = [
        figures.draw_weights(
            args.output / "camels_weights.png",
            "Weights of tokens in unseen documents; what is asked for is underlined",
            passages[:4] if args.data_dir is None else passages[:1],
        ),
        figures.draw_gain(args.output / "camels_gain.png", gains),
    ]
    return {
        "strategy": args.strategy,
        "depth": args.depth,
        "steps": args.steps,
        "parameters": {"language model": number_of_parameters(run.lm), "weight model": number_of_parameters(weights)},
        "documents": {name: len(getattr(documents, name)) for name in Splits._fields},
        "questions": len(questions),
        "left out": dict(run.encoder.skipped),
        "cosine": compared(run.folder / "log" / "weights"),
        "auroc": auroc,
        "mean weight": {"facts": mean(on), "other tokens": mean(off)} if on else {"all": mean(off)},
        "adaptation": methods,
        "gain along the stream": gains,
        "answers": examples,
        "CPU seconds": run.seconds,
        "peak memory (MiB)": report.peak_memory(),
        "figures": files,
    }


def compared(folder: Path) -> tuple[list[int], list[float]] | None:
    """Return the steps at which a hypergradient was compared with the exact one, and the cosines there."""
    if not (folder / "metrics.csv").exists():  # of a stage that was finished before this run went on
        return None
    steps, cosines = report.logged(folder).get("hypergradient_cosine", ([], []))
    found = list(zip(steps, cosines, strict=True))
    # Lightning writes a value again at every step until there is another.
    new = [now for before, now in zip([(-1, math.nan), *found], found, strict=False) if now[1] != before[1]]
    return ([step for step, _ in new], [cosine for _, cosine in new]) if new else None


def gain_along(
    curve: Sequence[tuple[int, Sequence[float]]], before: Sequence[float], numbers: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Return, along the stream, by how much the answer NLL on the documents read so far is less than before.

    Args:
        curve: after so many documents, the NLL of every answer.
        before: the NLL of every answer without adaptation.
        numbers: the number of the document that each question is about.

    >>> gain_along([(1, [1.0, 9.0]), (2, [1.0, 2.0])], before=[2.0, 3.0], numbers=[0, 1])
    ([1, 2], [1.0, 1.0])
    """
    gains = [
        mean([old - new for old, new, number in zip(before, after, numbers, strict=True) if number < read])
        for read, after in curve
    ]
    return [read for read, _ in curve], gains


@torch.no_grad()
def weighted_tokens(encoder: Encoder, document: EncodedDocument, weights: WeightModel) -> list[figures.WeightedToken]:
    """Return the tokens of a passage with their weights."""
    device = next(weights.parameters()).device
    tokens = encoder.padded([document.row])
    values = weights(type(tokens)(*(None if x is None else x.to(device) for x in tokens)))[0].tolist()
    texts = [encoder.tokenizer.decode([token]) for token in document.row.ids]
    return [figures.WeightedToken(*each) for each in zip(texts, values, document.row.marked, strict=True)]


def gain_by_document(after: Sequence[float], before: Sequence[float], numbers: Sequence[int]) -> list[float]:
    """Return, for each document, by how much the NLL of its answers is less than before.

    >>> gain_by_document(after=[1.0, 1.0, 2.0], before=[2.0, 3.0, 3.0], numbers=[0, 0, 1])
    [1.5, 1.0]
    """
    gains: dict[int, list[float]] = {}
    for number, old, new in zip(numbers, before, after, strict=True):
        gains.setdefault(number, []).append(old - new)
    return [mean(values) for values in gains.values()]


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; return its results."""
    parser = report.options(__doc__)
    add = parser.add_argument
    add("--strategy", choices=list(SETTINGS), default="reverse", help="(%(default)s)")
    add("--steps", type=int, help="outer steps, of both phases together (by strategy)")
    add("--first-steps", type=int, default=200, help="outer steps of the first of two phases (%(default)s)")
    add("--depth", type=int, help="documents, and so inner steps, of an episode (by strategy)")
    add("--directions", type=int, default=12, help="random directions (%(default)s)")
    add("--accumulate", type=int, default=1, help="episodes in an outer step (%(default)s)")
    add("--monitor", type=int, help="outer steps between comparisons with the exact hypergradient (none)")
    add("--data-dir", type=Path, help="folder with SQuAD's JSON or StreamingQA's CSV files")
    add("--stream", type=int, help="most documents to adapt to, in validation and test")
    add("--base", help="language model, by name or folder, that needs no pretraining")
    add("--weight-base", help="body of the weight model, by name or folder (by default the language model's)")
    add("--weights", type=Path, help="file with weights.pt of another run, to start from")
    add("--window", type=int, help="most tokens of a document (by data and model)")
    add("--pretrain-steps", type=int, help="steps of the language model on passages")
    add("--tune-steps", type=int, help="steps of the language model on passages and questions")
    add("--batch-size", type=int, default=16, help="passages in a step of these two (%(default)s)")
    add("--lm-lr", type=float, default=3e-3, help="learning rate of these two (%(default)s)")
    add("--inner-lr", type=float, default=0.1, help="of SGD on a document (%(default)s)")
    add("--outer-lr", type=float, default=5e-4, help="of Adam on the weight model (%(default)s)")
    add("--clip", type=float, default=1.0, help="most norm of a hypergradient (%(default)s)")
    add("--locality", type=float, default=1.0, help="factor of KL(adapted || base) on other text (%(default)s)")
    add("--reset-every", type=int, default=24, help="documents before the base starts anew (%(default)s)")
    add("--dropout", type=float, default=0.0, help="while the weights are trained (%(default)s)")
    add("--adapt-optimizer", choices=list(OPTIMIZERS), default="sgd", help="of the stream (%(default)s)")
    rates = (0.0035, 0.007, 0.015, 0.03, 0.05, 0.07, 0.1, 0.15)
    add("--adapt-lr", type=float, nargs="+", default=rates, help="to choose from on validation documents (%(default)s)")
    names = get_args(Weighting)
    add("--weightings", choices=names, nargs="+", default=names, help="to adapt with (%(default)s)")
    add("--accelerator", default="cpu", help="for the Trainer (%(default)s)")
    add("--precision", default="32-true", help="for the Trainer, such as bf16-mixed (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--quiet", action="store_true", help="no progress bar")
    args = completed(parser.parse_args(argv))
    with report.screen():
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # it asks for a mask where nothing is padded
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # that is where dropout is off
        results = train_and_compare(args)
    path = args.output / "camels.json"
    report.write_json(path, results)
    show(results, [*results["figures"], path])
    return results


def completed(args: Arguments) -> Arguments:
    """Fill in what depends on other options."""
    setting = SETTINGS[args.strategy]
    small = {"steps": 4, "first_steps": 2, "depth": 3, "pretrain_steps": 6, "tune_steps": 6, "stream": 6}
    args.sizes = (40, 30, 8, 8) if args.smoke else SIZES
    if args.smoke:
        args.adapt_lr = args.adapt_lr[:2]
    defaults = {
        "steps": setting.steps,
        "depth": setting.depth,
        "pretrain_steps": 0 if args.base else 400,
        "tune_steps": 600,
    }
    for name, value in {**defaults, **(small if args.smoke else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def show(results: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Print the table."""
    rows = [
        [
            name,
            f"{row['answer_nll']:.3f}",
            f"{row['gain']:+.3f}" if "gain" in row else "",
            f"{row['exact_match']:.1f}",
            f"{row['f1']:.1f}",
            f"{row['lr']:g}" if row["lr"] else "",
        ]
        for name, row in results["adaptation"].items()
    ]
    at_the_end = [name for name, row in results["adaptation"].items() if row["at an end of the rates"]]
    title = f"{results['questions']} questions on {results['documents']['test']} unseen documents"
    report.print_table(title, ["weights", "answer NLL", "gain", "EM %", "F1 %", "learning rate"], rows, files)
    if at_the_end:
        print(f"the best learning rate is the least or the largest one tried for: {', '.join(at_the_end)} (--adapt-lr)")
    if results["auroc"] is not None:
        means = ", ".join(f"{value:.2f} on {where}" for where, value in results["mean weight"].items())
        print(f"AUROC of the learned weights on facts {results['auroc']:.3f}; mean weight {means}")
    if results["cosine"]:
        print("cosine with the exact hypergradient: " + ", ".join(f"{value:.2f}" for value in results["cosine"][1]))
    if results["left out"]:
        print("left out: " + ", ".join(f"{count} {what}" for what, count in results["left out"].items()))


if __name__ == "__main__":
    main()
