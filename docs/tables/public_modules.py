"""`benchmarks/public_modules/public_modules.py`."""

from textwrap import fill
from typing import Any

from tables import markdown, results

WIDEST = 88

STRATEGIES = ["ReverseUnroll", "ForwardGradient", "PZOBO", "ImplicitGradient"]


def tables() -> dict[str, str]:
    """Return the modules with their agreement, the lines of each, why some did not run, and what the recipes gave."""
    found = results("public_modules")["results"]
    rows = list(found["rows"].values())
    heads = ["package", "module", "relative error", *(f"`{name}`" for name in STRATEGIES)]
    refusals = [
        f"- {row['package']}, {row['class']}, `{name}`: {said}"
        for row in rows
        for name, said in row["strategies"].items()
        if said != "ok"
    ]
    return {
        "public_modules": markdown(heads, [cells(row) for row in rows]),
        "public_modules_lines": "\n\n".join(map(lines, rows)),
        "public_modules_refusals": "\n".join(refusals) or "None.",
        **{f"recipe_{name}": f"```text\n{text}\n```" for name, text in found["recipes"].items()},
    }


def cells(row: dict[str, Any]) -> list[str]:
    agreement = row.get("agreement")
    error = f"{agreement['error']:.0e}{', float32' * (agreement['dtype'] == 'float32')}" if agreement else ""
    said = [row["strategies"][name].split(": ")[0] for name in STRATEGIES]
    return [f"{row['package']} {row['version']}", row["class"], error, *said]


def lines(row: dict[str, Any]) -> str:
    code = "\n".join(map(folded, row["lines"]))
    return f"{row['package']}, {row['class']}:\n\n```python\n{code}\n```"


def folded(line: str) -> str:
    """Return a call that is too long for the page with its arguments below it, and a fit on a line of its own."""
    if ").fit(" in line:
        made, _, fitted = line.partition(".fit(")
        return f"trainer = {made}\ntrainer.fit({fitted}"
    if len(line) <= WIDEST or not line.endswith(")"):
        return line
    call, _, arguments = line.partition("(")
    wrapped = fill(arguments[:-1], WIDEST, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return f"{call}(\n{wrapped}\n)"
