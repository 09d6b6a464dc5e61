"""A formula cannot run anything, whoever wrote it: what is not on the list is an error, built and loaded."""

import builtins
import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnorm.design import Design, FormulaError
from mdnorm.design.formula import parse_factor, parse_formula

ATTACKS = [
    "__import__('os').system('touch hacked')",
    "I(__import__('os').system('touch hacked'))",
    "{__import__('os').system('touch hacked')}",
    "().__class__.__bases__[0].__subclasses__()",
    "age.__class__.__mro__",
    "I(age.__class__)",
    "log.__globals__",
    "log(age).real",
    "(lambda: age)()",
    "I((lambda x: x)(age))",
    "[x for x in age]",
    "I([x for x in (1, 2)])",
    "I({x for x in age})",
    "I({1: 2})",
    "I(sum(x for x in age))",
    "f'{age}'",
    "I(f'{age.__class__}')",
    "(x := age)",
    "I((x := age))",
    "eval('1')",
    "exec('import os')",
    "open('hacked', 'w')",
    "getattr(age, 'x')",
    "np.load('hacked', allow_pickle=True)",
    "breakpoint()",
    "print(age)",
    "age[0]",
    "age if age else age",
    "age and age",
    "not age",
    "age < 3",
    "age @ age",
    "age // 2",
    "age % 2",
    "age << 100",
    "~age",
    "I(age, key=print)",
    "log(*age)",
    "bs(age, **age)",
    "bs(age, df=eval('4'))",
    "bs(age, knots=[eval('4')])",
    "bs(age, knots=[[1]])",
    "C(age, levels=[__name__])",
    "C(age, Treatment(open('x')))",
    "C(age, contr.treatment(open('x')))",
    "C(age.__class__)",
    "C(eval('age'))",
    "await age",
    "yield age",
    "I(b'x' * age)",
    "I('x' * age)",
    "I(1j * age)",
    "I(... * age)",
    "I(True * age)",
    "age; import os",
    "age\nimport os",
    "age #\x00",
    "`age`.__class__",
    "'`' + age.__class__ + '`'",
    "C(age, reference='`').__class__",
]


@pytest.fixture
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Fails the test if anything that could run code from a text is reached."""
    monkeypatch.chdir(tmp_path)
    events: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("exec", "os.system", "subprocess.Popen"):
            events.append(event)

    watching = True
    sys.addaudithook(hook)
    for name in ("eval", "exec", "breakpoint"):
        monkeypatch.setattr(builtins, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    yield
    watching = False
    assert events == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_errors_as_a_factor(attack: str) -> None:
    with pytest.raises(FormulaError):
        parse_factor(attack)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_errors_or_only_columns_in_a_formula(attack: str) -> None:
    # Wilkinson formulas have operators of their own: `age % 2` may be read, but never as Python.
    try:
        terms = parse_formula(attack)
    except FormulaError:
        return
    assert {factor.kind for term in terms for factor in term} <= {"column"}, attack


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["written_terms", "label_factors", "both"])
def test_attacks_are_errors_in_a_saved_design(attack: str, place: str) -> None:
    saved = Design(["log(age)"], labels="ill").fit({"age": [1.0, 2.0, 3.0, 5.0, 4.0], "ill": [0, 1, 1, 0, 1]})
    state = json.loads(saved.to_json())
    if place == "label_factors":
        state["label_factors"] = [attack]
    else:
        state["written_terms"] = [[attack]]
    if place == "both":
        state["factors"][attack] = state["factors"]["log(age)"]
        state["products"] = [{"term": attack, "factors": [[attack, False]]}]
    with pytest.raises(FormulaError):
        Design.from_json(json.dumps(state))


def test_the_formula_in_a_file_is_only_a_text() -> None:
    design = Design(["age"]).fit({"age": [1.0, 2.0]})
    state = json.loads(design.to_json())
    state["formula"] = "__import__('os').system('touch hacked')"
    loaded = Design.from_json(json.dumps(state))
    np.testing.assert_array_equal(
        loaded.transform({"age": 1.0}).metadata, design.transform({"age": 1.0}).metadata
    )


@pytest.mark.parametrize(
    "text",
    [
        "-" * 900 + "age",
        "log(" * 150 + "age" + ")" * 150,
        "+".join(["age"] * 300),
        "9" * 900 + " * age",
        "1e999 * age",
        "age" * 2000,
        "bs(age, df=" + "-" * 900 + "1)",
        "",
        "   ",
        "C()",
        "bs()",
        "1",
        "log(2)",
    ],
)
def test_what_is_too_deep_too_large_or_empty_is_an_error(text: str) -> None:
    with pytest.raises(FormulaError):
        parse_factor(text)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (
            "(a+b+c+d+e+f+g+h+i+j+k+l)**12",
            r"8,916,100,448,256 products.*limit is 50,000",
        ),
        ("*".join("abcdefghijklmnop"), r"65,535 products of columns"),
        ("a**1000000000", "the power 1000000000: the limit is 20"),
        ("a**(3**9)", "the limit is 20"),
    ],
)
def test_a_formula_that_expands_without_end_is_an_error_at_once(formula: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(FormulaError, match=message):
        Design(formula)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("poly(x, 200)", "would have 200 columns: degree must be between 1 and 20"),
        ("bs(x, df=500)", "would have 500 columns: df must be between 3 and 100"),
        ("cr(x, df=500)", "would have 500 columns: df must be between 1 and 100"),
        ("C(id):C(other)", r"would have 35,999,999 columns, and the limit is 10,000"),
        ("C(id) + C(other)", r"would have 11,998 columns, and the limit is 10,000"),
        ("C(few)*x + C(other)", r"would have 2,999 columns beside those of the widest category"),
        (":".join(f"C(c{i})" for i in range(14)), r"at least 16,384 columns"),
    ],
)
def test_too_many_columns_are_counted_before_they_are_made(formula: str, message: str) -> None:
    number = np.arange(6000)
    table = {"x": number * 1.0, "id": number, "other": -number, "few": number % 1500}
    table |= {f"c{i}": number // (i + 1) % 3 for i in range(14)}
    tracemalloc.start()
    with pytest.raises(FormulaError, match=message):
        Design(formula).fit(table)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_a_tower_of_powers_is_an_error_at_once() -> None:
    # As integers of Python it would not end.
    with pytest.raises(ValueError, match="not a finite number in row"):
        Design(["I(age * 9**9**9**9)"]).fit({"age": [1.0, 2.0]})


@given(st.text(max_size=30))
def test_any_text_is_a_factor_or_an_error(text: str) -> None:
    try:
        factor = parse_factor(text)
    except FormulaError:
        return
    assert factor.kind in ("column", "category", "numeric", "curve")
    assert factor.variables


@given(st.text(alphabet="ab`'\"()[]{}+-*/:^~|.,=1 \\\\_", max_size=25))
def test_any_formula_is_read_or_an_error(text: str) -> None:
    try:
        terms = parse_formula(text)
    except FormulaError:
        return
    for term in terms:
        for factor in term:
            assert parse_factor(factor.text).variables == factor.variables


@given(
    st.recursive(
        st.sampled_from(["x", "y", "2", "0.5"]),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(
                lambda t: f"({t[0]} {t[1]} {t[2]})"
            ),
            inner.map(lambda text: f"(-{text})"),
            inner.map(lambda text: f"abs({text})"),
            inner.map(lambda text: f"I({text} ** 2)"),
        ),
        max_leaves=6,
    )
)
def test_arithmetic_is_that_of_numpy(text: str) -> None:
    if "x" not in text and "y" not in text:
        return
    columns = {"x": np.array([1.5, -2.0, 0.0]), "y": np.array([3.0, 0.25, -1.0])}
    expected = eval(text, {"abs": np.abs, "I": lambda value: value}, columns)
    result = parse_factor(text if "(" in text else f"I({text})").evaluate(_used(text, columns), {})
    np.testing.assert_allclose(result, np.broadcast_to(expected, 3), rtol=1e-15)


def _used(text: str, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in columns.items() if name in text}
