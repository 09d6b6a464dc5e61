"""Streaming metrics against the same in one piece, against `dcor` and fairlearn, and over two processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import dcor
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from two_processes import SHARES, make_data, make_metrics, run, update

from mdnorm.metrics import distance_correlation_sqr
from mdnorm.metrics.reservoir import TooFewSamplesError, sample_keys
from mdnorm.metrics.streaming import DistanceCorrelation, GroupRates

TOLERANCE = 1e-9


def _dcor(features: Tensor, metadata: Tensor) -> float:
    x, y = features.flatten(1).double().numpy(), metadata.reshape(len(metadata), -1).double().numpy()
    return float(dcor.u_distance_correlation_sqr(x, y))


# -- distance correlation ---------------------------------------------------------------------------------


@hypothesis.settings(max_examples=20)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=6), st.integers(0, 9))
def test_batches_give_the_value_of_the_whole(sizes: list[int], seed: int) -> None:
    features, metadata, labels = make_data(sum(sizes) + 12, seed)
    metric = DistanceCorrelation()
    within = DistanceCorrelation(within_labels=True)
    for rows in torch.arange(len(features)).split([*sizes, 12]):
        metric.update(features[rows], metadata[rows])
        within.update(features[rows], metadata[rows], labels[rows])
    value = metric.compute()
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(_dcor(features, metadata), abs=TOLERANCE)
    by_label = within.compute()
    assert list(by_label) == ["label_0", "label_1", "label_2"]
    for label in range(3):
        mask = labels == label
        expected = _dcor(features[mask], metadata[mask])
        assert by_label[f"label_{label}"].item() == pytest.approx(expected, abs=TOLERANCE)


def test_a_value_for_each_column_and_all_together() -> None:
    features, metadata, labels = make_data(60)
    metric = DistanceCorrelation(per_column=True)
    metric.update(features, metadata)
    expected = {
        "column_0": _dcor(features, metadata[:, 0]),
        "column_1": _dcor(features, metadata[:, 1]),
        "joint": _dcor(features, metadata),
    }
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected)

    metric = DistanceCorrelation(per_column=True)
    metric.update(features, metadata[:, 0])
    assert list(metric.compute()) == ["column_0"]

    wide = torch.cat([metadata, metadata.square(), torch.randn(60, 1)], dim=1)
    metric = DistanceCorrelation(True, column_names={"b": [1, 3], "a": (2, 0)})
    metric.update(features, wide, labels)
    values = metric.compute()
    names = [f"{name}/label_{label}" for name in ("b", "a", "joint") for label in range(3)]
    assert list(values) == names
    for name, columns in {"b": [1, 3], "a": [2, 0], "joint": [0, 1, 2, 3]}.items():  # not the fifth column
        for label in range(3):
            mask = labels == label
            expected_value = _dcor(features[mask], wide[mask][:, columns])
            assert values[f"{name}/label_{label}"].item() == pytest.approx(expected_value, abs=TOLERANCE)


@hypothesis.settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    max_samples=st.integers(4, 60),
    seed=st.integers(0, 5),
)
def test_the_sample_depends_on_the_stream_not_on_its_batches(
    sizes: list[int], max_samples: int, seed: int
) -> None:
    features, metadata, _ = make_data(sum(sizes) + 12)
    metric = DistanceCorrelation(max_samples=max_samples, seed=seed)
    for rows in torch.arange(len(features)).split([*sizes, 12]):
        metric.update(features[rows], metadata[rows])
    kept = sample_keys(0, len(features), seed=seed).argsort()[:max_samples].sort().values
    assert metric.compute().item() == pytest.approx(_dcor(features[kept], metadata[kept]), abs=TOLERANCE)
    assert sum(piece.numel() for piece in metric.features) <= 2 * max_samples * 6
    assert int(metric.num_seen) == len(features)


def test_seeds_draw_different_samples() -> None:
    features, metadata, _ = make_data(200)
    values = set()
    for seed in range(5):
        metric = DistanceCorrelation(max_samples=50, seed=seed)
        metric.update(features, metadata)
        values.add(metric.compute().item())
    assert len(values) == 5


@pytest.mark.parametrize("max_samples", [None, 30])
def test_forward_gives_the_value_of_the_batch_and_adds_it(max_samples: int | None) -> None:
    features, metadata, _ = make_data(100)
    metric = DistanceCorrelation(max_samples=max_samples)
    other = DistanceCorrelation(max_samples=max_samples)
    for rows in torch.arange(100).split(25):
        value = metric(features[rows], metadata[rows])
        assert value.item() == pytest.approx(_dcor(features[rows], metadata[rows]), abs=TOLERANCE)
        other.update(features[rows], metadata[rows])
    assert metric.compute() == other.compute()
    assert sum(piece.numel() for piece in metric.features) <= 6 * (2 * max_samples if max_samples else 100)


@pytest.mark.parametrize("max_samples", [None, 30])
def test_reset_begins_anew(max_samples: int | None) -> None:
    metric = DistanceCorrelation(max_samples=max_samples)
    metric.update(*make_data(50, 1)[:2])
    metric.compute()
    metric.reset()
    metric.update(torch.randn(40, 5), torch.randn(40, 3))  # other columns than before
    metric.reset()
    metric.update(*make_data(50, 2)[:2])
    fresh = DistanceCorrelation(max_samples=max_samples)
    fresh.update(*make_data(50, 2)[:2])
    assert metric.compute() == fresh.compute()


@pytest.mark.parametrize("max_samples", [None, 30])
def test_copies_and_saved_states_go_on_on_their_own(max_samples: int | None, tmp_path: Path) -> None:
    features, metadata, labels = make_data(120)
    settings: dict[str, Any] = {"within_labels": True, "max_samples": max_samples, "seed": 3}
    whole = DistanceCorrelation(**settings)
    whole.update(features, metadata, labels)
    metric = DistanceCorrelation(**settings)
    metric.update(features[:70], metadata[:70], labels[:70])

    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    loaded = DistanceCorrelation(**settings)
    assert loaded.state_dict() == {}  # not part of a checkpoint unless asked for
    loaded.persistent(True)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for other in (metric.clone(), pickle.loads(pickle.dumps(metric)), loaded):
        other.update(features[70:], metadata[70:], labels[70:])
        assert other.compute() == whole.compute()
    # None of them has changed the metric itself.
    metric.update(features[70:], metadata[70:], labels[70:])
    assert metric.compute() == whole.compute()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_lose_nothing_more(dtype: torch.dtype) -> None:
    features, metadata, _ = make_data(80)
    features, metadata = features.to(dtype), metadata.to(dtype)
    metric = DistanceCorrelation().half()
    metric.update(features, metadata)
    assert metric.features[0].dtype == torch.float32
    assert metric.compute().item() == pytest.approx(_dcor(features, metadata), abs=TOLERANCE)


def test_no_graph_is_kept() -> None:
    features = torch.randn(20, 3, requires_grad=True)
    metric = DistanceCorrelation()
    value = metric(features * 2, torch.randn(20))
    assert not value.requires_grad
    assert not metric.features[0].requires_grad


def test_inference_mode_and_what_comes_after() -> None:
    features, metadata, _ = make_data(60)
    metric = DistanceCorrelation(max_samples=20)
    with torch.inference_mode():
        metric.update(features[:30], metadata[:30])
    metric.update(features[30:], metadata[30:])
    other = DistanceCorrelation(max_samples=20)
    other.update(features, metadata)
    assert metric.compute() == other.compute()


def test_a_collection_keeps_apart_what_would_differ_later() -> None:
    features, metadata, labels = make_data(90)
    preds = torch.nn.functional.one_hot(labels, 3).float()
    metrics = {
        "all": DistanceCorrelation(),
        "sampled": DistanceCorrelation(max_samples=30),
        "reseeded": DistanceCorrelation(max_samples=30, seed=1),
        "columns": DistanceCorrelation(per_column=True),
        "within": DistanceCorrelation(within_labels=True),
        "accuracy": MulticlassAccuracy(3, average="micro"),
    }
    alone = {name: metric.clone() for name, metric in metrics.items() if name != "accuracy"}
    collection = MetricCollection(metrics)
    for rows in torch.arange(90).split(10):
        collection.update(
            features=features[rows],
            metadata=metadata[rows],
            labels=labels[rows],
            preds=preds[rows],
            target=labels[rows],
        )
        for metric in alone.values():
            metric.update(features[rows], metadata[rows], labels[rows])
    expected: dict[str, Tensor] = {"accuracy": torch.tensor(1.0)}
    for name, metric in alone.items():
        value = metric.compute()
        expected |= value if isinstance(value, dict) else {name: value}
    assert collection.compute() == expected
    groups = [set(group) for group in collection.compute_groups.values()]
    assert {"all", "columns"} in groups
    assert len(groups) == 5


@pytest.mark.parametrize("max_samples", [None, 30])
def test_merging_two_streams(max_samples: int | None) -> None:
    features, metadata, labels = make_data(100)
    first, second = (DistanceCorrelation(True, max_samples, seed=seed) for seed in (0, 1))
    first.update(features[:40], metadata[:40], labels[:40])
    second.update(features[40:], metadata[40:], labels[40:])
    first.merge_state(DistanceCorrelation(True, max_samples, seed=2))  # nothing in it
    first.merge_state(second)
    keys = torch.cat([sample_keys(0, 40, seed=0), sample_keys(0, 60, seed=1)])
    kept = keys.argsort()[:max_samples]
    for label, value in first.compute().items():
        mask = labels[kept] == int(label.removeprefix("label_"))
        assert value.item() == pytest.approx(_dcor(features[kept][mask], metadata[kept][mask]), abs=TOLERANCE)
    empty = DistanceCorrelation(True, max_samples, seed=2)
    empty.merge_state(first.metric_state)
    values = {label: value.item() for label, value in first.compute().items()}
    assert {label: value.item() for label, value in empty.compute().items()} == pytest.approx(values)


def test_what_cannot_be_merged() -> None:
    features, metadata, _ = make_data(40)
    metric, same_seed = DistanceCorrelation(max_samples=20), DistanceCorrelation(max_samples=20)
    for other in (metric, same_seed):
        other.update(features, metadata)
    with pytest.raises(ValueError, match=r"seed=0 .*give each its own seed"):
        metric.merge_state(same_seed)
    with pytest.raises(ValueError, match="differ in max_samples \\(20 and 30\\)"):
        metric.merge_state(DistanceCorrelation(max_samples=30))
    with pytest.raises(ValueError, match="differ in within_labels"):
        metric.merge_state(DistanceCorrelation(True, 20))
    narrow = DistanceCorrelation(max_samples=20, seed=1)
    narrow.update(features[:, 0], metadata)
    with pytest.raises(ValueError, match=r"features have 2 value\(s\) a sample, but 6"):
        metric.merge_state(narrow)
    for wrong in ({"features": []}, GroupRates(2), 3):
        with pytest.raises(TypeError, match="must be a DistanceCorrelation or a dict of its states"):
            metric.merge_state(wrong)  # type: ignore[arg-type]


def test_too_few_samples() -> None:
    metric = DistanceCorrelation()
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(TooFewSamplesError, match=r"only 0 sample\(s\).*call update"),
    ):
        metric.compute()
    metric.update(torch.zeros(0, 2), torch.zeros(0))
    with pytest.raises(TooFewSamplesError, match=r"only 0 sample\(s\)"):
        metric.compute()
    metric.update(torch.randn(3, 2), torch.randn(3))
    with pytest.raises(TooFewSamplesError, match=r"only 3 sample\(s\).*at least 4"):
        metric.compute()
    metric.update(torch.randn(1, 2), torch.randn(1))
    assert -1 <= metric.compute().item() <= 1
    within = DistanceCorrelation(within_labels=True)
    within.update(torch.randn(10, 2), torch.randn(10), [0] * 6 + [7] * 3 + [-1])
    with pytest.raises(TooFewSamplesError, match=r"label class\(es\) -1 \(1\), 7 \(3\) have fewer than 4"):
        within.compute()


@pytest.mark.parametrize(
    ("settings", "batch", "error", "message"),
    [
        ({"within_labels": True}, (torch.zeros(4, 6), torch.zeros(4, 2)), ValueError, "labels are needed"),
        ({}, (torch.zeros(4, 5), torch.zeros(4, 2)), ValueError, r"features have 5 .*, but 6 .*Average"),
        ({}, (torch.zeros(4, 6), torch.zeros(4)), ValueError, r"metadata have 1 value\(s\) a sample, but 2"),
        ({}, (torch.zeros(4, 6), torch.zeros(3, 2)), ValueError, "got 4 rows in features and 3 in metadata"),
        ({}, (torch.zeros(4, 6), torch.full((4, 2), torch.nan)), ValueError, "metadata has NaN"),
        ({"column_names": ["a"]}, (torch.zeros(4, 6), torch.zeros(4, 2)), ValueError, r"1 name\(s\) \(a\)"),
    ],
)
def test_a_refused_batch_leaves_the_state_as_it_was(
    settings: dict[str, Any], batch: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    features, metadata, labels = make_data(30)
    metric = DistanceCorrelation(**settings)
    if "column_names" not in settings:
        metric.update(features, metadata, labels)
    before = {
        name: torch.tensor(value) if isinstance(value, int) else value
        for name, value in metric.metric_state.items()
    }
    with pytest.raises(error, match=message):
        metric.update(*batch)
    after = metric.metric_state
    assert before.keys() == after.keys()
    for name, value in before.items():
        parts = zip(value, after[name], strict=True) if isinstance(value, list) else [(value, after[name])]
        assert all(torch.equal(one, other) for one, other in parts)


@pytest.mark.gpu
@pytest.mark.parametrize("max_samples", [None, 30])
def test_device_moves_on_a_gpu(max_samples: int | None) -> None:
    features, metadata, labels = make_data(90)
    expected = DistanceCorrelation(True, max_samples)
    expected.update(features, metadata, labels)
    metric = DistanceCorrelation(True, max_samples)
    metric.update(features[:30], metadata[:30], labels[:30])
    metric.to("cuda")
    metric.update(features[30:60].cuda(), metadata[30:60], labels[30:60].cuda())
    assert all(piece.is_cuda for piece in metric.features)
    metric.to("cpu")
    metric.update(features[60:].cuda(), metadata[60:].cuda(), labels[60:])
    assert metric.compute() == expected.compute()
    on_cpu = DistanceCorrelation(True, max_samples, compute_on_cpu=True).to("cuda")
    for rows in torch.arange(90).split(30):
        on_cpu.update(features[rows].cuda(), metadata[rows].cuda(), labels[rows].cuda())
    assert not any(piece.is_cuda for piece in on_cpu.features)
    assert on_cpu.compute() == expected.compute()


# -- rates of groups --------------------------------------------------------------------------------------


def _expected_rates(
    preds: np.ndarray, target: np.ndarray, groups: np.ndarray, num_classes: int
) -> dict[str, float]:
    """The rates by scikit-learn; undefined ones are left out."""
    result: dict[str, float] = {}
    gaps: dict[str, dict[str, list[float]]] = {}
    for group in sorted(set(groups)):
        mask = groups == group
        result[f"accuracy/{group}"] = accuracy_score(target[mask], preds[mask])
        gaps.setdefault("accuracy", {}).setdefault("", []).append(result[f"accuracy/{group}"])
        for c in [1] if num_classes == 2 else range(num_classes):
            label = "" if num_classes == 2 else f"class_{c}/"
            (tn, fp), (fn, tp) = confusion_matrix(target[mask] == c, preds[mask] == c, labels=[False, True])
            for rate, hits, total in (
                ("true_positive_rate", tp, tp + fn),
                ("false_positive_rate", fp, fp + tn),
            ):
                if total:
                    result[f"{rate}/{label}{group}"] = hits / total
                    gaps.setdefault(rate, {}).setdefault(label, []).append(hits / total)
    for rate, values in gaps.items():
        differences = [max(one) - min(one) for one in values.values() if len(one) > 1]
        if differences:
            result[f"{rate}/gap"] = max(differences)
    return result


@given(
    n=st.integers(1, 40),
    num_classes=st.integers(2, 4),
    num_groups=st.integers(2, 4),
    seed=st.integers(0, 999),
)
def test_rates_are_those_of_scikit_learn(n: int, num_classes: int, num_groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    preds, target = rng.integers(num_classes, size=(2, n))
    names = np.array([f"site {letter}" for letter in "abcd"[:num_groups]])
    groups = names[rng.integers(num_groups, size=n)]
    metric = GroupRates(names, num_classes)
    for rows in np.array_split(np.arange(n), 3):
        metric.update(torch.from_numpy(preds[rows]), torch.from_numpy(target[rows]), groups[rows])
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx(_expected_rates(preds, target, groups, num_classes), abs=1e-6)


def test_gaps_are_those_of_fairlearn() -> None:
    fairlearn = pytest.importorskip("fairlearn.metrics")
    rng = np.random.default_rng(0)
    preds, target, groups = rng.integers(2, size=200), rng.integers(2, size=200), rng.integers(3, size=200)
    metric = GroupRates(3)
    value = metric(torch.from_numpy(preds), torch.from_numpy(target), torch.from_numpy(groups))
    odds = fairlearn.equalized_odds_difference(target, preds, sensitive_features=groups)
    gaps = (value["true_positive_rate/gap"], value["false_positive_rate/gap"])
    assert max(gaps).item() == pytest.approx(odds, abs=1e-6)


def test_scores_become_classes() -> None:
    target, groups = torch.tensor([1, 0, 1, 0]), ["a", "a", "b", "b"]
    expected = GroupRates(["a", "b"])
    expected.update(torch.tensor([1, 0, 0, 1]), target, groups)
    probabilities = torch.tensor([0.9, 0.2, 0.5, 0.6])  # at the threshold: not above it
    logits = torch.logit(probabilities).half()
    for threshold, scores in (
        (0.5, probabilities),
        (0.5, probabilities[:, None]),
        (0.5, torch.stack([1 - probabilities, probabilities], dim=1)),
        (0.0, logits),
    ):
        metric = GroupRates(["a", "b"], threshold=threshold)
        metric.update(scores, target, groups)
        assert metric.compute() == expected.compute()
    three = GroupRates(["a", "b"], num_classes=3)
    three.update(torch.eye(3)[[2, 0, 1, 1]], torch.tensor([2, 0, 1, 0]), groups)
    values = three.compute()
    assert values["accuracy/a"] == 1
    assert values["accuracy/b"] == 0.5
    assert "true_positive_rate/class_2/b" not in values


def test_forward_reset_and_saved_state_of_rates(tmp_path: Path) -> None:
    preds, target, groups = torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    metric = GroupRates(2)
    assert metric(preds[:2], target[:2], groups[:2])["accuracy/0"] == 1
    metric(preds[2:], target[2:], groups[2:])
    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    loaded = GroupRates(2)
    loaded.persistent(True)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for other in (metric, loaded, metric.clone()):
        other.update(preds, target, groups)
    assert metric.compute() == loaded.compute()
    assert metric.compute()["accuracy/gap"] == 0.5
    metric.reset()
    metric.update(preds[:2], target[:2], groups[:2])
    # No samples in one group: nothing to report of it, and no gap.
    assert set(metric.compute()) == {"accuracy/0", "true_positive_rate/0", "false_positive_rate/0"}


def test_collections_keep_thresholds_apart() -> None:
    collection = MetricCollection({"low": GroupRates(2, threshold=0.2), "high": GroupRates(2, threshold=0.8)})
    collection.update(
        preds=torch.tensor([0.9, 0.1]), target=torch.tensor([1, 0]), groups=torch.tensor([0, 1])
    )
    collection.update(
        preds=torch.tensor([0.5, 0.5]), target=torch.tensor([1, 1]), groups=torch.tensor([0, 1])
    )
    assert collection["low"].compute()["accuracy/0"] == 1
    assert collection["high"].compute()["accuracy/0"] == 0.5


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.tensor([0, 2]), torch.tensor([0, 1]), [0, 1]), ValueError, "preds .* 0 to 1, got 2 in row 1"),
        ((torch.tensor([0, 1]), torch.tensor([0, -1]), [0, 1]), ValueError, "target .*, got -1 in row 1"),
        ((torch.tensor([0, 1]), torch.tensor([0.0, 0.5]), [0, 1]), ValueError, "target .*, got 0.5 in row 1"),
        ((torch.tensor([0, 1]), torch.tensor([0, 1]), [0, 5]), ValueError, r"groups has 5 \(1 of 2 rows\)"),
        (
            (torch.tensor([0, 1]), torch.tensor([0, 1]), [0]),
            ValueError,
            "2 rows in preds, 2 in target and 1 in groups",
        ),
        (
            (torch.tensor([0, 1]), torch.tensor([0]), [0, 1]),
            ValueError,
            "2 rows in preds, 1 in target and 2 in groups",
        ),
        ((torch.tensor([0.1, torch.nan]), torch.tensor([0, 1]), [0, 1]), ValueError, "preds have NaN"),
        ((torch.zeros(2, 3), torch.tensor([0, 1]), [0, 1]), ValueError, r"\(n,\) or \(n, 2\), got \(2, 3\)"),
        (
            (torch.zeros(2, 3).long(), torch.tensor([0, 1]), [0, 1]),
            ValueError,
            r"shape \(n,\) or \(n, 1\), got \(2, 3\)",
        ),
        ((["a", "b"], torch.tensor([0, 1]), [0, 1]), TypeError, "preds must be real and numeric"),
    ],
)
def test_errors_of_rates(batch: tuple[Any, ...], error: type[Exception], message: str) -> None:
    metric = GroupRates(2)
    with pytest.raises(error, match=message):
        metric.update(*batch)
    assert int(metric.confusion.sum()) == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groups": "ab"}, TypeError, "groups must be the number of groups or their names, got 'ab'"),
        ({"groups": 2.5}, TypeError, "groups must be the number"),
        ({"groups": 1}, ValueError, "at least two"),
        ({"groups": ["a", "a"]}, ValueError, "different names"),
        ({"groups": ["a", "gap"]}, ValueError, "must not contain 'gap'"),
        ({"groups": 2, "num_classes": 1}, ValueError, "num_classes must be an integer of at least 2"),
    ],
)
def test_settings_of_rates(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GroupRates(**settings)


# -- two processes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("share", list(SHARES))
def test_two_processes_have_the_value_of_one(of_two_processes: list[dict[str, Any]], share: str) -> None:
    alone = make_metrics()
    data = make_data(100)
    update(alone, data, torch.arange(100))
    for rank, results in enumerate(of_two_processes):
        values = results[share]
        assert values["rates"] == alone["rates"].compute()
        assert values["all"].item() == pytest.approx(alone["all"].compute().item(), abs=TOLERANCE)
        for name, value in alone["columns"].compute().items():
            assert values["columns"][name].item() == pytest.approx(value.item(), abs=TOLERANCE)
        assert results[f"{share}, again"] == SHARES[share][rank]


@pytest.mark.parametrize("share", list(SHARES))
def test_two_processes_sample_from_both(of_two_processes: list[dict[str, Any]], share: str) -> None:
    features, metadata, labels = make_data(100)
    streams = [sample_keys(0, size, seed=5, rank=rank) for rank, size in enumerate(SHARES[share])]
    kept = torch.cat(streams).argsort()[:40]
    for results in of_two_processes:
        for label in range(3):
            rows = kept[labels[kept] == label]
            value = results[share]["sampled"][f"label_{label}"].item()
            assert value == pytest.approx(_dcor(features[rows], metadata[rows]), abs=TOLERANCE)


def test_a_process_goes_on_after_a_synchronisation(of_two_processes: list[dict[str, Any]]) -> None:
    features, metadata, _ = make_data(100)
    expected = _dcor(torch.cat([features, features]), torch.cat([metadata, metadata]))
    for results in of_two_processes:
        assert results["more"].item() == pytest.approx(expected, abs=TOLERANCE)
        half = torch.cat([torch.arange(18), torch.arange(37, 37 + 31)])
        assert results["half"].item() == pytest.approx(_dcor(features[half], metadata[half]), abs=TOLERANCE)
        assert results["on step"].item() == pytest.approx(_dcor(features, metadata), abs=TOLERANCE)


def test_processes_that_differ_in_columns_are_told(of_two_processes: list[dict[str, Any]]) -> None:
    for results in of_two_processes:
        assert results["after the error"] == len(torch.arange(100).split((37, 63))[results["rank"]])
        assert "features have 6 value(s) a sample, but 3 in other batches (of all proc" in results["widths"]


def test_the_value_is_that_of_the_library() -> None:
    features, metadata, _ = make_data(50)
    metric = DistanceCorrelation()
    metric.update(features, metadata)
    assert metric.compute() == distance_correlation_sqr(features.flatten(1), metadata)
