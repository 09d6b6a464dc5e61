"""What each of four gloo processes does for the tests of distributed training: light to import.

Starting processes takes seconds, so one start serves all tests: every scenario is run by all processes, and
the tests compare what they left with one process on the whole batch.
"""

from __future__ import annotations

import copy
import os
import pickle
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mdnorm
from mdnorm import MetadataNorm
from mdnorm.distributed import even_batches, global_mean, synchronize

WORLD = 4
# How many samples each process has, step by step: equal, uneven, none on some, all on one.
SIZES = {
    2: [(12, 12), (19, 5), (0, 24), (7, 17)],
    3: [(8, 8, 8), (5, 0, 19), (0, 0, 24), (11, 6, 7)],
    4: [(6, 6, 6, 6), (9, 0, 4, 11), (0, 0, 0, 24), (7, 6, 5, 6)],
}
CASES: dict[str, dict[str, Any]] = {
    "batch": {"estimator": "batch", "prior": 0.0},
    "batch, centred": {"estimator": "batch", "center": True},
    "batch, channels": {"estimator": "batch", "granularity": "channel"},
    "batch, prior": {"estimator": "batch", "prior": 8.0},
    "batch, weights": {"estimator": "batch"},
    "batch, channels, mask": {"estimator": "batch", "granularity": "channel"},
    "batch, sites": {"estimator": "batch"},
    "dataset": {"estimator": "dataset"},
    "dataset, centred, channels": {"estimator": "dataset", "center": True, "granularity": "channel"},
    "running": {"estimator": "running", "window": 60},
    "running, centred": {"estimator": "running", "window": 60, "center": True},
    "running, channels": {"estimator": "running", "window": 60, "granularity": "channel"},
    "running, sites": {"estimator": "running", "window": 60},
    "running, channels, mask, weights": {"estimator": "running", "window": 60, "granularity": "channel"},
    "running, sum": {"estimator": "running", "window": 60, "reduction": "sum"},
    "recursive": {"estimator": "recursive", "window": 60},
    "recursive, centred, weights": {"estimator": "recursive", "window": 60, "center": True},
    "penalty": {"estimator": "penalty"},
    "scale": {"estimator": "batch", "scale": True, "window": 60},
    "scale, channels": {"estimator": "batch", "scale": True, "window": 60, "granularity": "channel"},
}


def make_data(case: str, dtype: torch.dtype, n: int = 96) -> tuple[Tensor, ...]:
    """Inputs (n, 6), metadata (n, 2 or 3), labels (n, 1), targets (n,)."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, 2, (n, 1), generator=generator).double()
    age = torch.randn(n, 1, generator=generator, dtype=torch.float64) + 0.5 * labels
    # A year: far from zero against its spread.
    metadata = torch.cat([1990 + 10 * torch.randn(n, 1, generator=generator, dtype=torch.float64), age], 1)
    if "sites" in case:
        # Exactly collinear with the intercept.
        sites = torch.randint(0, 3, (n,), generator=generator)
        metadata = nn.functional.one_hot(sites, 3).double()
    inputs = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    inputs = inputs + labels + 0.7 * (metadata[:, -1:] - 0.2)
    targets = torch.randn(n, generator=generator, dtype=torch.float64) + labels[:, 0]
    return inputs.to(dtype), metadata, labels, targets.to(dtype)


class Net(nn.Module):
    def __init__(self, case: str, dtype: torch.dtype, repeat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings = CASES[case] | {"dtype": dtype}
        shape = 3 if settings.get("granularity") == "channel" else (3, 4)
        self.encoder = nn.Linear(6, 12, dtype=dtype)
        self.norm = MetadataNorm(shape, 3 if "sites" in case else 2, 1, **settings)
        self.head = nn.Linear(12, 1, dtype=dtype)
        self.repeat = repeat
        self.has_weights, self.has_mask = "weights" in case, "mask" in case

    def forward(self, inputs: Tensor, metadata: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(inputs).unflatten(1, (3, 4))
        weights, mask = self.rest(inputs)
        if self.repeat:
            features = checkpoint(self.norm, features, metadata, labels, weights, mask, use_reentrant=False)
        else:
            features = self.norm(features, metadata, labels, weights, mask)
        # Cloned: FSDP warns of views.
        return self.head(features.tanh().flatten(1)).squeeze(1).clone(), features.clone()

    def rest(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weights of the samples, some of them 0, and a mask of the positions."""
        weights = inputs[:, 0].detach().clamp_min(0) if self.has_weights else None
        return weights, inputs[:, 2:] > -0.5 if self.has_mask else None


def prepare(case: str, dtype: torch.dtype, **keywords: Any) -> Net:
    net = Net(case, dtype, **keywords)
    _, metadata, labels, _ = make_data(case, dtype)
    mdnorm.fit_gram(net, metadata, labels)
    return net


def loss_of(case: str, net: nn.Module, logits: Tensor, targets: Tensor, group: Any) -> Tensor:
    losses = (logits - targets).square()
    if case == "running, sum":
        return losses.sum()
    loss = losses.mean() if group is None else global_mean(losses, group)
    return loss + mdnorm.penalty_loss(net) if case == "penalty" else loss


def train(
    case: str, dtype: torch.dtype, net: nn.Module, batches: list[Tensor], group: Any = None
) -> dict[str, Any]:
    """Some steps of gradient descent; outputs, gradients and state."""
    data = make_data(case, dtype)
    factor = 1.0
    if case == "running, sum":
        # What makes the gradient of a sum, averaged over processes, that of one sample on average.
        factor = (1 if group is None else torch.distributed.get_world_size(group)) / 24
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05 * factor)
    results: dict[str, Any] = {"outputs": [], "gradients": []}
    for rows in batches:
        inputs, metadata, labels, targets = (part[rows] for part in data)
        logits, features = net(inputs, metadata, labels)
        optimizer.zero_grad()
        loss_of(case, net, logits, targets, group).backward()
        results["outputs"].append(features.detach().clone())
        results["gradients"].append([factor * parameter.grad for parameter in net.parameters()])
        optimizer.step()
    module = net.module if isinstance(net, DistributedDataParallel) else net
    # "penalty" brings its coefficients up to date in evaluation.
    module.eval()
    with torch.no_grad():
        results["evaluation"] = module(*(part[:9] for part in data[:3]))[1]
    results["state"] = {key: value.clone() for key, value in module.state_dict().items()}
    return results


def shares(world: int, rank: int) -> list[Tensor]:
    """The rows of this process in each step; those of all are 24 rows in order."""
    return [torch.arange(24 * i, 24 * i + 24).split(sizes)[rank] for i, sizes in enumerate(SIZES[world])]


def whole() -> list[Tensor]:
    return list(torch.arange(96).split(24))


class Counting:
    """Counts the calls of all_reduce and the bytes of their buffers."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __enter__(self) -> Counting:
        self.original = torch.distributed.all_reduce

        def counted(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
            self.sizes.append(tensor.numel() * tensor.element_size())
            return self.original(tensor, *args, **keywords)

        torch.distributed.all_reduce = counted
        return self

    def __exit__(self, *_: Any) -> None:
        torch.distributed.all_reduce = self.original


class Groups:
    """The groups of the first 2, 3 and 4 processes, and the second pair."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        # Every process makes every group.
        first, second = torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])
        three = torch.distributed.new_group([0, 1, 2])
        self.pair = first if rank < 2 else second
        self.other_pair = second if rank < 2 else first
        self.of_size = {2: self.pair, 3: three, 4: torch.distributed.new_group(list(range(4)))}

    def rank_in(self, world: int) -> int | None:
        rank = self.rank % 2 if world == 2 else self.rank
        return rank if rank < world else None


Scenario = Callable[[Groups], Any]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def equality(groups: Groups) -> Any:
    results = {}
    for world in SIZES:
        rank = groups.rank_in(world)
        if rank is None:
            continue
        group = groups.of_size[world]
        for index, case in enumerate(CASES):
            if world == 2 and index % 2 != groups.rank // 2:
                continue  # The two pairs share the cases.
            for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
                if world == 3 and name == "float32":
                    continue  # Seconds saved; two and four have it.
                net = DistributedDataParallel(prepare(case, dtype), process_group=group)
                results[f"{world} {case} {name}"] = train(case, dtype, net, shares(world, rank), group)
    return results


@scenario
def bytes_of_collectives(groups: Groups) -> Any:
    results = {}
    for case in CASES:
        for dtype in (torch.float64, torch.float32):
            net = prepare(case, dtype)
            synchronize(net)
            inputs, metadata, labels, _ = make_data(case, dtype)
            features = net.encoder(inputs).unflatten(1, (3, 4))
            # In the first step they agree on where the columns are measured from; see below.
            net.norm(features.detach(), metadata, labels, *net.rest(inputs))
            with Counting() as forward:
                out = net.norm(features, metadata, labels, *net.rest(inputs))
            with Counting() as backward:
                out.square().sum().backward()
            with Counting() as evaluation:
                net.norm.eval()(features, metadata)
            assert evaluation.sizes == []
            results[f"{case} {str(dtype)[6:]}"] = (forward.sizes, backward.sizes)
    net = synchronize(Net("running", torch.float32))
    inputs, metadata, labels, _ = make_data("running", torch.float32)
    results["first"] = []
    for _ in range(3):
        with Counting() as forward:
            net(inputs, metadata, labels)
        results["first"].append(forward.sizes)
    return results


@scenario
def warmed(groups: Groups) -> Any:
    """The first process tries the model by itself before all train; the wrapper gives all its state."""
    net = prepare("running", torch.float64)
    wrapped = DistributedDataParallel(net)
    if groups.rank == 0:
        net(*(part[:9] for part in make_data("running", torch.float64)[:3]))
    torch.distributed.barrier()
    return train("running", torch.float64, wrapped, shares(4, groups.rank), groups.of_size[4])


@scenario
def alone(groups: Groups) -> Any:
    """Only the first process runs these: nothing may wait for the others."""
    net = DistributedDataParallel(prepare("running", torch.float64))
    data = make_data("running", torch.float64)
    answer = None
    if groups.rank == 0:
        with Counting() as counting:
            # Of the module inside the wrapper, also in training.
            logits, _ = net.module(*data[:3])
            logits.sum().backward()
            net.eval()
            evaluated = net.module(*data[:3])[1]
            synchronize(net, groups.of_size[4])
            again = net.module(*data[:3])[1]
        answer = {"calls": len(counting.sizes), "difference": (evaluated - again).abs().max()}
    torch.distributed.barrier()
    return answer


@scenario
def local(groups: Groups) -> Any:
    net = prepare("batch", torch.float64)
    synchronize(net, "local")
    wrapped = DistributedDataParallel(net)
    rows = shares(4, groups.rank)[0]
    with Counting() as counting:
        _, features = wrapped(*(part[rows] for part in make_data("batch", torch.float64)[:3]))
    return {"calls": len(counting.sizes), "outputs": features.detach()}


@scenario
def accumulation(groups: Groups) -> Any:
    results = {}
    for case in ("running", "batch"):
        net = DistributedDataParallel(prepare(case, torch.float64))
        data = make_data(case, torch.float64)
        for step, rows in enumerate(shares(4, groups.rank)):
            inputs, metadata, labels, targets = (part[rows] for part in data)
            with nullcontext() if step == 3 else net.no_sync():
                global_mean((net(inputs, metadata, labels)[0] - targets) ** 2).backward()
        results[case] = [parameter.grad for parameter in net.parameters()]
    return results


@scenario
def ended(groups: Groups) -> Any:
    """Processes with 1, 2, 3 and 4 batches."""
    case, dtype = "running", torch.float64
    net = DistributedDataParallel(prepare(case, dtype))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    data = make_data(case, dtype)
    batches = [tuple(part[rows] for part in data) for rows in ending_batches(groups.rank)]
    sizes = []
    for inputs, metadata, labels, targets in even_batches(batches):
        sizes.append(len(inputs))
        optimizer.zero_grad()
        global_mean((net(inputs, metadata, labels)[0] - targets) ** 2).backward()
        optimizer.step()
    return {"sizes": sizes, "state": {key: value.clone() for key, value in net.module.state_dict().items()}}


def ending_batches(rank: int) -> list[Tensor]:
    return [torch.arange(24 * step + 6 * rank, 24 * step + 6 * rank + 6) for step in range(rank + 1)]


@scenario
def nothing_to_empty(groups: Groups) -> Any:
    answers = {}
    try:
        list(even_batches([torch.ones(2)] if groups.rank else []))
    except ValueError as error:
        answers["empty"] = str(error)
    batch = {"x": torch.ones(3, 2), "pair": (torch.ones(3), [torch.ones(3)])}
    batches = list(even_batches([batch] * (2 - groups.rank % 2)))
    answers["shapes"] = [(len(b["x"]), len(b["pair"][0]), len(b["pair"][1][0])) for b in batches]
    try:
        list(even_batches([["a name"]]))
    except TypeError as error:
        answers["names"] = str(error)
    return answers


@scenario
def join(groups: Groups) -> Any:
    answers = {}
    data = make_data("running", torch.float64)
    net = DistributedDataParallel(prepare("running", torch.float64))
    try:
        with net.join():
            net(*(part[:6] for part in data[:3]))
    except RuntimeError as error:
        answers["plain"] = str(error)
    torch.distributed.barrier()
    net = DistributedDataParallel(prepare("running", torch.float64))
    steps = 0
    try:
        with net.join(throw_on_early_termination=True):
            for _ in range(2 + (groups.rank == 0)):
                net(*(part[:6] for part in data[:3]))[0].sum().backward()
                steps += 1
    except RuntimeError as error:
        answers["throwing"] = str(error)
    answers["steps"] = steps
    torch.distributed.barrier()
    return answers


@scenario
def fully_sharded(groups: Groups) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for case in ("running", "batch", "dataset", "recursive", "penalty"):
        net = synchronize(prepare(case, torch.float64))
        fully_shard(net.encoder, mesh=mesh)
        fully_shard(net, mesh=mesh)
        data = make_data(case, torch.float64)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        outputs = []
        for rows in shares(4, groups.rank):
            inputs, metadata, labels, targets = (part[rows] for part in data)
            logits, features = net(inputs, metadata, labels)
            optimizer.zero_grad()
            loss_of(case, net, logits, targets, groups.of_size[4]).backward()
            optimizer.step()
            outputs.append(features.detach().clone())
        gradients = [parameter.grad.full_tensor() for parameter in net.parameters()]
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers() if "placement" not in name}
        results[case] = {"outputs": outputs, "gradients": gradients, "buffers": buffers}
    return results


def told(report: mdnorm.integration.Recalibration) -> tuple[Any, ...]:
    layer = report.layers[0]
    return layer.rows, layer.new_rows, torch.from_numpy(layer.standard_errors), layer.found_again


@scenario
def gram_and_recalibration(groups: Groups) -> Any:
    case, dtype = "dataset", torch.float64
    data = make_data(case, dtype)[:3]
    results = {}
    # The second process has no sample at all.
    for name, sizes in (("uneven", (40, 0, 31, 25)), ("pair", (60, 36))):
        world = len(sizes)
        group = groups.of_size[world]
        rows = torch.arange(96).split(sizes)[groups.rank_in(world)]
        net = Net(case, dtype)
        metadata = [(data[1][part], data[2][part]) for part in rows.split(10) if len(part)]
        gram = mdnorm.fit_gram(net, metadata, process_group=group)
        loader = [tuple(part[few] for part in data) for few in rows.split(7) if len(few)]
        order = mdnorm.recalibrate(net, loader, process_group=group).names
        results[name] = {
            "gram": (*map(torch.as_tensor, gram.products()[:3:2]), gram.weight),
            "order": order,
            "state": copy.deepcopy(net.state_dict()),
            "held_out": told(mdnorm.recalibrate(net, loader, held_out=loader, process_group=group)),
            "after": net.state_dict(),
        }
    wrapped = DistributedDataParallel(Net(case, dtype))
    rows = shares(4, groups.rank)[0]
    gram = mdnorm.fit_gram(wrapped, data[1][rows], data[2][rows])
    mdnorm.recalibrate(wrapped, [tuple(part[rows] for part in data)] if len(rows) else [])
    results["wrapped"] = {"gram": gram.weight, "state": wrapped.module.state_dict()}
    # The first process learns the sizes from the third.
    lazy = MetadataNorm(None, None, 1, estimator="batch", dtype=dtype)
    mdnorm.recalibrate(lazy, [data] if groups.rank == 2 else [], process_group="world")
    results["lazy"] = lazy.state_dict()
    return results


@scenario
def failures(groups: Groups) -> Any:
    """What fails on one process is an error on all, not a wait."""
    inputs, metadata, labels, _ = make_data("dataset", torch.float64)
    answers = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except (ValueError, RuntimeError) as error:
            answers[name] = f"{type(error).__name__}: {error}"

    net = prepare("dataset", torch.float64)
    bad = metadata.clone()
    bad[3, 0] = float("nan")
    of_one = bad if groups.rank == 1 else metadata
    attempt("nan gram", lambda: mdnorm.fit_gram(net, of_one, labels, process_group="world"))
    attempt("no gram", lambda: mdnorm.fit_gram(net, [], process_group="world"))
    anything = MetadataNorm(12, None, None)
    wide = metadata[:, : 1 + (groups.rank == 0)]
    attempt("widths", lambda: mdnorm.fit_gram(anything, wide, process_group="world"))
    attempt(
        "nan features",
        lambda: mdnorm.recalibrate(
            net,
            [(inputs * (float("nan") if groups.rank == 2 else 1), metadata, labels)],
            process_group="world",
        ),
    )
    attempt("no samples", lambda: mdnorm.recalibrate(net, [], process_group="world"))
    attempt("stranger", lambda: synchronize(net, groups.other_pair))
    return answers


@scenario
def without_a_layer(groups: Groups) -> Any:
    inputs, metadata, labels, _ = make_data("batch", torch.float64)
    rows = shares(4, groups.rank)[1]
    results = {}
    for prior in (0.0, 5.0):
        features = inputs[rows].clone().requires_grad_()
        out = mdnorm.metadata_norm(
            features, metadata[rows], labels[rows], prior=prior, process_group=groups.of_size[4]
        )
        gradient = torch.autograd.grad((out**3).sum(), features, create_graph=True)[0]
        second = torch.autograd.grad((gradient**2).sum(), features)[0]
        results[prior] = (out.detach(), gradient.detach(), second)
    return results


@scenario
def repeated(groups: Groups) -> Any:
    """Activation checkpointing runs the layer again in the backward pass, outside the wrapper's forward."""
    results = {}
    for case in ("running", "batch"):
        net = DistributedDataParallel(prepare(case, torch.float64, repeat=True))
        results[case] = train(case, torch.float64, net, shares(4, groups.rank), groups.of_size[4])
    return results


@scenario
def compiled(groups: Groups) -> Any:
    # Two processes only: the compiler costs each of them seconds.
    if groups.rank > 1:
        return None
    net = DistributedDataParallel(prepare("running", torch.float64), process_group=groups.pair)
    net.forward = torch.compile(net.forward, backend="eager")
    return train("running", torch.float64, net, shares(2, groups.rank)[:2], groups.pair)


@scenario
def overflow(groups: Groups) -> Any:
    results = {}
    for case in ("running", "batch", "dataset", "recursive", "scale"):
        net = DistributedDataParallel(prepare(case, torch.float64))
        data = make_data(case, torch.float64)
        rows = shares(4, groups.rank)[0]
        inputs, metadata, labels, _ = (part[rows] for part in data)
        net(inputs, metadata, labels)[0].sum().backward()
        before = {key: value.clone() for key, value in net.module.norm.state_dict().items()}
        spoiled = inputs * (float("inf") if groups.rank == 3 else 1)
        net(spoiled, metadata, labels)[0].sum().backward()
        after = net.module.norm.state_dict()
        results[case] = [key for key in before if not torch.equal(before[key], after[key])]
    return results


@scenario
def copies(groups: Groups) -> Any:
    net = synchronize(prepare("batch", torch.float64), groups.pair)
    copied = copy.deepcopy(net)
    rows = shares(2, groups.rank_in(2))[1]
    features = copied(*(part[rows] for part in make_data("batch", torch.float64)[:3]))[1]
    loaded = pickle.loads(pickle.dumps(net))
    return {"features": features.detach(), "pickled": loaded.norm.process_group}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    groups = Groups(rank)
    results = {}
    for name, function in SCENARIOS.items():
        try:
            results[name] = function(groups)
        except Exception:
            results[name] = traceback.format_exc()
            # The others wait for this process: what follows cannot be compared.
            break
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
