"""Run many independent trainings in worker processes, with progress, interruption and resumption."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING

import torch

from mdnorm.distributed import one_thread
from mdnorm_experiments.results import ResultStore, Row

if TYPE_CHECKING:
    from mdnorm_experiments.settings import Run

_PATIENCE = 0.5  # seconds between looks at what other processes have finished


Train = Callable[["Run", Callable[[], None]], Row]
"""Trains one run, calls the second argument after each epoch, and returns the measured values."""
_Finish = Callable[["Run", Callable[[], Row]], None]


class RunFailedError(Exception):
    """Some runs failed; the rows of the others are stored."""


class Runner:
    """Trains what the store does not hold yet and stores each row as soon as it is there.

    Every run has one thread to itself, so a row does not depend on how many run beside it. `train` is a
    module-level function, since the `jobs` worker processes import it; one job trains in this process, beside
    others that share the store. With more jobs let no other process train for the store: it might train the
    same runs, of which the first row is kept.
    """

    def __init__(self, store: ResultStore, train: Train, jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        self.store = store
        self.train = train
        self.jobs = jobs

    def pending(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs without a row."""
        return [run for run in runs if self.store.find(run.settings()) is None]

    def run(
        self,
        runs: Sequence[Run],
        epoch_done: Callable[[], None] = lambda: None,
        run_done: Callable[[Row], None] = lambda row: None,
    ) -> list[Row]:
        """Train the pending runs and return the rows of all, in the order of `runs`.

        The functions are called when an epoch of some run has ended, and when a row was stored.
        RunFailedError: some raised or their process died; the others were finished and stored first. After
        KeyboardInterrupt finished rows are stored, and the same call goes on from there.
        """
        failures: list[str] = []

        def finish(run: Run, measure: Callable[[], Row]) -> None:
            # A failure becomes a message, so that it costs no other run.
            settings = run.settings()
            try:
                row = self.store.add(settings, measure())
            except Exception as error:
                keys = (key for key in ("method", "batch_size", "seed") if key in settings)
                name = ", ".join(f"{key}={settings[key]}" for key in keys)
                failures.append(f"{name}: {type(error).__name__}: {error}")
            else:
                run_done(row)

        (self._in_process if self.jobs == 1 else self._in_workers)(self.pending(runs), epoch_done, finish)
        if failures:
            raise RunFailedError("\n".join(failures))
        rows = [self.store.find(run.settings()) for run in runs]
        return [row for row in rows if row is not None]

    def _in_process(self, runs: Sequence[Run], epoch_done: Callable[[], None], finish: _Finish) -> None:
        """Train what no other process has claimed until every run has a row or has failed here."""
        store = self.store
        waiting = list(runs)
        # As the workers do: sums in another order are other numbers.
        with one_thread():
            while waiting:
                held_by_others = []
                for run in waiting:
                    with store.claim(run.settings()) as claimed:
                        if not claimed:
                            held_by_others.append(run)
                            continue
                        store.refresh()
                        if store.find(run.settings()) is None:
                            finish(run, partial(self.train, run, epoch_done))
                if len(held_by_others) == len(waiting):
                    time.sleep(_PATIENCE)
                store.refresh()
                # Looked at again: the process that held a run may have died.
                waiting = self.pending(held_by_others)

    def _in_workers(self, runs: Sequence[Run], epoch_done: Callable[[], None], finish: _Finish) -> None:
        if not runs:
            return
        # Spawned, not forked: a fork of a process with running torch threads can hang.
        context = multiprocessing.get_context("spawn")
        epochs: Queue[int] = context.Queue()
        pool = ProcessPoolExecutor(
            min(self.jobs, len(runs)), context, initializer=_start_worker, initargs=(epochs,)
        )
        try:
            futures = {pool.submit(self.train, run, _epoch_done): run for run in runs}
            while futures:
                done, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(epochs, epoch_done)
                for future in done:
                    finish(futures.pop(future), future.result)
        except BaseException:
            # Ctrl-C: nothing that is running can be kept, so don't wait for it.
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
        pool.shutdown()
        # Workers flush what they have told when they end, so now the count is complete.
        _drain(epochs, epoch_done)


_epochs: Queue[int] | None = None


def _start_worker(epochs: Queue[int]) -> None:
    global _epochs
    _epochs = epochs
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _epoch_done() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        # Killed outright: nobody would store the row.
        os._exit(1)
    if _epochs is not None:
        _epochs.put(1)


def _drain(epochs: Queue[int], epoch_done: Callable[[], None]) -> None:
    while not epochs.empty():
        epochs.get()
        epoch_done()
