"""What the scripts of `benchmarks/peers/` have measured, and `compile_inner.py`."""

from typing import Any

from tables import markdown, results

OURS = "lightning_bilevel"
METHODS = {
    "reverse": "`ReverseUnroll()`",
    "reverse, checkpoints": '`ReverseUnroll(checkpoint="sqrt")`',
    "forward gradient, 1": "`ForwardGradient(1)`",
    "forward gradient, 4": "`ForwardGradient(4)`",
    "Neumann": "`ImplicitGradient(Neumann(10))`",
    "CG": "`ImplicitGradient(ConjugateGradient(10))`",
    "identity": "`ImplicitGradient(Identity())`",
}
CASES = {
    "mlp": "MLP, T = 20",
    "long": "MLP, T = 100",
    "adam": "MLP, Adam, T = 20",
    "cnn": "CNN, T = 20",
    "implicit": "MLP, T = 20",
}
STEPS = {
    "sinusoids": "MAML, 25 sinusoids × 5 steps",
    "images": "MAML, 4 tasks of images × 5 steps",
    "cleaning100": "cleaning, 20 steps, batches of 100",
    "cleaning1000": "cleaning, 20 steps, batches of 1,000",
    "forward100": "`ForwardGradient(16)`, 100 steps, batches of 100",
    "implicit": "`ImplicitGradient(Neumann(10))`, 1 step, 1,408 numbers",
}
PARTS = {
    "gradient": "inner gradient",
    "step": "the same and the update",
    "products": "Hessian and mixed product",
    "tangent": "tangent of the gradient",
}


def tables() -> dict[str, str]:
    """Return the tables of the page, and the one of compiled inner gradients."""
    cases = results("data_cleaning_speed")["results"]
    return {
        "peers_reverse": reverse(cases),
        "peers_implicit": implicit(cases["implicit"]["rows"]),
        "peers_ratios": ratios(cases),
        "peers_maml": maml(results("maml_speed")["results"]),
        "peers_maml_memory": maml_memory(results("cnn_maml_memory")["results"]),
        "peers_jax": in_jax(results("against_jax")["results"]),
        "peers_compile": compiled(results("compile_inner")["results"]),
    }


def reverse(cases: dict[str, Any]) -> str:
    """Return a row for each contender, with a column for each case but the implicit one."""
    found = {name: {named(row): row for row in cases[name]["rows"]} for name in CASES if name in cases}
    found.pop("implicit", None)
    names = dict.fromkeys(name for rows in found.values() for name, row in rows.items() if "cpu seconds" in row)
    cells = [[name, *(cell(rows.get(name, {})) for rows in found.values())] for name in names]
    return markdown(["CPU ms / peak MiB", *(CASES[name] for name in found)], cells)


def implicit(rows: list[dict[str, Any]]) -> str:
    """Return a row for each contender of the implicit methods."""
    return markdown(["", "CPU ms / peak MiB"], [[named(row), cell(row)] for row in rows if "cpu seconds" in row])


def named(row: dict[str, Any]) -> str:
    return METHODS[row["method"]] if row["library"] == OURS else f"{row['library']}, {row['method']}"


def cell(row: dict[str, Any]) -> str:
    return f"{1000 * row['cpu seconds']:.0f} / {row['MiB']:.0f}" if "cpu seconds" in row else ""


def ratios(cases: dict[str, Any]) -> str:
    """Return our time and memory over the best of the others, by case and method."""
    cells = []
    for name in CASES:
        for method, ratio in cases.get(name, {}).get("of the best other", {}).items():
            cells.append([f"{CASES[name]}: {METHODS[method]}", f"{ratio['cpu seconds']:.2f}", f"{ratio['MiB']:.2f}"])
    return markdown(["", "time", "memory"], cells)


def maml(found: dict[str, Any]) -> str:
    problems = {"sinusoids": "sinusoids", "images": "images"}
    names = [OURS, f"{OURS}, compiled", "higher", "TorchOpt", "learn2learn", "iteryne", "parallel-metalearn"]
    names = [name for name in names if name in found["sinusoids"]["cpu seconds"]]
    cells = []
    for problem, text in problems.items():
        seconds = found[problem]["cpu seconds"]
        cells.append([text, *(f"{1000 * seconds[name]:.1f}" if name in seconds else "" for name in names)])
    return markdown(["CPU ms of a meta-step", *names], cells)


def in_jax(found: dict[str, Any]) -> str:
    """Return our time of an outer step, eager and compiled, that of the fastest program in JAX, and an empty step's.

    The last columns have the seconds of the first step.
    """
    cells = []
    for name, text in STEPS.items():
        seconds = {row["contender"]: row["cpu seconds"] for row in found.get(name, {"rows": []})["rows"] if row["same"]}
        if not seconds:
            continue
        eager, compiled = seconds.pop(OURS), seconds.pop(f"{OURS}, compiled", None)
        fastest = min(seconds.values())
        ours = eager if compiled is None else compiled
        each = (eager, compiled, fastest, found[name]["Lightning alone"])
        numbers = ["" if value is None else milliseconds(1000 * value) for value in each]
        first = {row["contender"]: row["first"] for row in found[name]["rows"]}
        begun = [first.get(f"{OURS}, compiled"), first[min(seconds, key=seconds.__getitem__)]]
        took = ["" if value is None else f"{value:.1f}" for value in begun]
        cells.append([text, *numbers, f"{ours / fastest:.2f}", *took])
    names = ["eager", "`compile=True`", "JAX", "Lightning alone", "compiled / JAX", "first, s", "JAX, first, s"]
    return markdown(["CPU ms of an outer step", *names], cells)


def milliseconds(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def maml_memory(found: dict[str, Any]) -> str:
    steps = list(found)
    names = list(found[steps[0]]["rows"])
    cells = []
    for name in names:
        each = [found[step]["rows"][name] for step in steps]
        text = "`" + name.replace(f"{OURS}, ", "") + "`" if name.startswith(f"{OURS},") else name
        cells.append([text, *(f"{row['MiB']:.0f} / {1000 * row['cpu seconds']:.0f}" for row in each)])
    return markdown(["peak MiB / CPU ms", *(f"T = {step}" for step in steps)], cells)


def compiled(found: dict[str, Any]) -> str:
    cells = []
    for net in found.values():
        for part, text in PARTS.items():
            row = net[part]
            if "eager" not in row:
                continue
            eager, fast, once = row["eager"], row["compiled"], row["compile seconds"]
            again = once / (eager - fast) if fast < eager else float("inf")
            numbers = [f"{1000 * eager:.2f}", f"{1000 * fast:.2f}", f"{eager / fast:.1f}", f"{once:.0f}"]
            numbers += [f"{again:,.0f}", f"{row['difference']:.0e}"]
            cells.append([f"{net['text']}: {text}", *numbers])
    heads = ["", "eager, ms", "compiled, ms", "gain", "to compile, s", "calls until it pays", "difference"]
    return markdown(heads, cells)
