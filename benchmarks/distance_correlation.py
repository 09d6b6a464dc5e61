"""Time and memory of `mdnorm.metrics.distance_correlation_sqr` against `dcor`, in one process.

The contenders take turns, so that a change in the load of the machine meets all of them. "scipy" is the same
statistic from two full distance matrices of `scipy.spatial.distance.cdist`: what `dcor` would cost if it took
its own fast path for distances (version 0.7 does not recognise numpy arrays there).

    python benchmarks/distance_correlation.py --n 200 1000 4000 --p 84 --json times.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcor
import numpy as np
import scipy
import torch
from scipy.spatial.distance import cdist

from mdnorm.metrics import distance_correlation_sqr

FLOAT_BYTES = 8
GIB = 2**30


def full_matrices(x: np.ndarray, y: np.ndarray) -> float:
    """Return the statistic by its definition."""

    def centred(rows: np.ndarray) -> np.ndarray:
        n = len(rows)
        distances = cdist(rows, rows)
        sums = distances.sum(axis=0)
        distances -= sums / (n - 2)
        distances -= sums[:, None] / (n - 2)
        distances += sums.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(distances, 0)
        return distances.ravel()

    a, b = centred(x), centred(y)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def bytes_of_dcor(n: int, p: int, q: int) -> int:
    """Return the memory `dcor` needs: it keeps n² differences of p columns, and their squares."""
    return (n if p == q == 1 else 2 * n * n * max(p, q)) * FLOAT_BYTES


def bytes_of_full_matrices(n: int) -> int:
    """Return the memory of two distance matrices."""
    return 2 * n * n * FLOAT_BYTES


def measure(n: int, p: int, q: int, repeats: int, max_bytes: float) -> dict[str, Any]:
    """Time every contender that fits in `max_bytes` on one data set."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, p))
    y = x[:, :1] ** 2 + rng.standard_normal((n, q))
    contenders: dict[str, Callable[[], float]] = {"mdnorm": lambda: distance_correlation_sqr(x, y)}
    skipped = {}
    for name, needed, function in (
        ("dcor", bytes_of_dcor(n, p, q), lambda: float(dcor.u_distance_correlation_sqr(x, y))),
        ("scipy", bytes_of_full_matrices(n), lambda: full_matrices(x, y)),
    ):
        if needed > max_bytes:
            skipped[name] = f"needs {needed / GIB:.1f} GiB"
        else:
            contenders[name] = function

    values = {name: function() for name, function in contenders.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {
        "n": n,
        "p": p,
        "q": q,
        "values": values,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "skipped": skipped,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[200, 1000, 4000], help="numbers of samples")
    parser.add_argument("--p", type=int, nargs="+", default=[1, 84], help="numbers of columns of x")
    parser.add_argument("--q", type=int, default=1, help="number of columns of y")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, after one untimed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--max-gib", type=float, default=4.0, help="skip what needs more memory than this")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the measurements to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # dcor and the numba it compiles with warn of their own deprecations.
    warnings.simplefilter("ignore", DeprecationWarning)

    print(f"torch threads: {arguments.threads}, median of {arguments.repeats} runs, in ms")
    print(f"{'n':>7} {'p':>5} {'q':>3} {'mdnorm':>10} {'dcor':>19} {'scipy':>19} {'difference':>11}")
    results = []
    for n in arguments.n:
        for p in arguments.p:
            result = measure(n, p, arguments.q, arguments.repeats, arguments.max_gib * GIB)
            results.append(result)
            medians, values = result["median_seconds"], result["values"]
            cells = [f"{1e3 * medians['mdnorm']:10.2f}"]
            for name in ("dcor", "scipy"):
                if name in medians:
                    ratio = medians[name] / medians["mdnorm"]
                    cells.append(f"{1e3 * medians[name]:10.2f} {f'({ratio:.1f}x)':>8}")
                else:
                    cells.append(f"{result['skipped'][name]:>19}")
            others = [abs(value - values["mdnorm"]) for name, value in values.items() if name != "mdnorm"]
            cells.append(f"{max(others):11.1e}" if others else f"{'':>11}")
            print(f"{n:7d} {p:5d} {arguments.q:3d}", *cells, flush=True)
    print("(…x): time in units of mdnorm's; difference: largest of a result from mdnorm's")

    if arguments.json is not None:
        report = {
            "benchmark": "distance_correlation",
            "threads": arguments.threads,
            "cpu_count": os.cpu_count(),
            "machine": platform.machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "scipy": scipy.__version__,
                "dcor": dcor.__version__,
            },
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
