"""Forward and backward of `MetadataNorm` beside BatchNorm and the textbook form.

Ratios of medians on the same tensor, interleaved in one process with a fixed number of threads; absolute
times on a shared machine mean little. Memory is what one step allocates: output, gradient, everything in
between.

    python benchmarks/layer.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
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


def allocated(step: Step, features: Tensor, gradient: Tensor) -> int:
    """Bytes allocated over one step: the output, the gradient, and everything in between."""
    with AllocationCounter() as counter:
        step(features).backward(gradient)
    features.grad = None
    return counter.bytes


def measure(n: int, d: int, k: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator).requires_grad_()
    gradient = torch.randn(n, d, generator=generator)
    metadata = torch.randn(n, k - 2, generator=generator)
    labels = torch.rand(n, 1, generator=generator).round()
    batch_norm = nn.BatchNorm1d(d, affine=False)
    steps: dict[str, Step] = {
        "batchnorm": batch_norm,
        **{estimator: layer(estimator, features, metadata, labels) for estimator in ESTIMATORS},
    }
    if n > k:
        steps["textbook"] = textbook(metadata, labels)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 3):
        for name, step in steps.items():
            elapsed = time_once(step, features, gradient)
            if repeat >= 3:
                times[name].append(elapsed)
    return {
        "n": n,
        "d": d,
        "k": k,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "allocated_bytes": {name: allocated(step, features, gradient) for name, step in steps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = [(20, 84), (200, 84), (2000, 84), (20, 12544), (200, 12544)]
    if not arguments.quick:
        sizes += [(2000, 12544), (20, 18432), (200, 18432), (2000, 18432)]
    rows = []
    print(f"Ratio of the medians to BatchNorm1d, forward + backward, float32, {arguments.threads} thread(s).")
    print("Memory: allocated by a step, in units of the features. K counts all columns, the intercept too.")
    methods = (*ESTIMATORS, "textbook")
    print(f"{'N':>6}{'D':>8}{'K':>4}{'BatchNorm':>16}" + "".join(f"{name:>18}" for name in methods))
    for k in (3, 16):
        for n, d in sizes:
            row = measure(n, d, k, arguments.repeats if n * d < 1e7 else max(5, arguments.repeats // 4))
            rows.append({"threads": arguments.threads, **row})
            seconds, memory = row["seconds"], row["allocated_bytes"]
            unit = 4 * n * d
            text = f"{1e3 * seconds['batchnorm']:.3f} ms, {memory['batchnorm'] / unit:.1f}".rjust(16)
            for name in methods:
                ratio = f"{seconds[name] / seconds['batchnorm']:.2f} ×" if name in seconds else "–"
                text += (
                    f"{ratio}, {memory[name] / unit:.1f}".rjust(18) if name in seconds else ratio.rjust(18)
                )
            print(f"{n:>6}{d:>8}{k:>4}{text}", flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
