"""The experiment of settings 2 to 4, on tiny images with a known effect and a known confounder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import dcor
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from typer.testing import CliRunner

import mdnorm
from mdnorm.extras import MissingExtraError
from mdnorm.layer import MetadataNorm
from mdnorm_experiments import confounded, settings, training
from mdnorm_experiments.commands import app
from mdnorm_experiments.confounded import METHOD_NAMES, ConfoundedSetting, evaluate
from mdnorm_experiments.confounded_report import tables
from mdnorm_experiments.data.confounded import ConfoundedData, LoadedData, Samples, part_seed, select, split
from mdnorm_experiments.data.reading import DataProblemsError, Problems
from mdnorm_experiments.methods import METHODS
from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.settings import build, get_setting, plan, train, write_outputs
from mdnorm_experiments.training import fit, in_batches


def make_samples(size: int, seed: int, share: float) -> Samples:
    """4×4 images: the label dims the left half a little, the site lights the right half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 2
    agrees = torch.rand(size, generator=generator) < share
    site = torch.where(agrees, labels, 1 - labels)
    inputs = 0.3 * torch.randn(size, 1, 4, 4, generator=generator)
    inputs[..., :2] += 0.1 * (2 * labels - 1)[:, None, None, None]
    inputs[..., 2:] += 1.0 * (2 * site - 1)[:, None, None, None]
    column = site.float()[:, None]
    return Samples(inputs, labels, column, column, site)


def make_data(size: int, seed: int) -> ConfoundedData:
    parts = [
        make_samples(n, 3 * seed + k, share)
        for k, (n, share) in enumerate([(size, 0.9), (400, 0.9), (400, 0.5)])
    ]
    return ConfoundedData(
        *parts,
        ("ill", "well"),
        ("first", "second"),
        {"site": (0,)},
        unconfounded=lambda: make_samples(size, 1000 + seed, 0.5),
        held_out=lambda: make_samples(size // 4, 2000 + seed, 0.9),
    )


class Backbone(nn.Sequential):
    num_features = 32

    def __init__(self, norm: str) -> None:
        layer = {"none": nn.Identity(), "batch": nn.BatchNorm1d(32), "group": nn.GroupNorm(4, 32)}[norm]
        super().__init__(nn.Flatten(), nn.Linear(16, 32), layer, nn.ReLU())


def draw(data: ConfoundedData) -> Figure:
    figure = Figure()
    figure.subplots().imshow(data.train.inputs[0, 0].numpy())
    return figure


def load_data(folder: Path, on_problem: str, columns: dict[str, str]) -> LoadedData:
    problems = Problems()
    if not (folder / "scan.txt").exists():
        problems.add("no image", "sub-1", f"{folder.name} has no scan.txt")
    problems.settle(on_problem)
    samples = make_samples(400, 7, 0.8)
    return LoadedData(samples, ("ill", "well"), ("first", "second"), {"site": (0,)}, problems.text())


SETTING = ConfoundedSetting(
    name="tiny",
    title="Tiny images",
    introduction=("Two halves.",),
    make_data=make_data,
    backbone=Backbone,
    slots=("1",),
    base_norm="none",
    batch_size=50,
    epochs=12,
    learning_rate=5e-3,
    size=600,
    quick_size=300,
    quick_epochs=6,
    quick_methods=("none", "mdn-last-running"),
    load=load_data,
    limit=0.827,  # Φ(0.1 · √8 / 0.3)
    examples=draw,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(settings.SETTINGS, "tiny", (__name__, "SETTING"))


def run_of(method: str, **changes: object):
    return plan(SETTING, [method], 1, **changes)[0]


class TestPlan:
    def test_every_method_of_a_seed_follows_the_other(self):
        runs = plan(SETTING, seeds=2, first_seed=5)
        assert [run.method for run in runs] == 2 * list(METHOD_NAMES)
        assert [run.seed for run in runs] == [5] * len(METHOD_NAMES) + [6] * len(METHOD_NAMES)
        assert set(METHOD_NAMES) <= set(METHODS)

    def test_settings_tell_runs_apart_and_not_the_file(self, tmp_path):
        run = run_of("batchnorm", features_dir=tmp_path)
        assert run.settings() == run_of("batchnorm").settings()
        assert run.settings()["norm"] == "batch"
        assert run.settings() != run_of("batchnorm", epochs=3).settings()
        json.dumps(run.settings())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": []}, "none given"),
            ({"size": 3}, "size must be at least 40"),
            ({"batch_sizes": [1]}, "batch size must be at least 2"),
            ({"data": Path("folder")}, "oracle needs unconfounded data"),
        ],
    )
    def test_bad_numbers(self, changes, message):
        with pytest.raises(ValueError, match=message):
            plan(SETTING, **changes)

    def test_a_setting_without_real_data(self, monkeypatch):
        monkeypatch.setitem(settings.SETTINGS, "bare", (__name__, "BARE"))
        with pytest.raises(ValueError, match="no real data"):
            confounded.load(plan(BARE, ["none"], 1, data=Path("folder"))[0])

    def test_unknown_setting(self):
        with pytest.raises(ValueError, match="unknown setting"):
            get_setting("audio")


class TestNetworks:
    @pytest.mark.parametrize(
        ("method", "layers"), [("none", 0), ("brnet", 0), ("mdn-last-running", 1), ("mdn-every-running", 2)]
    )
    def test_layers_sit_where_they_should(self, method, layers):
        network = build(SETTING, METHODS[method], make_data(60, 0), 0)
        found = [name for name, module in network.named_modules() if isinstance(module, MetadataNorm)]
        assert len(found) == layers
        assert all(name.startswith(("hidden.", "backbone.1.")) for name in found)

    def test_weights_follow_from_the_seed(self):
        data = make_data(60, 0)
        plain, corrected = (build(SETTING, METHODS[name], data, 3) for name in ("none", "mdn-last-batch"))
        assert torch.equal(plain.head.weight, corrected.head.weight)
        assert torch.equal(plain.hidden.weight, corrected.hidden.weight)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_trains_and_its_row_is_json(method):
    row = train(run_of(method, size=151, epochs=1), lambda: None)
    json.dumps(row, allow_nan=False)
    assert 0 <= row["bacc"] <= 1
    assert ("recalibrated" in row) == method.startswith("mdn")


def test_a_network_cheats_and_correction_stops_it():
    cheats, last, every = (
        train(run_of(name, size=1200), lambda: None)
        for name in ("none", "mdn-last-running", "mdn-every-running")
    )
    assert cheats["bacc_confounded"] > cheats["bacc"] + 0.1
    before = np.mean(list(cheats["dcor2"]["site"].values()))
    assert before > 0.5
    # The last layer alone equalises the means; what the ReLU before it makes of the site is left.
    for row, share in ((last, 0.2), (every, 0.1)):
        corrected = row["recalibrated"]
        assert corrected["bacc"] > cheats["bacc"] + 0.05
        assert np.mean(list(corrected["dcor2"]["site"].values())) < share * before
        assert corrected["gap"] < cheats["gap"] / 2


def test_the_same_seed_gives_the_same_row():
    first, second = (train(run_of("brnet", epochs=2), lambda: None) for _ in range(2))
    for row in (first, second):
        row.pop("seconds_per_epoch")
    assert first == second


def test_epochs_are_told():
    told = []
    train(run_of("none", epochs=3, size=100), lambda: told.append(1))
    assert len(told) == 3


# Of 101 samples the last one joins the batch before it.
@pytest.mark.parametrize("size", [100, 101])
@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_the_learning_rate_rises_during_the_warmup_and_falls_to_zero(warmup_epochs, size, monkeypatch):
    rates = []

    class Recorded(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    data = make_data(size, 1)
    fit(
        build(SETTING, METHODS["none"], data, 0),
        METHODS["none"],
        data.train,
        batch_size=20,
        epochs=3,
        learning_rate=1e-2,
        warmup_epochs=warmup_epochs,
        seed=0,
        epoch_done=list,
    )
    assert len(rates) == 15
    rise = 5 * warmup_epochs
    np.testing.assert_allclose(rates[:rise], 1e-2 * np.arange(1, rise + 1) / (rise + 1))
    fall = 1e-2 * (1 + np.cos(np.pi * np.arange(15 - rise) / (15 - rise))) / 2 if rise < 15 else []
    np.testing.assert_allclose(rates[rise:], fall)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "expected"),
    [(100, 20, 3 * 5), (101, 20, 3 * 5), (102, 20, 3 * 6), (1, 20, 3), (19, 20, 3), (7, 1, 3 * 7)],
)
def test_steps_are_counted_as_they_are_made(num_samples, batch_size, expected):
    assert 3 * len(in_batches(torch.arange(num_samples), batch_size)) == expected


def trained(method, data):
    network = build(SETTING, METHODS[method], data, 0)
    fit(
        network,
        METHODS[method],
        data.train,
        batch_size=50,
        epochs=3,
        learning_rate=1e-2,
        warmup_epochs=1,
        seed=0,
        epoch_done=list,
    )
    return network


def test_measures_agree_with_their_definition():
    data = make_data(200, 1)
    network = trained("none", data)
    row = evaluate(network, data, data.train)
    free = data.confound_free
    with torch.no_grad():
        predicted = network(free.inputs).argmax(1).numpy()
    labels, groups = free.labels.numpy(), free.groups.numpy()
    recall = np.array(
        [[np.mean(predicted[(labels == c) & (groups == g)] == c) for c in range(2)] for g in range(2)]
    )
    assert [list(found.values()) for found in row["recall"].values()] == recall.tolist()
    assert row["gap"] == pytest.approx(np.abs(recall[0] - recall[1]).max())
    by_class = [np.mean(predicted[labels == c] == c) for c in range(2)]
    assert row["bacc"] == pytest.approx(np.mean(by_class))


@pytest.fixture(scope="module")
def measured():
    """A network with a layer whose features are the pixels' halves, and its measures."""
    data = make_data(400, 1)
    network = trained("mdn-last-running", data)
    return data, network, evaluate(network, data, data.train)


class TestMeasuresThatCannotBeCheated:
    @torch.no_grad()
    def outputs(self, network, samples, metadata=None):
        network.eval()
        with mdnorm.metadata(network, samples.metadata if metadata is None else metadata):
            features = network.features(samples.inputs)
            return features, network.classify(features)

    def test_dcor2_of_features_and_logits(self, measured):
        data, network, row = measured
        for samples, end in ((data.confound_free, ""), (data.train, "_train")):
            features, logits = self.outputs(network, samples)
            for label, name in enumerate(data.classes):
                inside = samples.labels == label
                site = samples.confounders[inside, 0].double().numpy()
                # Of two logits, only the difference decides.
                for values, key in ((features, "dcor2"), (logits[:, 1:] - logits[:, :1], "dcor2_logits")):
                    expected = dcor.u_distance_correlation_sqr(values[inside].double().numpy(), site)
                    assert row[key + end]["site"][name] == pytest.approx(expected, abs=1e-5)

    def test_whitened_features_do_not_depend_on_the_scale_of_a_direction(self, measured):
        data, network, row = measured
        free = data.confound_free
        features = self.outputs(network, free)[0].double()
        within = features - torch.stack([features[free.labels == c].mean(0) for c in (0, 1)])[free.labels]
        variances, directions = torch.linalg.eigh(within.T @ within / len(within))
        # 64 features of 32 units and of the layer's correction: the other directions are empty.
        rank = int(torch.linalg.matrix_rank(within, rtol=1e-5))
        assert 8 < rank <= 33
        whitened = (within @ directions / variances.abs().sqrt())[:, -rank:]
        for label, name in enumerate(data.classes):
            inside = free.labels == label
            expected = dcor.u_distance_correlation_sqr(
                whitened[inside].numpy(), free.confounders[inside, 0].double().numpy()
            )
            assert row["dcor2_whitened"]["site"][name] == pytest.approx(expected, abs=1e-5)

    def test_accuracy_with_other_metadata(self, measured):
        data, network, row = measured
        free = data.confound_free

        def accuracy(metadata):
            predicted = self.outputs(network, free, metadata)[1].argmax(1)
            return np.mean([(predicted[free.labels == c] == c).double().mean().item() for c in (0, 1)])

        mean = torch.full_like(free.metadata, data.train.metadata.mean().item())
        assert row["bacc_mean"] == pytest.approx(accuracy(mean))
        shuffles = [accuracy(free.metadata[torch.randperm(len(free))]) for _ in range(20)]
        assert row["bacc_shuffled"] == pytest.approx(np.mean(shuffles), abs=0.02)
        assert abs(row["bacc_shuffled"] - row["bacc"]) > 0.02 or row["bacc"] < 0.6

    def test_a_network_without_layers_takes_no_metadata(self):
        data = make_data(100, 0)
        row = evaluate(build(SETTING, METHODS["none"], data, 0), data, data.train)
        assert row["bacc_shuffled"] is None
        assert row["bacc_mean"] is None

    def test_the_probe_is_on_the_scale_from_chance_to_perfect(self, measured):
        data, network, row = measured
        free = data.confound_free
        features = self.outputs(network, free)[0].numpy()
        scores = []
        for label in (0, 1):
            inside = (free.labels == label).numpy()
            model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", C=0.01))
            site = free.groups.numpy()[inside]
            scores.append(
                cross_val_score(model, features[inside], site, scoring="balanced_accuracy", cv=5).mean()
            )
        assert row["probe"]["site"] == pytest.approx(max(2 * np.mean(scores) - 1, 0), abs=0.15)

    def test_one_hot_columns_are_one_category_for_the_probe(self):
        data = make_data(100, 0)
        free = data.confound_free
        columns = torch.nn.functional.one_hot(free.groups, 2).float()
        both = replace(
            data,
            confound_free=replace(free, confounders=columns),
            confounders={"site": (0, 1)},
            test=replace(data.test, confounders=data.test.confounders.repeat(1, 2)),
            train=replace(data.train, confounders=data.train.confounders.repeat(1, 2)),
        )
        network = build(SETTING, METHODS["none"], data, 0)
        found, expected = (evaluate(network, each, each.train)["probe"] for each in (both, data))
        assert found == pytest.approx(expected)

    def test_a_collapsed_network_has_measures(self):
        data = make_data(100, 0)
        network = build(SETTING, METHODS["none"], data, 0)
        nn.init.zeros_(network.hidden.weight)
        row = evaluate(network, data, data.train)
        json.dumps(row, allow_nan=False)
        assert row["bacc"] == 0.5
        assert row["probe"]["site"] == 0


@pytest.fixture(scope="module")
def plain():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.SETTINGS, "tiny", (__name__, "SETTING"))
        return train(run_of("none", size=1200), lambda: None)


class TestBaselines:
    @pytest.mark.parametrize("method", ["weights", "groupdro", "dfr", "oracle"])
    def test_each_improves_on_the_plain_network(self, plain, method):
        row = train(run_of(method, size=1200), lambda: None)
        assert row["bacc"] > plain["bacc"] + 0.05
        assert row["bacc_confounded"] - row["bacc"] < plain["bacc_confounded"] - plain["bacc"] - 0.1

    def test_weights_are_the_balancing_weights_in_loss_layer_and_recalibration(self, monkeypatch):
        samples = make_data(200, 0).train
        method = METHODS["mdn-last-running+weights"]
        expected = mdnorm.balancing_weights(samples.labels, samples.metadata, method="propensity").weights
        assert torch.equal(training.sample_weights(method, samples), expected.float())
        assert training.sample_weights(METHODS["none"], samples) is None
        given = []
        original = training.context.metadata

        def noted(model, metadata, labels=None, weights=None):
            given.append(weights)
            return original(model, metadata, labels, weights)

        monkeypatch.setattr(training.context, "metadata", noted)
        train(run_of("mdn-last-running+weights", size=200, epochs=1, batch_sizes=[200]), lambda: None)
        assert torch.equal(given[0].sort().values, expected.float().sort().values)
        assert torch.equal(
            torch.cat([part for part in given[1:] if part is not None])[-200:], expected.float()
        )

    def test_the_loss_is_weighted(self):
        """A weight of 2 is a sample that comes twice: of one batch of everything the loss is the same."""
        data = make_data(200, 0)
        network = build(SETTING, METHODS["weights"], data, 0)
        weights = training.sample_weights(METHODS["weights"], data.train)
        with torch.no_grad():
            logits = network(data.train.inputs).log_softmax(1)
        expected = -(weights * logits[torch.arange(200), data.train.labels]).mean()
        options = {"epochs": 1, "learning_rate": 1e-3, "warmup_epochs": 0, "seed": 0, "epoch_done": list}
        measured = fit(network, METHODS["weights"], data.train, batch_size=200, **options)
        assert measured["train_loss"] == pytest.approx(float(expected), rel=1e-5)

    def test_the_oracle_trains_on_unconfounded_data(self, monkeypatch):
        seen = []
        monkeypatch.setattr(settings, "fit", lambda network, method, samples, **_: seen.append(samples) or {})
        for method in ("oracle", "none"):
            train(run_of(method, size=1000), lambda: None)
        oracle, confounded_ones = ((samples.labels == samples.groups).double().mean() for samples in seen)
        assert oracle == pytest.approx(0.5, abs=0.05)
        assert confounded_ones == pytest.approx(0.9, abs=0.03)
        assert len(seen[0]) == 1000

    def test_data_without_held_out_samples_keep_a_quarter_of_the_training(self):
        data = replace(make_data(200, 0), held_out=None)
        first, second = data.for_retraining(3)
        assert (len(first), len(second)) == (150, 50)
        both = torch.cat([first.inputs, second.inputs]).flatten(1).tolist()
        assert sorted(both) == sorted(data.train.inputs.flatten(1).tolist())
        assert torch.equal(data.for_retraining(3)[1].inputs, second.inputs)

    def test_real_data_have_all_but_the_oracle(self, tmp_path, monkeypatch):
        monkeypatch.setitem(settings.SETTINGS, "tiny", (__name__, "SETTING"))
        (tmp_path / "scan.txt").touch()
        row = train(run_of("dfr", epochs=1, data=tmp_path), lambda: None)
        assert 0 <= row["bacc"] <= 1

    def test_what_is_tuned_for_a_setting(self):
        tuned = replace(SETTING, tuned={"group_dro": {"step_size": 0.5}, "adversary": {"strength": 2.0}})
        assert tuned.method("groupdro").settings() == {"group_dro": {"step_size": 0.5}}
        adversary = tuned.method("brnet").adversary
        assert adversary == METHODS["brnet"].adversary | {"strength": 2.0}
        assert tuned.method("none") == METHODS["none"]

    def test_rows_from_before_these_measures_count_as_absent(self, tmp_path):
        run = run_of("none", epochs=1, size=100)
        old = {name: value for name, value in run.settings().items() if name != "measures"}
        (tmp_path / "results.json").write_text(json.dumps([old | {"bacc": 0.5}]))
        assert ResultStore(tmp_path / "results.json").find(run.settings()) is None


class TestOverview:
    def rows(self, accuracies):
        """Rows of two seeds with these accuracies, by method."""
        of_each = {}
        for method in accuracies:
            run = run_of(method, epochs=1, size=100)
            of_each[method] = run.settings() | train(run, lambda: None)
        return [
            of_each[method] | {"seed": seed, "bacc": value, "bacc_confounded": 0.9}
            for method, values in accuracies.items()
            for seed, value in enumerate(values)
        ]

    def cells(self, accuracies):
        overview = tables(self.rows(accuracies), SETTING.limit)[0]
        return [dict(zip(overview.headings, line, strict=True)) for line in overview.lines]

    def test_gains_are_paired_and_a_share_of_the_oracles(self):
        plain, weights, oracle = self.cells(
            {"none": [0.6, 0.7], "weights": [0.65, 0.77], "oracle": [0.7, 0.8]}
        )
        assert plain["Gain (points)"] == "0.0 ± 0.0"
        assert weights["Gain (points)"] == "+6.0 ± 1.4"
        assert weights["Recovered (%)"] == "60 ± 14"
        assert oracle["Recovered (%)"] == "100 ± 0"
        assert plain["Confounded − confound-free (points)"] == "+25.0 ± 7.1"
        assert weights["Shuffled (%)"] == "–"

    def test_without_the_plain_network_or_the_oracle(self):
        (weights,) = self.cells({"weights": [0.65, 0.77]})
        assert weights["Gain (points)"] == weights["Recovered (%)"] == "–"
        _, weights = self.cells({"none": [0.6, 0.7], "weights": [0.65, 0.77]})
        assert weights["Gain (points)"] == "+6.0 ± 1.4"
        assert weights["Recovered (%)"] == "–"


class TestData:
    def test_no_part_of_a_seed_has_the_seed_of_another(self):
        seeds = [part_seed(seed, part) for seed in range(1000) for part in range(5)]
        assert len(set(seeds)) == len(seeds)
        assert [part_seed(4, part) for part in range(3)] == [12, 13, 14]

    def test_rows_must_agree(self):
        samples = make_samples(10, 0, 0.9)
        with pytest.raises(ValueError, match="same number of rows"):
            Samples(samples.inputs, samples.labels[:9], samples.metadata, samples.confounders, samples.groups)

    def test_values_must_be_finite(self):
        samples = make_samples(10, 0, 0.9)
        samples.metadata[4] = float("nan")
        with pytest.raises(ValueError, match=r"metadata must be finite: rows \[4\]"):
            Samples(**vars(samples))

    def test_split_of_real_samples(self):
        samples = make_samples(1000, 0, 0.9)
        train_part, test, free = split(samples, seed=1)
        assert len(train_part) + len(test) == 1000
        assert len(test) == pytest.approx(300, abs=4)
        table = [[int(((free.labels == c) & (free.groups == g)).sum()) for c in range(2)] for g in range(2)]
        assert table[0][0] == table[0][1] > 10
        assert table[1][0] == table[1][1] > 10
        again = split(samples, seed=1)
        assert torch.equal(again[0].inputs, train_part.inputs)
        # No sample is on both sides.
        seen = {tuple(row) for row in train_part.inputs.flatten(1).tolist()}
        assert not any(tuple(row) in seen for row in test.inputs.flatten(1).tolist())

    def test_split_without_overlap(self):
        samples = make_samples(100, 0, 1.0)
        with pytest.raises(ValueError, match="no confound-free test data"):
            split(samples, seed=0)
        with pytest.raises(ValueError, match="test_share"):
            split(samples, seed=0, test_share=1.0)

    def test_too_few_to_measure_within_a_class(self):
        samples = make_samples(400, 0, 1.0)
        groups = samples.groups.clone()
        groups[:4] = 1 - groups[:4]
        with pytest.raises(ValueError, match=r"have 2 sample\(s\) of each class, too few to measure"):
            split(replace(samples, groups=groups), seed=0)

    def test_select(self):
        samples = make_samples(10, 0, 0.9)
        assert torch.equal(select(samples, torch.tensor([3, 1])).labels, samples.labels[[3, 1]])


class TestProblems:
    def test_all_are_told_at_once(self):
        problems = Problems()
        problems.settle("error")
        assert problems.text() == ""
        problems.add("no image", "sub-1", "anat is empty")
        problems.add("no image", "sub-2", "anat is empty")
        problems.add("no row", "sub-3", "not in participants.tsv")
        with pytest.raises(DataProblemsError) as error:
            problems.settle("error")
        for text in ("3 problem(s)", "2 × no image", "sub-1", "sub-2", "sub-3"):
            assert text in str(error.value)
        problems.settle("skip")

    def test_what_was_left_out_explains_why_too_little_is_left(self):
        problems = Problems()
        assert problems.classes(["well", "ill", "well"], "the table must have two labels") == ("ill", "well")
        problems.add("no image", "sub-1", "anat is empty")
        with pytest.raises(ValueError, match=r"two labels, got ill\.\n1 problem.*\n  no image: sub-1"):
            problems.classes(["ill", "ill"], "the table must have two labels")

    def test_unknown_wish(self):
        with pytest.raises(ValueError, match="on_problem"):
            Problems().settle("ignore")


class TestCommand:
    def test_outputs(self, tmp_path, monkeypatch):
        # The commands are made when the module is imported: this one borrows the name of another.
        monkeypatch.setitem(settings.SETTINGS, "image", (__name__, "IMAGE"))
        out = tmp_path / "out"
        arguments = ["image", "--quick", "--jobs", "1", "--out", str(out)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "No normalisation" in result.output
        rows = json.loads((out / "results.json").read_text())
        assert [row["method"] for row in rows] == ["none", "mdn-last-running"]
        for name in ("table.md", "report.html", "audit/report.html", "audit/report.json"):
            assert (out / name).stat().st_size > 100
        for name in ("examples", "accuracy", "groups"):
            assert (out / "figures" / f"{name}.png").stat().st_size > 1000
        again = CliRunner().invoke(app, [*arguments, "--json"])
        assert again.exit_code == 0
        assert "2 of 2 trainings are already finished" in again.stderr
        assert json.loads(again.stdout) == rows

    def test_real_data(self, tmp_path, monkeypatch):
        monkeypatch.setitem(settings.SETTINGS, "image", (__name__, "IMAGE"))
        folder, out = tmp_path / "data", tmp_path / "out"
        folder.mkdir()
        arguments = ["image", "--quick", "--epochs", "1", "--jobs", "1", "--out", str(out)]
        arguments += ["--data", str(folder)]
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 2
        assert "1 × no image" in refused.stderr
        assert not (out / "results.json").exists()
        result = CliRunner().invoke(app, [*arguments, "--on-problem", "skip"])
        assert result.exit_code == 0, result.output
        assert "left out: 1 problem(s)" in result.stderr
        assert "No analytic limit" in (out / "table.md").read_text()
        assert json.loads((out / "results.json").read_text())[0]["data"] == str(folder)

    def test_real_data_that_cannot_be_divided_or_read(self, tmp_path, monkeypatch):
        monkeypatch.setitem(settings.SETTINGS, "image", (__name__, "IMAGE"))
        arguments = ["image", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
        samples = make_samples(400, 0, 1.0)

        def without_overlap(folder, on_problem, columns):
            return LoadedData(samples, ("ill", "well"), ("first", "second"), {"site": (0,)})

        def without_package(folder, on_problem, columns):
            raise MissingExtraError("the package 'monai' is missing: pip install 'mdnorm-experiments[mri]'")

        for load, message in (
            (without_overlap, "no confound-free test data"),
            (without_package, "mdnorm-experiments[mri]"),
        ):
            monkeypatch.setitem(globals(), "IMAGE", replace(IMAGE, load=load))
            confounded._loaded.cache_clear()
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 2, result.output
            assert message in " ".join(result.stderr.split())
            assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--on-problem", "hide"], "on_problem"),
            (["--methods", "magic"], "unknown method"),
            (["--methods", "none,oracle", "--data", "folder"], "the oracle needs unconfounded data"),
            (["--size", "5"], "size must be at least 40"),
            (["--size", "0"], "size must be at least 40, got 0"),
        ],
    )
    def test_bad_options(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.setitem(settings.SETTINGS, "image", (__name__, "IMAGE"))
        result = CliRunner().invoke(app, ["image", "--out", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
        assert not list(Path(tmp_path).glob("results.json"))


IMAGE = ConfoundedSetting(**(vars(SETTING) | {"name": "image"}))
BARE = ConfoundedSetting(**(vars(SETTING) | {"name": "bare", "load": None}))


def test_tables_have_every_method_and_variable():
    runs = [run_of(name, size=100, epochs=1) for name in ("none", "mdn-last-batch")]
    rows = [run.settings() | train(run, lambda: None) for run in runs]
    overview, by_variable, stages, by_class, by_group = tables(rows, SETTING.limit)
    for table in (overview, by_variable, stages):
        assert [line[0] for line in table.lines] == ["No normalisation", "MDN, last layer, batch"]
        assert all(len(line) == len(table.headings) for line in table.lines)
    assert list(by_class.headings) == ["Method", "site, ill", "site, well"]
    assert list(by_group.headings[1:]) == ["first (%)", "second (%)", "TPR, first (%)", "TPR, second (%)"]
    assert "82.7 %" in overview.limits


class TestOutputsOfRealData:
    """Small data sets, and groups that lack a class: what cannot be measured is left out, and said."""

    def outputs(self, groups, tmp_path, monkeypatch, **options):
        samples = replace(make_samples(400, 7, 1.0), groups=groups)
        loaded = LoadedData(samples, ("ill", "well"), ("first", "second", "third"), {"site": (0,)})
        monkeypatch.setitem(settings.SETTINGS, "tiny", (__name__, "REAL"))
        monkeypatch.setitem(
            globals(), "REAL", replace(SETTING, load=lambda folder, on_problem, columns: loaded)
        )
        confounded._loaded.cache_clear()
        settings._data.cache_clear()
        names = ["none", "mdn-last-running"]
        runs = plan(REAL, names, 1, epochs=1, data=tmp_path / "data", **options)
        rows = [run.settings() | train(run, lambda: None) for run in runs]
        return write_outputs(tmp_path, runs, rows, command="mdnorm-experiments tiny")

    def test_a_group_without_a_class(self, tmp_path, monkeypatch):
        groups = torch.arange(400) // 2 % 2
        groups[:80:2] = 2
        self.outputs(groups, tmp_path, monkeypatch)
        lines = (tmp_path / "table.md").read_text().split("## Accuracy by group")[1].splitlines()
        cells = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| No", "| MDN"))]
        assert [[cell == "–" for cell in line[1:]] for line in cells] == 2 * [2 * [False, False, True]]

    def test_too_few_samples_for_an_audit(self, tmp_path, monkeypatch):
        groups = torch.arange(400) % 2
        groups[:12] = 1 - groups[:12]
        report = self.outputs(groups, tmp_path, monkeypatch, features_dir=tmp_path)
        assert "There is no audit of what the networks still know: only 8 rows" in report.read_text()
        assert not (tmp_path / "audit").exists()


REAL = SETTING
