"""MAML and ANIL: sinusoids, Omniglot, the γ-greedy table, larger backbones, speed."""

from statistics import mean

from tables import difference, interval, markdown, results


def tables() -> dict[str, str]:
    """Return the tables of the page on few-shot learning."""
    return {
        "few_shot_sinusoids": sinusoids(),
        "few_shot_omniglot": omniglot(),
        "few_shot_gamma_greedy": gamma_greedy(),
        "few_shot_images": images(),
        "few_shot_backbone": backbone(),
        "few_shot_estimates": estimates(),
        "few_shot_speed": speed(),
    }


def sinusoids() -> str:
    found = results("sinusoid_maml")["results"]
    baselines = results("few_shot_baselines")["results"]["sinusoids"].values()
    process = [run["Gaussian process"]["score"] for run in baselines]
    errors = {name: [run[name] for run in found["runs"]] for name in ("MAML", "pretrained")}
    errors["Gaussian process, no steps"] = [[error] * len(found["steps"]) for error in process]
    last = [run[-1] for run in errors["MAML"]]
    rows = []
    for name, runs in errors.items():
        against = "" if name == "MAML" else difference([run[-1] for run in runs], last, 2)
        rows.append([name, *(interval(each, 2) for each in zip(*runs, strict=True)), against])
    heads = [f"{steps} step{'' if steps == 1 else 's'}" for steps in found["steps"]]
    return markdown([f"squared error after, {len(last)} seeds", *heads, "10 steps minus MAML"], rows)


def omniglot() -> str:
    rows = []
    for name, run in results("omniglot")["results"].items():
        points = zip(*(run["curve"][key] for key in ("steps", "mean", "95%")), strict=True)
        shown = {steps: f"{100 * value:.2f} ± {100 * half:.2f}" for steps, value, half in points}
        minutes = [f"{run['seconds'] / 60:.0f}", f"{run['cpu seconds'] / 60:.0f}"]
        setting = [f"{run['steps']} × {run['tasks']}", *minutes]
        rows.append([name, shown[1], shown[5], *setting])
        if other := run.get("curve at 5 shots"):
            shown = {s: f"{100 * v:.2f} ± {100 * h:.2f}" for s, v, h in zip(*other.values(), strict=True)}
            rows.append([f"{name}, tested at 5 shots", shown[1], shown[5], *setting])
    for name, row in results("few_shot_baselines")["results"]["28x28"]["0"].items():
        if "pixels" not in name or "nearest" in name:  # of the pixels one head is enough
            score = f"{100 * row['score']:.2f} ± {100 * row['95%']:.2f}"
            rows.append([f"{name}, no steps", score, score, "", "", f"{row['CPU seconds'] / 60:.0f}"])
    heads = ["5-way, one seed", "% after 1 step", "% after 5 steps", "meta-steps × tasks", "minutes", "CPU minutes"]
    return markdown(heads, rows)


def backbone() -> str:
    found = results("pzobo_backbone")
    goals = [str(goal) for goal in found["settings"]["goals"]]
    rows = []
    for name, run in found["results"]["race"].items():
        reached = [run["cpu seconds to reach"][goal] for goal in goals]
        times = ["not reached" if seconds is None else f"{seconds:.0f} s" for seconds in reached]
        rows.append([name, f"{run['cpu seconds per meta-step']:.2f} s", *times, f"{100 * run['curve'][-1][1]:.1f}"])
    return markdown(["method", "a meta-step", *(f"to {float(goal):.0%}" for goal in goals), "% at the end"], rows)


def estimates() -> str:
    found = dict(results("pzobo_backbone")["results"]["first estimates"])
    size = found.pop("outer parameters")
    rows = [[name, f"{row['cosine']:.3f}", f"{row['norm ratio']:.1f}"] for name, row in found.items()]
    return markdown([f"{size:,} outer parameters", "cosine with the exact gradient", "length over the exact"], rows)


def gamma_greedy() -> str:
    rows = []
    for data, settings in results("gamma_greedy_table")["results"].items():
        for ways, methods in sorted(settings.items()):
            for method, runs in methods.items():
                accuracy = [100 * run["accuracy"] for run in runs.values()]
                pairs = [100 * (run["accuracy"] - methods["FO"][seed]["accuracy"]) for seed, run in runs.items()]
                seconds = mean(run["cpu seconds"] for run in runs.values())
                against = "" if method == "FO" else interval(pairs, 2)
                spread = interval(accuracy, 2)
                rows.append([f"{data}, {ways}", method, spread, against, str(len(runs)), f"{seconds:.0f}"])
    heads = ["data", "method", "accuracy %", "minus that of FO, by seed", "seeds", "CPU seconds"]
    return markdown(heads, rows)


def of_images(name: str = "digits", ways: str = "5-way") -> dict[str, list[dict[str, float]]]:
    """Return accuracy and seconds of learned features and of what needs no outer level, seed by seed."""
    learned = results("gamma_greedy_table")["results"][name][ways]
    others = results("few_shot_baselines")["results"][name]
    found = {
        f"features by {method}": [
            {"score": learned[key][seed]["accuracy"], "CPU seconds": learned[key][seed]["cpu seconds"]}
            for seed in others
        ]
        for method, key in (("`ReverseUnroll`", "reverse"), ("`FirstOrder`", "FO"))
    }
    return found | {name: [run[name] for run in others.values()] for name in next(iter(others.values()))}


def images() -> str:
    heads, columns = ["5-way, 10 shots"], []
    for data in (name for name in ("digits", "omniglot") if name in results("few_shot_baselines")["results"]):
        accuracy = {name: [100 * run["score"] for run in runs] for name, runs in of_images(data).items()}
        ours = next(iter(accuracy.values()))
        heads += [f"{data}, % ({len(ours)} seeds)", "first row minus it"]
        columns.append(
            {
                name: [interval(values, 2), "" if values is ours else difference(ours, values, 2)]
                for name, values in accuracy.items()
            }
        )
    return markdown(heads, [[name, *(cell for column in columns for cell in column[name])] for name in columns[0]])


def speed() -> str:
    found = results("maml_speed")["results"]
    names = list(found["images"]["cpu seconds"])
    rows = []
    for name in names:
        cells = [found[problem]["cpu seconds"].get(name) for problem in ("sinusoids", "images")]
        rows.append([name, *("" if seconds is None else f"{1000 * seconds:.1f}" for seconds in cells)])
    return markdown(["CPU milliseconds per meta-step", "sinusoids, 25 tasks", "images, 4 tasks"], rows)
