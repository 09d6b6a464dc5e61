import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mdnorm.distributed import one_thread
from mdnorm.layer import MetadataNorm
from mdnorm.metrics import distance_correlation_sqr
from mdnorm_experiments import synthetic
from mdnorm_experiments.data.confounded import ConfoundedData
from mdnorm_experiments.data.synthetic import make_synthetic
from mdnorm_experiments.methods import METHODS
from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.runner import Runner
from mdnorm_experiments.settings import Run, build, plan, train, write_outputs

SETTING = synthetic.SETTING


def small(method="mdn-last-dataset", **options):
    settings = {"batch_size": 64, "seed": 0, "epochs": 1, "learning_rate": 1e-3, "size": 40}
    return Run("synthetic", method, **(settings | {"test_size": 30} | options))


class TestPlan:
    def test_default_table(self):
        runs = plan(SETTING)
        seeds = sum(METHODS[method].seeds for method in SETTING.default_methods)
        # BatchNorm cannot train with batch size 1.
        assert len(runs) == len(SETTING.batch_sizes) * seeds - METHODS["batchnorm"].seeds
        assert {run.batch_size for run in runs} == set(SETTING.batch_sizes)
        assert [run.seed for run in runs] == sorted(run.seed for run in runs)
        assert len({json.dumps(run.settings()) for run in runs}) == len(runs)

    def test_repeated_names_count_once(self):
        assert len(plan(SETTING, ["none", "none"], 1, batch_sizes=[20, 20])) == 1

    def test_what_cannot_be_trained_is_left_out(self):
        runs = plan(SETTING, ["none", "batchnorm"], 1, batch_sizes=[1, 4])
        assert ("batchnorm", 1) not in {(run.method, run.batch_size) for run in runs}
        assert len(runs) == 3
        with pytest.raises(ValueError, match="nothing to run"):
            plan(SETTING, ["batchnorm"], batch_sizes=[1])

    def test_features_are_kept_for_the_first_seed(self, tmp_path):
        runs = plan(SETTING, ["none"], 2, batch_sizes=[20], first_seed=5, features_dir=tmp_path)
        assert [run.seed for run in runs] == [5, 6]
        assert runs[0].features_file.endswith("none-plain-batch20-seed5.safetensors")
        assert runs[1].features_file is None
        assert "features_file" not in runs[0].settings()

    def test_schedule_of_the_nearest_batch_size(self):
        assert SETTING.schedule(16) == SETTING.schedule(20)
        assert SETTING.schedule(10_000) == SETTING.schedule(2000)
        assert plan(SETTING, ["none"], 1, batch_sizes=[20], epochs=3, learning_rate=0.1)[0].epochs == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"methods": ["none", "magic"]}, r"unknown method\(s\) magic: choose from none, "),
            # Of the settings with confounded images only.
            ({"methods": ["none", "dfr"]}, r"unknown method\(s\) dfr"),
            ({"batch_sizes": [0]}, "batch size must be at least 1"),
            ({"seeds": 0}, "seeds must be at least 1"),
            ({"epochs": -1}, "epochs must be at least 1"),
            ({"learning_rate": float("nan")}, "learning rate"),
            ({"learning_rate": -1.0}, "learning rate"),
            ({"learning_rate": float("inf")}, "learning rate"),
            ({"size": 3}, "group size must be at least 4"),
            ({"variant": "cubic"}, "unknown variant 'cubic': choose from plain, sites, quadratic, variance"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            plan(SETTING, **arguments)

    def test_a_mistyped_option_is_named_with_those_there_are(self):
        with pytest.raises(
            TypeError, match=r"plan has no option epoch, seed: .* epochs, learning_rate, .*data"
        ):
            plan(SETTING, epoch=3, seed=1)

    def test_what_changes_in_a_run(self):
        (run,) = plan(SETTING, ["none"], 1, batch_sizes=[20], warmup_epochs=2, test_size=9, on_problem="skip")
        assert (run.warmup_epochs, run.test_size, run.on_problem) == (2, 9, "skip")
        assert (run.epochs, run.learning_rate) == SETTING.schedule(20)


def built(method, seed):
    images = make_synthetic(4)
    samples = synthetic.samples_of(images, synthetic.metadata_columns(images, "plain", 3))
    data = ConfoundedData(samples, samples, samples, ("A", "B"), ("A", "B"), {"confounder": (0,)})
    return build(SETTING, METHODS[method], data, seed)


class TestNetworks:
    @pytest.mark.parametrize(
        ("method", "kinds"),
        [
            ("none", [nn.Identity] * 3),
            ("batchnorm", [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]),
            ("groupnorm", [nn.GroupNorm] * 3),
        ],
    )
    def test_norms(self, method, kinds):
        network = built(method, 0)
        norms = [network.backbone.norm1, network.backbone.norm2, network.hidden_norm]
        assert [type(module) for module in norms] == kinds

    @pytest.mark.parametrize(
        ("method", "count"), [("none", 0), ("mdn-last-dataset", 1), ("mdn-every-dataset", 3)]
    )
    def test_layers(self, method, count):
        assert sum(isinstance(module, MetadataNorm) for module in built(method, 0).modules()) == count

    def test_all_methods_start_from_the_same_weights(self):
        weights = [built(method, 0).head.weight for method in SETTING.methods]
        assert all(torch.equal(weight, weights[0]) for weight in weights)
        assert not torch.equal(built("none", 1).head.weight, weights[0])

    def test_authors_settings_remove_the_intercept(self):
        (layer,) = (m for m in built("mdn-last-authors", 0).modules() if isinstance(m, MetadataNorm))
        assert (layer.estimator.center, METHODS["mdn-last-authors"].degree) == (True, 1)


class TestTraining:
    @pytest.mark.parametrize("method", SETTING.methods)
    def test_every_method_trains_with_a_partial_last_batch(self, method):
        epochs = []
        row = train(small(method, batch_size=17), lambda: epochs.append(1))
        assert epochs == [1]
        assert 0 <= row["bacc"] <= 1
        assert row["bacc"] == pytest.approx(np.mean(list(row["accuracy"].values())))
        json.dumps(row, allow_nan=False)
        assert ("recalibrated" in row) == method.startswith("mdn")

    @pytest.mark.parametrize("batch_size", [1, 4])
    @pytest.mark.parametrize("method", ["groupnorm", "brnet", "mdn-every-running", "mdn-every-batch"])
    def test_the_smallest_batches(self, method, batch_size):
        run = small(method, batch_size=batch_size, size=10)
        json.dumps(train(run, lambda: None), allow_nan=False)

    @pytest.mark.filterwarnings("ignore:.* was recalibrated on 80 row")
    @pytest.mark.parametrize("variant", ["sites", "quadratic", "variance"])
    def test_every_variant_trains(self, variant):
        for method in ("mdn-last-running", "mdn-last-linear", "mdn-last-scale"):
            row = train(small(method, variant=variant), lambda: None)
            json.dumps(row, allow_nan=False)

    def test_same_seed_same_row(self):
        def measured():
            with one_thread():
                row = train(small("mdn-every-dataset"), lambda: None)
            del row["seconds_per_epoch"]
            return row

        assert measured() == measured()

    def test_rows_do_not_depend_on_the_number_of_jobs(self, tmp_path):
        runs = [small("none"), small("mdn-last-dataset")]
        tables = []
        for jobs in (1, 2):
            store = ResultStore(tmp_path / f"{jobs}.json")
            rows = Runner(store, train, jobs).run(runs)
            tables.append([{k: v for k, v in row.items() if k != "seconds_per_epoch"} for row in rows])
        assert tables[0] == tables[1]

    def test_kept_features_are_those_that_were_measured(self, tmp_path):
        path = tmp_path / "features.safetensors"
        row = train(small(features_file=str(path)), lambda: None)
        kept = load_file(path)
        assert kept["features"].shape == (60, 84)
        inside = kept["labels"] == 1
        dependence = distance_correlation_sqr(kept["features"][inside], kept["confounder"][inside])
        assert row["dcor2"]["B"] == pytest.approx(float(dependence), abs=1e-12)

    def test_the_effect_shows(self):
        """A short training already separates the two: the network without correction uses the confounder."""
        options = {"batch_size": 100, "epochs": 7, "learning_rate": 3e-4, "size": 500}
        rows = {
            method: train(small(method, **options, test_size=400), lambda: None)
            for method in ("none", "mdn-last-dataset")
        }
        assert rows["none"]["bacc"] > 0.91
        assert min(rows["none"]["dcor2"].values()) > 0.2
        assert rows["mdn-last-dataset"]["bacc"] < 0.87
        assert max(rows["mdn-last-dataset"]["dcor2"].values()) < 0.06


class TestMetadata:
    def test_columns_are_powers_of_the_confounder(self):
        data = make_synthetic(20)
        columns = synthetic.metadata_columns(data, "plain", 3)
        scaled = (data.confounder - 3.5) / 2.5
        torch.testing.assert_close(columns, torch.stack([scaled, scaled**2, scaled**3], 1))
        assert synthetic.metadata_columns(data, "plain", 1).shape == (40, 1)

    def test_fifty_columns_of_sites(self):
        data = make_synthetic(200, variant="sites")
        columns = synthetic.metadata_columns(data, "sites", 3)
        assert columns.shape == (400, 50)
        assert torch.equal(columns[:, :16].argmax(1), data.site)
        assert synthetic.metadata_columns(data, "sites", 1).shape == (400, 45)

    def test_the_columns_of_sites_explain_the_magnitude(self):
        """And a straight line in age does not, so there is something for the spline to do."""
        data = make_synthetic(2000, variant="sites", seed=1)
        left = {}
        for degree in (1, 3):
            columns = synthetic.metadata_columns(data, "sites", degree).double().numpy()
            design = np.column_stack([columns, np.ones(len(columns))])
            magnitude = data.confounder.double().numpy()
            fitted = design @ np.linalg.lstsq(design, magnitude, rcond=None)[0]
            left[degree] = np.var(magnitude - fitted) / np.var(magnitude)
        assert left[3] < 0.001
        assert left[1] > 2 * left[3]


def test_outputs(tmp_path):
    features = tmp_path / "features"
    features.mkdir()
    runs = plan(
        SETTING,
        ["none", "mdn-last-dataset"],
        2,
        batch_sizes=[64],
        epochs=1,
        size=40,
        test_size=30,
        features_dir=features,
    )
    rows = Runner(ResultStore(tmp_path / "results.json"), train).run(runs)
    report = write_outputs(tmp_path, runs, rows, command="mdnorm-experiments synthetic")
    text = report.read_text(encoding="utf-8")
    assert text.count("<img") == 4
    assert "MDN, last layer" in (tmp_path / "table.md").read_text(encoding="utf-8")
    names = sorted(file.name for file in (tmp_path / "figures").glob("*.png"))
    assert names == ["accuracy.png", "dependence.png", "examples.png", "projection.png"]
    for file in features.iterdir():
        file.unlink()
    assert write_outputs(tmp_path, runs, rows, command="").read_text().count("<img") == 3


def test_of_two_batch_sizes_as_near_to_200_one_is_drawn(tmp_path):
    runs = plan(SETTING, ["none"], 1, batch_sizes=[100, 400], features_dir=tmp_path)
    for run in runs:
        save_file({"batch_size": torch.tensor(run.batch_size)}, run.features_file)
    rows = [run.settings() | {"bacc": 0.5, "dcor2": dict.fromkeys("AB", run.batch_size)} for run in runs]
    drawn = synthetic._projections(runs, rows)
    assert [tensors["batch_size"].item() for tensors in drawn.values()] == [100]
    assert synthetic._projections([], []) == {}


def test_a_row_of_another_variant_does_not_count_as_finished(tmp_path):
    store = ResultStore(tmp_path / "results.json")
    runs = [small("none", variant=variant) for variant in ("sites", "plain")]
    store.add(runs[0].settings(), {"bacc": 0.5})
    assert Runner(store, train).pending(runs) == runs[1:]


def test_outputs_of_a_variant_without_limits_claim_none(tmp_path):
    runs = plan(SETTING, ["none"], 1, batch_sizes=[20], epochs=1, size=10, test_size=10, variant="variance")
    rows = Runner(ResultStore(tmp_path / "results.json"), train).run(runs)
    text = write_outputs(tmp_path, runs, rows, command="").read_text(encoding="utf-8")
    assert "No simple analytic limit" in text
    assert "83.3" not in text
    assert "Each image shows blobs whose brightness is the true effect plus noise" in text
    assert "one whose brightness" not in text
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "limit |" not in table
    assert "confounded" not in table
