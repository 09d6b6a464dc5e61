"""Whole training steps with `MetadataNorm` in every block, beside BatchNorm or LayerNorm in the same places.

Ratios of medians, interleaved in one process with a fixed number of threads; memory is the peak of what the
step adds to the process. Three networks: the CNN of the synthetic experiment (batches of 20), a 3D ResNet-10
of MONAI (batches of 4) and a small vision transformer of transformers (batches of 16).

    python benchmarks/training_step.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mdnorm
from layer import allocated_over, keep_freed_memory

Make = Callable[[str], tuple[nn.Module, Tensor]]


def synthetic(kind: str) -> tuple[nn.Module, Tensor]:
    """Two convolutions and three linear layers, a slot for a normalisation behind each but the last."""

    def norm(shape: tuple[int, ...]) -> list[nn.Module]:
        if kind == "mdn":
            return [mdnorm.MetadataNorm(shape, 3, 1)]
        if kind == "none":
            return []
        return [nn.BatchNorm2d(shape[0]) if len(shape) == 3 else nn.BatchNorm1d(shape[0])]

    layers: list[nn.Module] = [nn.Conv2d(1, 16, 5), *norm((16, 28, 28)), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 5), *norm((32, 10, 10)), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(800, 84), *norm((84,)), nn.ReLU(), nn.Linear(84, 2)]
    return nn.Sequential(*layers), torch.randn(20, 1, 32, 32)


def resnet(kind: str) -> tuple[nn.Module, Tensor]:
    from monai.networks.nets import resnet10

    model: nn.Module = resnet10(spatial_dims=3, n_input_channels=1, num_classes=2)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm3d)]
    if kind != "norm":
        for name in names:
            parent, _, child = name.rpartition(".")
            channels = model.get_submodule(name).num_features
            layer = (
                mdnorm.MetadataNorm(channels, 3, 1, granularity="channel") if kind == "mdn" else nn.Identity()
            )
            setattr(model.get_submodule(parent), child, layer)
    return model, torch.randn(4, 1, 32, 32, 32)


def transformer(kind: str) -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=32,
        patch_size=4, num_channels=3, num_labels=2,
    )  # fmt: skip
    model: nn.Module = ViTForImageClassification(config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if kind != "norm":
        for name in names:
            parent, _, child = name.rpartition(".")
            options: dict[str, Any] = {"granularity": "channel", "channel_dim": -1}
            layer = mdnorm.MetadataNorm(96, 3, 1, **options) if kind == "mdn" else nn.Identity()
            setattr(model.get_submodule(parent), child, layer)
    return model, torch.randn(16, 3, 32, 32)


NETWORKS: dict[str, Make] = {
    "synthetic CNN, batch 20": synthetic,
    "MONAI ResNet-10, batch 4": resnet,
    "small ViT, batch 16": transformer,
}


def training_step(make: Make, kind: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model, inputs = make(kind)
    model.train()
    metadata, labels = torch.randn(len(inputs), 3), torch.arange(len(inputs)) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        given = mdnorm.metadata(model, metadata, labels) if kind == "mdn" else nullcontext()
        with given:
            output = model(inputs)
            logits = output if isinstance(output, Tensor) else output.logits
            nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def measure(make: Make, budget: float, repeats: int) -> dict[str, Any]:
    steps = {kind: training_step(make, kind) for kind in ("norm", "mdn", "none")}
    allocated = {}
    for kind, step in steps.items():
        step()
        allocated[kind] = allocated_over(step)
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    start = time.perf_counter()
    kinds = list(steps)
    for repeat in range(repeats):
        for kind in kinds[repeat % 3 :] + kinds[: repeat % 3]:
            before = time.perf_counter()
            steps[kind]()
            times[kind].append(time.perf_counter() - before)
        if repeat >= 10 and time.perf_counter() - start > budget:
            break
    return {
        "rounds": len(times["norm"]),
        "seconds": {kind: statistics.median(values) for kind, values in times.items()},
        "allocated_bytes": allocated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=300, help="most rounds of one network")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for one network")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = []
    print(f"Training steps, float32, {arguments.threads} thread(s); ratios to the usual normalisation.")
    print(f"{'network':<26}{'usual':>12}{'MDN':>10}{'none':>10}{'allocated, MDN':>16}")
    for name, make in NETWORKS.items():
        row = measure(make, arguments.budget, arguments.repeats)
        rows.append({"network": name, "threads": arguments.threads, **row})
        seconds, memory = row["seconds"], row["allocated_bytes"]
        text = f"{name:<26}{1e3 * seconds['norm']:>9.2f} ms{seconds['mdn'] / seconds['norm']:>8.2f} ×"
        text += f"{seconds['none'] / seconds['norm']:>8.2f} ×{memory['mdn'] / memory['norm']:>14.2f} ×"
        print(text, flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
