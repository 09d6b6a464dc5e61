"""Forward and backward of `MetadataNorm` beside BatchNorm and the textbook form.

Ratios of medians on the same tensor, interleaved in one process with a fixed number of threads; absolute
times on a shared machine mean little. Memory is what one step allocates: output, gradient, everything in
between. Last, the recursive estimator beside its published form with an N×N inverse.

    python benchmarks/layer.py --quick
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdnorm import MetadataNorm, fit_gram
from mdnorm.estimators import ESTIMATORS

Step = Callable[[Tensor], Tensor]


def textbook(metadata: Tensor, labels: Tensor) -> Step:
    """The paper's formula written down: two products, temporaries of the features' size, autograd."""
    design = torch.cat([labels, metadata, torch.ones(len(metadata), 1)], 1)
    inverse = torch.linalg.inv(design.T @ design / len(design))
    width = labels.shape[1]

    def step(features: Tensor) -> Tensor:
        coefficients = inverse @ (design.T @ features / len(features))
        effect = design[:, width:] @ coefficients[width:]
        return features - effect

    return step


def layer(estimator: str, features: Tensor, metadata: Tensor, labels: Tensor) -> Step:
    module = MetadataNorm(features.shape[1], metadata.shape[1], labels.shape[1], estimator=estimator)
    fit_gram(module, metadata, labels)
    return lambda x: module(x, metadata, labels)


def time_once(step: Step, features: Tensor, gradient: Tensor) -> float:
    start = time.perf_counter()
    step(features).backward(gradient)
    elapsed = time.perf_counter() - start
    features.grad = None
    return elapsed


class AllocationCounter(TorchDispatchMode):
    """Adds up the bytes of every new tensor that an operation returns (not views, not in-place results)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        known = {x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.bytes += x.untyped_storage().nbytes()
        return out


def allocated_over(step: Callable[[], object]) -> int:
    """Bytes allocated over one step: outputs, gradients, and everything in between."""
    with AllocationCounter() as counter:
        step()
    return counter.bytes


def measure(n: int, d: int, k: int, estimators: Sequence[str], budget: float, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator).requires_grad_()
    gradient = torch.randn(n, d, generator=generator)
    metadata = torch.randn(n, k - 2, generator=generator)
    labels = torch.rand(n, 1, generator=generator).round()
    steps: dict[str, Step] = {
        "batchnorm": nn.BatchNorm1d(d, affine=False),
        **{estimator: layer(estimator, features, metadata, labels) for estimator in estimators},
        "textbook": textbook(metadata, labels),
    }
    memory = {}
    for name, step in steps.items():
        memory[name] = allocated_over(lambda step=step: step(features).backward(gradient))
        features.grad = None
    for step in steps.values():
        time_once(step, features, gradient)
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    # In turns, each round in another order: what else the machine does meets all alike.
    names = list(steps)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(time_once(steps[name], features, gradient))
        if repeat >= 4 and time.perf_counter() - start > budget:
            break
    return {
        "n": n,
        "d": d,
        "k": k,
        "rounds": len(times["batchnorm"]),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "allocated_bytes": memory,
    }


def recursion_by_samples(design: Tensor, features: Tensor) -> Callable[[], None]:
    """The published recursion (R-MDN, arXiv:2507.09031): the matrix inversion lemma with an N×N inverse."""
    covariance = 1e4 * torch.eye(design.shape[1])
    coefficients = torch.zeros(design.shape[1], features.shape[1])
    identity = torch.eye(len(design))

    def step() -> None:
        nonlocal covariance
        left = covariance @ design.T
        gain = left @ torch.linalg.inv(identity + design @ left)
        coefficients.add_(gain @ (features - design @ coefficients))
        covariance = covariance - gain @ design @ covariance

    return step


def measure_recursion(n: int, d: int, k: int, rounds: int) -> dict[str, Any]:
    """A training forward of the recursive estimator beside the update by samples and its removal."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator)
    metadata = torch.randn(n, k - 2, generator=generator)
    labels = torch.rand(n, 1, generator=generator).round()
    by_columns = layer("recursive", features, metadata, labels)
    by_samples = recursion_by_samples(torch.cat([metadata, labels, torch.ones(n, 1)], 1), features)
    times: dict[str, list[float]] = {"by_columns": [], "by_samples": []}
    for repeat in range(rounds + 1):
        for name, step in (("by_columns", lambda: by_columns(features)), ("by_samples", by_samples)):
            start = time.perf_counter()
            step()
            if repeat:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {"n": n, "d": d, "k": k, "rounds": rounds, "seconds": seconds}


def summary(rows: list[dict[str, Any]], estimators: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median and worst ratios over the grid; memory beyond output and gradient, in units of features."""
    result = {}
    for name in estimators:
        seconds = [row["seconds"] for row in rows]
        extra = [row["allocated_bytes"][name] / (4 * row["n"] * row["d"]) - 2 for row in rows]
        result[name] = {
            "to_batchnorm": statistics.median(s[name] / s["batchnorm"] for s in seconds),
            "worst_to_batchnorm": max(s[name] / s["batchnorm"] for s in seconds),
            "textbook_to_it": statistics.median(s["textbook"] / s[name] for s in seconds),
            "extra_buffers": statistics.median(extra),
            "worst_extra_buffers": max(extra),
        }
    return result


def keep_freed_memory() -> None:
    """Let the C library keep what is freed (glibc).

    Else it gives the top of its heap back and takes it again, or not, depending on where small blocks happen
    to lie: page faults that made one and the same step 1.5 or 6 ms.
    """
    if sys.platform == "linux":
        no_mmap, trim_threshold = -4, -1
        library = ctypes.CDLL(None)
        library.mallopt(no_mmap, 0)
        library.mallopt(trim_threshold, 2**31 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=301, help="most rounds of one size")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for one size, after five rounds")
    parser.add_argument(
        "--estimators", nargs="+", choices=ESTIMATORS, default=["dataset", "running", "batch"]
    )
    parser.add_argument("--max-gib", type=float, default=4.0, help="leave out sizes that need more memory")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    # Small layers, for which the number of calls is what counts, and large ones, for which memory is.
    sizes = [(4, n, d) for n, d in ((32, 64), (4, 512), (50, 4096), (20, 12544), (200, 12544))]
    if not arguments.quick:
        widths = (84, 512, 12544, 18432, 1_000_000)
        sizes += [(k, n, d) for k in (3, 16) for d in widths for n in (20, 200, 2000)]
    rows = []
    print(f"Ratio of the medians to BatchNorm1d, forward + backward, float32, {arguments.threads} thread(s).")
    print("Memory: allocated by a step, in units of the features. K counts all columns, the intercept too.")
    methods = (*arguments.estimators, "textbook")
    print(f"{'N':>6}{'D':>9}{'K':>4}{'BatchNorm':>18}" + "".join(f"{name:>18}" for name in methods))
    for k, n, d in sizes:
        # Features, gradient, output, gradient of the features, and three temporaries of the textbook.
        if 7 * 4 * n * d > arguments.max_gib * 2**30:
            print(f"{n:>6}{d:>9}{k:>4}   left out: more than {arguments.max_gib:g} GiB")
            continue
        row = measure(n, d, k, arguments.estimators, arguments.budget, arguments.repeats)
        rows.append({"threads": arguments.threads, **row})
        seconds, memory = row["seconds"], row["allocated_bytes"]
        unit = 4 * n * d
        text = f"{1e3 * seconds['batchnorm']:.3f} ms, {memory['batchnorm'] / unit:.1f}".rjust(18)
        for name in methods:
            ratio = seconds[name] / seconds["batchnorm"]
            text += f"{ratio:.2f} ×, {memory[name] / unit:.1f}".rjust(18)
        print(f"{n:>6}{d:>9}{k:>4}{text}", flush=True)
    totals = summary(rows, arguments.estimators)
    for name, total in totals.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in total.items()))
    recursion = measure_recursion(2048, 84, 16, 3 if arguments.quick else 5)
    speedup = recursion["seconds"]["by_samples"] / recursion["seconds"]["by_columns"]
    print(f"recursive, N = 2048: {speedup:.0f} times faster than with an N×N inverse")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"rows": rows, "summary": totals, "recursion": recursion}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
