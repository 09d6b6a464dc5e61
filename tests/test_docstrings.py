"""The examples in the docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import mdnorm
import mdnorm_experiments

# `__main__` runs the command line when imported.
MODULES = [
    module.name
    for package in (mdnorm, mdnorm_experiments)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_some_examples_were_found():
    assert doctest.testmod(importlib.import_module("mdnorm.layer")).attempted > 0
