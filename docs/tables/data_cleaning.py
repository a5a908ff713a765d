"""`data_cleaning.py --strategy all`."""

from tables import markdown, results

KINDS = ("noisy", "validation only", "cleaned", "clean only")
HEADS = ("strategy", *(f"{kind} %" for kind in KINDS), "AUROC", "cosine", "seconds", "peak MiB")


def tables() -> dict[str, str]:
    """Return the table of all strategies."""
    rows = []
    for row in results("data_cleaning_all")["results"]:
        accuracy = [f"{100 * row['accuracy'][name]:.1f}" for name in KINDS]
        cosine = "" if row["cosine"] is None else f"{row['cosine']:.2f}"
        numbers = [f"{row['auroc']:.3f}", cosine, f"{row['seconds']:.0f}", f"{row['peak memory (MiB)']:.0f}"]
        rows.append([f"`{row['strategy']}`", *accuracy, *numbers])
    return {"data_cleaning": markdown(HEADS, rows)}
