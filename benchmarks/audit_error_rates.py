"""How often an audit is wrong, by simulation: false alarms, coverage of intervals, power.

    python benchmarks/audit_error_rates.py --pages 40 --repeats 300

prints the table of docs/audit.md (ten minutes on one core).
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import mdnorm
from mdnorm.auditing import Settings
from mdnorm.metrics import (
    conditional_independence_test,
    distance_correlation_interval,
    group_gaps,
    probe,
)

SETTINGS = Settings(num_permutations=100, num_bootstrap=0)


def pages(num_pages: int, num_rows: int, num_columns: int, effect: float) -> dict[str, float]:
    """Share of pages whose first column, which features know by `effect`, or any other one is found."""
    found = {"first": 0, "others": 0, "first not found": 0}
    for seed in range(num_pages):
        rng = np.random.default_rng(seed)
        columns = rng.standard_normal((num_columns, num_rows))
        features = rng.standard_normal((num_rows, 5))
        features[:, 0] += effect * columns[0]
        table = {str(index): values for index, values in enumerate(columns)}
        report = mdnorm.audit(features, table, settings=SETTINGS)
        levels = {finding.column: finding.level for finding in report.findings}
        found["first"] += levels["0"] in ("strong", "weak")
        found["first not found"] += levels["0"] == "none"
        found["others"] += any(levels[name] in ("strong", "weak") for name in table if name != "0")
    return {name: count / num_pages for name, count in found.items()}


def dependence_coverage(num_rows: int, correlation: float, repeats: int) -> float:
    """Coverage of 95 % intervals of dcor² of two normal variables (theorem 7 of Székely et al. 2007)."""
    r = correlation
    value = r * math.asin(r) + math.sqrt(1 - r**2) - r * math.asin(r / 2) - math.sqrt(4 - r**2) + 1
    value /= 1 + math.pi / 3 - math.sqrt(3)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(repeats):
        x, noise = rng.standard_normal((2, num_rows))
        interval = distance_correlation_interval(x, r * x + math.sqrt(1 - r**2) * noise)
        covered += interval.lower <= value <= interval.upper
    return covered / repeats


def gap_coverage(group_rows: int, repeats: int) -> float:
    """Share of samples of three groups in which all three intervals have the true difference in them."""
    accuracy = np.array([0.95, 0.8, 0.8])
    group = np.repeat(np.arange(3), group_rows)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(repeats):
        y = rng.integers(0, 2, group.size)
        y[:2] = 0, 1
        predicted = np.where(rng.random(group.size) < accuracy[group], y, 1 - y)
        pairs = group_gaps(y, predicted, group, min_group_rows=1, num_bootstrap=0).pairs["accuracy"]
        covered += all(
            pair.low <= accuracy[pair.higher] - accuracy[pair.lower] <= pair.high for pair in pairs
        )
    return covered / repeats


def probe_coverage(effect: float, repeats: int) -> tuple[float, float]:
    """Coverage of the intervals of R² and balanced accuracy of 100 rows, of the mean score."""
    rng = np.random.default_rng(0)
    results = []
    for classes in (False, True):
        scores = []
        for _ in range(repeats):
            x = rng.standard_normal((100, 2))
            y = effect * x[:, 0] + rng.standard_normal(100)
            scores.append(probe(x, y > 0 if classes else y, num_permutations=0).scored)
        mean = float(np.mean([score.value for score in scores]))
        inside = [
            score.low <= mean <= score.high
            for score in scores
            if score.low is not None and score.high is not None
        ]
        results.append(float(np.mean(inside)))
    return results[0], results[1]


def conditional_alarms(repeats: int) -> dict[str, float]:
    """False alarms at 5 % of the test given a continuous variable, and its power, 200 rows."""
    rng = np.random.default_rng(0)
    alarms = {"z² + noise twice": 0, "spread depends on z": 0, "x is in y": 0}
    for seed in range(repeats):
        z, a, b = rng.standard_normal((3, 200))
        for name, (x, y) in {
            "z² + noise twice": (z**2 + a, z**2 + b),
            "spread depends on z": (np.exp(z) * a, np.exp(z) * b),
            "x is in y": (z**2 + a, z**2 + 0.3 * a + b),
        }.items():
            alarms[name] += (
                conditional_independence_test(x, y, z, num_permutations=99, seed=seed).p_value < 0.05
            )
    return {name: count / repeats for name, count in alarms.items()}


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    print("given a continuous variable:", conditional_alarms(options.repeats), flush=True)
    for num_rows in (10, 20, 50, 200):
        coverage = [dependence_coverage(num_rows, r, options.repeats) for r in (0.1, 0.3, 0.5, 0.8)]
        print(f"dcor², {num_rows} rows, correlation 0.1, 0.3, 0.5, 0.8:", coverage, flush=True)
    for group_rows in (10, 20, 100):
        print(f"gaps, groups of {group_rows}:", gap_coverage(group_rows, options.repeats), flush=True)
    for effect in (0.3, 0.6, 1.0):
        print(f"probe, effect {effect} (R², accuracy):", probe_coverage(effect, options.repeats), flush=True)
    for num_columns, num_rows, effect in ((1, 100, 0.0), (10, 100, 0.0), (10, 100, 0.5), (1, 1000, 0.0)):
        count = options.pages if num_rows < 1000 else max(1, options.pages // 4)
        result = pages(count, num_rows, num_columns, effect)
        print(f"pages of {num_columns} columns, {num_rows} rows, effect {effect}:", result, flush=True)


if __name__ == "__main__":
    main()
