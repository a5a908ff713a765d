"""`benchmarks/papers/camels_baselines.py`, `camels_strategies.py`, `camels_squad.py` and `camels_depth.py`."""

from statistics import fmean
from typing import Any

from tables import RESULTS, markdown, results

SCORES = ("answer NLL", "gain", "learned over it", "EM %", "F1 %")
WEIGHTS = ("no adaptation", "uniform", "IDF", "TF-IDF", "learned", "oracle")
FIRST = "reverse 6"


def tables() -> dict[str, str]:
    """Return the tables of the page on CaMeLS."""
    strategies = results("camels_strategies")["results"]
    squad = results("camels_squad")["results"]
    return {
        "camels_adaptation": adaptation(results("camels_baselines")["results"]),
        "camels_strategies": compared(strategies),
        "camels_identity": cosines(strategies["identity 6"]),
        "camels_squad": adaptation(squad["adaptation"]),
        "camels_squad_runs": squad_runs(squad),
        **depths(),
    }


def adaptation(found: dict[str, Any]) -> str:
    """Compare ways of weighting, over seeds."""
    rows = []
    for name in (name for name in WEIGHTS if name in found):
        scores, over = found[name], found.get(f"learned over {name}")
        gain = found.get(f"gain of {name}", scores["gain"])
        cells = [
            number(scores["answer_nll"], 3),
            "" if name == "no adaptation" else number(gain, 3),
            number(over, 3) if over else "",
            number(scores["exact_match"], 1),
            number(scores["f1"], 1),
        ]
        rows.append([name, *cells])
    return markdown((f"weights, {len(found['learned']['answer_nll']['values'])} seeds", *SCORES), rows)


def compared(found: dict[str, Any]) -> str:
    """Compare strategies and depths."""
    rows = []
    for name, row in found.items():
        lower = f", rate {row['outer_lr']:g}" if row["outer_lr"] else ""
        curves = [curve[1] for curve in row["cosine"] if curve]
        cells = [
            str(row["steps"]),
            str(row["seeds"]),
            f"{fmean(value for curve in curves for value in curve):.2f}" if curves else "",
            number(row["auroc"], 3),
            f"{row['weight of facts']['mean']:.2f}",
            f"{row['weight of other tokens']['mean']:.2f}",
            number(row["learned"]["gain"], 3),
            "" if name == FIRST else number(row["over the first"], 3),
        ]
        rows.append([f"`{row['strategy']}`, {row['depth']}{', goes on' if row['goes_on'] else ''}{lower}", *cells])
    heads = ("strategy, documents", "outer steps", "seeds", "cosine", "AUROC", "facts", "others", "gain", "over first")
    return markdown(heads, rows)


def cosines(found: dict[str, Any]) -> str:
    """Return the cosine with the exact hypergradient along a run, a row for each seed."""
    steps = found["cosine"][0][0]
    rows = [[f"seed {seed}", *(f"{value:.2f}" for value in curve[1])] for seed, curve in enumerate(found["cosine"])]
    return markdown(("cosine, at outer step", *map(str, steps)), rows)


def squad_runs(found: dict[str, Any]) -> str:
    """Return what each of the runs on SQuAD had and learned."""
    rows = []
    for seed, (run, auroc) in enumerate(zip(found["runs"], found["auroc"]["values"], strict=True)):
        documents, weights = run["documents"], run["mean weight"]
        cells = [str(documents[name]) for name in ("pretraining", "training", "test")]
        cells += [str(run["questions"]), str(run["left out"].get("documents longer than the window", 0))]
        cells += [f"{auroc:.3f}", f"{weights['facts']:.2f}", f"{weights['other tokens']:.2f}"]
        rows.append([str(seed), *cells])
    heads = ("seed", "LM", "weights", "test", "questions", "too long", "AUROC", "facts", "others")
    return markdown(heads, rows)


def depths() -> dict[str, str]:
    """Return memory and seconds of one hypergradient: a row for each model and strategy, a column for each depth."""
    known = [results(path.stem) for path in RESULTS.glob("camels_depth*.json")]
    known = [record for record in known if any("peak MiB" in row for row in record["results"])]
    known.sort(key=lambda record: (parameters(record), record["settings"]["precision"]))
    columns = sorted({row["depth"] for record in known for row in record["results"]})
    models, memory, seconds = [], [], []
    for record in known:
        models.append([described(record), *model(record)])
        for strategy in dict.fromkeys(row["strategy"] for row in record["results"]):
            found = {row["depth"]: row for row in record["results"] if row["strategy"] == strategy}
            label = f"{described(record)}: `{strategy}`"
            memory.append([label, *(peak(found.get(number, {})) for number in columns)])
            taken = [found.get(number, {}).get("seconds") for number in columns]
            seconds.append([label, *("" if value is None else f"{value:.1f}" for value in taken)])
    of_models = ("model, precision", "parameters", "its MiB", "weight model's body", "tokens", "directions")
    return {
        "camels_depth_models": markdown(of_models, models),
        "camels_depth": markdown(("peak MiB, by documents", *map(str, columns)), memory),
        "camels_depth_seconds": markdown(("seconds, by documents", *map(str, columns)), seconds),
    }


def parameters(record: dict[str, Any]) -> int:
    """Return the parameters of the language model of a file."""
    return max(row.get("parameters", 0) for row in record["results"])


def described(record: dict[str, Any]) -> str:
    """Name the language model of a file, and the precision and the device it ran with."""
    settings = record["settings"]
    device = "" if settings["device"] == "cpu" else f", {record['environment']['gpu']}"
    return f"{settings['size']}, {settings['precision']}{device}"


def model(record: dict[str, Any]) -> list[str]:
    """Return the sizes that a file was measured with."""
    settings = record["settings"]
    own = max(row.get("LM MiB", 0) for row in record["results"])
    body = settings["weight_size"] or settings["size"]
    tokens = settings["tokens"] or max(row.get("tokens", 0) for row in record["results"])
    millions = parameters(record) / 1e6
    count = f"{millions:,.0f}M" if millions >= 100 else f"{millions:.3g}M"
    return [count, f"{own:,.0f}", body, str(tokens), str(settings["directions"])]


def peak(row: dict[str, Any]) -> str:
    """Return the peak, one that was foreseen and not measured in brackets."""
    if "not run, foreseen MiB" in row:
        return f"({row['not run, foreseen MiB']:,.0f})"
    return f"{row['peak MiB']:,.0f}" if "peak MiB" in row else row.get("error", "")


def number(value: dict[str, Any], digits: int) -> str:
    """Return a mean with half the width of its interval, which of one or two values says nothing."""
    half = "" if len(value["values"]) < 3 else f" ± {value['half_width']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"
