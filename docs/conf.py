"""Sphinx configuration; `make docs` builds with warnings as errors."""

import json
from pathlib import Path

import lightning_bilevel
from lightning_bilevel.strategies import table

project = "lightning_bilevel"
author = "The lightning_bilevel authors"
release = lightning_bilevel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = "lightning_bilevel"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # names that two public modules re-export

# The table of strategies is what the classes say about themselves.
generated = Path(__file__).parent / "_generated"
generated.mkdir(exist_ok=True)
(generated / "strategies.md").write_text(table.markdown() + "\n")


def cleaning_table(results: list[dict]) -> str:
    """Return the results of `data_cleaning.py --strategy all` as a table."""
    kinds = ("noisy", "validation only", "cleaned", "clean only")
    heads = ["strategy", *(f"{kind} %" for kind in kinds), "AUROC", "cosine", "seconds", "peak MiB"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in results:
        accuracy = [f"{100 * row['accuracy'][name]:.1f}" for name in kinds]
        cosine = "" if row["cosine"] is None else f"{row['cosine']:.2f}"
        numbers = [f"{row['auroc']:.3f}", cosine, f"{row['seconds']:.0f}", f"{row['peak memory (MiB)']:.0f}"]
        lines.append([f"`{row['strategy']}`", *accuracy, *numbers])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


measured = Path(__file__).parents[1] / "benchmarks" / "results" / "data_cleaning_all.json"
(generated / "data_cleaning.md").write_text(cleaning_table(json.loads(measured.read_text())["results"]) + "\n")
