"""Verdicts on what an audit measured, each with a sentence in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdnorm.auditing.results import ColumnAudit, FeatureSet, Finding, Measure, Representation
from mdnorm.auditing.settings import Settings
from mdnorm.metrics import GroupGaps

# From harm to none.
LEVELS = ("strong", "weak", "open", "none", "note")

# A linear association this many standard deviations below what chance gives is no chance.
_BELOW_CHANCE = -5.0

# Fewer permutations have no tail to go by: see `mdnorm.metrics.probes.ProbeScore`.
_MIN_TAIL = 100

_MODELS = {"linear": "linear probe", "nonlinear": "non-linear probe"}


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


def _digits(measure: Measure, value: float) -> str:
    if measure.name == "balanced accuracy":
        return f"{100 * value:.0f}"
    return number(value, 3 if measure.name == "dcor²" else 2)


def _text(measure: Measure, value: float) -> str:
    """Return a value of this measure: "R² 0.62", "97 %", "dcor² 0.41"."""
    is_share = measure.name == "balanced accuracy"
    return percent(value) if is_share else f"{measure.name} {_digits(measure, value)}"


def describe(measure: Measure) -> str:
    """Return a measure with its interval: "R² 0.62 [0.55, 0.69]", "97 % [94, 99], chance 33 %"."""
    text = _text(measure, measure.value)
    if measure.low is not None and measure.high is not None:
        text += f" [{_digits(measure, measure.low)}, {_digits(measure, measure.high)}]"
    return text + (f", chance {percent(measure.chance)}" if measure.chance else "")


def worst(levels: Iterable[str]) -> str:
    """Return the worst of several levels, "note" of none."""
    return min(levels, key=LEVELS.index, default="note")


def find(
    columns: Sequence[ColumnAudit], sets: Mapping[str, FeatureSet], label: str | None, settings: Settings
) -> list[Finding]:
    """Return a verdict on every column and set of features, from harm to none."""
    judge = _Judge(columns, sets, label, settings)
    by_column = {column.name: list(judge.findings(column)) for column in columns}
    # Sorting keeps the order of equal ones: the label, and what is meant to stay, come last.
    order = sorted(
        columns,
        key=lambda column: (
            LEVELS.index(verdict_of(by_column[column.name])),
            column.role == "label",
            -max(part.shown_probe.share for part in column.representations.values()),
        ),
    )
    return [finding for column in order for finding in by_column[column.name]]


def comparable(result: GroupGaps) -> dict[str, Any]:
    """Return the gaps that a verdict looks at: in accuracy and in odds, where two groups can be compared."""
    gaps = {name: result.gaps.get(name) for name in ("accuracy", "equalized_odds", "worst_recall")}
    return {name: gap for name, gap in gaps.items() if gap is not None and gap.value is not None}


def verdict_of(findings: Iterable[Finding]) -> str:
    """Return the level of a column from its findings."""
    return worst(finding.level for finding in findings if finding.is_decisive)


@dataclass(frozen=True)
class _Judge:
    columns: Sequence[ColumnAudit]
    sets: Mapping[str, FeatureSet]
    label: str | None
    settings: Settings

    def findings(self, column: ColumnAudit) -> Iterable[Finding]:
        """Yield the verdicts on a column; those that are decisive first."""
        for key in sorted(column.representations, key=lambda key: not self.sets[key].is_decisive):
            decisive = self.sets[key].is_decisive
            part = column.representations[key]
            judged = self._dependence if column.role == "remove" else self._kept
            yield Finding("dependence", *judged(column, key), column.name, key, decisive)
            if part.group_gaps is not None or part.why_no_gaps:
                yield Finding("gap", *self._gap(column, key, part), column.name, key, decisive)
            if part.prediction_test is not None:
                judgement = self._prediction(column, key, part.prediction_test)
                yield Finding("prediction", *judgement, column.name, key, decisive)
        if column.num_codes and not all(self.is_found(column, key) for key in column.representations):
            text = (
                f"{column.name} has {column.num_codes} different whole numbers, taken as continuous, so that "
                "what depends on them as codes may not be found. If they are codes: "
                f"--kind '{column.name}=categorical', in Python kinds={{{column.name!r}: 'categorical'}}."
            )
            yield Finding("kind", "note", "note", text, column.name)
        association = column.association_with_label
        if association is not None and association >= self.settings.max_dcor2:
            text = (
                f"In these data {column.name} and the label {self.label} go together (dcor² "
                f"{number(association)}). Features that know {self.label} know something of {column.name} "
                f"for that reason alone, so verdicts are on what they know given {self.label}."
            )
            yield Finding("confounding", "note", "note", text, column.name)

    # -- what is found at all -----------------------------------------------------------------------------

    def is_found(self, column: ColumnAudit, key: str) -> bool:
        """Whether any measure is above chance, by Holm's method over the columns that are to be removed."""
        family = [other for other in self.columns if other.role == "remove" and key in other.representations]
        if column.role != "remove":
            family = [column]
        p_values = {other.name: _p_value(other.representations[key]) for other in family}
        order = sorted(p_values, key=p_values.__getitem__)
        smallest = order[: order.index(column.name) + 1]
        corrected = [p_values[name] * (len(family) - rank) for rank, name in enumerate(smallest)]
        return max(corrected) < self.settings.alpha

    def _largest_share(self, measure: Measure) -> float:
        return self.settings.max_dcor2 if measure.name == "dcor²" else self.settings.max_probe

    def _is_bounded(self, part: Representation) -> bool:
        """Whether all that the intervals allow is below the limits."""
        measures = (*part.shown_probes.values(), part.shown_dependence)
        return all(each.as_share(_upper(each)) < self._largest_share(each) for each in measures)

    def _limit(self, measure: Measure) -> str:
        return _text(measure, measure.chance + self._largest_share(measure) * (1 - measure.chance))

    def _given(self, part: Representation) -> str:
        return f" given {self.label}" if part.dependence_within is not None else ""

    def _numbers(self, part: Representation) -> str:
        """Return the best probe and the dependence, as they are judged."""
        model, measure = max(part.shown_probes.items(), key=lambda item: item[1].value)
        dependence = part.shown_dependence
        return (
            f"{describe(measure)} ({_MODELS[model]}, {p_text(measure.p_value)}); {describe(dependence)} "
            f"({p_text(dependence.p_value)})"
        )

    def _bounds(self, part: Representation) -> str:
        probes = part.shown_probes.values()
        largest = max(probes, key=lambda measure: measure.as_share(_upper(measure)))
        dependence = part.shown_dependence
        return (
            f"{_text(largest, _upper(largest))} and {_text(dependence, _upper(dependence))} at "
            f"{percent(self.settings.confidence)}"
        )

    def _undecided(self, part: Representation) -> str:
        """Say why neither harm nor its absence is shown."""
        measures = [*part.shown_probes.values(), part.shown_dependence]
        text = (
            f"it is not found, but {part.shown_dependence.num_rows} rows leave room for "
            f"{self._bounds(part)}; the limits are {self._limit(measures[0])} and {self._limit(measures[-1])}"
        )
        num_columns = sum(column.role == "remove" for column in self.columns)
        tests = len(measures) * num_columns
        number_of = self.settings.num_permutations
        if number_of < _MIN_TAIL and tests / (1 + number_of) >= self.settings.alpha:
            text += (
                f". {number_of} permutations are too few for a probe to be found among {num_columns} "
                f"column(s): take {_MIN_TAIL} or more"
            )
        return text

    # -- level, badge and sentence ------------------------------------------------------------------------

    def _dependence(self, column: ColumnAudit, key: str) -> tuple[str, str, str]:
        part, title = column.representations[key], self.sets[key].in_a_sentence
        where = f"in {title}{self._given(part)}"
        found, before = self.is_found(column, key), self._before(column, key)
        if part.association_z < _BELOW_CHANCE and not found:
            text = (
                f"{column.name} has less to do with {title}{self._given(part)} than chance gives: it was "
                "removed with the help of these very rows. What other rows show cannot be decided here: "
                "audit rows that were not fitted."
            )
            return "open", "below chance", text
        shown = (part.shown_probe, part.shown_dependence)
        old = part if before is None else column.representations[before]
        if found and any(measure.share >= self._largest_share(measure) for measure in shown):
            if before is None:
                badge, text = "found", f"{column.name} is found {where}"
            elif not self.is_found(column, before):
                badge, text = "new", f"{column.name} was not found before, but is {where}"
            elif all(map(_is_less, shown, (old.shown_probe, old.shown_dependence))):
                badge = "still there, less"
                text = f"{column.name} is less than before, but still found {where}"
            else:
                badge, text = "still there", f"{column.name} is still there {where}"
            return "strong", badge, f"{text}: {self._numbers(part)}{self._was(column, before)}."
        if found:
            text = f"A little of {column.name} is found {where}, below the limits: {self._numbers(part)}"
            return "weak", "found, little", f"{text}{self._was(column, before)}."
        if self._is_bounded(part):
            limits = f"{self._limit(part.shown_probe)} and {self._limit(part.shown_dependence)}"
            gone = before is not None and self.is_found(column, before)
            verb = "is gone:" if gone else "was found neither before nor after:" if before else "is"
            text = f"{column.name} {verb} not found {where} above {limits}, at most {self._bounds(part)}"
            badge = f"not found above {self._limit(part.shown_probe)}"
            badge += ", taken as continuous" if column.num_codes else ""
            return "none", badge, f"{text}{self._was(column, before)}."
        text = f"Whether {column.name} is {where} cannot be decided: {self._undecided(part)}"
        return "open", "cannot be decided", f"{text}{self._was(column, before)}."

    def _before(self, column: ColumnAudit, key: str) -> str | None:
        reference = self.sets[key].reference
        return reference if reference in column.representations else None

    def _was(self, column: ColumnAudit, before: str | None) -> str:
        if before is None:
            return ""
        part = column.representations[before]
        found = "found" if self.is_found(column, before) else "not found"
        return f". Before: {found}, {_text(part.shown_probe, part.shown_probe.value)}, " + _text(
            part.shown_dependence, part.shown_dependence.value
        )

    def _kept(self, column: ColumnAudit, key: str) -> tuple[str, str, str]:
        part, title = column.representations[key], self.sets[key].in_a_sentence
        where = f"in {title}{self._given(part)}"
        before = self._before(column, key)
        what = inside = column.name
        if column.role == "label":
            inside = "the label" if column.name == "label" else f"the label {column.name}"
            what = inside.replace("the", "The", 1)
        numbers = f"{self._numbers(part)}{self._was(column, before)}."
        found = self.is_found(column, key)
        if before is not None and self.is_found(column, before):
            old, new = column.representations[before].shown_probe, part.shown_probe
            if not found or new.share < old.share / 2:
                return "strong", "lost", f"{what}, which is meant to stay, is lost {where}: {numbers}"
            if _is_less(new, old):
                text = f"{what}, which is meant to stay, is partly lost {where}: {numbers}"
                return "weak", "partly lost", text
        if found:
            return "none", "kept", f"{what} is {where}, as it is meant to be: {numbers}"
        if self._is_bounded(part):
            return "strong", "not there", f"{what}, which is meant to stay, is not found {where}: {numbers}"
        text = f"Whether {inside}, which is meant to stay, is {where} cannot be decided"
        return "open", "cannot be decided", f"{text}: {self._undecided(part)}."

    def _gap(self, column: ColumnAudit, key: str, part: Representation) -> tuple[str, str, str]:
        title, limit, result = self.sets[key].in_a_sentence, self.settings.max_gap, part.group_gaps
        groups = () if result is None else result.groups
        small = [f"{group.group} ({group.num_rows} rows)" for group in groups if group.is_small]
        apart = f" Too small to be compared: {', '.join(small)}." if small else ""
        gaps = {} if result is None else comparable(result)
        if not gaps:
            text = (
                f"Whether the predictions of {title} differ between groups of {column.name} cannot be decided"
            )
            why = part.why_no_gaps or "fewer than two groups have enough rows."
            return "open", "gap cannot be decided", f"{text}: {why}{apart}"
        # Of gaps of the worst level the surest, or the one that is least known.
        judged = [(self._level_of_gap(gap), gap) for gap in gaps.values()]
        level = worst(each for each, _ in judged)
        gap = max((gap for each, gap in judged if each == level), key=lambda gap: (gap.low, gap.bound))
        rates: dict[Any, Any] = {group.group: group.rates[str(gap.rate)] for group in groups}
        ends = " and ".join(
            f"{percent(rates[name].value)} [{100 * rates[name].low:.0f}, {100 * rates[name].high:.0f}] for "
            f"{column.name} {name}"
            for name in (gap.highest, gap.lowest)
        )
        rate = gap.rate if "[" in gap.rate else gap.rate.replace("_", " ")
        text = (
            f"The {rate} of the predictions of {title} is {ends}: a difference of {_points(gap.value)} "
            f"({100 * gap.low:.0f} to {100 * gap.high:.0f} at {percent(self.settings.confidence)})"
        )
        badges = {"none": f"no gap above {_points(limit)}", "open": "gap cannot be decided"}
        badge = badges.get(level, f"gap of {_points(gap.value)}")
        if level in ("none", "open"):
            text += f". No two groups differ by more than {_points(gap.bound)}"
            text += f", which is above the limit of {100 * limit:.0f}" if level == "open" else ""
        return level, badge, f"{text}.{apart}"

    def _level_of_gap(self, gap: Any) -> str:
        if gap.low > 0:
            return "strong" if gap.value >= self.settings.max_gap else "weak"
        return "none" if gap.bound < self.settings.max_gap else "open"

    def _prediction(self, column: ColumnAudit, key: str, measure: Measure) -> tuple[str, str, str]:
        title, limit = self.sets[key].in_a_sentence, self.settings.max_dcor2
        numbers = f"{describe(measure)} ({p_text(measure.p_value)})"
        parts = [other.representations[key] for other in self.columns if key in other.representations]
        number_of = sum(part.prediction_test is not None for part in parts)
        p_value = 1.0 if measure.p_value is None else measure.p_value * number_of
        about = f"the predictions of {title} depend on {column.name} beyond {self.label}"
        if p_value < self.settings.alpha:
            level = "strong" if measure.value >= limit else "weak"
            return level, "in the predictions", f"{about[0].upper()}{about[1:]}: {numbers}."
        if _upper(measure) < limit:
            badge = f"not in the predictions above dcor² {limit:g}"
            return "none", badge, f"It is not found that {about}: {numbers}."
        text = f"Whether {about} cannot be decided: {numbers}, the limit is {limit:g}."
        return "open", "cannot be decided", text


def _points(share: float) -> str:
    points = f"{100 * share:.0f}"
    return f"{points} point{'' if points == '1' else 's'}"


def _is_less(new: Measure, old: Measure) -> bool:
    """Whether the whole interval is below that before."""
    return old.low is not None and _upper(new) < old.low


def _upper(measure: Measure) -> float:
    return 1.0 if measure.high is None else measure.high


def _p_value(part: Representation) -> float:
    """Return the p-value of all shown measures together (Bonferroni)."""
    measures = [part.shown_dependence, *part.shown_probes.values()]
    p_values = [part.p_value if part.tail_p_value is None else part.tail_p_value for part in measures]
    return min(1.0, len(measures) * min((value for value in p_values if value is not None), default=1.0))
