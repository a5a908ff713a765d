"""How much memory does a hypergradient take, and how good are the weights it learns, by the depth of the unroll?

After Figure 1 (bottom left) of (FG)²U, arXiv 2406.14095: reverse unrolling at depth 1 to 6, random directions at 24
and 48, and besides reverse unrolling with checkpoints. Memory and seconds are those of one hypergradient in a process
of its own, of a language model with random weights (which change neither): on a GPU the most that torch held and the
time that passed, on a CPU the peak of the process over what it held before and CPU seconds. The answers are those of
``camels_strategies.json``, of the small trained model.

    python benchmarks/camels_depth.py
    python benchmarks/camels_depth.py --size gpt2 --device cuda --precision bf16
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from _results import RESULTS, plot_path, save
from matplotlib.axes import Axes
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_bilevel import Episode, ForwardGradient, HypergradientStrategy, ReverseUnroll, hypergradient

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import report  # noqa: E402
from camels_lm.encoding import Tokens  # noqa: E402
from camels_lm.models import WeightModel, number_of_parameters  # noqa: E402
from camels_lm.stages import Judgement, MetaTraining  # noqa: E402


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
CASES = [("reverse", depth) for depth in (1, 2, 4, 6)]
CASES += [(name, depth) for name in ("checkpointed", "forward") for depth in (6, 24, 48)]
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


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Take one hypergradient in this process; return its peak memory and its seconds."""
    name, depth = args.measure[0], int(args.measure[1])
    torch.manual_seed(0)
    size, weighting = SIZES[args.size], SIZES[args.weight_size or args.size]
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    module = MetaTraining(gpt2(size), WeightModel(gpt2(weighting).transformer), inner_lr=1e-3, outer_lr=1e-5)
    module = module.to(args.device, dtype)
    for parameter in module.lm.parameters():
        parameter.requires_grad_(True)

    def tokens(rows: int, length: int) -> Tokens:
        ids = torch.randint(0, size.vocabulary, (rows, length), device=args.device)
        return Tokens(ids, None, torch.arange(length, device=args.device).expand(rows, -1) >= length - 8)

    module.inner_steps = depth
    judgement = Judgement(tokens(4, 32), tokens(2, size.tokens))
    episode = Episode([tokens(1, size.tokens) for _ in range(depth)], judgement)
    cuda = args.device.startswith("cuda")
    with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        module.episodes(episode)  # what is loaded at a first call is not counted
        before = report.peak_memory()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        (episode,) = module.episodes(episode)
        clock = time.perf_counter if cuda else time.process_time
        began = clock()
        value = hypergradient(module, strategy(name, args), episode).value.item()
        if cuda:
            torch.cuda.synchronize()
    seconds = clock() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else report.peak_memory() - before
    parameters = number_of_parameters(module.lm)
    return {"peak MiB": peak, "seconds": seconds, "parameters": parameters, "outer loss": value}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the language model")
    parser.add_argument("--weight-size", choices=list(SIZES), help="of the weight model's body, if another")
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--chunk", type=int, help="directions pushed at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16", "bf16-true"], default="32")
    parser.add_argument("--measure", nargs=2, metavar=("STRATEGY", "DEPTH"), help="one case, in this process")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured before")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure:
        found = measure(args)
        print(json.dumps(found))
        return found

    key = "camels_depth" if args.size == "small" else f"camels_depth_{args.size}_{args.precision}"
    if args.draw:
        rows = json.loads((RESULTS / f"{key}.json").read_text())["results"]
        draw(rows, args, key)
        return {"rows": rows}
    rows = []
    for name, depth in CASES:
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--measure", name, str(depth)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # out of memory, on a GPU: a result, too
            rows.append({"strategy": name, "depth": depth, "error": done.stderr.strip().splitlines()[-1][:200]})
        else:
            rows.append({"strategy": name, "depth": depth, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    save(key, {k: v for k, v in vars(args).items() if k not in ("measure", "draw")}, rows)
    draw(rows, args, key)
    return {"rows": rows}


def draw(rows: Sequence[dict[str, Any]], args: argparse.Namespace, key: str) -> None:
    """Draw memory, and the answers where they were measured, against the depth."""
    answers = RESULTS / "camels_strategies.json"
    with_answers = args.size == "small" and answers.exists()
    with plt.rc_context(report.STYLE):
        figure, panels = plt.subplots(1, 1 + with_answers, figsize=(5.6 * (1 + with_answers), 4.2), squeeze=False)
        memory = panels[0, 0]
        for name, color in COLORS.items():
            found = [row for row in rows if row["strategy"] == name and "peak MiB" in row]
            memory.plot(
                [row["depth"] for row in found],
                [row["peak MiB"] for row in found],
                color=color,
                marker="o",
                label=LABELS[name],
            )
        memory.set(title="Memory of one hypergradient", xlabel="documents unrolled through", ylabel="MiB")
        memory.set_ylim(bottom=0)
        memory.legend()
        panels_of_depth = [memory]
        if with_answers:
            gain = panels[0, 1]
            panels_of_depth.append(gain)
            results = json.loads(answers.read_text())["results"]
            for name, color in COLORS.items():
                cases = sorted((row for row in results.values() if row["strategy"] == name), key=lambda c: c["depth"])
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
        figure.savefig(plot_path(key))


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
