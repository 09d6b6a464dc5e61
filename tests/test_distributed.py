"""Several gloo processes against one process on the whole batch."""

from __future__ import annotations

import os
import threading
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mdnorm
from four_processes import (
    CASES,
    SIZES,
    WORLD,
    Net,
    ending_batches,
    loss_of,
    make_data,
    prepare,
    run,
    shares,
    told,
    train,
    whole,
)
from mdnorm import MetadataNorm
from mdnorm.distributed import even_batches, gather_results, global_mean, synchronize
from mdnorm.moments import NoSamplesError
from reference import residual

TOLERANCES = {"float64": 1e-10, "float32": 1e-6}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the four processes left, scenario by scenario."""
    # Once for all workers of pytest-xdist, which have folders of their own in one folder.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "four_processes"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            torch.multiprocessing.spawn(run, args=(str(folder),), nprocs=WORLD)
    left = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for rank, scenarios in enumerate(left):
        for name, result in scenarios.items():
            assert not isinstance(result, str), f"process {rank}, {name}: {result}"
    return left


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_close(actual[key], expected[key], tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, tolerance)
    else:
        # The year 1990 among the state: relative to what is large, absolute for the rest.
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def deviation(state: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float(((state[key] - other[key]).abs() / (1 + other[key].abs())).max()) for key in other)


class TestOneProcessAndSeveral:
    @pytest.mark.parametrize("precision", list(TOLERANCES))
    @pytest.mark.parametrize("case", list(CASES))
    def test_outputs_gradients_state_and_evaluation_agree(self, results, case, precision):
        dtype = getattr(torch, precision)
        expected = train(case, dtype, prepare(case, dtype), whole())
        tolerance = TOLERANCES[precision]
        if case.startswith("scale") and precision == "float32":
            # The logarithm of a residual near zero shows rounding, with one process as with several: here
            # twice what one rounding of the weights changes.
            net = prepare(case, dtype)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1 + torch.finfo(dtype).eps)
            tolerance += 2 * deviation(train(case, dtype, net, whole())["state"], expected["state"])
            assert tolerance < 1e-5
        compared = set()
        for world in SIZES:
            for process, left in enumerate(results):
                if f"{world} {case} {precision}" not in left["equality"]:
                    continue
                compared.add(world)
                rank = process % 2 if world == 2 else process
                actual = left["equality"][f"{world} {case} {precision}"]
                for key in ("gradients", "state", "evaluation"):
                    assert_close(actual[key], expected[key], tolerance)
                outputs = [
                    out.split(sizes)[rank]
                    for out, sizes in zip(expected["outputs"], SIZES[world], strict=True)
                ]
                assert_close(actual["outputs"], outputs, tolerance)
        assert compared == ({2, 3, 4} if precision == "float64" else {2, 4})

    @pytest.mark.parametrize("case", list(CASES))
    def test_the_state_is_the_same_to_the_last_bit_on_every_process(self, results, case):
        for precision in TOLERANCES:
            first, *others = (left["equality"][f"4 {case} {precision}"]["state"] for left in results)
            for other in others:
                assert all(torch.equal(first[key], other[key]) for key in first)

    def test_against_least_squares_in_numpy(self, results):
        inputs, metadata, labels, _ = make_data("batch", torch.float64)
        net = prepare("batch", torch.float64)
        features = net.encoder(inputs[:24]).detach()
        expected = residual(features, metadata[:24], labels[:24]).reshape(24, 3, 4)
        actual = torch.cat([left["equality"]["4 batch float64"]["outputs"][0] for left in results])
        np.testing.assert_allclose(actual, expected, atol=1e-9)

    def test_accumulated_gradients(self, results):
        for case in ("running", "batch"):
            net = prepare(case, torch.float64)
            data = make_data(case, torch.float64)
            for rows in whole():
                inputs, metadata, labels, targets = (part[rows] for part in data)
                loss_of(case, net, net(inputs, metadata, labels)[0], targets, None).backward()
            expected = [parameter.grad for parameter in net.parameters()]
            for left in results:
                assert_close(left["accumulation"][case], expected, 1e-10)

    def test_fully_sharded(self, results):
        for case, actual in results[0]["fully_sharded"].items():
            net = prepare(case, torch.float64)
            expected = train(case, torch.float64, net, whole())
            buffers = {name: value for name, value in net.named_buffers() if "placement" not in name}
            for rank, left in enumerate(results):
                actual = left["fully_sharded"][case]
                outputs = [
                    out.split(sizes)[rank] for out, sizes in zip(expected["outputs"], SIZES[4], strict=True)
                ]
                assert_close(actual["outputs"], outputs, 1e-10)
                assert_close(actual["gradients"], expected["gradients"][-1], 1e-10)
                # Evaluation brings these up to date, which the sharded network has not done.
                stale = {"norm.estimator.coefficients"} if case == "penalty" else set()
                for name in buffers.keys() - stale:
                    assert_close(actual["buffers"][name], buffers[name], 1e-10)

    def test_with_activation_checkpointing(self, results):
        for case in ("running", "batch"):
            expected = train(case, torch.float64, prepare(case, torch.float64), whole())
            for left in results:
                for key in ("gradients", "state"):
                    assert_close(left["repeated"][case][key], expected[key], 1e-10)

    def test_a_process_may_have_tried_the_model_before(self, results):
        net = prepare("running", torch.float64)
        net(*(part[:9] for part in make_data("running", torch.float64)[:3]))
        expected = train("running", torch.float64, net, whole())
        for left in results:
            for key in ("gradients", "state"):
                assert_close(left["warmed"][key], expected[key], 1e-10)

    def test_compiled(self, results):
        expected = train("running", torch.float64, prepare("running", torch.float64), whole()[:2])
        for left in results[:2]:
            for key in ("gradients", "state"):
                assert_close(left["compiled"][key], expected[key], 1e-10)

    def test_without_a_layer_to_the_second_derivative(self, results):
        inputs, metadata, labels, _ = make_data("batch", torch.float64)
        for prior in (0.0, 5.0):
            features = inputs[24:48].clone().requires_grad_()
            out = mdnorm.metadata_norm(features, metadata[24:48], labels[24:48], prior=prior)
            gradient = torch.autograd.grad((out**3).sum(), features, create_graph=True)[0]
            second = torch.autograd.grad((gradient**2).sum(), features)[0]
            parts = zip(*(left["without_a_layer"][prior] for left in results), strict=True)
            actual = [torch.cat(part) for part in parts]
            assert_close(actual, [out.detach(), gradient.detach(), second], 1e-9)

    def test_a_group_is_shared_by_copies_and_not_saved(self, results):
        net = prepare("batch", torch.float64)
        data = make_data("batch", torch.float64)
        expected = net(*(part[24:48] for part in data[:3]))[1].detach()
        for rank, left in enumerate(results):
            assert_close(left["copies"]["features"], expected.split(SIZES[2][1])[rank % 2], 1e-10)
            assert left["copies"]["pickled"] == "auto"


class TestCommunication:
    def floats(self, case: str, num_columns: int) -> tuple[list[int], list[int]]:
        """How many numbers the documentation says are exchanged, forward and backward."""
        d = 3 if "channels" in case else 12
        k = num_columns
        removed = k - 2 + ("centred" in case)
        moments = k * (d + k) + 1
        if case.startswith("scale"):
            return [moments] * 4, [removed * d]
        if case.startswith("penalty"):
            return [1], []
        if case.startswith("recursive"):
            return [moments], []
        return [moments], [removed * d]

    @pytest.mark.parametrize("case", list(CASES))
    def test_one_collective_each_way_and_its_bytes(self, results, case):
        # Metadata, label and intercept.
        num_columns = (3 if "sites" in case else 2) + 2
        for precision, size in (("float64", 8), ("float32", 4)):
            forward, backward = self.floats(case, num_columns)
            for left in results:
                calls = left["bytes_of_collectives"][f"{case} {precision}"]
                # Statistics of the design travel in float64, whatever the features are.
                assert calls == ([8 * count for count in forward], [size * count for count in backward])

    def test_the_first_step_agrees_on_origin_and_scale(self, results):
        moments = 8 * (4 * (12 + 4) + 1)
        for left in results:
            first, *others = left["bytes_of_collectives"]["first"]
            assert first == [8 * 4, 8 * 4, moments]
            assert others == [[moments]] * 2

    def test_one_process_alone_waits_for_nobody(self, results):
        assert results[0]["alone"]["calls"] == 0
        assert results[0]["alone"]["difference"] == 0

    def test_local_layers_fit_their_own_share(self, results):
        data = make_data("batch", torch.float64)
        for rank, left in enumerate(results):
            rows = shares(4, rank)[0]
            net = prepare("batch", torch.float64)
            assert left["local"]["calls"] == 0
            assert_close(left["local"]["outputs"], net(*(part[rows] for part in data[:3]))[1].detach(), 1e-12)

    def test_an_overflow_on_one_process_changes_no_state(self, results):
        for left in results:
            assert left["overflow"].keys() >= {"running", "batch", "dataset", "recursive", "scale"}
            assert not any(left["overflow"].values()), left["overflow"]


GROUP: Any = object()  # of processes that are played by threads


def share_as_processes(shares, function):
    """What `function(share)` returns on each of as many processes, which are threads of this one."""
    buffers: list[Any] = [None] * len(shares)
    results: list[Any] = [None] * len(shares)
    barrier, rank = threading.Barrier(len(shares)), threading.local()

    def all_reduce(buffer, group):
        assert group is GROUP
        buffers[rank.value] = buffer.clone()
        barrier.wait(60)
        buffer.copy_(torch.stack(buffers).sum(0))
        barrier.wait(60)

    def process(number):
        rank.value = number
        try:
            results[number] = function(shares[number])
        except BaseException:
            barrier.abort()
            raise

    with (
        mock.patch("torch.distributed.get_world_size", return_value=len(shares)),
        mock.patch("torch.distributed.all_reduce", side_effect=all_reduce),
    ):
        threads = [threading.Thread(target=process, args=(number,)) for number in range(len(shares))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


class TestSharedMoments:
    @given(
        sizes=st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(lambda sizes: sum(sizes) > 1),
        k=st.integers(1, 4),
        d=st.integers(1, 5),
        location=st.sampled_from([0.0, 1990.0, 1.7e9]),
        kind=st.sampled_from(["continuous", "sites"]),
        seed=st.integers(0, 1000),
    )
    def test_the_fit_of_all_samples_in_numpy(self, sizes, k, d, location, kind, seed):
        """Columns far from zero (a year, a time stamp) and exactly collinear ones (one for every site)."""
        rng = np.random.default_rng(seed)
        features = 3 + rng.normal(size=(sum(sizes), d))
        if kind == "sites":
            metadata = np.eye(k)[rng.integers(k, size=sum(sizes))]
        else:
            metadata = location + rng.normal(size=(sum(sizes), k))
        bounds = np.cumsum(sizes)[:-1]
        parts = list(zip(np.split(metadata, bounds), np.split(features, bounds), strict=True))

        def process(share):
            m, f = map(torch.from_numpy, share)
            return mdnorm.metadata_norm(f, m, process_group=GROUP)

        # The columns are differences of numbers of that size.
        tolerance = 1e-9 + 1e3 * np.finfo(float).eps * location
        centred = metadata - metadata.mean(0)
        conditioned = np.linalg.cond(centred[:, :-1] if kind == "sites" else centred) if k > 1 else 1
        if conditioned < 1e3:
            out = np.concatenate(share_as_processes(parts, process))
            expected = residual(features, centred, None)
            np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * conditioned**2)

    def test_no_sample_on_any_process(self):
        nothing = torch.zeros(0, 2, dtype=torch.float64)
        for out in share_as_processes(
            [nothing] * 2, lambda x: mdnorm.metadata_norm(x, x, process_group=GROUP)
        ):
            assert out.shape == (0, 2)


class TestUnevenNumbersOfBatches:
    def test_those_that_ended_give_empty_batches(self, results):
        net = prepare("running", torch.float64)
        data = make_data("running", torch.float64)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(WORLD):
            rows = torch.cat(
                [ending_batches(rank)[step] for rank in range(WORLD) if len(ending_batches(rank)) > step]
            )
            inputs, metadata, labels, targets = (part[rows] for part in data)
            optimizer.zero_grad()
            (net(inputs, metadata, labels)[0] - targets).square().mean().backward()
            optimizer.step()
        expected = net.state_dict()
        for rank, left in enumerate(results):
            assert left["ended"]["sizes"] == [6] * (rank + 1) + [0] * (3 - rank)
            assert_close(left["ended"]["state"], dict(expected), 1e-10)

    def test_what_cannot_be_emptied(self, results):
        for rank, left in enumerate(results):
            answers = left["nothing_to_empty"]
            assert "the loaders of 1 of 4 processes are empty" in answers["empty"]
            assert answers["shapes"] == [(3, 3, 3), (0, 0, 0) if rank % 2 else (3, 3, 3)]
            assert "holds a str, which has no dimension of samples" in answers["names"]

    def test_join_is_an_error_and_not_a_wait(self, results):
        for left in results:
            assert "mdnorm.distributed.even_batches" in left["join"]["plain"]

    def test_join_that_throws_ends_all_processes_in_the_same_step(self, results):
        for left in results:
            assert "throw_on_early_termination" not in left["join"]["plain"].split(":")[0]
            assert "exhausted" in left["join"]["throwing"]
            assert left["join"]["steps"] == 2

    def test_in_one_process_the_loader_as_it_is(self):
        assert list(even_batches([1, "two"])) == [1, "two"]
        assert list(even_batches([])) == []


class TestGramAndRecalibration:
    def expected(self, rows: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        data = tuple(part[rows] for part in make_data("dataset", torch.float64)[:3])
        net = Net("dataset", torch.float64)
        gram = mdnorm.fit_gram(net, data[1], data[2])
        mdnorm.recalibrate(net, [data])
        return gram, net.state_dict()

    @pytest.mark.parametrize("name", ["uneven", "pair"])
    def test_shares_of_held_out_data(self, results, name):
        data = make_data("dataset", torch.float64)[:3]
        expected = told(mdnorm.recalibrate(Net("dataset", torch.float64), [data], held_out=[data]))
        first = results[0]["gram_and_recalibration"][name]
        for left in results:
            actual = left["gram_and_recalibration"][name]
            assert actual["held_out"][:2] == (96, 96)
            # Which rows make a group depends on the processes, errors of coefficients and the share do not.
            assert_close(actual["held_out"][2], expected[2], 1e-9)
            assert actual["held_out"][3] == pytest.approx(expected[3], rel=1e-9)
            assert all(torch.equal(first["after"][key], actual["after"][key]) for key in first["after"])

    @pytest.mark.parametrize("name", ["uneven", "pair"])
    def test_shares_of_the_data(self, results, name):
        gram, state = self.expected(torch.arange(96))
        for left in results:
            actual = left["gram_and_recalibration"][name]
            products = map(torch.as_tensor, gram.products()[:3:2])
            assert_close(actual["gram"], (*products, gram.weight), 1e-12)
            assert actual["order"] == ["norm"]
            assert_close(actual["state"], dict(state), 1e-10)
        first, *others = (left["gram_and_recalibration"][name]["state"] for left in results)
        assert all(torch.equal(first[key], other[key]) for other in others for key in first)

    def test_a_wrapped_model_brings_its_group(self, results):
        gram, state = self.expected(torch.arange(24))
        for left in results:
            assert left["gram_and_recalibration"]["wrapped"]["gram"] == gram.weight
            assert_close(left["gram_and_recalibration"]["wrapped"]["state"], dict(state), 1e-10)

    def test_sizes_that_one_process_knows(self, results):
        data = make_data("dataset", torch.float64)[:3]
        lazy = MetadataNorm(None, None, 1, estimator="batch", dtype=torch.float64)
        mdnorm.recalibrate(lazy, [data])
        for left in results:
            assert_close(left["gram_and_recalibration"]["lazy"], dict(lazy.state_dict()), 1e-10)

    def test_a_failure_of_one_is_an_error_on_all(self, results):
        for rank, left in enumerate(results):
            answers = left["failures"]
            own = "ValueError: metadata has NaN"
            other = "RuntimeError: process 1 of the group failed: ValueError: metadata has NaN"
            assert answers["nan gram"].startswith(own if rank == 1 else other)
            assert "no samples: the Gram matrix" in answers["no gram"]
            assert "only moments of the same columns can be merged" in answers["widths"]
            assert "at the layer 'norm': features has NaN" in answers["nan features"]
            assert ("process 2 of the group failed" in answers["nan features"]) == (rank != 2)
            assert "no samples: the loader is empty" in answers["no samples"]
            assert "does not belong to the process group" in answers["stranger"]


def test_a_failure_elsewhere_is_told_to_a_process_without_samples(monkeypatch):
    def work():
        raise NoSamplesError("no samples here")

    for others, error, message in (
        ([(None, False, "ValueError: NaN")], RuntimeError, "process 1 of the group failed: ValueError: NaN"),
        ([(None, True, None)], NoSamplesError, "no samples here"),
    ):
        monkeypatch.setattr("mdnorm.distributed.gather_objects", lambda own, group, rest=others: [own, *rest])
        with pytest.raises(error, match=message):
            gather_results(work, object(), NoSamplesError)


class TestSettings:
    def test_in_one_process_every_setting_is_local(self):
        inputs, metadata, labels, _ = make_data("batch", torch.float64)
        plain = MetadataNorm(6, 2, 1, estimator="batch", dtype=torch.float64)
        expected = plain(inputs, metadata, labels)
        for setting in ("auto", "world", "local"):
            layer = MetadataNorm(
                6, 2, 1, estimator="batch", dtype=torch.float64, scale=False, process_group=setting
            )
            assert layer.process_group == setting
            assert torch.equal(layer(inputs, metadata, labels), expected)

    def test_synchronize_returns_the_model(self):
        layer = MetadataNorm(3, 1, scale=True)
        assert synchronize(layer) is layer
        assert layer.process_group == "world"

    @pytest.mark.parametrize("setting", [None, 3, "all"])
    def test_what_is_no_group(self, setting):
        with pytest.raises(TypeError, match=r"process_group must be a ProcessGroup, 'auto'"):
            MetadataNorm(3, 1, process_group=setting)

    def test_a_torch_that_does_not_tell_is_an_error_and_not_a_local_fit(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.delattr(nn.parallel.DistributedDataParallel, "_active_ddp_module")
        features, metadata = torch.randn(9, 3), torch.randn(9, 1)
        with pytest.raises(RuntimeError, match=r"call mdnorm\.distributed\.synchronize"):
            MetadataNorm(3, 1)(features, metadata)
        assert MetadataNorm(3, 1, process_group="local")(features, metadata).shape == (9, 3)

    def test_a_model_without_a_layer(self):
        with pytest.raises(ValueError, match="Linear has no MetadataNorm layer"):
            synchronize(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
            synchronize(None)

    def test_the_global_mean_of_one_process(self):
        losses = torch.randn(7, requires_grad=True)
        assert torch.equal(global_mean(losses), losses.sum() / 7)
        nothing = global_mean(losses[:0])
        nothing.backward()
        assert nothing == 0
        assert torch.equal(losses.grad, torch.zeros(7))
