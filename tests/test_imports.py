"""Imports go one way, in the order of the table in CONTRIBUTING.md, and the package itself stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mdnorm

PACKAGE = Path(mdnorm.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def rows() -> list[list[str]]:
    """The modules of each row of the table, from the lowest to the highest."""
    section = CONTRIBUTING.read_text(encoding="utf-8").split("## Where things are")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [[name.removesuffix(".py").rstrip("/") for name in re.findall("`(.+?)`", cell)] for cell in cells]


LAYER_OF = {name: layer for layer, names in enumerate(rows()) for name in names}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name, below the package, of what a module imports, in its functions and for its types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mdnorm."):
                    yield node.lineno, alias.name.split(".")[1]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            package, *below = (node.module or "").split(".")
            if package == "mdnorm":
                yield from ((node.lineno, name) for name in below[:1] or [a.name for a in node.names])
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mdnorm":
            # After ``import mdnorm``.
            yield node.lineno, node.attr


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_module_imports_from_a_higher_layer(module: Path) -> None:
    if str(module) == "__init__.py":
        return
    own = module.parts[0].removesuffix(".py")
    assert own in LAYER_OF, f"{own} is not in the table of CONTRIBUTING.md"
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    upward = [
        f"line {line}: {name}"
        for line, name in imported(tree)
        # The version is that of the package, whatever has been imported of it.
        if name != "__version__" and LAYER_OF.get(name, len(MODULES)) > LAYER_OF[own]
    ]
    assert not upward


def test_the_table_has_what_there_is() -> None:
    assert {path.parts[0].removesuffix(".py") for path in MODULES} - {"__init__"} == set(LAYER_OF)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_needs_nothing_beside_torch_and_numpy() -> None:
    heavy = "sklearn scipy pandas polars pyarrow narwhals formulaic torchmetrics matplotlib plotly lightning"
    out = run(
        f"import sys\nfor name in {heavy.split()}: sys.modules[name] = None\n"
        "import mdnorm\n"
        "print(mdnorm.tables.Moments.empty(2, 1).weight, mdnorm.distributed.synchronize.__name__)\n"
        "print(mdnorm.integration.insert is mdnorm.insert, mdnorm.auditing.audit is mdnorm.audit)\n"
        "from mdnorm import *\n"
        "try:\n    mdnorm.sklearn\n"
        "except ImportError as error:\n    print(error)"
    )
    missing = "the package 'sklearn' is missing: pip install 'mdnorm[tables]'"
    assert out.splitlines() == ["0.0 synchronize", "True True", missing]


def test_parts_that_are_imported_when_they_are_used() -> None:
    out = run(
        "import sys, mdnorm\n"
        "names = ['sklearn', 'mdnorm.tables']\n"
        "print([name for name in names if name in sys.modules], {'sklearn', 'tables'} <= set(dir(mdnorm)))\n"
        "print(mdnorm.tables.MetadataResidualizer is mdnorm.sklearn.MetadataResidualizer)\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert out.splitlines() == ["[] True", "True", "['sklearn', 'mdnorm.tables']"]
    with pytest.raises(AttributeError, match="module 'mdnorm' has no attribute 'sclearn'"):
        mdnorm.sclearn  # noqa: B018


def test_what_was_inserted_can_be_asked_for() -> None:
    assert mdnorm.insertions is mdnorm.integration.insertions
