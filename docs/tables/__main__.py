"""``cd docs && python -m tables`` writes the tables of the reports in ``benchmarks/results/`` anew."""

from tables import RESULTS, filled

for report in sorted(RESULTS.glob("*.md")):
    report.write_text(filled(report.read_text()))
