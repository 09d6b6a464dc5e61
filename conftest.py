"""Shared settings: seeded randomness, hypothesis without a time limit on a loaded machine, errors seen."""

import os
from collections.abc import Iterator
from typing import Any

import numba
import pytest
import torch
from hypothesis import HealthCheck, settings

# dcor, the reference for distance correlations, compiles its functions at import into one folder of files.
# Two workers that do so at the same time have crashed each other, and as Python its results are the same.
# NumPy's universal functions are compiled in spite of the first line, and no test calls those.
numba.config.DISABLE_JIT = True
numba.guvectorize = lambda *signature, **options: lambda function: function

settings.register_profile(
    "mdnorm", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("mdnorm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _without_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and some write thousands of small files, each of which would wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


# As it is before any module of tests is imported: some packages change it at import, others when they train.
# Two workers with two threads each then wait for each other longer than they compute, and with another number
# of threads the last bit of a sum is another.
_NUM_THREADS = torch.get_num_threads()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # Before fixtures of any scope.
    if torch.get_num_threads() != _NUM_THREADS:
        torch.set_num_threads(_NUM_THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


_internal_errors: list[str] = []
_ended_workers: list[str] = []


def pytest_internalerror(excrepr: object) -> None:
    _internal_errors.append(str(excrepr))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _ended_workers.append(
        f"{node.gateway.id}: {getattr(node, 'workeroutput', {}).get('exitstatus')}, {error}"
    )


def pytest_unconfigure() -> None:
    # Pages on the missing workers follow a worker's own error, and a log's end shows only these.
    if _internal_errors:
        print("Workers that ended, with exit status and error:", *_ended_workers[:4], sep="\n  ")
        print("The first internal error:", *_internal_errors[0].splitlines()[-8:], sep="\n  ")
