import json
import re
import sys

import dcor
import numpy as np
import pandas as pd
import pytest
import torch
from audit_example import QUICK, QUICKEST, example

import mdnorm
from mdnorm.auditing import InputError, Settings
from mdnorm.metrics import cka, distance_correlation_sqr

OLD, NEW = "the old network", "the new network"


def column_of(report, name):
    return next(column for column in report.columns if column.name == name)


def level_of(report, name, topic="dependence"):
    """The level of the verdict: of the features after, where there are such."""
    return next(f.level for f in report.findings if f.column == name and f.topic == topic and f.is_decisive)


def standardized(values):
    return (values - values.mean(axis=0)) / values.std(axis=0)


def test_what_was_put_in_is_found_and_what_was_not_is_not(report):
    # From harm to none, the label last.
    assert [column.name for column in report.columns] == ["site", "age", "shoe size", "diagnosis"]
    for name in ("site", "age"):
        column = column_of(report, name)
        before, after = column.representations[OLD], column.representations[NEW]
        assert before.dependence_within.low > 0.1
        assert before.dependence_within.p_value < 0.001
        assert after.dependence_within.p_value > 0.01
        assert before.probes_within["linear"].p_value == 1 / 101
        assert next(f for f in report.findings if f.column == name and f.key == OLD).level == "strong"
        assert before.probes_within["linear"].share > 0.6
        assert after.shown_probe.share < 0.2
    shoe = column_of(report, "shoe size").representations[OLD]
    assert abs(shoe.dependence.value) < 0.03
    assert max(probe.value for probe in shoe.probes.values()) < 0.1
    assert level_of(report, "shoe size") == "none"
    assert "shoe size was found neither before nor after" in str(report)
    # Of 240 rows the intervals leave room for more than the limits.
    assert level_of(report, "site") == "open"
    assert "Whether site is in the new network given diagnosis cannot be decided" in str(report)
    assert level_of(report, "diagnosis") == "none"


def test_numbers_are_those_of_the_metrics(report):
    raw_before, raw_after, metadata = example()
    before, after = standardized(raw_before), standardized(raw_after)
    site = (metadata["site"] == "a").astype(float)
    measured = column_of(report, "site").representations
    for key, features in ((OLD, before), (NEW, after)):
        assert measured[key].dependence.value == pytest.approx(
            distance_correlation_sqr(features, site), abs=1e-9
        )
        values, weights = [], []
        for name in ("ill", "well"):
            inside = metadata["diagnosis"] == name
            value = distance_correlation_sqr(features[inside], site[inside])
            assert measured[key].dependence_by_class[name].value == pytest.approx(value, abs=1e-9)
            values.append(value)
            weights.append(inside.sum())
        pooled = np.average(values, weights=weights)
        assert measured[key].dependence_within.value == pytest.approx(pooled, abs=1e-9)
    assert report.similarity == pytest.approx(cka(raw_before, raw_after))
    diagnosis = (metadata["diagnosis"] == "ill").astype(float)
    association = column_of(report, "site").association_with_label
    assert association == pytest.approx(distance_correlation_sqr(site, diagnosis), abs=1e-9)
    assert any(f.topic == "confounding" and f.column == "site" for f in report.findings)
    assert not any(f.topic == "confounding" and f.column == "age" for f in report.findings)


def test_group_gaps_of_the_predictions(report):
    _, _, metadata = example()
    gaps = column_of(report, "site").representations[OLD].group_gaps
    assert gaps.positive == "ill"
    for group in gaps.groups:
        inside = metadata["site"] == group.group
        right = (metadata["predicted"] == metadata["diagnosis"])[inside]
        assert group.rates["accuracy"].value == pytest.approx(right.mean())
        ill = metadata["diagnosis"][inside] == "ill"
        found = (metadata["predicted"][inside] == "ill")[ill].mean()
        assert group.rates["true_positive_rate"].value == pytest.approx(found)
    ages = column_of(report, "age").representations[OLD].group_gaps
    assert len(ages.groups) == 4
    assert column_of(report, "diagnosis").representations[OLD].group_gaps is None
    assert level_of(report, "site", "gap") == "strong"


def test_the_same_seed_gives_the_same_report(report):
    before, after, metadata = example()
    again = mdnorm.audit(
        {OLD: torch.from_numpy(before), NEW: after},
        pd.DataFrame(metadata),
        "diagnosis",
        predictions={OLD: "predicted", NEW: "predicted later"},
        positive="ill",
        settings=QUICK,
    )
    first, second = report.to_dict(), again.to_dict()
    first.pop("facts"), second.pop("facts")
    assert json.dumps(first) == json.dumps(second)


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_counts_the_steps_on_a_terminal(progress, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before, _, metadata = example()
    mdnorm.audit(before, {"age": metadata["age"]}, settings=QUICK, progress=progress)
    shown = capsys.readouterr().err
    assert ("0/4" in shown) is progress
    assert progress or shown == ""


def test_without_labels_and_without_after():
    before, _, metadata = example()
    steps = []
    report = mdnorm.audit(
        before, {"age": metadata["age"]}, settings=QUICK, progress=lambda *step: steps.append(step)
    )
    assert [step[1:] for step in steps] == [(done, 4) for done in range(4)]
    assert report.label is None
    assert report.similarity is None
    assert [finding.topic for finding in report.findings] == ["dependence"]
    assert level_of(report, "age", "dependence") == "strong"
    assert report.columns[0].representations["before"].dependence_within is None
    assert "age is found in these features: R²" in str(report)


def test_labels_as_an_array_and_continuous_labels():
    before, _, metadata = example()
    report = mdnorm.audit(before, {"site": metadata["site"]}, metadata["age"], settings=QUICKEST)
    assert report.label == "label"
    site = column_of(report, "site")
    assert site.representations["before"].dependence_by_class == {}
    assert site.representations["before"].dependence_within is not None
    assert "what a smooth function of it leaves" in site.note
    assert column_of(report, "label").kind == "continuous"


def test_missing_values_are_reported_and_rows_used_stated():
    before, _, metadata = example()
    age = metadata["age"].copy()
    age[:30] = np.nan
    before[100:105, 2] = np.nan
    before[105, 0] = np.inf
    report = mdnorm.audit(before, {"age": age, "site": metadata["site"]}, settings=QUICKEST)
    assert "6 of 240 rows have missing or infinite features" in report.notes[0]
    assert report.facts["rows_used"] == 234
    assert column_of(report, "age").num_rows == 204
    assert column_of(report, "age").num_missing == 30
    assert column_of(report, "site").num_rows == 234


def test_constants_and_identifiers_are_left_out_with_a_reason():
    before, _, metadata = example()
    report = mdnorm.audit(
        before,
        {
            "age": metadata["age"],
            "subject_id": np.arange(240),
            "scanner": ["x"] * 240,
            "few": [1.5, 2.5] + [None] * 238,
        },
        settings=QUICKEST,
    )
    assert [column.name for column in report.columns] == ["age"]
    assert {column.name: column.kind for column in report.left_out} == {
        "subject_id": "identifier",
        "scanner": "constant",
        "few": "constant",
    }
    notes = " ".join(report.notes)
    assert "like a row number or an id" in notes
    assert "same value (x)" in notes
    assert "only 2 rows have a value" in notes


def test_a_constant_column_within_a_label_class_is_noted():
    before, _, metadata = example()
    site = np.where(metadata["diagnosis"] == "ill", "a", metadata["site"])
    report = mdnorm.audit(
        before, {"diagnosis": metadata["diagnosis"], "site": site}, "diagnosis", settings=QUICK
    )
    column = column_of(report, "site")
    assert "Within class ill of the label, site never changes" in column.note
    assert list(column.representations["before"].dependence_by_class) == ["well"]


def test_rare_classes_do_not_stop_an_audit():
    before, _, metadata = example()
    site = metadata["site"].astype(object)
    site[:2] = "rare"
    report = mdnorm.audit(before, {"site": site}, settings=QUICKEST)
    probe = report.columns[0].representations["before"].probes["linear"]
    assert "fewer than 20 rows were left out: rare" in probe.notes[0]
    assert probe.num_rows == 238
    rare = np.array([f"family {i // 3}" for i in range(240)])
    report = mdnorm.audit(before, {"age": metadata["age"], "family": rare}, settings=QUICKEST)
    assert [column.name for column in report.left_out] == ["family"]
    assert "fewer than two classes have 5 rows" in report.notes[0]


def test_many_rows_are_sampled_and_it_is_said():
    before, _, metadata = example(3000)
    report = mdnorm.audit(before, {"age": metadata["age"]}, max_rows=200, settings=QUICKEST)
    assert "200 of 3000 rows were sampled (seed 0)" in report.notes[0]
    assert report.facts["rows_used"] == 200
    assert report.facts["rows_given"] == 3000


def test_subjects_stay_together():
    rng = np.random.default_rng(0)
    # Forty subjects of six samples each: features tell the subject, and so the age, if it is in both folds.
    age, centre = rng.uniform(20, 80, 40), 5 * rng.standard_normal((40, 30))
    subject = np.repeat(np.arange(40), 6)
    features = centre[subject] + rng.standard_normal((240, 30))
    leaky = mdnorm.audit(features, {"age": age[subject]}, settings=QUICKEST)
    kept = mdnorm.audit(features, {"age": age[subject]}, subjects=subject, settings=QUICKEST)
    assert leaky.columns[0].representations["before"].shown_probe.value > 0.5
    assert kept.columns[0].representations["before"].shown_probe.value < 0.2


def test_distance_correlations_are_of_one_row_of_each_subject():
    """Rows of the same subject are alike: taken for independent, they make any column significant."""
    alarms = {"rows": 0, "subjects": 0}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        age, centre = rng.uniform(20, 80, 30), 3 * rng.standard_normal((30, 4))
        sick = np.repeat(rng.permutation(30) < 15, 6)
        subject = np.repeat([f"s{i}" for i in range(30)], 6)
        features = np.repeat(centre, 6, axis=0) + rng.standard_normal((180, 4))
        for key, given in (("rows", None), ("subjects", subject)):
            settings = Settings(num_permutations=20, num_bootstrap=0, num_folds=2, seed=seed)
            report = mdnorm.audit(features, {"age": np.repeat(age, 6)}, subjects=given, settings=settings)
            dependence = report.columns[0].representations["before"].dependence
            alarms[key] += dependence.p_value < 0.05
            if given is not None:
                assert dependence.num_rows == 30
                assert dependence.low <= dependence.value <= dependence.high
                assert "180 rows are of 30 subjects" in report.notes[0]
    assert alarms["rows"] >= 18
    assert alarms["subjects"] <= 4  # 1 is expected
    report = mdnorm.audit(features, {"age": np.repeat(age, 6)}, sick, subjects=subject, settings=QUICKEST)
    column = report.columns[0]
    assert "Class False of the label has 15 rows, too few to look within." in column.note
    assert column.representations["before"].dependence_within is None


def test_subjects_are_resampled_whole_for_the_gaps():
    _, after, metadata = example(seed=3)
    settings = Settings(num_permutations=20, num_bootstrap=0, num_folds=2)
    arguments = {"labels": "diagnosis", "predictions": "predicted", "settings": settings}
    arguments["ignore"] = ["age", "shoe size", "predicted later"]
    rows = np.repeat(np.arange(240), 4)
    repeated = {name: np.asarray(values)[rows] for name, values in metadata.items()}
    features = after[rows] + 1e-3 * np.random.default_rng(0).standard_normal((960, 6))

    def widths(**options):
        report = mdnorm.audit(features, repeated, max_rows=960, **arguments, **options)
        column = next(column for column in report.columns if column.name == "site")
        groups = column.representations["before"].group_gaps.groups
        return np.array([g.rates["accuracy"].high - g.rates["accuracy"].low for g in groups])

    # Four copies of each row say nothing new, so the interval is twice as wide as that of 960 rows.
    ratio = widths(subjects=rows) / widths()
    assert (ratio > 1.5).all()
    assert (ratio < 2.6).all()


def test_dates_are_read_as_dates():
    before, _, metadata = example()
    days = np.datetime64("2020-01-01") + np.arange(240).astype("timedelta64[D]")
    table = {"visit": days, "diagnosis": metadata["diagnosis"], "predicted": metadata["predicted"]}
    report = mdnorm.audit(before, table, "diagnosis", predictions="predicted", settings=QUICK)
    visit = next(column for column in report.columns if column.name == "visit")
    assert visit.description == "2020-01-01 to 2020-08-27, median 2020-04-29"
    groups = [group.group for group in visit.representations["before"].group_gaps.groups]
    assert groups[0] == "2020-01-01 to 2020-02-29"
    assert len(groups) == 4
    page = report.to_html()
    assert "2020-08-27" in page
    # Seconds since 1970 are positions in figures, and nowhere a text.
    assert not re.search(r"1577\d", re.sub(r'"(numbers|ticks)":\[.*?\]', "", page.split('id="figures">')[1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_permutations": 0}, "num_permutations must be at least 1, got 0"),
        ({"num_permutations": 19}, "num_permutations must be at least 20, got 19"),
        ({"min_group_rows": 0}, "min_group_rows must be at least 1"),
        ({"max_gap": 5}, "max_gap must be a number between 0 and 1, got 5"),
        ({"alpha": True}, "alpha must be a number between 0 and 1, got True"),
        ({"num_bootstrap": 2.5}, "num_bootstrap must be an integer, got 2.5"),
        ({"num_folds": 1}, "num_folds must be at least 2"),
        ({"seed": "today"}, "seed must be an integer, got 'today'"),
        ({"confidence": 95}, "confidence must be between 0 and 1, got 95"),
        ({"confidence": float("nan")}, "confidence must be between 0 and 1, got nan"),
        ({"confidence": None}, "confidence must be a number, got None"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        Settings(**changes)


def test_feature_maps_are_flattened():
    before, _, metadata = example()
    flat = mdnorm.audit(before, {"age": metadata["age"]}, settings=QUICKEST)
    maps = mdnorm.audit(before.reshape(240, 2, 3), {"age": metadata["age"]}, settings=QUICKEST)
    assert maps.facts["features"] == {"before": [240, 6]}
    assert maps.findings == flat.findings
    assert maps.facts["fingerprint"] == flat.facts["fingerprint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((0, 3))}, r"features must have one row for each sample, got shape \(0, 3\)"),
        ({"features": np.zeros((240, 3))}, "all features .before. are constant"),
        ({"features": np.array([["a"]])}, "features must be real and numeric, got an array of dtype <U1"),
        ({"features": np.tile([1e-200, -1e-200], 120)}, r"features .before. have values up to 1e-200, whose"),
        ({"features": np.tile([1e200, 3.0], 120)}, r"features .before. have values up to 1e\+200, whose"),
        (
            {"features": np.column_stack([np.ones(240), np.arange(240) * 1e-200])},
            "all features .before. are constant",
        ),
        ({"features": np.full((240, 2), np.nan)}, "only 0 rows with finite features"),
        ({"features": np.ones((100, 2))}, "100 rows in features and 240 in metadata"),
        ({"after": np.ones((100, 2))}, "240 rows in features, 240 in metadata and 100 in after"),
        *(
            (
                {"features": {"raw": np.ones((240, 2)), name: np.ones((100, 2))}},
                rf"240 rows in features, 240 in metadata and 100 in features\['{name}'\]",
            )
            for name in ("features", "metadata")
        ),
        ({"labels": "disease"}, "no metadata column 'disease' for the labels"),
        ({"keep": ["sight"]}, "no metadata column 'sight' for what is meant to stay"),
        ({"intersect": [("site", "sight")]}, "no metadata column 'sight' for an intersection"),
        ({"intersect": [("site", "age")]}, "site × age is of classes, but age is continuous"),
        ({"intersect": [("site",)]}, "an intersection needs two columns at least"),
        ({"held_out": "site"}, "held_out must say true or false for each row, got 'a', 'b'"),
        ({"held_out": np.arange(240) < 5}, "only 5 held-out rows are left of 240"),
        ({"features": {}}, "a mapping without treatments"),
        ({"features": {"raw": np.ones((240, 2))}, "after": np.ones((240, 2))}, "as one more entry of it"),
        (
            {"predictions": {"raw": "predicted"}},
            "has 'raw', but there are no such features; there are 'before'",
        ),
        ({"labels": np.zeros(240)}, "the label 'label' cannot be used"),
        ({"labels": np.zeros(24)}, "labels have 24 rows, features 240"),
        ({"metadata": {"scanner": ["x"] * 240}, "labels": None}, "no metadata column can be audited"),
        ({"metadata": {}, "labels": None}, "no metadata columns"),
        ({"labels": None, "predictions": "predicted"}, "need the labels"),
        ({"predictions": np.array(["sick"] * 240)}, "hold 'sick', but the labels are only"),
        ({"predictions": "predicted", "scores": np.full(240, 1.2)}, "must be probabilities from 0 to 1"),
        ({"predictions": "predicted", "scores": np.full(240, np.nan)}, "some are NaN or infinite"),
        ({"predictions": "predicted", "scores": "predicted later"}, "scores must be numbers: could not"),
        ({"scores": np.full(240, 0.5)}, "scores are used beside predictions: give those of 'before' too"),
        ({"predictions": {"after": "predicted later"}}, "has 'after', but there are no such features"),
        ({"predictions": "predicted", "positive": "sick"}, "positive='sick' is not one of the labels"),
        ({"subjects": np.zeros(3)}, r"subjects must have shape \(240,\)"),
        ({"max_rows": 3}, "max_rows must be at least 20, got 3"),
        ({"max_rows": True}, "max_rows"),
        ({"labels": [{}] * 240}, "^the argument labels has values of type dict"),
        ({"labels": 3}, r"^the argument labels must have shape \(n,\), got \(\)"),
        (
            {"labels": ["?", *map(str, np.arange(239) / 8)]},
            "^the argument labels has numbers, but '[?]' in row 0",
        ),
        ({"predictions": np.array([{}] * 240)}, "^the argument predictions has values of type dict"),
        ({"predictions": "predicted", "positive": {}}, "^the argument positive has values of type dict"),
        ({"held_out": np.array([b"x", None] * 120)}, "^the argument held_out has values of type bytes"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    before, _, metadata = example()
    arguments = {"features": before, "metadata": metadata, "labels": "diagnosis", "settings": QUICK} | changes
    with pytest.raises(InputError, match=message):
        mdnorm.audit(**arguments)


def test_integer_and_boolean_predictions_match_their_labels():
    before, _, metadata = example()
    label = (metadata["diagnosis"] == "ill").astype(int)
    pairs = [
        (label, label),
        (label, label.astype(float)),
        (label, torch.from_numpy(label)),
        (label.astype(bool), label.astype(bool)),
    ]
    for labels, predictions in pairs:
        report = mdnorm.audit(
            before, {"site": metadata["site"]}, labels, predictions=predictions, settings=QUICKEST
        )
        gaps = report.columns[0].representations["before"].group_gaps
        assert gaps.gaps["accuracy"].value == 0


def test_a_model_that_always_says_the_same_is_audited():
    before, _, metadata = example()
    label = (metadata["diagnosis"] == "ill").astype(int)
    for predictions in (np.ones(240, int), np.ones(240), "predicted"):
        columns = {"site": metadata["site"], "predicted": np.ones(240, int)}
        report = mdnorm.audit(
            before, columns, label, predictions=predictions, positive=1.0, settings=QUICKEST
        )
        site = column_of(report, "site")
        accuracy = site.representations["before"].group_gaps.groups[0].rates["accuracy"].value
        assert accuracy == pytest.approx(label[metadata["site"] == "a"].mean())


def test_more_sites_than_groups_are_compared_keep_their_other_measures():
    rng = np.random.default_rng(0)
    site = np.arange(600) % 120
    features = rng.standard_normal((600, 3)) + 3 * rng.standard_normal((120, 3))[site]
    metadata = {"site": [f"s{code}" for code in site], "sex": rng.choice(["f", "m"], 600)}
    label, predictions = rng.integers(0, 2, (2, 600))
    report = mdnorm.audit(features, metadata, label, predictions=predictions, settings=QUICKEST)
    part = column_of(report, "site").representations["before"]
    expected = dcor.u_distance_correlation_sqr(standardized(features), np.eye(120)[site])
    assert part.dependence.value == pytest.approx(expected, abs=1e-12)
    assert part.group_gaps is None
    assert level_of(report, "site") == "strong"
    assert level_of(report, "site", "gap") == "open"
    assert re.search("groups of site cannot be decided: groups has 120 different values", str(report))
    sex = column_of(report, "sex").representations["before"].group_gaps
    assert [group.rates["accuracy"].value for group in sex.groups] == [
        pytest.approx((label == predictions)[metadata["sex"] == name].mean()) for name in "fm"
    ]
    # It may be the only column, too.
    alone = mdnorm.audit(
        features, {"site": metadata["site"]}, label, predictions=predictions, settings=QUICKEST
    )
    assert column_of(alone, "site").representations["before"].dependence == part.dependence


def test_whole_numbers_that_may_be_codes_are_not_simply_not_found():
    rng = np.random.default_rng(0)
    site = np.arange(400) % 20
    features = rng.standard_normal((400, 3))
    features[:, 0] += 3 * (site % 2)
    as_codes = dcor.u_distance_correlation_sqr(standardized(features), np.eye(20)[site])
    as_numbers = dcor.u_distance_correlation_sqr(standardized(features), site.astype(float))
    assert as_numbers < 0.05 < as_codes
    reports = {
        kind: mdnorm.audit(features, {"site": site}, kinds=kind and {"site": kind}, settings=QUICK)
        for kind in (None, "continuous", "categorical")
    }
    for kind, value in ((None, as_numbers), ("continuous", as_numbers), ("categorical", as_codes)):
        part = column_of(reports[kind], "site").representations["before"]
        assert part.dependence.value == pytest.approx(value, abs=1e-12)
        # Who gives the kind has decided.
        for text in (str(reports[kind]), reports[kind].to_html(), json.dumps(reports[kind].to_dict())):
            assert ("--kind" in text) == (kind is None)
    assert "[note] site has 20 different whole numbers, taken as continuous" in str(reports[None])
    words = {kind: report.table()[0].words for kind, report in reports.items()}
    assert words == {
        None: "not found above R² 0.20, taken as continuous",
        "continuous": "not found above R² 0.20",
        "categorical": "found",
    }
    # What is found needs no such word.
    assert "--kind" not in str(mdnorm.audit(site[:, None], {"site": site}, settings=QUICK))


def test_frames_of_nullable_types_are_features_like_any_other():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"count": rng.poisson(3.0, 90), "size": rng.standard_normal(90), "flag": rng.random(90) < 0.5}
    )
    site = rng.choice(["a", "b"], 90)
    expected = mdnorm.audit(frame.to_numpy(np.float64), {"site": site}, settings=QUICKEST)
    nullable = frame.convert_dtypes()
    assert nullable.to_numpy().dtype == object
    assert mdnorm.audit(nullable, {"site": site}, settings=QUICKEST).columns == expected.columns
    nullable.loc[0, "count"] = pd.NA
    report = mdnorm.audit(nullable, {"site": site}, settings=QUICKEST)
    assert report.notes == ("1 of 90 rows have missing or infinite features and were left out.",)
    rest = mdnorm.audit(frame.to_numpy(np.float64)[1:], {"site": site[1:]}, settings=QUICKEST)
    assert report.columns == rest.columns


@pytest.mark.parametrize("unit", [1e-300, 1e-160, 1e200, 1e300])
def test_the_unit_of_metadata_does_not_matter(unit):
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, 90)
    features = np.column_stack([age + rng.normal(0, 20, 90), rng.standard_normal(90)])
    given = mdnorm.audit(features, {"age": age * unit}, rng.integers(0, 2, 90), settings=QUICKEST)
    part = column_of(given, "age").representations["before"]
    expected = dcor.u_distance_correlation_sqr(standardized(features), age)
    assert part.dependence.value == pytest.approx(expected, abs=1e-12)
    assert np.isfinite(part.association_z)


def test_rows_that_were_shuffled_apart_are_refused() -> None:
    rng = np.random.default_rng(0)
    people = [f"sub-{row}" for row in range(60)]
    age = pd.DataFrame({"age": rng.uniform(20, 80, 60)}, index=people)
    features = pd.DataFrame(rng.standard_normal((60, 2)), index=people)
    with pytest.raises(InputError, match="same row labels as metadata, but in another order"):
        mdnorm.audit(features.sample(frac=1, random_state=0), age)
    # The features of a model have no labels of rows.
    mdnorm.audit(features.reset_index(drop=True), age, settings=Settings(num_permutations=20))


def test_a_treatment_that_makes_many_values_of_few_is_noted() -> None:
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, 90)
    counts = np.column_stack([rng.poisson(1.0, 90), rng.standard_normal(90)]).astype(float)
    slope = np.polyfit(age, counts, 1)[0]
    after = counts - np.outer(age - age.mean(), slope)
    notes = mdnorm.audit(counts, {"age": age}, after=after, settings=QUICKEST).notes
    assert any(note.startswith("1 of 2 features had few different values and have many") for note in notes)
    notes = mdnorm.audit(counts, {"age": age}, after=counts * 2, settings=QUICKEST).notes
    assert not any("few different values" in note for note in notes)
