"""CaMeLS: its losses, the carry-over of the language model, and its stages."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import camels
from camels_lm import encoding, figures, loading, losses, models, readers, salience, stages, synthetic
from camels_lm.documents import Document
from camels_lm.encoding import Encoder, Tokens
from lightning_bilevel import Episode, ForwardGradient, HypergradientSchedule, ReverseUnroll, hypergradient, tree
from lightning_bilevel.directions import Gaussian
from tests.support.camels import (
    WINDOW,
    alone,
    an_episode,
    encoded,
    encoder,
    language_model,
    meta_training,
    splits,
    weight_model,
)
from tests.support.modules import differing, parameters, trainer
from tests.support.problems import DIFFERENCE, assert_close, perturbed
from tests.support.processes import ran
from tests.support.seeds import forked, key_of

pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")  # where dropout is off, all are

# --- The losses ---


def test_masked_mean_does_not_see_what_is_masked() -> None:
    values = torch.tensor([1.0, 3.0, 7.0], requires_grad=True)
    mean = losses.masked_mean(values, torch.tensor([True, True, False]))
    assert mean.item() == 2
    assert torch.autograd.grad(mean, values)[0].tolist() == [0.5, 0.5, 0]
    assert losses.masked_mean(values, torch.zeros(3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_nowhere(side: str) -> None:
    """Each loss of a padded batch is the mean over the tokens of its rows, taken one by one."""
    lm, weights, outer = language_model(), weight_model(), an_episode(side=side).outer
    assert outer.questions.mask is not None
    base = models.log_probs(weighted_copy(lm), outer.unrelated)

    def over_tokens(tokens: Tokens, sums: Callable[[Tokens], tuple[Tensor, int]]) -> Tensor:
        parts = [sums(row) for row in alone(tokens)]
        return sum(part for part, _ in parts) / sum(count for _, count in parts)

    def answer(row: Tokens) -> tuple[Tensor, int]:
        return (losses.token_nll(lm, row) * row.marked[:, 1:]).sum(), int(row.marked.sum())

    def weighted(row: Tokens) -> tuple[Tensor, int]:
        return (losses.token_nll(lm, row) * weights(row)[:, 1:]).sum(), row.ids.shape[1] - 1

    def divergent(row: Tokens) -> tuple[Tensor, int]:
        log_p = losses.logits(lm, row).log_softmax(-1)
        return F.kl_div(
            models.log_probs(weighted_copy(lm), row), log_p, log_target=True, reduction="sum"
        ), row.ids.numel()

    close = torch.testing.assert_close
    close(losses.answer_nll(lm, outer.questions), over_tokens(outer.questions, answer))
    passages = outer.unrelated
    close(losses.weighted_nll(lm, passages, weights(passages)), over_tokens(passages, weighted))
    close(losses.divergence(lm, passages, base), over_tokens(passages, divergent))
    each = [losses.answer_nll(lm, row) for row in alone(outer.questions)]
    close(losses.nll_of_each_answer(lm, outer.questions), torch.stack(each))


def weighted_copy(lm: Any) -> Any:
    """Return another language model."""
    other = copy.deepcopy(lm)
    with torch.no_grad():
        other.transformer.wte.weight.mul_(2)
    return other


def test_token_nll_is_that_of_the_next_token() -> None:
    lm, tokens = language_model(), alone(an_episode().outer.unrelated)[0]
    log_probs = lm(tokens.ids).logits[0].log_softmax(-1)
    expected = [-log_probs[i - 1, tokens.ids[0, i]] for i in range(1, tokens.ids.shape[1])]
    torch.testing.assert_close(losses.token_nll(lm, tokens)[0], torch.stack(expected))


def test_divergence_from_itself_is_zero() -> None:
    lm, tokens = language_model(), an_episode().outer.unrelated
    assert losses.divergence(lm, tokens, models.log_probs(lm, tokens)).item() == pytest.approx(0, abs=1e-12)
    assert losses.divergence(lm, tokens, models.log_probs(weighted_copy(lm), tokens)).item() > 1e-3


def test_weights_start_uniform() -> None:
    weights = models.WeightModel(language_model().base_model)
    values = weights.float()(an_episode().outer.unrelated)
    torch.testing.assert_close(values, torch.full_like(values, math.log(2) / 3))


def test_the_models_are_as_described() -> None:
    lm = language_model()
    assert lm.config._attn_implementation == "sdpa"
    assert lm.lm_head.weight is lm.transformer.wte.weight
    assert models.window_of(lm) == WINDOW
    assert models.window_of(lm, 20) == 20
    with_dropout = models.with_dropout(lm, 0.3)
    assert with_dropout.training
    assert {child.p for child in with_dropout.modules() if isinstance(child, torch.nn.Dropout)} == {0.3}
    assert not models.with_dropout(lm, 0.0).training


# --- The hypergradient ---


def value_of(module: stages.MetaTraining, episode: Episode, seed: int = 0) -> float:
    """Return the outer loss after plain SGD, by code of its own."""
    lm = copy.deepcopy(module.lm)
    with forked(seed):
        for passage in episode.inner:
            with torch.no_grad():
                weights = module.weights(passage)[:, 1:]
            predictions = lm(**losses.inputs(passage)).logits[:, :-1]
            nll = F.cross_entropy(predictions.flatten(0, 1), passage.ids[:, 1:].flatten(), reduction="none")
            counts = losses.predicted(passage)
            loss = (nll.view(counts.shape) * weights)[counts].mean()
            grads = torch.autograd.grad(loss, list(lm.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(lm.parameters(), grads, strict=True):
                    parameter -= module.inner_lr * grad
        with torch.no_grad():
            nll = losses.answer_nll(lm, episode.outer.questions)
            kl = losses.divergence(lm, episode.outer.unrelated, episode.outer.base_log_probs)
            return (nll + module.locality * kl).item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_hypergradient_is_the_derivative(side: str) -> None:
    """Reverse, checkpointed and forward agree with differences of a plain loop, with SDPA and tied embeddings."""
    module = meta_training(locality=0.5)
    module.inner_steps = 2
    (episode,) = module.episodes(an_episode(side=side))
    exact = hypergradient(module, ReverseUnroll(), episode)
    assert_close(hypergradient(module, ReverseUnroll(checkpoint=1), episode).grads, exact.grads, rtol=1e-8)
    v = {name: rows[0] for name, rows in Gaussian().draw(key_of(0, 0), 0, 1, exact.grads).items()}
    along = tree.dot(exact.grads, v).item()
    ahead, behind = (perturbed(module, v, sign * DIFFERENCE, lambda: value_of(module, episode)) for sign in (1, -1))
    assert along == pytest.approx((ahead - behind) / (2 * DIFFERENCE), rel=1e-6)
    forward = hypergradient(module, ForwardGradient(num_directions=1, directions=Gaussian()), episode).grads
    name = "weights.head.0.weight"
    assert (forward[name] / v[name]).mean().item() == pytest.approx(along, rel=1e-8)


def test_the_side_of_the_padding_changes_nothing() -> None:
    module = meta_training()
    module.inner_steps = 2
    left, right = (
        hypergradient(module, ReverseUnroll(), module.episodes(an_episode(side=side))[0]).grads
        for side in ("left", "right")
    )
    assert_close(left, right, rtol=1e-8)


def test_hypergradient_with_dropout() -> None:
    """Masks are drawn, and are the same when a segment is run again."""
    module = meta_training(dropout=0.3)
    module.inner_steps = 2
    (episode,) = module.episodes(an_episode())
    exact, checkpointed = (hypergradient(module, ReverseUnroll(k), episode, seed=1) for k in (None, 1))
    assert_close(checkpointed.grads, exact.grads, rtol=1e-8)
    other = hypergradient(module, ReverseUnroll(), episode, seed=2)
    assert other.value != exact.value
    assert hypergradient(module, ForwardGradient(num_directions=2), episode, seed=1).value == pytest.approx(
        exact.value.item()
    )


# --- Training the weights ---


def fitted(
    module: pl.LightningModule, batches: Any, *callbacks: Any, ckpt_path: Path | None = None, **options: Any
) -> Any:
    fitter = trainer(*callbacks, max_epochs=1, **options)
    fitter.fit(module, batches, ckpt_path=ckpt_path)
    return fitter


class Watch(pl.Callback):
    """Keeps the language model and the number of steps before every training step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Tensor]]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.seen.append((int(module.documents), copy.deepcopy(module.lm.state_dict())))


def test_the_language_model_is_carried_over_and_reset() -> None:
    """Two episodes of 2 documents fit into 5; before the third, the model is where it started."""
    module, watch = meta_training(reset_every=5), Watch()
    start = copy.deepcopy(module.lm.state_dict())
    origins = []

    class Origins(stages.MetaTraining):
        def episodes(self, batch: Episode) -> list[Episode]:
            origins.append(copy.deepcopy(self.lm.state_dict()))
            found = super().episodes(batch)
            expected = models.log_probs(self.lm, batch.outer.unrelated)
            assert torch.equal(found[0].outer.base_log_probs, expected)  # of this episode, not of the whole run
            return found

    module.__class__ = Origins
    fitted(
        module,
        stages.episodes(encoder(), encoded("training"), encoded("pretraining"), [2] * 3, 0),
        ReverseUnroll(),
        watch,
    )
    same = [not differing(origin, start) for origin in origins]
    assert same == [True, False, True]
    assert module.documents == 2


def test_the_base_of_an_episode_has_no_dropout() -> None:
    module = meta_training(dropout=0.5)
    first, second = (module.episodes(an_episode())[0].outer.base_log_probs for _ in range(2))
    assert torch.equal(first, second)
    assert module.lm.training


def test_the_two_phases_differ_in_depth_and_rate() -> None:
    module = meta_training(phase_steps=2)
    schedule = HypergradientSchedule([(ReverseUnroll(), 2), (ForwardGradient(num_directions=2), None)])
    seen: list[tuple[int, float, float]] = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            phase = trainer.callback_metrics["hypergradient_phase"].item()
            seen.append((module.inner_steps, phase, trainer.optimizers[0].param_groups[0]["lr"]))

    batches = stages.episodes(encoder(), encoded("training"), encoded("pretraining"), [2, 2, 4, 4], 0)
    fitted(module, batches, schedule, Log())
    assert [depth for depth, _, _ in seen] == [2, 2, 4, 4]
    assert [phase for _, phase, _ in seen] == [0, 0, 1, 1]
    assert [rate for _, _, rate in seen] == pytest.approx([0.625e-2, 0.25e-2, 0.25e-2, 0.25e-2])  # after each step


@pytest.mark.parametrize("name", camels.SETTINGS)
def test_every_strategy_trains_the_weights(name: str) -> None:
    args = Namespace(directions=2, inner_lr=0.5, first_steps=1)
    spare = int(name == "identity")
    module = meta_training(spare=spare)
    before = parameters(module.weights)
    documents = (encoded("training"), encoded("pretraining"))
    batches = stages.episodes(encoder(), *documents, [3, 3], 0, spare=spare)
    fitted(module, batches, camels.SETTINGS[name].strategy(args))
    assert module.inner_steps == 3
    assert differing(parameters(module.weights), before)
    assert all(value.isfinite().all() for value in module.weights.parameters())


def test_mixed_precision() -> None:
    """In bfloat16, losses are still summed in float32, and the hypergradient points the same way."""
    grads = []
    for precision in ("32-true", "bf16-mixed"):
        module = stages.MetaTraining(language_model().float(), weight_model().float(), inner_lr=0.5, outer_lr=1.0)
        before = parameters(module.weights)

        class Keep(pl.Callback):
            def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
                grads.append(torch.cat([p.grad.flatten() for p in module.weights.parameters()]))

        batches = stages.episodes(encoder(), encoded("training"), encoded("pretraining"), [2], 0)
        fitted(module, batches, ReverseUnroll(), Keep(), precision=precision)
        assert differing(parameters(module.weights), before)
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


class Crash(pl.Callback):
    """Ends the process, as it were, before a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            raise InterruptedError


def crashed_and_resumed(
    folder: Path,
    make: Callable[[], Any],
    data: Callable[[], Any],
    callback: Callable[[], Any],
    when: dict,
    **options: Any,
) -> Any:
    """Fit, with a checkpoint at each step, until a crash at step 2; return a fresh module that went on from there."""

    def fitter(*callbacks: Any) -> pl.Trainer:
        keep = camels.checkpoints(folder, **when)
        return trainer(callback(), *callbacks, keep, enable_checkpointing=True, **options)

    with pytest.raises(InterruptedError):
        fitter(Crash(2)).fit(make(), *data())
    resumed = make()
    fitter().fit(resumed, *data(), ckpt_path=folder / "last.ckpt")
    return resumed


def test_weights_resume_exactly(tmp_path: Path) -> None:
    """Cut off in the middle, and gone on with from the checkpoint: as if never cut off."""

    def make() -> stages.MetaTraining:
        return meta_training(reset_every=6)

    def data() -> Any:
        return (stages.episodes(encoder(), encoded("training"), encoded("pretraining"), [2] * 4, 0),)

    whole = make()
    trainer(ReverseUnroll()).fit(whole, *data())
    resumed = crashed_and_resumed(tmp_path, make, data, ReverseUnroll, {"every": 1})
    assert whole.documents == 2
    assert not differing(parameters(whole), parameters(resumed))


# --- Many processes ---


def test_batches_are_shared_out_and_resumed() -> None:
    def share(rank: int) -> loading.Batches[str]:
        numbered = loading.Numbered(str, 5)
        return loading.Batches(numbered, sampler=DistributedSampler(numbered, 2, rank))

    assert [list(share(rank)) for rank in (0, 1)] == [["0", "2", "4"], ["1", "3", "0"]]
    assert len(share(0)) == 3
    batches = share(1)
    first = next(iter(batches))
    rest = share(1)
    rest.load_state_dict(batches.state_dict())
    assert [first, *rest] == list(share(1)) == list(rest)


class Read(pl.Callback):
    """Keeps the first passage of every episode, as text."""

    def __init__(self) -> None:
        self.passages: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Episode, batch_idx: int) -> None:
        self.passages.append(passage_of(batch))


def passage_of(episode: Episode) -> str:
    return encoder().tokenizer.decode(episode.inner[0].ids[0])


def some_episodes(count: int) -> loading.Batches[Episode]:
    return stages.episodes(encoder(), encoded("training"), encoded("pretraining"), [2] * count, 0)


def work(folder: Path) -> None:
    """Fit in two processes; write what this one read, and its weights."""
    for name, make in {"ddp": ReverseUnroll, "ddp_directions": lambda: ForwardGradient(num_directions=2)}.items():
        module, read = meta_training(), Read()
        trainer(make(), read, strategy=name, devices=2).fit(module, some_episodes(3))
        one = meta_training()
        trainer(make(), strategy=name, devices=2, max_steps=1).fit(one, some_episodes(3))
        found = {"read": read.passages, "weights": parameters(module.weights), "after one": parameters(one.weights)}
        torch.save(found, folder / f"{name}_{os.environ.get('LOCAL_RANK', 0)}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run this file as a script, which Lightning starts a second time."""
    folder = tmp_path_factory.mktemp("ranks")
    ran(__file__, folder)
    return folder


def of_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_processes_have_episodes_of_their_own(ranks: Path) -> None:
    """The first step of two processes is that of the mean of two hypergradients."""
    episodes = list(some_episodes(3))
    numbers = [[0, 2], [1, 0]]
    found = of_ranks(ranks, "ddp")
    assert [each["read"] for each in found] == [[passage_of(episodes[i]) for i in mine] for mine in numbers]
    assert not differing(found[0]["weights"], found[1]["weights"])

    module = meta_training()
    module.inner_steps = 2
    grads = [hypergradient(module, ReverseUnroll(), module.episodes(episode)[0]).grads for episode in episodes[:2]]
    for name, parameter in module.weights.named_parameters():
        parameter.grad = sum(each[f"weights.{name}"] for each in grads) / 2
    made = module.configure_optimizers()
    made["optimizer"].step()
    torch.testing.assert_close(found[0]["after one"], parameters(module.weights))


def test_processes_that_share_directions_have_the_same_episodes(ranks: Path) -> None:
    found = of_ranks(ranks, "ddp_directions")
    assert [each["read"] for each in found] == [[passage_of(episode) for episode in some_episodes(3)]] * 2
    assert not differing(found[0]["weights"], found[1]["weights"])


# --- Adaptation ---


def adaptation(weighting: str = "uniform", lr: float = 0.1, **options: Any) -> stages.OnlineAdaptation:
    questions = [question for document in encoded("test") for question in document.questions]
    return stages.OnlineAdaptation(
        language_model(), weighting, weight_model().float(), questions, encoder(), lr=lr, **options
    )


def stream() -> loading.Batches:
    return loading.Batches(loading.Numbered(lambda number: encoder().padded([encoded("test")[number].row]), 4))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_adaptation_takes_one_step_for_each_document(optimizer: str) -> None:
    module = adaptation(optimizer=optimizer)
    expected = copy.deepcopy(module.lm)
    steps = stages.OPTIMIZERS[optimizer](expected.parameters(), lr=0.1)
    for number in range(4):
        tokens = encoder().padded([encoded("test")[number].row])
        steps.zero_grad()
        losses.token_nll(expected, tokens).mean().backward()
        steps.step()
    trainer(num_sanity_val_steps=0).fit(module, stream(), stages.asked(encoder(), module.questions))
    assert module.read == 4
    assert not differing(parameters(module.lm), parameters(expected))


def test_oracle_weights_are_one_on_facts() -> None:
    tokens = encoder().padded([encoded("test")[0].row])
    assert adaptation("oracle").weights_of(tokens).tolist() == tokens.marked.float().tolist()
    assert adaptation("uniform").weights_of(tokens).unique().tolist() == [1]
    module = adaptation("learned")
    assert torch.equal(module.weights_of(tokens), module.weights(tokens))


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_salience_is_the_rarity_of_a_token_and_its_count(counted: bool, side: str) -> None:
    """Against counts by hand; padding counts nowhere, and the mean over all documents is 1."""
    rows = [document.row for document in encoded("pretraining")]
    ids = [row.ids for row in rows]
    module = salience.Salience(ids, language_model().config.vocab_size, counted)
    found = module(encoder().padded(rows, side))
    raw = []
    for row in ids:
        having = [sum(token in other for other in ids) for token in row]
        counts = [row.count(token) if counted else 1 for token in row]
        raw.append([n * math.log((1 + len(ids)) / (1 + m)) for n, m in zip(counts, having, strict=True)])
    scale = sum(map(sum, raw)) / sum(map(len, raw))
    for values, expected in zip(found, raw, strict=True):
        own = values[-len(expected) :] if side == "left" else values[: len(expected)]
        assert own.tolist() == pytest.approx([value / scale for value in expected], rel=1e-4, abs=1e-6)


def test_answers_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers right has EM 100; the curve has a value for every question at every look."""
    module = adaptation()
    questions = stages.asked(encoder(), module.questions, size=3)
    fitter = trainer(max_epochs=1, num_sanity_val_steps=0, val_check_interval=2)
    fitter.fit(module, stream(), questions)
    right = {tuple(q.prompt): q.answers[0] for q in module.questions}

    def said(lm: Any, prompts: Tokens, encoder: Encoder) -> list[str]:
        return [right[tuple(row.ids[0].tolist())] for row in alone(prompts)]

    monkeypatch.setattr(stages, "continued", said)
    scores = fitter.test(module, questions, verbose=False)[0]
    assert scores["exact_match"] == scores["f1"] == 100
    assert [read for read, _ in module.curve] == [2, 4]
    nll = [losses.answer_nll(module.lm, encoder().padded([q.row])).item() for q in module.questions]
    assert module.curve[-1][1] == pytest.approx(nll, rel=1e-6)
    assert scores["answer_nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-6)


def test_answers_do_not_depend_on_the_padding() -> None:
    lm = weighted_copy(language_model())
    questions = [question for document in encoded("test") for question in document.questions]
    (batch,) = stages.asked(encoder(), questions)
    assert batch.prompts.mask is not None
    assert not batch.prompts.mask[:, 0].all()  # on the left
    together = stages.continued(lm, batch.prompts, encoder())
    each = [stages.continued(lm, row, encoder())[0] for row in alone(batch.prompts)]
    assert together == each


def test_adaptation_resumes_exactly(tmp_path: Path) -> None:
    make = partial(adaptation, optimizer="adam")
    options = {"num_sanity_val_steps": 0, "val_check_interval": 1}
    whole = make()

    def data() -> Any:
        return stream(), stages.asked(encoder(), whole.questions)

    trainer(**options).fit(whole, *data())
    resumed = crashed_and_resumed(tmp_path, make, data, pl.Callback, {}, **options)
    assert not differing(parameters(whole.lm), parameters(resumed.lm))
    # Lightning 2.4 asks again what it asked just before the checkpoint.
    assert list(dict(resumed.curve)) == [1, 2, 3, 4]
    assert dict(resumed.curve) == dict(whole.curve)


def test_bad_weightings_are_named() -> None:
    with pytest.raises(ValueError, match=r"^Expected `OnlineAdaptation\(weighting=...\)` to be one of"):
        adaptation("random")
    with pytest.raises(ValueError, match=r"^Expected `OnlineAdaptation\(weights=...\)` to be a weight model"):
        stages.OnlineAdaptation(language_model(), "learned", None, [], encoder())


# --- Docstrings, the picture ---


@pytest.mark.parametrize("module", [camels, losses, loading, readers, salience, synthetic])
def test_examples_in_docstrings(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_words_stay_together_in_the_picture(tmp_path: Path) -> None:
    passage = [figures.WeightedToken(text, 0.5, False) for text in ["A", "b", " Cd", "ef"] + [" word"] * 30]
    spots, lines = figures._laid_out(passage)
    assert spots[:4] == [(0, 0), (0, 1), (0, 2), (0, 5)]
    assert lines == 2
    assert max(column + len(token.text) for (_, column), token in zip(spots, passage, strict=True)) <= figures.LINE


# --- The whole example ---


def run(folder: Path, *argv: str) -> dict[str, Any]:
    return importlib.import_module("camels").main(["--smoke", "--quiet", "--output", str(folder), *argv])


def test_a_run_is_resumed(tmp_path: Path) -> None:
    first = run(tmp_path)
    (tmp_path / "camels" / "rates.json").unlink()
    again = run(tmp_path, "--resume")
    for name in ("auroc", "adaptation", "gain along the stream", "answers"):
        assert again[name] == first[name]
    for stage, seconds in first["CPU seconds"].items():
        assert again["CPU seconds"][stage] > seconds  # of both runs
    with pytest.raises(ValueError, match=r"^Expected `--output` to be a folder that --base .* is not in"):
        run(tmp_path, "--base", str(tmp_path / "camels" / "lm"))
    with pytest.raises(ValueError, match=r"^Expected `--resume` to be with the options of the run in"):
        run(tmp_path, "--resume", "--locality", "0")


def published(folder: Path) -> Path:
    """Write a GPT-2 as the published ones are: files of its own tokenizer, no padding token, dropout."""
    trained = encoding.ByteLevelBPETokenizer()
    trained.train_from_iterator((d.text for d in splits().pretraining), 300, special_tokens=[encoding.END])
    folder.mkdir()
    trained.save_model(str(folder))
    GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    end = trained.token_to_id(encoding.END)
    sizes = {"vocab_size": trained.get_vocab_size(), "n_positions": WINDOW, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    assert config.resid_pdrop > 0
    with forked(0):
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_the_settings_of_the_papers(tmp_path: Path) -> None:
    """The command of the documentation on a tiny model: a folder is a base like any name."""
    data = tmp_path / "data"
    data.mkdir()
    found = [d for part in synthetic.documents((20, 10, 2, 8), seed=5) for d in part]
    too_long = [Document(found[0].text * 9, found[0].questions, f"long {i}") for i in range(4)]
    content = {"data": [as_squad(document) for document in [*found, *too_long]]}
    (data / "dev.json").write_text(json.dumps(content))
    base = str(published(tmp_path / "gpt2"))
    options = f"--data-dir {data} --base {base} --weight-base {base} --precision bf16-mixed --strategy two-phase"
    options += " --accumulate 2 --dropout 0.1 --adapt-optimizer adam --adapt-lr 1e-4 1e-3 --directions 2"
    result = run(tmp_path / "run", *options.split())
    assert sum(result["documents"].values()) <= len(found)
    assert result["left out"]["documents longer than the window"] == len(too_long)
    assert set(result["adaptation"]) == {"no adaptation", "uniform", "IDF", "TF-IDF", "learned", "oracle"}
    for scores in result["adaptation"].values():
        assert math.isfinite(scores["answer_nll"])
    assert result["CPU seconds"].keys() >= {"tune", "weights", "stream-learned"}


def test_rates_at_an_end_are_named_and_estimates_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weightings", "uniform", "learned", "--strategy", "identity", "--monitor", "3", "--adapt-lr"]
    result = run(tmp_path, *options, "1e-3", "1e3")
    steps, cosines = result["cosine"]
    assert steps == [0, 3]
    assert all(0 < cosine <= 1 for cosine in cosines)
    assert result["adaptation"]["uniform"]["lr"] == 1e-3
    assert [row["at an end of the rates"] for row in result["adaptation"].values()] == [False, True, True]
    assert "the least or the largest one tried for: uniform, learned" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=r"^Expected `--adapt-lr` to be learning rates of which one does not diverge"):
        run(tmp_path, *options, "inf", "nan")


def as_squad(document: Document) -> dict[str, Any]:
    qas = [{"id": q.text, "question": q.text, "answers": [{"text": q.answers[0]}]} for q in document.questions]
    return {"title": document.article, "paragraphs": [{"context": document.text, "qas": qas}]}


if __name__ == "__main__":
    work(Path(sys.argv[1]))
