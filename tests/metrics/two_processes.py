"""What each of two processes does for the tests of streaming metrics: light to import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdnorm.metrics.streaming import DistanceCorrelation, GroupRates

# Of 0 and 100 rows, too: a process without samples takes part.
SHARES = {"uneven": (37, 63), "one empty": (0, 100), "other empty": (100, 0)}


def make_metrics() -> dict[str, Any]:
    return {
        "all": DistanceCorrelation(),
        "sampled": DistanceCorrelation(within_labels=True, max_samples=40, seed=5),
        "columns": DistanceCorrelation(column_names=["a", "b"]),
        "rates": GroupRates(["even", "odd"], num_classes=3),
    }


def update(metrics: dict[str, Any], data: tuple[Tensor, ...], rows: Tensor) -> None:
    features, metadata, labels = data
    for part in rows.split(10) if len(rows) else ():
        for name in ("all", "sampled", "columns"):
            metrics[name].update(features[part], metadata[part], labels[part])
        groups = ["odd" if row % 2 else "even" for row in part.tolist()]
        metrics["rates"].update((labels[part] + (part % 5 == 0)) % 3, labels[part], groups)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    data = make_data(100)
    results: dict[str, Any] = {"rank": rank}
    for share, sizes in SHARES.items():
        metrics = make_metrics()
        rows = torch.arange(100).split(sizes)[rank]
        half = len(rows) // 2
        update(metrics, data, rows[:half])
        if all(sizes):  # torchmetrics gives a process that got no more samples its value from before
            results["half"] = metrics["all"].compute()
        update(metrics, data, rows[half:])
        results[share] = {name: metric.compute() for name, metric in metrics.items()}
        # And the state of the process is its own again.
        results[f"{share}, again"] = int(metrics["all"].num_seen)
        if share == "one empty":
            update(metrics, data, torch.arange(100).split(50)[rank])
            results["more"] = metrics["all"].compute()
    features, metadata, _ = data
    on_step = DistanceCorrelation(dist_sync_on_step=True)
    rows = torch.arange(100).split((37, 63))[rank]
    results["on step"] = on_step(features[rows], metadata[rows])
    on_step.reset()
    on_step.update(features[rows][:, :, : rank + 1], metadata[rows])
    try:
        on_step.compute()
    except ValueError as error:
        results["widths"] = str(error)
    # An error leaves each process with its own state.
    results["after the error"] = int(on_step.num_seen)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def make_data(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, 3, 2) in which float32 rounds nothing away, metadata (n, 2), labels (n,) of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    metadata = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % 3
    noise = torch.randn(n, 3, 2, generator=generator)
    features = noise + (metadata[:, :1, None].float() ** 2) + labels[:, None, None]
    return features, metadata, labels
