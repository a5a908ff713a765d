"""`benchmarks/accuracy/precision.py` and `benchmarks/cost/memory_knobs.py`."""

from tables import markdown, results

KNOBS = {
    "checkpoint": "`ReverseUnroll(checkpoint=k)`",
    "directions": "`ForwardGradient(32, chunk_size=k)`",
    "runs": "`PZOBO(32, chunk_size=k)`",
    "episodes": "8 episodes, `episode_chunk_size=k`",
}


def tables() -> dict[str, str]:
    """Return the errors of the strategies, those of scaled losses, and the memory knobs."""
    found = results("precision")
    errors, scales = found["results"]["strategies"], found["settings"]["scales"]
    precisions = list(next(iter(errors.values())))
    strategies = [[f"`{name}`", *(percent(row[each]) for each in precisions)] for name, row in errors.items()]
    scaled = [[each, *(percent(value) for value in row)] for each, row in found["results"]["scale"].items()]
    memory = results("memory_knobs")["results"]
    knobs = [
        [text, *(str(round(row[name])) for name in ("k", "measured", "formula"))]
        for knob, text in KNOBS.items()
        for row in memory[knob]
    ]
    return {
        "precision_strategies": markdown(["estimate", *precisions], strategies),
        "precision_scaled": markdown(["losses times", *(f"{scale:g}" for scale in scales)], scaled),
        "memory_knobs": markdown(["setting", "k", "measured, MiB", "formula, MiB"], knobs),
    }


def percent(value: float) -> str:
    """Return a relative error in percent, to two digits or more."""
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:.0f}%"
