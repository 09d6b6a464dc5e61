"""Imports go one way, in the order of the tables in CONTRIBUTING.md, and the package itself stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mdnorm

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "mdnorm": Path(mdnorm.__file__).parent,
    "mdnorm_experiments": ROOT / "experiments" / "src" / "mdnorm_experiments",
}


def tables() -> list[dict[str, int]]:
    """Module → row of each table, counted from the lowest; the order of the tables is that of `FOLDERS`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Where things are")[1].split("\n## ")[0]
    found: list[dict[str, int]] = []
    for table in section.split("| --- | --- |\n")[1:]:
        cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        names = [re.findall("`(.+?)`", cell) for cell in cells]
        found.append(
            {name.removesuffix(".py").rstrip("/"): row for row, line in enumerate(names) for name in line}
        )
    return found


LAYERS_OF = dict(zip(FOLDERS, tables(), strict=True))
MODULES = [
    (package, path.relative_to(folder))
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
]


def imported(tree: ast.Module, of: str) -> Iterator[tuple[int, str]]:
    """Line and name, below a package, of what a module imports of it, in functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{of}."):
                    yield node.lineno, alias.name.split(".")[1]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            package, *below = (node.module or "").split(".")
            if package == of:
                yield from ((node.lineno, name) for name in below[:1] or [a.name for a in node.names])
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == of:
            # After ``import mdnorm``.
            yield node.lineno, node.attr


@pytest.mark.parametrize(("package", "module"), MODULES, ids=str)
def test_no_module_imports_from_a_higher_layer(package: str, module: Path) -> None:
    tree = ast.parse((FOLDERS[package] / module).read_text(encoding="utf-8"))
    if package == "mdnorm":
        assert not list(imported(tree, "mdnorm_experiments")), "the package knows nothing of the experiments"
    if str(module) == "__init__.py":
        return
    own, layer_of = module.parts[0].removesuffix(".py"), LAYERS_OF[package]
    assert own in layer_of, f"{own} is not in the table of CONTRIBUTING.md"
    upward = [
        f"line {line}: {name}"
        for line, name in imported(tree, package)
        # The version is that of the package, whatever has been imported of it.
        if name != "__version__" and layer_of.get(name, len(MODULES)) > layer_of[own]
    ]
    assert not upward


@pytest.mark.parametrize("package", FOLDERS)
def test_the_table_has_what_there_is(package: str) -> None:
    found = {path.parts[0].removesuffix(".py") for name, path in MODULES if name == package}
    assert found - {"__init__"} == set(LAYERS_OF[package])


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
