"""Conditions under which an audit fails: "sex: probe > 0.6, gap > 0.05"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mdnorm.auditing.findings import comparable
from mdnorm.auditing.reading import InputError
from mdnorm.auditing.report import Report
from mdnorm.auditing.results import ColumnAudit, Representation

MEASURES = ("probe", "share", "dcor2", "gap")


@dataclass(frozen=True)
class Condition:
    """A `limit` that a `measure` of a `column` must not exceed; "*": every column not meant to stay.

    The measure is "probe", the best probe's score (R² or balanced accuracy), "share", its share of the way
    from chance to a perfect score, or "dcor2", all given the label where there is one; or "gap", the largest
    sure difference of accuracy or odds between two groups.
    """

    column: str
    measure: str
    limit: float


@dataclass(frozen=True)
class Outcome:
    """The result of a condition for one column and set of features, and a sentence, `text`.

    Whether it `failed` is None where it cannot be decided: there is no value, or its interval has the limit
    in it.
    """

    text: str
    failed: bool | None


def parse(text: str) -> list[Condition]:
    """Return the conditions in a text such as ``sex: probe > 0.6, gap > 0.05; *: dcor2 > 0.1``.

    InputError where the text is no such list.
    """
    conditions = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        column, separator, rest = part.rpartition(":")
        for item in rest.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*>\s*(-?(?:\d+\.?\d*|\.\d+))\s*", item)
            if not separator or match is None or match[1] not in MEASURES:
                raise InputError(
                    f"{item.strip() or part!r} is no condition: write COLUMN: MEASURE > NUMBER with a "
                    f"measure of {', '.join(MEASURES)}, such as 'sex: probe > 0.6, gap > 0.05'."
                )
            conditions.append(Condition(column.strip(), match[1], float(match[2])))
    if not conditions:
        raise InputError("there is no condition: write for example 'sex: probe > 0.6, gap > 0.05'.")
    return conditions


def check(report: Report, conditions: Iterable[Condition]) -> list[Outcome]:
    """Return the outcome of each condition, for each column and decisive set of features it is about.

    InputError where a condition is about a column that was not audited.
    """
    outcomes = []
    for condition in conditions:
        columns = [
            column
            for column in report.columns
            if column.name == condition.column or (condition.column == "*" and column.role == "remove")
        ]
        if not columns:
            names = ", ".join(repr(column.name) for column in report.columns)
            raise InputError(f"a condition is about {condition.column!r}, but audited are {names}.")
        for column in columns:
            for key, part in column.representations.items():
                if report.sets[key].is_decisive:
                    outcomes.append(_outcome(condition, column, report.sets[key].full_title, part))
    return outcomes


def _outcome(condition: Condition, column: ColumnAudit, title: str, part: Representation) -> Outcome:
    measure, limit = condition.measure, f"{condition.limit:g}"
    what = f"{column.name}: {measure} in {title}"
    if measure == "gap":
        gaps = [] if part.group_gaps is None else list(comparable(part.group_gaps).values())
        if not gaps:
            return Outcome(f"{what} was not measured, so that > {limit} cannot be decided.", None)
        value, high = max(gap.value for gap in gaps), max(gap.bound for gap in gaps)
    else:
        shown = part.shown_dependence if measure == "dcor2" else part.shown_probe
        value, high = shown.value, 1.0 if shown.high is None else shown.high
        if measure == "share":
            value, high = shown.as_share(value), shown.as_share(high)
    text = f"{what} is {value:.3f} (at most {high:.3f})"
    if value > condition.limit:
        return Outcome(f"{text}, above {limit}.", failed=True)
    if high > condition.limit:
        return Outcome(f"{text}: whether it is above {limit} cannot be decided.", None)
    return Outcome(f"{text}, not above {limit}.", failed=False)
