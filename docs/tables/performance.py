"""The benchmarks of cost: `cost_against_*.py`, `long_runs.py`, `trainer_overhead.py` and `chunk_choice.py`."""

from __future__ import annotations

from tables import markdown, results

DEPTHS, SIZES = ("1", "16", "256", "1024"), ("10", "100", "10000", "1000000")
KINDS = {"ForwardGradient": "`ForwardGradient`", "PZOBO": "`PZOBO`", "episodes": "`ReverseUnroll` over episodes"}
DIRECTIONS = ("ForwardGradient", "PZOBO", "ZerothOrder")
PLAIN = "the inner run alone"


def tables() -> dict[str, str]:
    """Return the main ratios, and time and memory over T, N and b, of a Trainer, and of chunks."""
    return {
        "performance_ratios": markdown(["", "ratio"], ratios()),
        "performance_depth": over("cost_against_depth", "T", DEPTHS),
        "performance_size": over("cost_against_size", "N", SIZES),
        "performance_directions": directions(),
        "performance_overhead": overhead(),
        "performance_chunks": chunks(),
        "performance_long_runs": long_runs(),
        "performance_recomputation": recomputation(),
    }


def ratios() -> list[list[str]]:
    """Return the ratios that say most of what there is below."""
    overheads, nets = results("trainer_overhead")["results"], results("cost_against_directions")["results"]
    long, maml = results("long_runs")["results"], results("maml_speed")["results"]
    found: dict[str, float] = {}
    for name, row in overheads.items():
        found[f"Trainer and `BilevelModule` over the loop by hand, {name}"] = row["over by hand"]
    for name, row in nets.items():
        found[f"one more direction, in inner runs, {name}"] = row["ForwardGradient"]["a direction"]
    found["memory of `ForwardGradient`, T = 1000 over T = 10"] = long["forward gradient"]["ratio"]
    recomputed = long["recomputation"]
    found[f'time of `checkpoint="sqrt"` over none, T = {recomputed["T"]}'] = recomputed["sqrt over reverse"]
    found['exponent of T in the memory of `checkpoint="sqrt"`'] = long["memory"]['ReverseUnroll("sqrt")']["exponent"]
    for name, row in results("chunk_choice")["results"].items():
        worst = max(row[kind]["own over best"] for kind in KINDS)
        found[f"chunks of the library's choice over the best fixed size, {name}"] = worst
    for name in ("sinusoids", "images"):
        found[f"a meta-step of MAML over the fastest peer's, {name}"] = maml[name]["of the fastest peer"]
    found["directions in a second, 2 processes over 1"] = two_processes()
    return [[text, f"{value:.2f}"] for text, value in found.items()]


def two_processes() -> float:
    """Return the seconds of one process over those of two, at the most directions."""
    rows = results("scaling")["results"]["rows"]
    most = max(row["b"] for row in rows)
    one, two = (next(row for row in rows if row["R"] == count and row["b"] == most) for count in (1, 2))
    return one["seconds"] / two["seconds"]


def over(name: str, letter: str, sizes: tuple[str, ...]) -> str:
    """Return milliseconds and MiB of every strategy for some sizes."""
    found = results(name)["results"]
    heads = [f"ms, {letter} = {number(size)}" for size in sizes] + [f"MiB, {letter} = {number(size)}" for size in sizes]
    rows = []
    for strategy in found[sizes[0]]:
        each = [found[size].get(strategy) for size in sizes]
        times = [figure(1000 * row["seconds"]) if row else "" for row in each]
        peaks = [figure(row["MiB"]) if row else "" for row in each]
        rows.append([strategy if strategy == PLAIN else f"`{strategy}`", *times, *peaks])
    return markdown(["", *heads], rows)


def directions() -> str:
    """Return what a direction costs, in inner runs, and the memory of the fewest and of the most."""
    rows = []
    for found in results("cost_against_directions")["results"].values():
        for kind in DIRECTIONS:
            row, b = found[kind], found["b"]
            peaks = f"{figure(row['MiB'][0])} (b = {b[0]}), {figure(row['MiB'][-1])} (b = {b[-1]})"
            rows.append([found["net"], f"`{kind}`", f"{row['a direction']:.2f}", f"{row['none']:.1f}", peaks])
    return markdown(["net", "strategy", "a direction", "the rest", "peak MiB"], rows)


def overhead() -> str:
    """Return milliseconds of an outer step in three ways."""
    rows = []
    for name, row in results("trainer_overhead")["results"].items():
        times = [f"{1000 * value:.1f}" for value in row["cpu seconds"].values()]
        rows.append([f"{name}: {row['text']}", *times, *(f"{row[key]:.2f}" for key in list(row)[2:])])
    heads = ["", "by hand, ms", "in a LightningModule, ms", "`BilevelModule`, ms", "over by hand", "over Lightning"]
    return markdown(heads, rows)


def chunks() -> str:
    """Return the time of each chunk size over the best one."""
    found = results("chunk_choice")
    sizes = [str(size) for size in found["settings"]["sizes"]]
    rows = []
    for row in found["results"].values():
        for kind, text in KINDS.items():
            times = row[kind]["seconds"]
            rows.append([row["net"], text, *(f"{times[size] / row[kind]['best']:.2f}" for size in (*sizes, "None"))])
    return markdown(["net", "", *sizes, "`None`"], rows)


def long_runs() -> str:
    """Return the peak memory of reverse mode over T, with and without recomputation."""
    found = results("long_runs")["results"]["memory"]
    rows = [
        [f"`{name}`", *(figure(value) for value in row["MiB"]), f"{row['exponent']:.2f}"]
        for name, row in found.items()
        if name != "T"
    ]
    return markdown(["MiB", *(f"T = {depth}" for depth in found["T"]), "exponent of T"], rows)


def figure(value: float) -> str:
    """Return a number to two digits or more."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def number(size: str) -> str:
    """Return an integer with its thousands apart."""
    return f"{int(size):,}"


def recomputation() -> str:
    """Return the seconds of reverse mode with and without recomputation, and of what is recomputed."""
    found = results("long_runs")["results"]["recomputation"]
    seconds = found["seconds"]
    whole, again = "ReverseUnroll()", "FirstOrder()"
    times = {f"`{name}`": seconds[name] for name in (whole, again)}
    times[f"`{whole}` and `{again}` together"] = seconds[whole] + seconds[again]
    times['`ReverseUnroll("sqrt")`'] = seconds['ReverseUnroll("sqrt")']
    rows = [[text, f"{value:.2f}", f"{value / seconds[whole]:.2f}"] for text, value in times.items()]
    return markdown([f"T = {found['T']}", "seconds", f"of `{whole}`"], rows)
