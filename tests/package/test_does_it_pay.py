"""The page that says what wins: its table is that of the results, and its verdicts are those of a t-test."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("tables.does_it_pay")


def test_each_verdict_is_that_of_a_paired_test(table: Any) -> None:
    for case in table.cases():
        others = case.others[case.strongest]
        assert len(case.ours) == len(others) > 2
        found = stats.ttest_rel(case.ours, others)
        better = (found.statistic > 0) == case.larger_is_better
        expected = "neither" if found.pvalue > 0.05 else "bilevel" if better else "the baseline"
        assert case.winner == expected, case.problem


def test_the_strongest_baseline_is_the_best_of_all(table: Any) -> None:
    for case in table.cases():
        sign = 1 if case.larger_is_better else -1
        means = {name: sign * sum(values) / len(values) for name, values in case.others.items()}
        assert means[case.strongest] == max(means.values()), case.problem


def test_a_baseline_is_beaten_where_a_paired_test_says_so(table: Any) -> None:
    module = importlib.import_module("tables.cleaning_baselines")
    for setting, seeds in module.results("cleaning_baselines")["results"].items():
        runs = module.accuracies(seeds)
        for ours in module.LEARNED:
            found = {
                name
                for name in set(runs) - {*module.LEARNED, module.CEILING}
                if stats.ttest_rel(runs[ours], runs[name], alternative="greater").pvalue < 0.025
            }
            assert set(module.beaten(runs, ours)) == found, (setting, ours)


def test_every_problem_is_in_the_table(table: Any) -> None:
    (text,) = table.tables().values()
    assert all(f"| {case.problem} |" in text for case in table.cases())
    assert text.count("\n") == len(table.cases()) + 1


def test_numbers_of_outer_variables_are_those_of_the_modules(table: Any) -> None:
    from cleaning.weights import WeightNet
    from few_shot.nets import mlp
    from learned_start import LearnedStart

    sizes = {case.problem: case.sizes.split(", T")[0].replace(",", "") for case in table.cases()}
    counted = {
        "drawing a digit in 3 steps": sum(each.numel() for each in LearnedStart().outer_parameters()),
        "sinusoids, 10 points": sum(each.numel() for each in mlp().parameters()),
        "cleaning: 60% of them any other, 50 trusted": sum(each.numel() for each in WeightNet().parameters()),
    }
    assert {name: sizes[name] for name in counted} == {name: str(count) for name, count in counted.items()}
