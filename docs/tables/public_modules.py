"""`benchmarks/public_modules/public_modules.py`."""

from typing import Any

from tables import markdown, results

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
    return f"{row['package']}, {row['class']}:\n\n```python\n" + "\n".join(row["lines"]) + "\n```"
