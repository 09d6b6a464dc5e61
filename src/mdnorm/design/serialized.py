"""A fitted design as JSON: numbers, levels and texts of factors, all of which are checked when read.

Factors are parsed again against the list of what is allowed; nothing else in the text is more than a value.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mdnorm.design.factors import factor_from_state
from mdnorm.design.formula import FormulaError, parse_factor
from mdnorm.design.reader import KINDS
from mdnorm.design.saved import numbers_in, read
from mdnorm.design.terms import Product, Terms, label_terms

if TYPE_CHECKING:
    from mdnorm.design.matrices import Design

_FORMAT = "mdnorm.Design"
_VERSION = 1


def design_to_json(design: Design) -> str:
    """Return a fitted design as JSON."""
    state = {
        "format": _FORMAT,
        "version": _VERSION,
        "formula": design.formula if isinstance(design.formula, str) else list(design.formula),
        "labels": list(design.labels),
        "missing": design.missing,
        "unseen": design.unseen,
        "standardize": design.standardize,
        "variables": design._kinds,
        "written_terms": [[factor.text for factor in term] for term in design._written_terms],
        "label_factors": [factor.text for factor in design._label_factors],
        "factors": {text: fitted.state() for text, fitted in design._factors.items()},
        "products": [
            {
                "term": product.term,
                "factors": [[fitted.factor.text, reduced] for fitted, reduced in product.factors],
            }
            for product in design._terms.products
        ],
        "indicators": list(design._terms.indicators),
        "mean": design._mean.tolist(),
        "scale": design._scale.tolist(),
    }
    return json.dumps(state, allow_nan=False, ensure_ascii=True)


def design_from_json(design: Design, text: str) -> Design:
    """Give a bare design what `design_to_json` saved, and return it; see `Design.from_json`."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"this is not a saved design but truncated or no JSON: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"this is not a saved design: it is JSON, but its format is not {_FORMAT!r}.")
    if state.get("version") != _VERSION:
        raise ValueError(
            f"the saved design has version {state.get('version')!r}, mdnorm reads {_VERSION}: update mdnorm."
        )
    try:
        _restore(design, state)
    except FormulaError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"the saved design is damaged: {error}.") from error
    return design


def _restore(design: Design, state: Mapping[str, Any]) -> None:
    # Not through __init__: a saved formula is never parsed as one, its factors are.
    formula = state["formula"]
    design.formula = formula if isinstance(formula, str) else _strings(state, "formula")
    design.labels = _strings(state, "labels")
    design.missing, design.unseen = read(state, "missing", str), read(state, "unseen", str)
    design._check_choices()
    design.standardize = read(state, "standardize", bool)
    design._written_terms = tuple(
        tuple(parse_factor(text) for text in _strings({"term": term}, "term"))
        for term in read(state, "written_terms", list)
    )
    design._label_factors = tuple(parse_factor(text) for text in _strings(state, "label_factors"))
    design._check_overlap()
    states = read(state, "factors", dict)
    design._factors = {
        factor.text: factor_from_state(factor, read(states, factor.text, dict))
        for factor in [*itertools.chain(*design._written_terms), *design._label_factors]
    }
    kinds = read(state, "variables", dict)
    design._kinds = {name: read(kinds, name, str) for name in design.variables()}
    if not set(design._kinds.values()) <= set(KINDS):
        raise ValueError("it has a variable of an unknown kind")
    indicators = _strings(state, "indicators")
    if not set(indicators) <= set(design.variables(labels=False)):
        raise ValueError("it has an indicator of an unknown variable")
    metadata = {factor.text for term in design._written_terms for factor in term}
    products = []
    for saved in read(state, "products", list):
        pairs = [(text, bool(reduced)) for text, reduced in read(saved, "factors", list)]
        if not pairs or not {text for text, _ in pairs} <= metadata or len(pairs) > len(metadata):
            raise ValueError("it has a product of unknown factors, or of none")
        factors = [(design._factors[text], reduced) for text, reduced in pairs]
        products.append(
            Product(
                read(saved, "term", str),
                tuple((fitted, reduced and fitted.kind == "category") for fitted, reduced in factors),
            )
        )
    # Its columns are counted before any name is written out: a file may ask for a product of very many.
    design._terms = Terms(products, indicators)
    design._mean, design._scale = np.array(numbers_in(state, "mean")), np.array(numbers_in(state, "scale"))
    if not design._terms.width == len(design._mean) == len(design._scale) > 0:
        raise ValueError(
            f"it has {design._terms.width} columns, {len(design._mean)} means and {len(design._scale)} scales"
        )
    if bool((design._scale < 0).any()):
        raise ValueError("it has a negative scale")
    design._label_terms = label_terms(design._fitted_labels())
    design._is_fitted = True


def _strings(state: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = read(state, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"its {key!r} has something that is no text")
    return tuple(values)
