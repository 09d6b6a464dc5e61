"""Sentences in plain words for what an audit measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mdnorm.auditing.results import ColumnAudit, Finding, Measure, Representation

__all__ = ["describe", "find", "is_found", "level_of", "number", "p_text", "percent"]

SIGNIFICANCE = 0.05

# Share of the way from chance to perfect from which a probe's success is called strong.
_STRONG_SHARE = 0.25
_STRONG_DEPENDENCE = 0.05
_LARGE_GAP = 0.05

_MODELS = {"linear": "a linear probe", "nonlinear": "a non-linear probe"}


def percent(value: float) -> str:
    """Return a fraction as a whole percentage, with one digit where a whole one would hide the difference."""
    digits = 1 if round(100 * value) in (0, 100) and value not in (0, 1) else 0
    return f"{100 * value:.{digits}f} %".replace("-", "−")


def number(value: float, digits: int = 2) -> str:
    """Return a number with a true minus sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def p_text(value: float | None) -> str:
    """Return "p = 0.02" or "p < 0.001"."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def describe(measure: Measure) -> str:
    """Return a measure as text: "R² 0.62", "97 % (chance 33 %)", "0.412 [0.380, 0.445]"."""
    if measure.name == "dcor²":
        return f"{number(measure.value, 3)} [{number(measure.low or 0, 3)}, {number(measure.high or 0, 3)}]"
    if measure.name == "R²":
        return f"R² {number(measure.value)}"
    return f"{percent(measure.value)} (chance {percent(measure.chance)})"


def is_found(measure: Measure) -> bool:
    """Whether a value is above chance by more than chance itself explains, and its interval agrees."""
    significant = measure.p_value is not None and measure.p_value < SIGNIFICANCE
    return (
        significant
        and measure.value > measure.chance
        and (measure.low is None or measure.low > measure.chance)
    )


def level_of(representation: Representation, *, is_label: bool = False) -> str:
    """Return "strong", "weak" or "none": within label classes where there are such measures.

    Over all rows, features that know the label must know of everything that goes with the label.
    """
    within = not is_label and representation.dependence_within is not None
    dependence = representation.dependence_within if within else representation.dependence
    probes = (
        representation.probes_within if within and representation.probes_within else representation.probes
    )
    assert dependence is not None
    found = [measure for measure in probes.values() if is_found(measure)]
    if any(measure.share >= _STRONG_SHARE for measure in found):
        return "strong"
    if is_found(dependence) and dependence.value >= _STRONG_DEPENDENCE:
        return "strong"
    return "weak" if found or is_found(dependence) else "none"


def find(columns: Sequence[ColumnAudit], titles: Mapping[str, str], label: str | None) -> list[Finding]:
    """Return the findings on every column, the label last.

    Parameters
    ----------
    columns : sequence of ColumnAudit
    titles : mapping
        "before", "after" → how the reader calls these features.
    label : str or None
        Name of the label.
    """
    findings: list[Finding] = []
    for column in columns:
        findings += _on_label(column, titles) if column.is_label else _on_column(column, titles, label)
    return findings


def _on_column(column: ColumnAudit, titles: Mapping[str, str], label: str | None) -> list[Finding]:
    findings = []
    if len(column.representations) == 2:
        findings.append(_change(column, titles))
    for key, representation in column.representations.items():
        text = f"{_prediction(column, representation, titles[key])}{_within(representation, label)}"
        findings.append(Finding("dependence", level_of(representation), text, column.name))
    for key, representation in column.representations.items():
        findings += _on_gaps(column, representation, titles[key])
    association = column.association_with_label
    if association is not None and association >= _STRONG_DEPENDENCE:
        text = (
            f"In these data {column.name} and the label {label} go together (dcor² {number(association)}). "
            f"Features that know {label} know something of {column.name} for that reason alone, so look at "
            f"the numbers within classes of {label}."
        )
        findings.append(Finding("confounding", "note", text, column.name))
    return findings


def _prediction(column: ColumnAudit, representation: Representation, title: str) -> str:
    model, measure = representation.best_probe
    if measure.explained_by_label is not None and measure.share > 0.02:
        return (
            f"{column.name} can be predicted from {title} with {_score(measure)}, and the label alone gives "
            f"{_value(measure.explained_by_label, measure)} ({_MODELS[model]}, cross-validated)."
        )
    if not is_found(measure):
        return (
            f"{column.name} could not be predicted from {title} better than by chance "
            f"({_score(measure)}; {p_text(measure.p_value)})."
        )
    return (
        f"{column.name} can be predicted from {title} with {_score(measure)} "
        f"({_MODELS[model]}, cross-validated, {p_text(measure.p_value)})."
    )


def _value(value: float, measure: Measure) -> str:
    return f"R² {number(value)}" if measure.name == "R²" else percent(value)


def _score(measure: Measure) -> str:
    if measure.name == "R²":
        return f"R² {number(measure.value)}, chance being 0"
    return f"{percent(measure.value)} balanced accuracy; chance is {percent(measure.chance)}"


def _within(representation: Representation, label: str | None) -> str:
    parts = []
    best = representation.best_probe_within
    if best is not None:
        model, measure = best
        if is_found(measure):
            parts.append(f"{_value(measure.value, measure)} ({_MODELS[model]}, {p_text(measure.p_value)})")
        else:
            parts.append(f"no better than by chance ({p_text(measure.p_value)})")
    dependence = representation.dependence_within
    if dependence is not None:
        parts.append(f"dcor² {number(dependence.value, 3)} ({p_text(dependence.p_value)})")
    return f" Among samples of the same {label}: {', '.join(parts)}." if parts else ""


def _change(column: ColumnAudit, titles: Mapping[str, str]) -> Finding:
    """Say what became of the dependence and of the best probe: within label classes, if measured there."""
    before, after = (column.representations[key] for key in ("before", "after"))
    old, new = before.dependence, after.dependence
    old_probe, new_probe = before.best_probe[1], after.best_probe[1]
    where = ""
    if before.dependence_within is not None and after.dependence_within is not None:
        old, new = before.dependence_within, after.dependence_within
        where = " among samples of the same label"
        if before.best_probe_within is not None and after.best_probe_within is not None:
            old_probe, new_probe = before.best_probe_within[1], after.best_probe_within[1]
    numbers = (
        f"dcor²{where} went from {number(old.value, 3)} to {number(new.value, 3)}, the best probe from "
        f"{describe(old_probe)} to {describe(new_probe)}"
    )
    probed, dependent = is_found(new_probe), is_found(new)
    if not (is_found(old) or is_found(old_probe)):
        if probed or dependent:
            return Finding(
                "change", "strong", f"{column.name} was not found before, but is: {numbers}.", column.name
            )
        return Finding(
            "change", "none", f"{column.name} was found neither before nor after: {numbers}.", column.name
        )
    if not (probed or dependent):
        return Finding(
            "change", "none", f"{column.name} is gone: {numbers}, no better than chance.", column.name
        )
    if not dependent:
        text = (
            f"{column.name} no longer shows in the distances between samples, but a probe still finds some "
            f"of it, in directions of small variance: {numbers}."
        )
        return Finding("change", "weak", text, column.name)
    if new.value < old.value / 2 and new_probe.share < old_probe.share:
        return Finding("change", "weak", f"{column.name} is reduced, not gone: {numbers}.", column.name)
    return Finding("change", "strong", f"{column.name} is still there: {numbers}.", column.name)


def _on_label(column: ColumnAudit, titles: Mapping[str, str]) -> list[Finding]:
    parts = []
    for key, representation in column.representations.items():
        model, measure = representation.best_probe
        parts.append(f"{describe(measure)} from {titles[key]} ({_MODELS[model]})")
    text = f"The label {column.name} can be predicted with {'; '.join(parts)}."
    return [Finding("label", "note", text, column.name)]


def _on_gaps(column: ColumnAudit, representation: Representation, title: str) -> list[Finding]:
    gaps = representation.group_gaps
    if gaps is None:
        return []
    accuracy = gaps["gaps"].get("accuracy")
    if accuracy is None or accuracy["value"] is None:
        return []
    rates = {str(group["group"]): group["rates"]["accuracy"]["value"] for group in gaps["groups"]}
    best, worst = str(accuracy["highest"]), str(accuracy["lowest"])
    text = (
        f"The predictions of {title} are right for {percent(rates[best])} of {column.name} {best} and for "
        f"{percent(rates[worst])} of {column.name} {worst}"
    )
    odds = gaps["gaps"].get("equalized_odds")
    if odds is not None and odds["value"] is not None:
        text += f"; the equalised-odds gap is {percent(odds['value'])}"
    clear = any(
        gap is not None and gap["low"] is not None and gap["low"] > 0 and gap["value"] >= _LARGE_GAP
        for gap in (accuracy, odds)
    )
    return [Finding("gap", "weak" if clear else "none", f"{text}.", column.name)]
