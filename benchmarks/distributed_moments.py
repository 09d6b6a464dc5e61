"""What the metadata layer costs in several processes: bytes in each collective, time of a step.

The same network trains under DistributedDataParallel without a layer, with one that stays local and with ones
that share their moments, interleaved, on as many gloo processes as asked for. (SyncBatchNorm, the natural
yardstick, has no CPU form.) On a shared machine look at the differences, not at the times.

    python benchmarks/distributed_moments.py --processes 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mdnorm
from mdnorm.distributed import global_mean, synchronize

COLUMNS, LABELS, BATCH = 4, 1, 64


class Net(nn.Module):
    def __init__(self, width: int, estimator: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, width))
        self.norm = (
            None if estimator is None else mdnorm.MetadataNorm(width, COLUMNS, LABELS, estimator=estimator)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, inputs: Tensor, metadata: Tensor, labels: Tensor) -> Tensor:
        features = self.encoder(inputs)
        if self.norm is not None:
            features = self.norm(features, metadata, labels)
        return self.head(features.relu()).squeeze(1)


def step(model: nn.Module, batch: tuple[Tensor, ...], is_penalty: bool) -> None:
    inputs, metadata, labels = batch
    loss = global_mean((model(inputs, metadata, labels) - labels[:, 0]).square())
    if is_penalty:
        loss = loss + mdnorm.penalty_loss(model)
    loss.backward()
    model.zero_grad()


def measure(rank: int, processes: int, folder: str, widths: list[int], steps: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    generator = torch.Generator().manual_seed(rank)
    batch = (
        torch.randn(BATCH, 128, generator=generator),
        torch.randn(BATCH, COLUMNS, generator=generator),
        torch.randint(0, 2, (BATCH, LABELS), generator=generator).float(),
    )
    rows = []
    for width in widths:
        models: dict[str, DistributedDataParallel] = {}
        for name in ("none", "running, local", "batch", "dataset", "running", "recursive", "penalty"):
            estimator = None if name == "none" else name.split(",")[0]
            net = Net(width, estimator)
            if estimator is not None:
                mdnorm.fit_gram(net, batch[1], batch[2], process_group="world")
                synchronize(net, "local" if "local" in name else "auto")
            models[name] = DistributedDataParallel(net)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(steps):
            for name, model in models.items():
                torch.distributed.barrier()
                start = time.perf_counter()
                step(model, batch, name == "penalty")
                times[name].append(time.perf_counter() - start)
        for name, model in models.items():
            rows.append(
                {
                    "features": width,
                    "estimator": name,
                    "bytes": bytes_of(model.module.norm, width, batch),
                    "milliseconds": 1000 * statistics.median(times[name][steps // 5 :]),
                }
            )
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


def bytes_of(layer: mdnorm.MetadataNorm | None, width: int, batch: tuple[Tensor, ...]) -> list[int]:
    """The sizes of what the layer reduces in one step, forward and backward."""
    sizes: list[int] = []
    original = torch.distributed.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return original(tensor, *arguments, **keywords)

    torch.distributed.all_reduce = counted
    try:
        if layer is not None:
            if layer.process_group == "auto":
                synchronize(layer)
            layer(torch.randn(BATCH, width, requires_grad=True), *batch[1:]).sum().backward()
    finally:
        torch.distributed.all_reduce = original
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[84, 1024, 16384])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            measure,
            args=(options.processes, folder, options.widths, options.steps),
            nprocs=options.processes,
        )
        rows = json.loads(Path(folder, "rows.json").read_text())
    print(f"{COLUMNS} metadata and {LABELS} label columns, {options.processes} processes, float32\n")
    print("| features | estimator | bytes forward, backward | ms a step |\n| ---: | --- | --- | ---: |")
    for row in rows:
        sizes = ", ".join(f"{size:,}" for size in row["bytes"]) or "–"
        print(f"| {row['features']} | {row['estimator']} | {sizes} | {row['milliseconds']:.1f} |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
