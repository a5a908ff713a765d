"""How much memory does a hypergradient take, and how good are the weights it learns, by the depth of the unroll?

After Figure 1 (bottom left) of (FG)²U, arXiv 2406.14095: reverse unrolling at depth 1 to 6, random directions at 24
and 48, and besides reverse unrolling with checkpoints. Memory and seconds are those of one hypergradient in a process
of its own, of a language model with random weights (which change neither): on a GPU the most that torch held and the
time that passed, on a CPU (Linux) the peak of the process over what it held before and CPU seconds. The answers are
those of ``camels_strategies.json``, of the small trained model.

    python benchmarks/papers/camels_depth.py
    python benchmarks/papers/camels_depth.py --size gpt2 --device cuda --precision bf16
    python benchmarks/papers/camels_depth.py --size gpt2-large --weight-size distilgpt2 --tokens 64 --directions 1 \\
        --precision bf16-true --limit 13

Every case is saved as soon as it is measured; ``--resume`` goes on where a run was cut off, and ``--strategies`` and
``--depths`` add some cases at a time. With ``--limit`` a case whose memory is foreseen to be more is not run: reverse
unrolling takes a line over the depth, with checkpoints one over its root. Its row says what it would take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from pytorch_lightning.plugins import HalfPrecision
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_bilevel import Episode, ForwardGradient, HypergradientStrategy, ReverseUnroll, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import script
from support.results import RESULTS, earlier, plot, save

import report
from camels_lm.encoding import Tokens
from camels_lm.models import WeightModel, number_of_parameters
from camels_lm.stages import Judgement, MetaTraining


class Size(NamedTuple):
    """Of a GPT-2, and of the documents."""

    layers: int
    width: int
    vocabulary: int
    tokens: int


SIZES = {
    "tiny": Size(1, 64, 128, 16),
    "small": Size(4, 256, 4096, 128),
    "distilgpt2": Size(6, 768, 50257, 256),
    "gpt2": Size(12, 768, 50257, 256),
    "gpt2-medium": Size(24, 1024, 50257, 256),
    "gpt2-large": Size(36, 1280, 50257, 256),
    "gpt2-xl": Size(48, 1600, 50257, 256),
}
Case = tuple[str, int]
"""A strategy's name here, and a depth."""

CASES: list[Case] = [("reverse", depth) for depth in (1, 2, 4, 6)]
CASES += [(name, depth) for name in ("checkpointed", "forward") for depth in (6, 24, 48)]
GROWTH: dict[str, Callable[[float], float]] = {
    "reverse": float,
    "checkpointed": math.sqrt,
    "forward": lambda depth: 0.0,
}
"""What a strategy's memory is linear in."""

FORESEEN = "not run, foreseen MiB"

SETTINGS = ("size", "weight_size", "tokens", "directions", "chunk", "device", "precision")
COLORS = {"reverse": report.VERMILION, "checkpointed": report.GREEN, "forward": report.BLUE}
LABELS = {"reverse": "reverse", "checkpointed": "reverse, checkpointed", "forward": "forward, random directions"}


def gpt2(size: Size) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights, without dropout."""
    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=1024,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.width // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    return GPT2LMHeadModel(config)


def strategy(name: str, args: argparse.Namespace) -> HypergradientStrategy:
    """Return a strategy by its name here."""
    if name == "forward":
        return ForwardGradient(num_directions=args.directions, chunk_size=args.chunk)
    return ReverseUnroll(checkpoint="sqrt" if name == "checkpointed" else None)


def modules(args: argparse.Namespace) -> MetaTraining:
    """Return both models with random weights, in the precision and on the device of ``args``."""
    torch.manual_seed(0)
    size, weighting = SIZES[args.size], SIZES[args.weight_size or args.size]
    with HalfPrecision("bf16-true").module_init_context() if args.precision == "bf16-true" else nullcontext():
        lm = gpt2(size).to(args.device)
        weights = WeightModel(gpt2(weighting._replace(vocabulary=size.vocabulary)).transformer).to(args.device)
        module = MetaTraining(lm, weights, inner_lr=1e-3, outer_lr=1e-5)
    module._start.clear()  # where a training returns to after many episodes; one episode does not need it
    return module.to(args.device)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Take one hypergradient in this process; return its peak memory and its seconds."""
    name, depth = args.measure[0], int(args.measure[1])
    module = modules(args)
    vocabulary, length = SIZES[args.size].vocabulary, args.tokens or SIZES[args.size].tokens

    def tokens(rows: int, length: int) -> Tokens:
        ids = torch.randint(0, vocabulary, (rows, length), device=args.device)
        return Tokens(ids, None, torch.arange(length, device=args.device).expand(rows, -1) >= length - 8)

    module.inner_steps = depth
    judgement = Judgement(tokens(4, 32), tokens(2, length))
    episode = Episode([tokens(1, length) for _ in range(depth)], judgement)
    cuda = args.device.startswith("cuda")
    with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        module.episodes(episode)  # what is loaded at a first call is not counted
        (episode,) = module.episodes(episode)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        elif (peaks := Path("/proc/self/clear_refs")).exists():
            peaks.write_text("5")  # the peak begins anew
        before = report.peak_memory()
        clock = time.perf_counter if cuda else time.process_time
        if cuda:
            torch.cuda.synchronize()
        began = clock()
        value = hypergradient(module, strategy(name, args), episode).value.item()
        if cuda:
            torch.cuda.synchronize()
    seconds = clock() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else report.peak_memory() - before
    return {
        "peak MiB": peak,
        "LM MiB": sum(parameter.nbytes for parameter in module.lm.parameters()) / 2**20,
        "seconds": seconds,
        "parameters": number_of_parameters(module.lm),
        "tokens": length,
        "outer loss": value,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script.options(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the language model")
    parser.add_argument("--weight-size", choices=list(SIZES), help="of the weight model's body, if another")
    parser.add_argument("--tokens", type=int, help="of a document, if not those of the size")
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--chunk", type=int, help="directions pushed at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16", "bf16-true"], default="32")
    parser.add_argument("--strategies", nargs="+", choices=list(COLORS), default=list(COLORS), help="only these")
    parser.add_argument("--depths", nargs="+", type=int, help="these, and not those of the figure")
    parser.add_argument("--limit", type=float, help="GiB; a case that would take more is not run")
    parser.add_argument("--resume", action="store_true", help="keep the cases that were measured with these settings")
    parser.add_argument("--measure", nargs=2, metavar=("STRATEGY", "DEPTH"), help="one case, in this process")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured before")
    args = script.begin(parser, argv)
    if args.measure:
        found = measure(args)
        print(json.dumps(found))
        return found

    key = "camels_depth" if args.size == "small" else f"camels_depth_{args.size}_{args.precision}"
    key += "" if args.device == "cpu" else "_gpu"
    if args.draw:
        rows = earlier(key)
    else:
        rows = measured(key, args, sys.argv[1:] if argv is None else argv)
    draw(rows, args, key)
    return {"rows": rows}


def measured(key: str, args: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure every case in a process of its own and save it at once; return the rows by strategy and depth."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    rows = kept(key, settings) if args.resume else {}
    for name in args.strategies:
        for depth in args.depths or [depth for other, depth in CASES if other == name]:
            if "peak MiB" in rows.get((name, depth), {}):
                continue
            rows[name, depth] = {"strategy": name, "depth": depth, **of_case(name, depth, args, argv, rows)}
            print(rows[name, depth], flush=True)
            rows = {(n, d): row for n in COLORS for (other, d), row in sorted(rows.items()) if n == other}
            save(key, settings, list(rows.values()))
    return list(rows.values())


def kept(key: str, settings: dict[str, Any]) -> dict[Case, dict[str, Any]]:
    """Return the rows of an earlier run with the same settings."""
    path = RESULTS / f"{key}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    same = record.get("settings") == settings
    return {(row["strategy"], row["depth"]): row for row in record["results"]} if same else {}


def of_case(
    name: str, depth: int, args: argparse.Namespace, argv: Sequence[str], rows: dict[Case, dict[str, Any]]
) -> dict[str, Any]:
    """Return what one case took; or why it has no result, as on a GPU whose memory does not suffice."""
    expected = foreseen(name, depth, rows)
    if args.limit and expected and expected > 1024 * args.limit:
        return {FORESEEN: expected}
    # On Linux, what is freed goes back to the system at once, or the peak would say what malloc keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *argv, "--measure", name, str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def foreseen(name: str, depth: int, rows: dict[Case, dict[str, Any]]) -> float | None:
    """Return the MiB that a case will take by the two deepest that were measured; by one, at most."""
    known = [(GROWTH[name](d), row["peak MiB"]) for (n, d), row in rows.items() if n == name and "peak MiB" in row]
    if not known:
        return None
    (x, first), (y, last) = [(0.0, 0.0), *sorted(known)][-2:]
    return last + (GROWTH[name](depth) - y) * (last - first) / (y - x) if y > x else last


def draw(rows: Sequence[dict[str, Any]], args: argparse.Namespace, key: str) -> None:
    """Draw memory, and the answers where they were measured, against the depth."""
    answers = earlier("camels_strategies")
    columns = 1 + (args.size == "small" and bool(answers))
    with plot(key, 1, columns, size=(5.6 * columns, 4.2), squeeze=False) as (_, panels):
        memory = panels[0, 0]
        for name, color in COLORS.items():
            found = [row for row in rows if row["strategy"] == name and "peak MiB" in row]
            missing = [row for row in rows if row["strategy"] == name and FORESEEN in row]
            if not found and not missing:
                continue
            memory.plot(
                [row["depth"] for row in found],
                [row["peak MiB"] for row in found],
                color=color,
                marker="o",
                label=LABELS[name],
            )
            memory.plot(
                [row["depth"] for row in missing],
                [row[FORESEEN] for row in missing],
                color=color,
                marker="o",
                markerfacecolor="white",
                linestyle="none",
            )
        title = "Memory of one hypergradient" + ", hollow: not run" * any(FORESEEN in row for row in rows)
        memory.set(title=title, xlabel="documents unrolled through", ylabel="MiB")
        memory.set_ylim(bottom=0)
        memory.legend()
        panels_of_depth = [memory]
        if columns > 1:
            gain = panels[0, 1]
            panels_of_depth.append(gain)
            for name, color in COLORS.items():
                cases = sorted((row for row in answers.values() if row["strategy"] == name), key=lambda c: c["depth"])
                draw_gain(gain, cases, color, LABELS[name])
            gain.set(
                title="What the adapted model has learned",
                xlabel="documents unrolled through",
                ylabel="gain in answer NLL (nats per token)",
            )
            gain.set_ylim(0, 1.1 * gain.get_ylim()[1])
            gain.legend()
        for axes in panels_of_depth:
            axes.set_xscale("log", base=2)
            axes.set_xlim(0.85, 56)
            axes.set_xticks([1, 2, 4, 6, 24, 48], ["1", "2", "4", "6", "24", "48"])
            axes.minorticks_off()


def draw_gain(axes: Axes, cases: Sequence[dict[str, Any]], color: str, label: str) -> None:
    """Draw the gain against the depth: thick the mean over the seeds that all cases have, thin each seed."""
    values = [row["learned"]["gain"]["values"] for row in cases]
    depths = [row["depth"] for row in cases]
    common = min(map(len, values), default=0)
    for seed in range(max(map(len, values), default=0)):
        known = [(depth, of_case[seed]) for depth, of_case in zip(depths, values, strict=True) if seed < len(of_case)]
        axes.plot(*zip(*known, strict=True), color=color, lw=0.8, alpha=0.6, marker=".")
    means = [statistics.fmean(of_case[:common]) for of_case in values]
    axes.plot(depths, means, color=color, marker="o", label=f"{label} ({common} seed{'s' * (common > 1)})")


if __name__ == "__main__":
    main()
