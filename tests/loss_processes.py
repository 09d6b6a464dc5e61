"""What each of two gloo processes does for the tests of `DependenceLoss`: light to import."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdnorm import DependenceLoss

# Samples of each process, step by step: equal, uneven, none on one.
SHARES = [(20, 20), (9, 31), (40, 0), (3, 37)]


def make_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for sizes in SHARES:
        labels = torch.arange(sum(sizes)) % 2
        metadata = torch.randn(len(labels), 2, dtype=torch.float64, generator=generator)
        inputs = torch.randn(len(labels), 3, dtype=torch.float64, generator=generator) + metadata[:, :1]
        batches.append((inputs, metadata, labels))
    return batches


def train(rank: int | None) -> dict[str, Tensor]:
    """Two steps a batch by SGD on the penalty alone; all samples with rank None."""
    torch.manual_seed(1)
    network = nn.Linear(3, 2).double()
    model = network if rank is None else DistributedDataParallel(network)
    penalty = DependenceLoss(window=60, warm_up=50, process_group="local" if rank is None else "world")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    values = []
    for sizes, (inputs, metadata, labels) in zip(SHARES, make_batches(), strict=True):
        rows = slice(None) if rank is None else torch.arange(len(labels)).split(sizes)[rank]
        for _ in range(2):
            optimizer.zero_grad()
            value = penalty(model(inputs[rows]), metadata[rows], labels[rows])
            value.backward()
            optimizer.step()
            values.append(value.detach())
    return {"weight": network.weight.detach(), "values": torch.stack(values), **penalty.state_dict()}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.save(train(rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
