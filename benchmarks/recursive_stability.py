"""A million steps of recursive least squares: does its state stay symmetric, positive definite and right?

    python benchmarks/recursive_stability.py [--steps 1000000] [--dtype float32]

Batches of two samples of four standardised columns, of which the last is zero (a constant: nothing excites
it), forgetting factor 0.999. Printed every tenth of the way: the smallest eigenvalue of `P`, its asymmetry,
and its relative error against the inverse form in float64 over the last 60 windows (what is older weighs
10⁻²⁶), computed afresh each time.
"""

import argparse
import time

import numpy as np
import torch

from mdnorm.estimators import RecursiveEstimator
from mdnorm.functional import recursive_update

PRIOR = RecursiveEstimator.prior
DECAY = 0.999
HORIZON = 60_000


def exact(rows: np.ndarray) -> np.ndarray:
    """P of the three columns that vary, from the rows (steps, 2, 4) of the last steps."""
    weights = DECAY ** np.arange(len(rows))[::-1]
    x = rows[..., :3]
    return np.linalg.inv(np.einsum("s,sni,snj->ij", weights, x, x))


def main() -> None:
    parser = argparse.ArgumentParser(description="Long-run stability of recursive least squares.")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(0)
    factor = (PRIOR**0.5 * torch.eye(4)).to(dtype)
    chunk = max(arguments.steps // 10, 1)
    recent = np.empty((0, 2, 4))
    start = time.perf_counter()
    print("    steps  smallest eigenvalue  asymmetry  relative error  P of the constant column     s")
    for done in range(chunk, arguments.steps + 1, chunk):
        data = torch.randn(chunk, 2, 4, generator=generator, dtype=torch.float64)
        data[..., 3] = 0
        for rows in data.to(dtype):
            factor = recursive_update(factor, rows, DECAY, PRIOR)
        recent = np.concatenate([recent, data.numpy()])[-HORIZON:]
        covariance = (factor @ factor.mT).double()
        asymmetry = float((covariance - covariance.mT).abs().max())
        smallest = float(torch.linalg.eigvalsh(covariance)[0])
        reference = exact(recent)
        error = np.abs(covariance[:3, :3].numpy() - reference).max() / np.abs(reference).max()
        print(
            f"{done:9d}  {smallest:19.3e}  {asymmetry:9.1e}  {error:14.1e}  {float(covariance[3, 3]):24.6g}"
            f"  {time.perf_counter() - start:4.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
