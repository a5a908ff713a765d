"""What estimates cost and how good they are: `data_cleaning.py --strategy all`, `guided_error.py`, `remembering.py`,
`wider_memories.py`."""

from __future__ import annotations

from tables import markdown, results

NAMES = {
    "reverse": "`ReverseUnroll()`",
    "checkpointed": '`ReverseUnroll(checkpoint="sqrt")`',
    "truncated": "`TruncatedReverse(5)`",
    "gamma-greedy": "`GammaGreedy(0.99)`",
    "first-order": "`FirstOrder()`",
    "neumann": "`ImplicitGradient(Neumann(20, step_size=0.5))`",
    "cg": "`ImplicitGradient(ConjugateGradient(10, damping=0.1))`",
    "nystrom": "`ImplicitGradient(Nystrom(10, rho=0.1))`",
    "identity": "`ImplicitGradient(Identity())`",
    "guided": "`ForwardGradient(8, guide=TruncatedReverse(5))`",
    "forward": "`ForwardGradient(32)`",
    "pzobo": "`PZOBO(32)`",
    "zeroth-order": "`ZerothOrder(32)`",
}
DIRECTIONS = 16
IN_TIME = "outer loss, equal seconds"


def tables() -> dict[str, str]:
    """Return the tables of costs, of guides, and of what guides and memories are worth."""
    rows = {row["strategy"]: row for row in results("data_cleaning_all")["results"]}
    costs = [
        [
            text,
            f"{rows[name]['seconds'] / rows['reverse']['seconds']:.1f}",
            "" if rows[name]["cosine"] is None else f"{rows[name]['cosine']:.2f}",
            f"{rows[name]['auroc']:.3f}",
        ]
        for name, text in NAMES.items()
    ]
    found = results("guided_error")["results"]
    number = found["b"].index(DIRECTIONS)
    guides = [
        [
            "none" if name == "no guide" else f"`{name}`",
            f"{each['cosine']:.2f}",
            f"{each['errors'][number]['measured']:.0f}",
        ]
        for name, each in found.items()
        if isinstance(each, dict)
    ]
    return {
        "choosing_costs": markdown(["strategy", "time", "cosine", "AUROC"], costs),
        "choosing_guides": markdown(["guide", "its cosine", "squared error"], guides),
        "choosing_memory": memories(),
        "choosing_wider": wider(),
    }


def memories() -> str:
    """Return outer losses by problem and outer optimizer, and cosines, at equal directions and in equal time."""
    rows = []
    for problem, found in results("remembering")["results"].items():
        guide = next(name.removesuffix(" and memory") for name in found["seconds"] if name.endswith(" and memory"))
        names = ("plain", "memory", guide, f"{guide} and memory")
        for optimizer in ("Adam", "SGD", "momentum"):
            for rate, each in found.get(optimizer, {}).items():
                losses = {name: f"{each[name]['outer loss']['mean']:.3f}" for name in ("exact", *names)}
                cells = [f"{losses[name]} ({each[name]['cosine']['mean']:.2f})" for name in names]
                in_time = f"{each[names[-1]][IN_TIME]['mean']:.3f}"
                rows.append([problem, f"{optimizer} {rate}", losses["exact"], *cells, in_time])
    return markdown(["problem", "outer optimizer", "exact", "plain", "memory", "guide", "both", "both, in time"], rows)


def wider() -> str:
    """Return the cosines with more than one vector of memory."""
    found = results("wider_memories")["results"]
    rows = [
        [name, *(f"{each[name]['mean']:.3f} ± {each[name]['half_width']:.3f}" for each in found.values())]
        for name in next(iter(found.values()))
    ]
    return markdown(["what is known", *found], rows)
