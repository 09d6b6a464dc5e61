import copy
import itertools
import json

import numpy as np
import pytest
import torch

from mdnorm.distributed import one_thread
from mdnorm_experiments import continual, training
from mdnorm_experiments.data.synthetic import BOTH_LIMITS, EFFECT_LIMITS, NUM_STAGES
from mdnorm_experiments.methods import METHODS
from mdnorm_experiments.results import ResultStore
from mdnorm_experiments.runner import Runner
from mdnorm_experiments.settings import Run, build, plan, train, write_outputs
from mdnorm_experiments.training import prepare, recalibrate_on

SETTING = continual.SETTING


def small(method="mdn-last-dataset", **options):
    settings = {"batch_size": 16, "seed": 0, "epochs": 1, "learning_rate": 1e-3, "size": 10}
    return Run("continual", method, **(settings | {"test_size": 8} | options))


def without_times(row):
    return {key: value for key, value in row.items() if key != "seconds_per_epoch"}


class TestPlan:
    def test_default_table(self):
        runs = plan(SETTING)
        assert len(runs) == 3 * len(SETTING.default_methods)
        assert [run.seed for run in runs] == sorted(run.seed for run in runs)
        assert len({json.dumps(run.settings()) for run in runs}) == len(runs)
        assert {SETTING.num_stages * run.epochs for run in runs} == {25}

    def test_choices(self):
        runs = plan(SETTING, ["none", "none"], 2, batch_sizes=[8], first_seed=5, epochs=3, learning_rate=0.1)
        assert [(run.seed, run.batch_size, run.epochs) for run in runs] == [(5, 8, 3), (6, 8, 3)]
        assert runs[0].settings()["learning_rate"] == 0.1

    def test_settings_hold_the_method(self):
        settings = small("mdn-last-recursive").settings()
        assert settings["setting"] == "continual"
        assert settings["options"]["estimator"] == "recursive"
        assert settings["degree"] == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"test_size": 3}, "test group size must be at least 4"),
            ({"batch_sizes": [1], "methods": ["batchnorm"]}, "nothing to run"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            plan(SETTING, **arguments)


class TestMeasures:
    def test_a_confounder_free_network_is_at_zero(self):
        result = continual.transfer([EFFECT_LIMITS] * 5)
        assert set(result.values()) == {0}
        assert len(result) == 5

    def test_against_loops_over_the_definitions(self):
        accuracy = np.random.default_rng(0).uniform(0.4, 1, (5, 5))
        expected = {"accuracy_distance": [], "backward_distance": [], "forward_distance": []}
        backward, forward = [], []
        for i in range(5):
            for j in range(5):
                key = "accuracy" if i == j else "backward" if j < i else "forward"
                expected[f"{key}_distance"].append(abs(accuracy[i, j] - EFFECT_LIMITS[j]))
                if i == 4 and j < 4:
                    backward.append(accuracy[4, j] - accuracy[j, j])
                if i == j - 1:
                    forward.append(accuracy[i, j] - EFFECT_LIMITS[j])
        assert list(map(len, expected.values())) == [5, 10, 10]
        means = {key: np.mean(values) for key, values in expected.items()}
        means |= {"backward_transfer": np.mean(backward), "forward_transfer": np.mean(forward)}
        assert continual.transfer(accuracy.tolist()) == pytest.approx(means)

    def test_a_network_that_uses_both(self):
        result = continual.transfer([BOTH_LIMITS] * 5)
        assert result["accuracy_distance"] == pytest.approx(np.subtract(BOTH_LIMITS, EFFECT_LIMITS).mean())
        assert result["backward_transfer"] == 0

    def test_means_are_over_the_own_stage(self):
        tested = [
            [{"bacc": 0.1 * i + j, "dcor2": {"A": i * j, "B": -float(i == j)}} for j in range(5)]
            for i in range(5)
        ]
        row = continual.measures(tested)
        assert row["bacc"] == pytest.approx(2.2)
        assert row["dcor2"] == {"A": 6, "B": -1}
        assert row["bacc_matrix"][3][1] == pytest.approx(1.3)
        assert row["dcor2_matrix"]["A"][3][1] == 3


class TestTraining:
    @pytest.mark.parametrize("method", SETTING.methods)
    def test_every_method_passes_all_stages(self, method):
        epochs = []
        row = train(small(method), lambda: epochs.append(1))
        assert len(epochs) == NUM_STAGES
        parts = [row, row["recalibrated"]] if METHODS[method].layers != "none" else [row]
        assert ("recalibrated" in row) == (len(parts) == 2)
        for part in parts:
            matrix = np.array(part["bacc_matrix"])
            assert matrix.shape == (5, 5)
            assert part["bacc"] == pytest.approx(np.diagonal(matrix).mean())
            assert {key: part[key] for key in continual.transfer(matrix)} == continual.transfer(matrix)
            assert np.shape(part["dcor2_matrix"]["B"]) == (5, 5)
        assert len(row["train_loss"]) == 5
        json.dumps(row, allow_nan=False)

    def test_same_seed_same_row(self):
        with one_thread():
            rows = [train(small("mdn-every-running"), lambda: None) for _ in range(2)]
        assert without_times(rows[0]) == without_times(rows[1])

    def test_one_network_goes_through_the_stages(self, monkeypatch):
        """Weights and state go on; data differ between stages and between training and test."""
        networks, weights, data, held_out = [], [], [], []
        fit, test = continual.fit, continual.ContinualSetting.measure

        def spied_fit(network, method, images, *args, **kwargs):
            networks.append(network)
            weights.append([network.head.weight.detach().clone()])
            data.append(images)
            row = fit(network, method, images, *args, **kwargs)
            weights[-1].append(network.head.weight.detach().clone())
            return row

        def spied_test(setting, network, data, *args):
            held_out.append((network, data.test))
            return test(setting, network, data, *args)

        monkeypatch.setattr(continual, "fit", spied_fit)
        monkeypatch.setattr(continual.ContinualSetting, "measure", spied_test)
        train(small("mdn-last-running"), lambda: None)
        assert len({id(network) for network in networks}) == 1
        for (_, after), (before, _) in itertools.pairwise(weights):
            assert torch.equal(after, before)
        images = [*data, *(images for _, images in held_out[:5])]
        assert len({float(part.inputs.sum()) for part in images}) == 10
        # Recalibrated copies are others, so that training goes on from what it has left.
        assert sum(network is networks[0] for network, _ in held_out) == 25
        assert len(held_out) == 50

    @pytest.mark.parametrize(
        ("method", "calls"),
        [
            ("none", 0),
            ("mdn-last-dataset", 5),
            ("mdn-last-authors", 5),
            ("mdn-last-recursive", 1),
            ("mdn-last-penalty", 5),
        ],
    )
    def test_gram_matrices(self, method, calls, monkeypatch):
        given = []

        def spied(network, metadata, labels):
            given.append(metadata)
            return fit_gram(network, metadata, labels)

        fit_gram = training.fit_gram
        monkeypatch.setattr(training, "fit_gram", spied)
        train(small(method), lambda: None)
        assert len(given) == calls
        assert len({float(metadata.sum()) for metadata in given}) == calls

    def test_the_effect_shows(self):
        """In small already: the network follows the confounder without correction, and not with it."""
        options = {"batch_size": 32, "epochs": 2, "learning_rate": 3e-4, "size": 300, "test_size": 25}
        rows = {name: train(small(name, **options), lambda: None) for name in ("none", "mdn-last-running")}
        assert rows["none"]["accuracy_distance"] > 0.2
        assert rows["none"]["bacc_matrix"][4][4] > 0.9
        assert rows["mdn-last-running"]["accuracy_distance"] < 0.12
        assert rows["mdn-last-running"]["bacc_matrix"][4][4] < 0.7


def test_a_recalibrated_copy_leaves_the_network_alone():
    method = METHODS["mdn-every-recursive"]
    (data, *_) = SETTING.stages(small("mdn-every-recursive"))
    network = build(SETTING, method, data, 0)
    prepare(network, data.train)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copied = copy.deepcopy(network)
    recalibrate_on(copied, data.train, method)
    SETTING.measure(copied, data, data.train)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


def test_the_basis_is_the_same_in_all_stages():
    columns = continual.make_samples(4, 500, 3, seed=0).metadata
    assert columns.shape == (1000, 3)
    assert 0.99 < columns.abs().max() <= 1
    torch.testing.assert_close(columns[:, 0] ** 3, columns[:, 2])


def row(method, seed, shift=0.0, **more):
    tested = [
        [
            {"bacc": limit + shift * (1 + j), "dcor2": {"A": 0.1, "B": 0.2 + 0.1 * seed}}
            for j, limit in enumerate(EFFECT_LIMITS)
        ]
        for _ in range(5)
    ]
    return {"method": method, "batch_size": 8, "seed": seed} | continual.measures(tested) | more


ROWS = (
    row("mdn-last-dataset", 0, 0.01, seconds_per_epoch=1.0, recalibrated=row("", 0, -0.01)),
    row("mdn-last-dataset", 1, 0.03, seconds_per_epoch=2.0, recalibrated=row("", 1, -0.01)),
    row("none", 0, 0.1, seconds_per_epoch=1.0),
)


class TestTables:
    def test_distances(self):
        table, _ = SETTING.tables(ROWS)
        assert [line[0] for line in table.lines] == [
            "No normalisation",
            "MDN, last layer, dataset",
            "MDN, last layer, dataset, recalibrated",
        ]
        assert table.headings[1:7] == ("Seeds", "ACCd", "BWTd", "FWTd", "BWT", "FWT")
        assert table.lines[0][1:] == ("1", "30.0", "20.0", "40.0", "0.0", "+35.0", "0.100", "0.200", "1.0")
        # Means 3 and 9 points, 2 and 6 on earlier, 4 and 12 on later stages.
        assert table.lines[1][1:5] == ("2", "6.0 ± 4.2", "4.0 ± 2.8", "8.0 ± 5.7")
        assert table.lines[1][-2:] == ("0.250 ± 0.071", "1.5")
        assert table.lines[2][6] == "−3.5 ± 0.0"
        assert table.lines[2][-1] == "–"

    def test_stages(self):
        _, table = SETTING.tables(ROWS)
        assert table.headings[1] == "Stage 1: 75 %"
        assert table.headings[-1] == "Stage 5: 50 %"
        assert table.lines[0][1:] == ("+10.0", "+20.0", "+30.0", "+40.0", "+50.0")
        assert table.lines[1][2] == "+4.0 ± 2.8"

    def test_recalibration_of_some_seeds_only_is_not_shown(self):
        partial = [{k: v for k, v in ROWS[0].items() if k != "recalibrated"}, ROWS[1]]
        assert [line[0] for line in SETTING.tables(partial)[0].lines] == ["MDN, last layer, dataset"]

    def test_limits(self):
        text = continual.limits_text()
        assert "75, 68.75, 62.5, 56.25, 50 % from the true effect" in text
        assert "87.5, 88.28, 90.62, 94.53, 100 % with the confounder" in text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mdn-last-dataset", "none"], ["none", "mdn-last-dataset", "mdn-last-dataset, recalibrated"]),
        (["batchnorm", "groupnorm"], ["batchnorm", "groupnorm"]),
        (
            [*SETTING.methods],
            [
                "none",
                "mdn-last-dataset",
                "mdn-last-running",
                "mdn-last-running, recalibrated",
                "mdn-last-recursive",
                "mdn-last-recursive, recalibrated",
            ],
        ),
        ([name for name in METHODS if name.startswith("mdn-every")], 6),
    ],
)
def test_matrices_shown(names, expected):
    ordered = [name for name in METHODS if name in names]
    rows = [
        row(name, 0) | ({"recalibrated": row("", 0)} if name.startswith("mdn") else {}) for name in ordered
    ]
    shown = list(continual._matrices(rows))
    if isinstance(expected, int):
        assert len(shown) == expected
        return
    parts = [name.partition(",") for name in expected]
    assert shown == [METHODS[name].title + comma + rest for name, comma, rest in parts]


def test_outputs(tmp_path):
    runs = plan(
        SETTING,
        ["none", "mdn-last-dataset"],
        2,
        batch_sizes=[16],
        epochs=1,
        size=10,
        test_size=10,
        first_seed=3,
    )
    rows = Runner(ResultStore(tmp_path / "results.json"), train).run(runs)
    report = write_outputs(tmp_path, runs, rows, command="mdnorm-experiments continual")
    text = report.read_text(encoding="utf-8")
    assert text.count("<img") == 4
    assert text.count("<table>") == 2
    assert "mdnorm-experiments continual" in text
    assert "<dd>3, 4</dd>" in text
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"| {METHODS['mdn-last-dataset'].title}, recalibrated | 2 |" in table
    assert "## Above the limit, by stage" in table
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    expected = ["accuracy", "dependence", "examples", "matrices"]
    assert names == [f"{name}.{suffix}" for name in expected for suffix in ("pdf", "png")]
