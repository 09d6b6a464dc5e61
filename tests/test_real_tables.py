"""The comparison on real tables and the check against ComBat's stored results, on invented files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmark_modules import load

ROOT = Path(__file__).parent.parent


real = load("real_tables")
combat = load("combat_reference")


def write_heart(folder, num_rows=60, copied=True):
    """Write a table as the real one; Cleveland as in the copy with other codes, or in the original ones."""
    rng = np.random.default_rng(0)
    parts = []
    for shift, hospital in enumerate(("cleveland", "hungarian", "va")):
        ill = np.arange(num_rows) % 2
        part = pd.DataFrame(
            {
                "age": rng.integers(30, 70, num_rows) + shift,
                "sex": rng.integers(0, 2, num_rows),
                "cp": 1 + rng.integers(0, 4, num_rows),
                "trestbps": rng.integers(100, 160, num_rows) + 10 * ill,
                "chol": rng.integers(150, 300, num_rows),
                "fbs": rng.integers(0, 2, num_rows),
                "restecg": rng.integers(0, 3, num_rows),
                "thalach": rng.integers(90, 180, num_rows) - 20 * ill + 5 * shift,
                "exang": rng.integers(0, 2, num_rows),
                "oldpeak": (rng.random(num_rows) + ill).round(1),
                "slope": 1 + rng.integers(0, 3, num_rows),
                "ca": "?",
                "thal": "?",
                "num": ill * rng.integers(1, 4, num_rows),
                "hospital": hospital,
            }
        )
        parts.append(part.astype({"trestbps": object, "slope": object}))
    if copied:
        first = parts[0]
        first["cp"] = first["cp"].map({4: 0, 2: 1, 3: 2, 1: 3})
        first["restecg"] = first["restecg"].map({2: 0, 0: 1, 1: 2})
        first["num"] = (first["num"] == 0).astype(int)
    parts[1]["slope"] = "?"
    parts[1].loc[0, "trestbps"] = "?"
    parts[2].loc[:9, "chol"] = 0
    pd.concat(parts).to_csv(folder / "heart_all.csv", index=False)


def write_abide(folder, per_site=20):
    rng = np.random.default_rng(1)
    count = 3 * per_site
    age = rng.uniform(8, 40, count)
    site = np.repeat(["NYU", "USM", "YALE"], per_site)
    table = {
        "FILE_ID": [f"p{row}" for row in range(count)],
        "SITE_ID": site,
        "DX_GROUP": 1 + np.arange(count) % 2,
        "AGE_AT_SCAN": age,
        "SEX": 1,
        "FIQ": np.where(np.arange(count) % 7 == 0, -9999.0, 100.0),
        "BMI": "",
    }
    for index in range(4):
        table[f"lh_{index}_thickness"] = 3 - 0.02 * age + 0.1 * (site == "USM") + 0.05 * rng.random(count)
        table[f"Left-{index}"] = 5000 + 900 * rng.random(count) + 400 * (site == "YALE")
    table["Left-WM-hypointensities"] = 0.0
    pd.DataFrame(table).to_csv(folder / "abide_freesurfer.csv", index=False)


def write_captk(folder, count=30):
    rng = np.random.default_rng(2)
    names = [f"p{row:03}" for row in range(count)]
    measures = pd.DataFrame(
        {
            "SubjectID": names,
            "energy": 1e9 * rng.random(count),
            "mean": rng.standard_normal(count),
            "contrast": rng.random(count).astype(object),
        }
    ).drop(index=4)
    measures.loc[7, "contrast"] = "#NAME?"
    text = "\ufeff" + measures.to_csv(index=False)
    (folder / "captk_radiomics.csv").write_text(text, encoding="utf-8")
    people = pd.DataFrame(
        {
            "event": 0,
            "age": ["nan" if row < 12 else str(60 + row % 9) for row in range(count)],
            "egfr-mut": ["nan" if row % 10 == 9 else str(row % 2) for row in range(count)],
            "solid-subsolid": "no data",
        },
        index=names,
    )
    people.to_csv(folder / "captk_clinical.csv")


# --------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_heart_table_with_other_codes_is_what_the_original_is(tmp_path):
    tables = []
    for name, copied in (("copy", True), ("original", False)):
        (tmp_path / name).mkdir()
        write_heart(tmp_path / name, copied=copied)
        tables.append(real.heart(tmp_path / name))
    copy, original = tables
    np.testing.assert_array_equal(copy.features, original.features)
    np.testing.assert_array_equal(copy.target, original.target)
    assert any("brought back" in note for note in copy.notes)
    assert not any("brought back" in note for note in original.notes)


def test_what_the_heart_table_lacks_is_missing_and_what_a_hospital_lacks_is_left_out(tmp_path):
    write_heart(tmp_path)
    table = real.heart(tmp_path)
    # One blood pressure of "?", ten cholesterols of 0; the slope is missing at one hospital.
    assert np.isnan(table.features).sum() == 11
    assert "left out: slope" in "; ".join(table.notes)
    assert table.features.shape[1] == 9 - 1 + 3 + 2  # numbers less the slope and two classes, and their codes
    assert table.target.dtype == np.int64
    assert not table.is_regression


def test_abide_has_measures_only_and_a_missing_iq_is_no_measure(tmp_path):
    write_abide(tmp_path)
    age, diagnosis = real.abide(tmp_path, "age"), real.abide(tmp_path, "diagnosis")
    assert age.features.shape == (60, 8)
    assert np.isfinite(age.features).all()
    assert age.features.min() > 0
    np.testing.assert_allclose(np.exp(age.target), age.age)
    assert set(diagnosis.target) == {0, 1}
    assert "1 features that never vary left out" in age.notes
    assert "4 features in mm, 4 in mm³ and counts" in age.notes


def test_captk_joins_people_by_their_names(tmp_path):
    write_captk(tmp_path)
    table = real.captk(tmp_path)
    assert table.features.shape == (26, 3)  # one has no radiomics, three no known mutation
    assert np.isnan(table.features).sum() == 1
    assert table.features[:, 0].max() < 25  # the logarithm
    assert {name: int((table.site == name).sum()) for name in set(table.site)} == {
        "set without ages": 10,
        "set with ages": 16,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="hospital"), "lacks the columns hospital"),
        (lambda table: table.assign(thalach="fast"), "thalach should be numbers"),
    ],
)
def test_another_table_is_an_error_that_says_what_is_wrong(tmp_path, change, message):
    write_heart(tmp_path)
    path = tmp_path / "heart_all.csv"
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)
    with pytest.raises(real.DataError, match=message):
        real.heart(tmp_path)


# --------------------------------------------------------------------------------------------------------
# Methods and measures
# --------------------------------------------------------------------------------------------------------


def split(folder, case="age"):
    write_abide(folder)
    table = real.abide(folder, case)
    train, held_out = next(iter(real.folds(table, "within", 0, 0)))
    return real.prepared(table.rows(train), table.rows(held_out))


def test_statistics_of_held_out_rows_play_no_part(tmp_path):
    train, held_out = split(tmp_path)
    np.testing.assert_allclose(train.features.mean(axis=0), 0, atol=1e-9)
    assert np.abs(held_out.features.mean(axis=0)).max() > 1e-3


def test_site_scale_with_the_label_protected_is_combat_with_the_label_at_its_mean(tmp_path):
    pair = split(tmp_path)
    results = {}
    for name in ("mdnorm-scale", "neuroharmonize-mean", "neurocombat"):
        method = real.METHODS[name]
        with real.quiet():
            results[name] = method.fit(pair[0], **method.options)(pair[1])
    for other in ("neuroharmonize-mean", "neurocombat"):
        np.testing.assert_allclose(results["mdnorm-scale"], results[other], atol=1e-6)


def test_only_methods_with_a_star_look_at_labels_of_held_out_rows(tmp_path):
    train, held_out = split(tmp_path)
    other = real.Table(held_out.features, held_out.site, held_out.target[::-1].copy(), held_out.age)
    for name, method in real.METHODS.items():
        if method.package not in ("mdnorm", "neuroHarmonize", "neuroCombat", "concept-erasure"):
            continue
        with real.quiet():
            transform = method.fit(train, **method.options)
            same = np.array_equal(transform(held_out), transform(other))
        assert same != method.given_labels, name


def test_a_site_that_nobody_knew_is_left_to_methods_that_can(tmp_path):
    write_abide(tmp_path)
    table = real.abide(tmp_path, "age")
    keys = ["raw", "mdnorm-scale", "mdnorm-adapt", "neuroharmonize", "leace-within"]
    rows = real.run_tables("abide-age", table, "left-out", keys, 1, 0)
    cannot = {row["method"] for row in rows if "cannot" in row}
    assert cannot == {"neuroharmonize"}
    assert "neuroHarmonize, no label" in real.reasons(rows)[0]
    assert all(set(row["sites"]) == {"NYU", "USM", "YALE"} for row in rows if "sites" in row)


def test_groups_count_the_same_and_the_interval_has_the_mean():
    values, groups = np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])
    assert real.grouped_mean(values, groups) == 0.5
    mean, low, high = real.bootstrap_interval(
        np.random.default_rng(0).normal(2, 1, 400), np.zeros(400, int), 0
    )
    assert low < mean < high
    assert 0.1 < high - low < 0.3


def test_errors_are_years_and_classes_are_right_or_wrong():
    np.testing.assert_allclose(real.losses(np.log([30.0]), np.log([20.0])), 10)
    assert real.losses(np.array([0.3, 0.3]), np.array([1, 0])).tolist() == [1, 0]


# --------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------

FEW = ["--repeats", "2", "--network-repeats", "1", "--methods", "mdnorm-scale", "leace-within", "weights"]


def test_the_command_writes_rows_and_prints_narrow_tables(tmp_path, capsys):
    write_heart(tmp_path)
    out = tmp_path / "results.json"
    arguments = ["--data", str(tmp_path), "--out", str(out), "--cases", "heart", "abide-age", *FEW]
    assert real.main(arguments) == 0
    captured = capsys.readouterr()
    assert "abide-age is skipped: abide_freesurfer.csv not in the folder" in captured.err
    tables = [line for line in captured.out.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) <= 100
    assert any("network with mdnorm's layer" in line for line in tables)
    first = json.loads(out.read_text(encoding="utf-8"))
    assert real.main([*arguments, "--schemes", "within"]) == 0
    again = json.loads(out.read_text(encoding="utf-8"))
    key = json.dumps
    assert sorted(map(key, first)) == sorted(map(key, again))  # the same seed, and other schemes stay
    capsys.readouterr()
    assert real.main(["--out", str(out), "--stored"]) == 0
    assert "mdnorm, shifts and scale" in capsys.readouterr().out


def test_a_folder_without_tables_or_none_at_all_is_an_error(tmp_path, capsys):
    assert real.main(["--data", str(tmp_path)]) == 2
    assert "no table of any case" in capsys.readouterr().err
    assert real.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def write_reference(folder, wrong=0.0):
    features = np.random.default_rng(0).normal(5, 2, (10, 30))
    columns = ",".join(f"V{index + 1}" for index in range(10))
    (folder / "combat_reference").mkdir()
    np.savetxt(
        folder / "combat_testdata.csv", features.T, "%.17g", delimiter=",", header=columns, comments=""
    )
    for name in ("parametric_adjusted", "parametric_unadjusted_noeb", "nonparametric_adjusted"):
        for language in ("r", "python", "matlab"):
            make = combat.harmonised_as_matlab if language == "matlab" else combat.harmonised
            expected = make(features, combat.Variant(name, language)) + wrong
            path = folder / f"combat_reference/{name}_{language}.csv"
            header = columns if language == "r" else ""
            np.savetxt(path, expected.T, "%.17g", delimiter=",", header=header, comments="")
            if language != "r":
                path.write_text(path.read_text(encoding="utf-8").lstrip("\n"), encoding="utf-8")


def test_stored_combat_results_are_compared_variant_by_variant(tmp_path, capsys):
    write_reference(tmp_path)
    assert combat.main(["--data", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "parametric, unadjusted, noeb" in out
    assert "not covered: nonparametric_adjusted" in out
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    differences = [row["difference"] for row in rows if "difference" in row]
    assert len(differences) >= 6
    assert max(differences) < 1e-10


def test_matlab_stops_its_iteration_earlier():
    features = np.random.default_rng(0).normal(5, 2, (10, 30))
    variant = combat.Variant("parametric_adjusted", "matlab")
    difference = np.abs(combat.harmonised_as_matlab(features, variant) - combat.harmonised(features, variant))
    assert 1e-12 < difference.max() < 1e-2


def test_a_stored_result_that_differs_is_an_error(tmp_path, capsys):
    write_reference(tmp_path, wrong=1e-6)
    assert combat.main(["--data", str(tmp_path)]) == 1
    assert "1.0e-06" in capsys.readouterr().err


def test_without_the_test_table_there_is_nothing_to_check(tmp_path, capsys):
    assert combat.main(["--data", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_stored_rows():
    rows = json.loads((ROOT / "docs/results/real-tables.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/real-tables.md").read_text(encoding="utf-8")
    shown = {(row["case"], row["scheme"]) for row in rows if "scheme" in row}
    assert shown == {(case, scheme) for case in real.CASES for scheme in real.SCHEMES}
    for case, scheme in shown:
        assert real.printed(rows, case, scheme) in page, (case, scheme)
    assert real.as_json(list(rows)) == (ROOT / "docs/results/real-tables.json").read_text(encoding="utf-8")
