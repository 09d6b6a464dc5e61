"""Time and memory of `mdnorm.metrics.distance_correlation_sqr` against `dcor`.

Times are taken in one process in which the contenders take turns, so that a change in the load of the
machine meets all of them. The peak of memory beyond the inputs is that of one call in a process of its own.
"scipy" is the same statistic from two full distance matrices of `scipy.spatial.distance.cdist`: what `dcor`
would cost if it took its own fast path for distances (version 0.7 does not recognise numpy arrays there).

    python benchmarks/distance_correlation.py --case 1000,84,1 4000,84,1 --max-gib 14 --json times.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
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
MIB = 2**20

# From here on the contenders with full matrices are left out for scalars, and `dcor` sorts.
MIN_SAMPLES_SORTED = 5000

DEFAULT_CASES = (
    "200,84,1", "1000,84,1", "4000,84,1", "1000,1,1", "10000,1,1", "100000,1,1", "1000000,1,1",
)  # fmt: skip


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


def dcor_with(method: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda x, y: float(dcor.u_distance_correlation_sqr(x, y, method=method))


CONTENDERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mdnorm": distance_correlation_sqr,
    "dcor": dcor_with("auto"),
    "dcor mergesort": dcor_with("mergesort"),
    "dcor avl": dcor_with("avl"),
    "scipy": full_matrices,
}


def needed_bytes(n: int, p: int, q: int) -> dict[str, int]:
    """Return the memory that the contenders of a case need, roughly."""
    full = n * n * FLOAT_BYTES
    if p == q == 1 and n >= MIN_SAMPLES_SORTED:
        return {"mdnorm": 0, "dcor mergesort": 0, "dcor avl": 0}
    # dcor keeps the n² differences of all p columns.
    return {"mdnorm": 0, "dcor": n if p == q == 1 else full * max(p, q, 2), "scipy": 2 * full}


def samples(n: int, p: int, q: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, p))
    y = x[:, :1] ** 2 + rng.standard_normal((n, q))
    return x, y


def warm_up(name: str, p: int, q: int) -> None:
    """Compile what is compiled, start threads."""
    CONTENDERS[name](*samples(2000 if name == "mdnorm" else 60, p, q))


def print_peak_memory(name: str, n: int, p: int, q: int) -> None:
    """Print the bytes by which one call raises the peak of this process's memory."""
    warm_up(name, p, q)
    x, y = samples(n, p, q)
    # The peak is reset to the present use, so that making the inputs does not count.
    before = reset_peak()
    CONTENDERS[name](x, y)
    print(peak() - before)


def reset_peak() -> int:
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(name: str, n: int, p: int, q: int, threads: int) -> int:
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(threads),
        "--peak-of",
        name,
        "--case",
        f"{n},{p},{q}",
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(n: int, p: int, q: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every contender that fits in memory on one data set."""
    x, y = samples(n, p, q)
    names, skipped = [], {}
    for name, needed in needed_bytes(n, p, q).items():
        if needed > arguments.max_gib * GIB:
            skipped[name] = f"needs {needed / GIB:.1f} GiB"
        else:
            names.append(name)
            warm_up(name, p, q)

    values: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            if seconds[name] and seconds[name][-1] > arguments.once_above:
                continue
            start = time.perf_counter()
            values[name] = float(CONTENDERS[name](x, y))
            seconds[name].append(time.perf_counter() - start)
    del x, y
    return {
        "n": n,
        "p": p,
        "q": q,
        "values": values,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "peak_bytes": {name: peak_memory(name, n, p, q, arguments.threads) for name in names},
        "skipped": skipped,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", nargs="+", default=DEFAULT_CASES, metavar="N,P,Q", help="samples, columns of x and of y"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, after one untimed")
    parser.add_argument(
        "--once-above", type=float, default=10.0, help="do not repeat what took longer than this, in seconds"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--max-gib", type=float, default=4.0, help="skip what needs more memory than this")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the measurements to this file")
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.case = [tuple(map(int, case.split(","))) for case in arguments.case]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    # dcor and the numba it compiles with warn of their own deprecations.
    warnings.simplefilter("ignore", DeprecationWarning)
    if arguments.peak_of:
        print_peak_memory(arguments.peak_of, *arguments.case[0])
        return

    print(f"torch threads: {arguments.threads}, median of up to {arguments.repeats} runs")
    print(f"{'':34} {'':>11} {'mdnorm is':>11} {'MiB beyond':>11} {'difference':>11}")
    headings = f"{'ms':>11} {'faster by':>11} {'the inputs':>11} {'from mdnorm':>11}"
    print(f"{'n':>8} {'p':>4} {'q':>3}  {'':15} {headings}")
    results = []
    for n, p, q in arguments.case:
        result = measure(n, p, q, arguments)
        results.append(result)
        medians, values = result["median_seconds"], result["values"]
        for name, median in medians.items():
            print(
                f"{n:8d} {p:4d} {q:3d}  {name:15} {1e3 * median:11.2f} {median / medians['mdnorm']:10.1f}x "
                f"{result['peak_bytes'][name] / MIB:11.1f} {abs(values[name] - values['mdnorm']):11.1e}",
                flush=True,
            )
        for name, reason in result["skipped"].items():
            print(f"{n:8d} {p:4d} {q:3d}  {name:15} {reason}", flush=True)

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
