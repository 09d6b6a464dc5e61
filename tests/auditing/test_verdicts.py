"""Verdicts on data of which the right verdict is known."""

import numpy as np
import pytest
from audit_example import example

import mdnorm
from mdnorm.auditing import InputError, Settings
from mdnorm.auditing.conditions import check, parse
from mdnorm.auditing.findings import worst

FEW = Settings(num_permutations=100, num_bootstrap=0)
# Where no test looks at a probe.
NO_PROBES = Settings(num_permutations=20, num_bootstrap=0, num_folds=2)


def verdict(report, name, topic="dependence"):
    """Level and badge of the deciding verdict on a column."""
    finding = next(f for f in report.findings if f.column == name and f.topic == topic and f.is_decisive)
    return finding.level, finding.badge


def test_nothing_changes_and_nothing_is_reported():
    """Two large directions hide a hand from raw distances, before and after alike."""
    rng = np.random.default_rng(1)
    hand = rng.integers(0, 2, 400)
    features = rng.standard_normal((400, 30))
    features[:, :2] *= 40
    features[:, 2] = 0.5 * features[:, 2] + 1.2 * hand
    for settings in (FEW, Settings(num_permutations=100, num_bootstrap=0, standardize=False)):
        report = mdnorm.audit(
            features,
            {"hand": np.where(hand, "L", "R")},
            rng.integers(0, 2, 400),
            after=features + 1e-6 * rng.standard_normal(features.shape),
            settings=settings,
        )
        assert verdict(report, "hand") == ("strong", "still there")
        assert "no longer" not in str(report)
        assert "gone" not in str(report)


def test_units_do_not_matter_and_raw_features_are_an_option():
    rng = np.random.default_rng(0)
    site = rng.integers(0, 4, 400)
    volume = 1.5e6 + 1e5 * rng.standard_normal((400, 1))
    thickness = 2.5 + 0.1 * rng.standard_normal((400, 20)) + 0.1 * (site == 0)[:, None]
    names = np.array(list("ABCD"))[site]
    report = mdnorm.audit(np.hstack([volume, thickness]), {"site": names}, settings=FEW)
    scaled = mdnorm.audit(np.hstack([volume / 1e6, 1000 * thickness]), {"site": names}, settings=FEW)
    raw = mdnorm.audit(
        np.hstack([volume, thickness]),
        {"site": names},
        settings=Settings(num_permutations=100, num_bootstrap=0, standardize=False),
    )
    found = [r.columns[0].representations["before"].dependence.value for r in (report, scaled, raw)]
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    assert found[0] > 0.1
    assert found[2] < 0.02
    assert any("dcor² is that of the feature with the largest numbers" in note for note in raw.notes)
    # Whitened features have no units either way.
    whitened = [r.columns[0].representations["before"].whitened.value for r in (report, raw)]
    assert whitened[0] == pytest.approx(whitened[1], abs=1e-6)


def test_a_code_for_missing_values_is_no_finding():
    rng = np.random.default_rng(0)
    site = rng.integers(0, 6, 600)
    features = rng.standard_normal((600, 10))
    features[:, :3] += 2 * (site == 0)[:, None]
    iq = 100 + 15 * rng.standard_normal(600)
    is_missing = (site == 0) & (rng.random(600) < 0.8)
    coded, missing = np.where(is_missing, -9999, iq), np.where(is_missing, np.nan, iq)
    of_codes, of_missing = (mdnorm.audit(features, {"iq": v}, settings=FEW) for v in (coded, missing))
    assert of_codes.findings == of_missing.findings
    assert verdict(of_codes, "iq")[0] == "none"
    assert "−9999 seem to stand for missing ones and count as such" in of_codes.columns[0].note
    assert of_codes.columns[0].num_missing == is_missing.sum()
    kept = mdnorm.audit(features, {"iq": coded}, kinds={"iq": "continuous"}, settings=FEW)
    assert "seem to stand for missing ones, but are kept" in kept.columns[0].note
    features[:5, 2] = -999
    noted = mdnorm.audit(features, {"iq": missing}, settings=FEW)
    assert any("hold -999, which seems to stand for missing" in note for note in noted.notes)


def test_a_small_group_hides_no_gap():
    rng = np.random.default_rng(0)
    group = np.r_[np.repeat("A", 600), np.repeat("B", 600), np.repeat("C", 15)]
    y = np.arange(1215) % 2
    right = rng.random(1215) < np.vectorize({"A": 0.95, "B": 0.75, "C": 0.6}.get)(group)
    report = mdnorm.audit(
        rng.standard_normal((1215, 3)),
        {"group": group},
        y,
        predictions=np.where(right, y, 1 - y),
        settings=NO_PROBES,
    )
    level, badge = verdict(report, "group", "gap")
    assert level == "strong"
    assert badge.startswith("gap of ")
    assert "Too small to be compared: C (15 rows)." in str(report)


def test_the_absence_of_a_gap_needs_enough_rows():
    rng = np.random.default_rng(0)
    for n, expected in ((100, "open"), (1900, "none")):
        y, group = rng.integers(0, 2, n), rng.integers(0, 2, n)
        right = rng.random(n) < 0.9
        report = mdnorm.audit(
            rng.standard_normal((n, 3)),
            {"group": np.array(["f", "m"])[group]},
            y,
            predictions=np.where(right, y, 1 - y),
            settings=NO_PROBES,
        )
        assert verdict(report, "group", "gap")[0] == expected


def test_intersections_are_audited():
    rng = np.random.default_rng(0)
    n = 1200
    gender, ethnicity, y = rng.integers(0, 2, (3, n))
    # Only one of the four combinations is predicted worse.
    right = rng.random(n) < np.where(gender & ethnicity, 0.6, 0.95)
    report = mdnorm.audit(
        rng.standard_normal((n, 3)),
        {"gender": np.array(["f", "m"])[gender], "ethnicity": np.array(["x", "y"])[ethnicity]},
        y,
        predictions=np.where(right, y, 1 - y),
        intersect=[("gender", "ethnicity")],
        settings=NO_PROBES,
    )
    assert verdict(report, "gender × ethnicity", "gap")[0] == "strong"
    assert "gender × ethnicity m, y" in str(report)


def test_what_is_meant_to_stay():
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, 500)
    features = rng.standard_normal((500, 5))
    features[:, 0] += (age - 50) / 10
    lost, weaker = features.copy(), features.copy()
    lost[:, 0] = rng.standard_normal(500)
    weaker[:, 0] += 1.7 * rng.standard_normal(500)
    for after, expected in ((features + 0, "kept"), (lost, "lost"), (weaker, "partly lost")):
        report = mdnorm.audit(features, {"age": age}, after=after, keep=["age"], settings=FEW)
        assert verdict(report, "age") == (
            {"kept": "none", "lost": "strong", "partly lost": "weak"}[expected],
            expected,
        )
    assert verdict(mdnorm.audit(lost, {"age": age}, keep=["age"], settings=FEW), "age") == (
        "strong",
        "not there",
    )


def test_removal_from_the_same_rows_is_below_chance_and_held_out_rows_decide():
    rng = np.random.default_rng(0)
    n = 300
    age = rng.uniform(20, 80, n)
    features = rng.standard_normal((n, 100))
    features[:, :5] += (age[:, None] - 50) / 20
    design = np.column_stack([np.ones(n), age])
    corrected = features - design @ np.linalg.lstsq(design, features, rcond=None)[0]
    report = mdnorm.audit(corrected, {"age": age}, settings=FEW)
    assert verdict(report, "age") == ("open", "below chance")
    assert "audit rows that were not fitted" in str(report)

    # A correction that is fitted on few rows leaves something in others, and looks perfect on these few.
    held_out = np.arange(n) >= 40
    few = np.linalg.lstsq(design[:40], features[:40], rcond=None)[0]
    report = mdnorm.audit(
        {"raw": features, "corrected": features - design @ few},
        {"age": age, "held out": held_out},
        held_out="held out",
        settings=FEW,
    )
    assert list(report.sets) == [
        "raw, training rows",
        "raw, held-out rows",
        "corrected, training rows",
        "corrected, held-out rows",
    ]
    by_key = {f.key: f.badge for f in report.findings if f.topic == "dependence"}
    assert by_key["corrected, training rows"] == "below chance"
    assert by_key["corrected, held-out rows"] != "below chance"
    assert by_key["raw, held-out rows"] == "found"
    assert report.columns[0].representations["corrected, held-out rows"].dependence.num_rows == 260
    decisive = [key for key, part in report.sets.items() if part.is_decisive]
    assert decisive == ["corrected, held-out rows"]


def test_several_treatments_are_compared_with_the_first():
    before, after, metadata = example()
    report = mdnorm.audit(
        {"raw": before, "combat": after, "nothing": before + 0},
        {"site": metadata["site"], "diagnosis": metadata["diagnosis"]},
        "diagnosis",
        settings=FEW,
    )
    by_key = {f.key: f.badge for f in report.findings if f.column == "site" and f.topic == "dependence"}
    assert by_key["raw"] == "found"
    assert by_key["nothing"] == "still there"
    assert by_key["combat"] == "cannot be decided"
    assert len(next(row for row in report.table() if row.column.name == "site").cells) == 3
    assert report.to_html()


def test_predicted_numbers_are_tested_given_the_target():
    rng = np.random.default_rng(0)
    n = 400
    site, target = rng.integers(0, 2, n), rng.standard_normal(n)
    column = np.where(site + target > 0.5, "a", "b")  # Goes with the target.
    features = np.column_stack([target + rng.standard_normal(n), rng.standard_normal(n)])
    fair, unfair = target**3 + rng.standard_normal(n), target + 1.5 * (column == "a")
    for predictions, expected in (
        (fair, ("none", "open")),
        (unfair + 0.3 * rng.standard_normal(n), ("strong",)),
    ):
        report = mdnorm.audit(features, {"column": column}, target, predictions=predictions, settings=FEW)
        assert verdict(report, "column", "prediction")[0] in expected
    with pytest.raises(InputError, match="predictions must be finite numbers"):
        mdnorm.audit(features, {"column": column}, target, predictions=np.full(n, np.nan), settings=FEW)


def test_a_continuous_label_is_taken_into_account():
    """The features know the label, and the column only by it: cut in quarters it would be found."""
    rng = np.random.default_rng(0)
    label, first, second = rng.standard_normal((3, 600))
    features = np.column_stack([3 * label + first, rng.standard_normal(600)])
    report = mdnorm.audit(features, {"column": 3 * label + second}, label, settings=FEW)
    assert verdict(report, "column")[0] != "strong"
    part = report.columns[0].representations["before"]
    assert part.dependence.value > 0.5
    assert part.dependence_within.value < 0.03
    assert part.shown_probe.value < 0.05


def test_few_permutations_cannot_decide():
    rng = np.random.default_rng(0)
    features, other = rng.standard_normal((60, 5)), rng.standard_normal((60, 3))
    table = {f"column {i}": values for i, values in enumerate(other.T)}
    report = mdnorm.audit(features, table, settings=Settings(num_permutations=20, num_bootstrap=0))
    assert {finding.level for finding in report.findings} == {"open"}
    assert "20 permutations are too few for a probe to be found among 3 column(s): take 100 or more" in str(
        report
    )


def test_repeated_subjects_are_suggested():
    rng = np.random.default_rng(0)
    table = {"age": rng.standard_normal(80), "participant_id": np.repeat([f"s{i}" for i in range(40)], 2)}
    report = mdnorm.audit(rng.standard_normal((80, 3)), table, settings=FEW)
    assert any("80 rows have 40 values of participant_id. If these are subjects" in n for n in report.notes)


def test_false_alarms_are_rare_for_all_columns_together():
    """Of pages on features that know nothing, one in twenty has a finding at most."""
    alarms = 0
    settings = Settings(num_permutations=100, num_bootstrap=0, num_folds=2)
    for seed in range(16):
        rng = np.random.default_rng(seed)
        table = {f"column {i}": rng.standard_normal(60) for i in range(6)}
        report = mdnorm.audit(rng.standard_normal((60, 3)), table, settings=settings)
        alarms += any(finding.level in ("strong", "weak") for finding in report.findings)
    assert alarms <= 3  # 0.8 are expected at most, more than 3 in one of a hundred runs


def test_the_worst_level_is_that_of_harm():
    assert worst(["none", "open", "weak"]) == "weak"
    assert worst(["none", "open"]) == "open"
    assert worst([]) == "note"


# -- conditions -------------------------------------------------------------------------------------------


def test_conditions_on_values_that_are_known():
    rng = np.random.default_rng(0)
    site = rng.integers(0, 2, 600)
    features = rng.standard_normal((600, 4))
    features[:, 0] += 4 * site
    table = {"site": np.array(["a", "b"])[site], "noise": rng.standard_normal(600)}
    report = mdnorm.audit(features, table, settings=FEW)
    value = report.columns[0].representations["before"].shown_probe.value
    results = {
        "site: probe > 0.6": True,
        f"site: probe > {value - 1e-6:.6f}": True,
        f"site: probe > {value + 1e-3:.6f}": None,
        "noise: probe > 0.5": False,
        "noise: dcor2 > 0.05": False,
        "site: dcor2 > 0.05": True,
        "site: share > 0.2": True,
        "site: gap > 0.05": None,
    }
    for text, failed in results.items():
        assert [outcome.failed for outcome in check(report, parse(text))] == [failed], text
    both = check(report, parse("*: dcor2 > 0.05; noise: probe > 0.5, share > 0.9"))
    assert [outcome.failed for outcome in both] == [True, False, False, False]
    with pytest.raises(InputError, match="a condition is about 'sight', but audited are 'site', 'noise'"):
        check(report, parse("sight: gap > 1"))


@pytest.mark.parametrize(
    "text", ["", "site", "probe > 1", "site: probe", "site: probe < 1", "site: loss > 1", "site: gap > 1.2.3"]
)
def test_what_is_no_condition_is_an_error(text):
    with pytest.raises(InputError, match=r"condition|no number"):
        parse(text)
