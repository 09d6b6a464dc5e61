"""`mdnorm.metrics.distance_correlation_sqr` beside `dcor.u_distance_correlation_sqr`.

Medians, interleaved in one process with a fixed number of threads. dcor builds many n × n matrices in
float64: it is left out where those would not fit into the memory allowed for it.

    python benchmarks/distance_correlation.py --n 1000 2000
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import dcor
import numpy as np
import torch

from mdnorm.metrics import distance_correlation_sqr

DCOR_MATRICES = 80  # dcor 0.7 at n = 4000 was seen to use 10.6 GB, that is 83 matrices of n × n × 8 bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--p", type=int, default=84, help="columns of x; y has one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=8, help="memory allowed for dcor")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = np.random.default_rng(0)
    rows = []
    print(f"p = {arguments.p}, float64, {arguments.threads} thread(s)")
    print(f"{'n':>8}{'mdnorm s':>12}{'dcor s':>12}{'ratio':>10}{'difference':>14}")
    for n in arguments.n:
        x = generator.normal(size=(n, arguments.p))
        y = x[:, 0] + generator.normal(size=n)
        functions = {"mdnorm": distance_correlation_sqr}
        if DCOR_MATRICES * 8 * n**2 <= 1e9 * arguments.gigabytes:
            functions["dcor"] = dcor.u_distance_correlation_sqr
        values, times = {}, {name: [] for name in functions}
        for repeat in range(arguments.repeats + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                values[name] = float(function(x, y))
                if repeat:
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(measured) for name, measured in times.items()}
        rows.append(
            {"n": n, "p": arguments.p, "threads": arguments.threads, "seconds": medians, "value": values}
        )
        line = f"{n:>8}{medians['mdnorm']:>12.4f}"
        if "dcor" in medians:
            line += f"{medians['dcor']:>12.3f}{medians['dcor'] / medians['mdnorm']:>9.1f}×"
            line += f"{abs(values['dcor'] - values['mdnorm']):>14.1e}"
        print(line, flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
