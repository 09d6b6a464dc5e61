"""One thread: on a machine with other work, threads that wait for each other make short operations slow."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Importing numba, which dcor does, undoes OMP_NUM_THREADS.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
