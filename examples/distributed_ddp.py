"""Training on several processes that goes on after one of them dies, to the last bit.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed_ddp.py --out results/ddp

Every process trains on its share of each batch; the metadata layer fits the whole batch. After every epoch
the first process writes a checkpoint: model (the layer's running moments inside), optimiser, and what the
epochs so far have shown. Where a process dies, torchrun starts all again, and they go on from there.
``--die-in-epoch 3`` lets one try it: the last process kills itself once, in the middle of that epoch.

Two processes end with the same bits after an interruption as without one. With more, DistributedDataParallel
may add gradients up in another order after a restart, and the last digits may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import mdnorm
from mdnorm.distributed import even_batches, global_mean


class Net(nn.Module):
    """A small network with a metadata layer before its last ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
        self.norm = mdnorm.MetadataNorm(16, num_metadata=3, num_labels=1)
        self.head = nn.Linear(16, 1)

    def forward(self, inputs: Tensor, metadata: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits (N,)."""
        features = self.norm(self.encoder(inputs), metadata, labels)
        return self.head(features.relu()).squeeze(1)


def make_data(num_samples: int) -> TensorDataset:
    """Inputs that show the label and, more clearly, the age, which goes with the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (num_samples,), generator=generator).float()
    age = 40 + 20 * torch.rand(num_samples, generator=generator) + 15 * labels
    inputs = torch.randn(num_samples, 32, generator=generator)
    inputs[:, :8] += labels[:, None]
    inputs[:, 8:16] += (age[:, None] - 55) / 8
    return TensorDataset(inputs, mdnorm.design.polynomial(age, 3, low=40, high=75), labels)


def join_the_others() -> None:
    """As ``init_process_group("gloo")``, also after a restart.

    torchrun may keep its store when it starts the processes again, and gloo would find in it the addresses
    of those that are gone: every attempt has a part of the store for itself.
    """
    store, rank, world_size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"attempt-{attempt}", store)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def save(path: Path, checkpoint: dict[str, object]) -> None:
    """Write the new checkpoint beside the old one and put it in its place: one of them is always whole."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    """Join the other processes, train, leave them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/ddp"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=1003)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--die-in-epoch", type=int, help="kill the last process once, in this epoch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    join_the_others()
    train(options)
    # Only when nobody needs the others, and no model holds the group any more, may it go.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # All is written. Without Python's own end, during which a thread that gloo left behind may still wake up,
    # ask for the interpreter, and abort the process: rare, and torchrun would start everything again.
    sys.stdout.flush()
    os._exit(0)


def train(options: argparse.Namespace) -> None:
    """Go on from the last checkpoint, recalibrate, and leave the model."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "checkpoint.pt"

    torch.manual_seed(0)
    net = Net()
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history: list[float] = []
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        net.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        history = checkpoint["history"]

    dataset = make_data(options.samples)
    # Shares of the data that follow from seed and epoch alone, so a restart finds the same batches.
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(dataset, seed=0, drop_last=False)
    loader = DataLoader(dataset, batch_size=options.batch_size // world_size, sampler=sampler)
    for epoch in range(len(history), options.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(1, dtype=torch.float64)
        # Where a process has fewer batches than others, empty ones.
        for step, (inputs, metadata, labels) in enumerate(even_batches(loader)):
            if epoch == options.die_in_epoch and step == 3:
                die_once(options.out, rank == world_size - 1)
            logits = model(inputs, metadata, labels)
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            optimizer.zero_grad()
            global_mean(losses).backward()
            optimizer.step()
            total += losses.detach().sum()
        torch.distributed.all_reduce(total)
        history.append(total.item() / len(dataset))
        if rank == 0:
            print(f"epoch {epoch}: loss {history[-1]:.6f}", flush=True)
            save(
                path,
                {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "history": history},
            )
    # Exact coefficients for evaluation, each process with its share of the data.
    mdnorm.recalibrate(model, loader, progress=False)
    if rank == 0:
        save(options.out / "model.pt", net.state_dict())
        (options.out / "history.json").write_text(json.dumps(history))


def die_once(folder: Path, is_victim: bool) -> None:
    """Kill this process if it is the victim and nobody has died yet."""
    marker = folder / "died"
    if is_victim and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
