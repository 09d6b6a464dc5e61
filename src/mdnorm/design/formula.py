"""Factors of a formula: read into a tree, checked against a list of what is allowed, and computed by us.

A formula may come from a file. Nothing in it is ever given to Python to run: the text is parsed (`ast.parse`
does not execute), every node must be on the list below, and the values are computed by walking the tree.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mdnorm.extras import requires

# Columns that a design may have. The matrix of their products has the square of this many numbers: 800 MB.
MAX_COLUMNS = 10_000

_MAX_LENGTH = 1000
_MAX_DEPTH = 40
# Products of terms that formulaic may have to form while it expands a formula: about a second.
_MAX_PRODUCTS = 50_000
_MAX_POWER = 20

Vector = NDArray[np.float64]
# From the columns, and the moments of what is standardised in them.
Compute = Callable[[Mapping[str, Vector], dict[str, list[float]]], Vector]

_ELEMENTWISE: dict[str, Callable[[Vector], Vector]] = {
    "I": lambda values: values,
    "abs": np.abs,
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "sqrt": np.sqrt,
}
# These take the mean (and standard deviation) of the training values.
_STANDARDIZING = ("center", "scale", "standardize")
_BINARY: dict[type[ast.operator], Callable[[Vector, Vector], Vector]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
# The options of each curve, in the order in which they may be given without a name.
_BOUNDS = ("lower_bound", "upper_bound")
_CURVES = {
    "bs": ("df", "knots", "degree", *_BOUNDS),
    "cr": ("df", "knots", *_BOUNDS, "constraints"),
    "cs": ("df", "knots", *_BOUNDS, "constraints"),
    "poly": ("degree",),
}
_FUNCTIONS = ("C", *_CURVES, *_ELEMENTWISE, *_STANDARDIZING)

# Strings; and outside of them names in backticks, and other names: Python would normalise those that are not
# ASCII, and no longer find the column.
_QUOTED = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|`([^`]*)`|([^\W\d]\w*)""")


_COLOUR = re.compile(r"[⧛⧚]|\x1b\[[0-9;]*m")


class FormulaError(ValueError):
    """A formula has a part that cannot be read or is not allowed; the message says which."""


@dataclass(frozen=True)
class Factor:
    """One factor of a term, such as ``age``, ``log(age)``, ``C(site)`` or ``bs(age, df=4)``."""

    text: str  # as written; columns are named after it
    # "column" (numeric or categorical, whichever the column is), "category", "numeric" or "curve".
    kind: str
    variables: tuple[str, ...]  # columns of the table
    function: str = ""  # of a curve
    options: Mapping[str, Any] = field(default_factory=dict)  # of a curve or category
    # Of the numeric expression: the argument of a curve, or the factor itself.
    compute: Compute | None = None
    moment_keys: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[Callable[[str], Factor], tuple[str]]:
        return parse_factor, (self.text,)

    def evaluate(self, columns: Mapping[str, Vector], moments: dict[str, list[float]]) -> Vector:
        """Return (n,) values of the numeric expression of columns (n,), float64, NaN where missing.

        `moments` are mean and standard deviation of what is inside ``center`` and ``scale``; those that are
        not there yet are filled in.
        """
        assert self.compute is not None
        num_rows = len(next(iter(columns.values())))
        with np.errstate(all="ignore"):
            values = self.compute(columns, moments)
        return np.broadcast_to(values, (num_rows,)).astype(np.float64)


def quoted(name: str) -> str:
    """Return the name of a column as a formula has it: in backticks unless it is an identifier."""
    if "`" in name or not name:
        raise FormulaError(f"a column cannot be called {name!r} here: rename it.")
    return name if name.isascii() and name.isidentifier() and not keyword.iskeyword(name) else f"`{name}`"


def parse_formula(formula: str) -> tuple[tuple[Factor, ...], ...]:
    """Return the terms of a Wilkinson formula, each a tuple of factors, without the intercept."""
    with requires("design"):
        from formulaic import Formula, SimpleFormula
        from formulaic.errors import FormulaicError
        from formulaic.parser import DefaultFormulaParser
    if len(formula) > 10 * _MAX_LENGTH:
        raise FormulaError(f"the formula has {len(formula)} characters, more than {10 * _MAX_LENGTH}.")
    code, names = _with_placeholders(formula)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _check_expansion(formula, DefaultFormulaParser().get_ast(code, context={}))
            parsed = Formula(code)
    except FormulaError:
        raise
    except (FormulaicError, SyntaxError, SyntaxWarning, ValueError, RecursionError, MemoryError) as error:
        # formulaic colours the place for a terminal and puts it on a line of its own.
        reason = " ".join(_COLOUR.sub("", str(error)).split())
        raise FormulaError(f"the formula {formula!r} cannot be read: {reason}") from error
    if not isinstance(parsed, SimpleFormula):
        raise FormulaError(
            f"the formula {formula!r} has several parts: give the metadata alone, without '~' or '|', and "
            "the label as labels=."
        )
    terms = []
    for term in parsed:
        factors = []
        for factor in term.factors:
            kind = factor.eval_method.value
            if kind == "literal" and factor.expr in ("0", "1"):
                continue
            if kind == "literal":
                raise FormulaError(
                    f"the formula {formula!r} multiplies a term by {factor.expr}: take it away, the scale of "
                    "a column does not matter."
                )
            text = factor.expr
            if kind == "lookup":
                factors.append(parse_factor(quoted(names.get(text, text))))
                continue
            for placeholder, name in names.items():
                text = re.sub(rf"\b{placeholder}\b", quoted(name).replace("\\", r"\\"), text)
            factors.append(parse_factor(text))
        if factors:
            terms.append(tuple(factors))
    return tuple(terms)


def _check_expansion(formula: str, tree: Any) -> None:
    """Raise where formulaic would have to form very many products of terms, before it does.

    Every node of formulaic's syntax tree gets the most terms that it can expand to.
    """
    count: dict[int, int] = {}
    nodes = [tree]
    for node in nodes:  # which grows meanwhile: arguments come after what they belong to
        nodes += getattr(node, "args", ())
    for node in reversed(nodes):
        sizes = [count[id(argument)] for argument in getattr(node, "args", ())]
        symbol = getattr(getattr(node, "operator", None), "symbol", "")
        if symbol in ("**", "^"):
            power = str(node.args[1])
            exponent = int(power) if power.isdigit() and len(power) < 10 else _MAX_POWER + 1
            if exponent > _MAX_POWER:
                raise FormulaError(
                    f"{formula[:200]!r} has the power {power}: the limit is {_MAX_POWER}; as arithmetic, "
                    "write I(x**2)."
                )
            products = sizes[0] ** exponent
        elif symbol in ("*", ":"):
            products = math.prod(sizes) + (sum(sizes) if symbol == "*" else 0)
        else:
            products = sum(sizes) if sizes else 1
        if products > _MAX_PRODUCTS:
            raise FormulaError(
                f"{formula[:200]!r} would expand to {products:,} products of columns, and the limit is "
                f"{_MAX_PRODUCTS:,}: write out the interactions that you need."
            )
        count[id(node)] = products


def _with_placeholders(text: str) -> tuple[str, dict[str, str]]:
    """Return a text in which names that are no plain identifiers are, and what each stands for."""
    names: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        if match[1] is not None or (match[3] is not None and match[3].isascii()):
            return match[0]
        name = f"quoted_{len(names)}"
        while name in text:
            name += "_"
        names[name] = match[2] if match[3] is None else match[3]
        return f" {name} "

    return _QUOTED.sub(placeholder, text).strip(), names


def parse_factor(text: str) -> Factor:
    """Return the factor that a text describes.

    Allowed are names of columns (in backticks where they are not identifiers), numbers, strings, ``+ - * /
    **`` and calls of a few functions. Everything else is an error: attributes, subscripts, comparisons,
    lambdas, comprehensions, other functions.
    """
    if len(text) > _MAX_LENGTH:
        raise FormulaError(f"{text[:40]!r}… has {len(text)} characters, more than {_MAX_LENGTH}.")
    code, names = _with_placeholders(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = ast.parse(code, mode="eval").body
    except (SyntaxError, SyntaxWarning, ValueError, RecursionError, MemoryError) as error:
        raise FormulaError(f"{text!r} cannot be read as a factor of a formula: {error}") from error

    function = tree.func.id if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) else ""
    if isinstance(tree, ast.Call) and function == "C":
        return _category(text, tree, names)
    if isinstance(tree, ast.Call) and function in _CURVES:
        inner, options = _argument(text, tree, function), _options(text, tree, function)
        return Factor(text, "curve", function=function, options=options, **_expression(text, inner, names))
    kind = "column" if isinstance(tree, ast.Name) else "numeric"
    return Factor(text, kind, **_expression(text, tree, names))


def _argument(text: str, call: ast.Call, function: str) -> ast.expr:
    if not call.args or isinstance(call.args[0], ast.Starred):
        raise FormulaError(f"{text!r}: the first argument of {function}() must be a column.")
    return call.args[0]


def _expression(text: str, tree: ast.expr, names: Mapping[str, str]) -> dict[str, Any]:
    """Return what a `Factor` has of a numeric expression, after checking that it is one."""
    variables: dict[str, None] = {}
    keys = set()

    def read(node: ast.expr, depth: int) -> Compute:
        if depth > _MAX_DEPTH:
            raise FormulaError(f"{text[:40]!r}… is nested more than {_MAX_DEPTH} deep.")
        if isinstance(node, ast.Name):
            name = names.get(node.id, node.id)
            variables[name] = None
            return lambda columns, moments: columns[name]
        if isinstance(node, ast.Constant) and _is_number(node.value):
            _finite(text, node.value)
            # As float64 a power of powers overflows at once; as integers it would take for ever.
            number = np.asarray(node.value, dtype=np.float64)
            return lambda columns, moments: number
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            inner = read(node.operand, depth + 1)
            return inner if isinstance(node.op, ast.UAdd) else lambda *given: -inner(*given)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            operator = _BINARY[type(node.op)]
            left, right = read(node.left, depth + 1), read(node.right, depth + 1)
            return lambda *given: operator(left(*given), right(*given))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return read_call(node, node.func.id, depth)
        raise _not_allowed(text, node)

    def read_call(node: ast.Call, function: str, depth: int) -> Compute:
        if function in _CURVES or function == "C":
            raise FormulaError(f"{text!r}: {function}() gives several columns and cannot be computed with.")
        if function not in _ELEMENTWISE and function not in _STANDARDIZING:
            raise FormulaError(
                f"{text!r}: there is no function {function}(); there are {', '.join(_FUNCTIONS)}."
            )
        if len(node.args) != 1 or node.keywords:
            raise FormulaError(f"{text!r}: {function}() takes one argument.")
        inner = read(node.args[0], depth + 1)
        if function in _ELEMENTWISE:
            return lambda *given: _ELEMENTWISE[function](inner(*given))
        key = ast.unparse(node)
        keys.add(key)
        return lambda columns, moments: _standardized(function, key, inner(columns, moments), moments)

    compute = read(tree, 0)
    if not variables:
        raise FormulaError(f"{text!r} uses no column.")
    return {"variables": tuple(variables), "compute": compute, "moment_keys": frozenset(keys)}


def _standardized(function: str, key: str, value: Vector, moments: dict[str, list[float]]) -> Vector:
    if key not in moments:
        finite = value[np.isfinite(value)]
        deviation = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
        moments[key] = [float(finite.mean()) if len(finite) else 0.0, deviation]
    mean, deviation = moments[key]
    return (value - mean) / (1.0 if function == "center" else deviation or 1.0)


def _finite(text: str, value: float) -> None:
    if not abs(value) <= sys.float_info.max:
        raise FormulaError(f"{text[:40]!r}: a number in it is too large.")


def _not_allowed(text: str, node: ast.AST) -> FormulaError:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func
    what = {
        ast.Attribute: "a dot; write log(x) rather than np.log(x), and a column with a dot in backticks",
        ast.Compare: "a comparison",
        ast.Subscript: "brackets",
        ast.Lambda: "a lambda",
        ast.JoinedStr: "an f-string",
        ast.NamedExpr: "an assignment",
        ast.Call: "a call of something that is not a function by name",
    }.get(type(node), type(node).__name__)
    return FormulaError(
        f"{text!r} has {what}, which is not allowed: a formula may have columns, numbers, strings, "
        f"+ - * / ** and {', '.join(_FUNCTIONS)}."
    )


def _literal(text: str, node: ast.expr) -> Any:
    if isinstance(node, ast.List | ast.Tuple):
        # Of literals, not of lists again.
        if any(isinstance(item, ast.List | ast.Tuple) for item in node.elts):
            raise _not_allowed(text, node)
        return [_literal(text, item) for item in node.elts]
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = ...
    if _is_number(value):
        _finite(text, value)
    elif not isinstance(value, str | bool | None):
        raise FormulaError(f"{text!r} has an option that is not allowed: give a number or a string.")
    return value


def _arguments(text: str, call: ast.Call, allowed: Iterable[str]) -> dict[str, ast.expr]:
    allowed = list(allowed)
    function = getattr(call.func, "id", "")
    if len(call.args) - 1 > len(allowed) or any(keyword.arg not in allowed for keyword in call.keywords):
        raise FormulaError(f"{text!r}: {function}() has the options {', '.join(allowed)}.")
    arguments = dict(zip(allowed, call.args[1:], strict=False))
    for keyword_ in call.keywords:
        if keyword_.arg in arguments:
            raise FormulaError(f"{text!r}: {keyword_.arg} is given twice.")
        arguments[str(keyword_.arg)] = keyword_.value
    return arguments


def _options(text: str, call: ast.Call, function: str) -> dict[str, Any]:
    """Return the checked options of a curve."""
    arguments = _arguments(text, call, _CURVES[function])
    options = {name: _literal(text, node) for name, node in arguments.items()}
    for name, value in options.items():
        number = _is_number(value)
        fits = {
            "df": value is None or type(value) is int,
            "degree": type(value) is int,
            "knots": value is None or (isinstance(value, list) and all(map(_is_number, value))),
            "lower_bound": value is None or number,
            "upper_bound": value is None or number,
            "constraints": value == "center",
        }[name]
        if not fits:
            only = ": only 'center' leaves the intercept to MetadataNorm" if name == "constraints" else ""
            raise FormulaError(f"{text!r}: {name}={value!r} is not possible{only}.")
    if options.get("df") is not None and options.get("knots") is not None:
        raise FormulaError(f"{text!r}: give df or knots, not both.")
    return options


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _category(text: str, call: ast.Call, names: Mapping[str, str]) -> Factor:
    """Return ``C(x)``, with its options ``reference`` and ``levels``."""
    column = _argument(text, call, "C")
    if not isinstance(column, ast.Name):
        raise FormulaError(f"{text!r}: C() takes the name of a column.")
    options: dict[str, Any] = {}
    for name, node in _arguments(text, call, ("reference", "levels")).items():
        value = _literal(text, node)
        several = name == "levels"
        values = value if several and isinstance(value, list) else [value]
        wrong = several and (not isinstance(value, list) or len(set(values)) < len(values))
        if wrong or any(type(item) not in (int, float, str, bool) for item in values):
            what = "a list of different levels" if several else "a level"
            raise FormulaError(f"{text!r}: {name} must be {what}, got {value!r}.")
        options[name] = value
    variable = names.get(column.id, column.id)
    return Factor(text, "category", (variable,), "C", options)


def in_order(name: str, entries: Any) -> tuple[str, ...]:
    """Return a sequence of column names as a tuple; raise TypeError where it is none, or has no order."""
    if isinstance(entries, (Set, Mapping)):
        raise TypeError(
            f"{name} is a {type(entries).__name__}, whose order is not part of its meaning, but columns need "
            "one: give a list."
        )
    if not isinstance(entries, Iterable):
        raise TypeError(f"{name} must be a string or a list of column names, got {entries!r}.")
    return tuple(entries)


def column_or_factor(entry: str) -> Factor:
    """Return what an entry of a list means: a call such as ``C(site)``, otherwise the name of a column."""
    if not isinstance(entry, str):
        raise TypeError(f"columns must be given by name, got {entry!r} of type {type(entry).__name__}.")
    is_call = re.fullmatch(r"\w+\(.*\)", entry.strip(), re.DOTALL)
    return parse_factor(entry.strip() if is_call else quoted(entry))
