"""Training in several processes: moments over all of them, losses, batches that run out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mdnorm.context import check_module, layers_of

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch.distributed import ProcessGroup

    ProcessGroupSetting: TypeAlias = ProcessGroup | Literal["auto", "world", "local"]

T = TypeVar("T")

_UNKNOWN = object()


def synchronize(model: nn.Module, process_group: ProcessGroupSetting = "world") -> nn.Module:
    """Say with which processes the `MetadataNorm` layers of a model share their moments in training.

    Not needed under `DistributedDataParallel`, in whose forward passes every layer shares its moments with
    the other processes by itself. Needed under FSDP2 and in training loops of your own.

    Parameters
    ----------
    model : nn.Module
        Changed in place, on every process in the same way, and returned.
    process_group : ProcessGroup, "world", "auto" or "local"
        A group this process belongs to; "world": all processes; "auto" (what every layer starts with): those
        of the wrapping `DistributedDataParallel`, and none outside its forward pass; "local": no others.

    Raises
    ------
    ValueError
        The model has no `MetadataNorm` layer, or this process does not belong to the group.
    TypeError
        `model` is not a module, or `process_group` neither a process group nor one of the names.

    Notes
    -----
    With a group given, or "world", every training forward pass is a collective: a process that runs one alone
    waits for the others until the group's timeout. Evaluation never communicates.
    """
    check_module(model)
    for layer in layers_of(model).values():
        layer.process_group = process_group
    return model


def global_mean(losses: Tensor, process_group: ProcessGroupSetting = "world") -> Tensor:
    """Return the loss whose gradient, averaged over the processes, is that of the mean over all samples.

    `DistributedDataParallel` and FSDP2 average gradients over processes: with the usual mean over the local
    batch, a sample of a small batch weighs more. This is the sum of the local losses times the number of
    processes, divided by the number of samples on all of them (one collective of one number).

    Parameters
    ----------
    losses : tensor
        One loss for each sample of this process, any shape (``reduction="none"``); none at all (a process
        that ran out of data) is a loss of 0.
    process_group
        The processes over which gradients are averaged, as of `synchronize`.

    Returns
    -------
    scalar tensor
        Its mean over the processes is the mean loss over all samples. In one process: ``losses.mean()``.

    Raises
    ------
    ValueError
        This process does not belong to the group.
    """
    group = active_group(GroupSetting(process_group).value)
    count = torch.full((1,), float(losses.numel()), dtype=torch.float64, device=losses.device)
    if group is not None:
        torch.distributed.all_reduce(count, group=group)
    return losses.sum() * (world_size(group) / count.clamp_min(1)).to(losses.dtype).squeeze()


def even_batches(
    loader: Iterable[T], process_group: ProcessGroupSetting = "world", *, device: torch.device | str = "cpu"
) -> Iterator[T]:
    """Iterate until the loaders of all processes have ended, yielding empty batches once this one has.

    The layers communicate in every training forward pass, and `DistributedDataParallel.join` cannot stand in
    for them (nor for `SyncBatchNorm`); an empty batch takes part and weighs nothing. Each step costs one
    collective of one number.

    Parameters
    ----------
    loader : iterable of batches
        Tensors, or tuples, lists and dicts of tensors, samples in the first dimension. Its shares may differ
        in length between processes; none may be empty, since there is nothing to make an empty batch of.
    process_group
        The processes that train together, as of `synchronize`.
    device : torch.device or str
        Where the number is exchanged: "cuda" with NCCL.

    Yields
    ------
    batch
        The loader's own, then as many empty ones (0 samples, same dtypes and shapes) as others still need.

    Raises
    ------
    ValueError
        The loader of some process is empty (all raise); or this process does not belong to the group.
    TypeError
        A batch holds what has no samples to take away.
    """
    group = active_group(GroupSetting(process_group).value)
    if group is None:
        yield from loader
        return
    batches, empty, size = iter(loader), None, world_size(group)
    for step in range(2**62):
        batch = next(batches, None)
        # How many still have data and, in the first step, whether all have.
        waiting = torch.tensor([float(batch is not None)], device=device)
        torch.distributed.all_reduce(waiting, group=group)
        if step == 0 and int(waiting) < size:
            empty_ones = f"{size - int(waiting)} of {size} processes"
            raise ValueError(f"the loaders of {empty_ones} are empty: give each one batch at least.")
        if int(waiting) == 0:
            return
        if batch is None:
            yield cast(T, empty)
            continue
        if empty is None:
            empty = tree_map(_emptied, batch)
        yield batch


def _emptied(values: Any) -> Any:
    if getattr(values, "ndim", 0):
        return values[:0]
    raise TypeError(
        f"a batch holds a {type(values).__name__}, which has no dimension of samples: give tensors, or "
        "tuples, lists and dicts of them."
    )


class GroupSetting:
    """A checked `process_group`; copies of a model share the group, which itself cannot be copied."""

    def __init__(self, value: Any) -> None:
        if not isinstance(value, str) and torch.distributed.is_available():
            if value is torch.distributed.GroupMember.NON_GROUP_MEMBER:
                raise ValueError(
                    "this process does not belong to the process group: give it one that it is in."
                )
            if isinstance(value, torch.distributed.ProcessGroup):
                self.value: Any = value
                return
        if not isinstance(value, str) or value not in ("auto", "world", "local"):
            raise TypeError(
                f"process_group must be a ProcessGroup, 'auto', 'world' or 'local', got {value!r}."
            )
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupSetting:
        return self

    def __reduce__(self) -> tuple[type[GroupSetting], tuple[str]]:
        # A group means nothing in another process.
        return GroupSetting, (self.value if isinstance(self.value, str) else "auto",)


def active_group(setting: Any) -> ProcessGroup | None:
    """Return the group to communicate in now, None where this process is on its own.

    RuntimeError inside ``DistributedDataParallel.join``, which would hang, and where this torch cannot tell
    "auto".
    """
    # The first two are constants to torch.compile, so a model in one process is traced as a whole.
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or setting == "local":
        return None
    # What DistributedDataParallel sets for the time of its forward pass; no public name says so.
    wrapper: Any = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", _UNKNOWN)
    if wrapper is _UNKNOWN:
        if setting == "auto":
            raise RuntimeError(
                f"torch {torch.__version__} does not tell whether a model is in DistributedDataParallel: "
                "call mdnorm.distributed.synchronize(model, process_group), or with 'local', before training."
            )
        wrapper = None
    config = getattr(wrapper, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            "DistributedDataParallel.join cannot stand in for the collectives of metadata layers: iterate "
            "over mdnorm.distributed.even_batches(loader), or give join throw_on_early_termination=True."
        )
    if setting == "auto":
        if wrapper is None:
            return None
        group = wrapper.process_group
    else:
        group = torch.distributed.group.WORLD if setting == "world" else setting
    return group if torch.distributed.get_world_size(group) > 1 else None


def group_of(model: nn.Module, setting: Any) -> tuple[nn.Module, ProcessGroup | None]:
    """Return the model without its `DistributedDataParallel` and the group for work outside a forward pass.

    "auto" is the wrapper's group, and none without a wrapper. The wrapper's own forward pass would exchange
    buffers, so processes with more batches than others would wait for them. TypeError for wrong arguments.
    """
    check_module(model)
    setting = GroupSetting(setting).value
    if isinstance(model, nn.parallel.DistributedDataParallel):
        setting = model.process_group if setting == "auto" else setting
        model = model.module
    return model, active_group(setting)


def world_size(group: ProcessGroup | None) -> int:
    """Return the number of processes, 1 for None."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def eager(function: Callable[..., T]) -> Callable[..., T]:
    """Keep torch.compile out of a function that communicates."""
    # Not a decorator: torch.compiler.disable imports the compiler, which takes seconds.
    return (
        cast("Callable[..., T]", torch.compiler.disable(function))
        if torch.compiler.is_compiling()
        else function
    )


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The sum is its own adjoint: every process's loss depends on every process's summand.
        return all_reduce_sum(grad, ctx.group), None


def all_reduce_sum(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of a tensor over the group; the gradient is summed in the same way, to any order."""
    return cast(Tensor, _AllReduceSum.apply(tensor, group))  # type: ignore[no-untyped-call]


def gather_objects(item: T, group: ProcessGroup) -> list[T]:
    """Return the object of every process, in the order of their ranks."""
    items: list[Any] = [None] * world_size(group)
    torch.distributed.all_gather_object(items, item, group=group)
    return items


def gather_results(work: Callable[[], T], group: ProcessGroup | None, empty: type[Exception]) -> list[T]:
    """Return what the work gives on each process, but for those where it raises `empty`, unless all do.

    Where it fails on some process, raise on all, so that none waits for it: the process's own error, or a
    RuntimeError with that of another.
    """
    if group is None:
        return [work()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    is_empty = isinstance(failure, empty)
    said = f"{type(failure).__name__}: {failure}" if failure is not None and not is_empty else None
    answers = gather_objects((result, is_empty, said), group)
    if said is not None:
        raise cast(Exception, failure)
    for rank, (_, _, message) in enumerate(answers):
        if message is not None:
            raise RuntimeError(f"process {rank} of the group failed: {message}")
    if failure is not None and all(was_empty for _, was_empty, _ in answers):
        raise failure
    return [cast(T, answer) for answer, was_empty, _ in answers if not was_empty]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as one of many workers does, and put the number of threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
