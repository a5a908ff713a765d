"""`benchmarks/cost/scaling.py`: measured and foreseen seconds, and what the model says of many processes."""

from tables import markdown, results


def tables() -> dict[str, str]:
    """Return the measurements, the constants and the predictions."""
    found = results("scaling")["results"]
    measured = []
    for row in found["rows"]:
        if row["b"]:
            error = row["model"] / row["seconds"] - 1
            seconds = [f"{row['seconds']:.3f}", f"{row['model']:.3f}", f"{100 * error:+.0f}%"]
            measured.append([str(row["R"]), str(row["b"]), str(row["T"]), *seconds, str(row["bytes"])])
    constants = found["constants"]
    plain = constants["plain step"]
    units = [
        ["α, per chunk", f"{1e3 * constants['alpha']:.2f}", f"{constants['alpha'] / plain:.2f}"],
        ["β, per direction", f"{1e3 * constants['beta']:.2f}", f"{constants['beta'] / plain:.2f}"],
        ["a plain inner step", f"{1e3 * plain:.2f}", "1"],
    ]
    predicted = [
        [str(row["b"]), str(row["R"]), f"{row['times faster']:.1f}", f"{100 * row['efficiency']:.0f}%"]
        for row in found["predictions"]
    ]
    return {
        "scaling": markdown(["processes R", "b", "T", "seconds", "model", "error", "bytes per process"], measured),
        "scaling_constants": markdown(["", "milliseconds per inner step", "plain inner steps"], units),
        "scaling_predictions": markdown(["b", "processes R", "times faster", "efficiency"], predicted),
    }
