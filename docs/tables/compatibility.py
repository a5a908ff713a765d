"""`benchmarks/versions/compatibility.py`: which versions were run."""

from tables import markdown, results

HEADS = ("Python", "torch", "pytorch-lightning", "strategies", "`lightning.pytorch`")


def tables() -> dict[str, str]:
    """Return a row for each environment."""
    rows = []
    for row in results("compatibility")["results"]:
        said = row["strategies"].values()
        right = f"{sum(each == 'ok' for each in said)} of {len(said)}"
        versions = [row[name] for name in ("python", "torch", "pytorch-lightning")]
        rows.append([*versions, right, row["lightning"] or "not installed"])
    return {"compatibility": markdown(HEADS, rows)}
