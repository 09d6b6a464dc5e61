"""What the entry point says where the packages of a command are missing."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import mdnorm.cli
from mdnorm.commands import app

WITHOUT_TYPER = [["audit", "features.npy"], ["residualize", "--help"], [], ["--version"]]


@pytest.fixture(scope="module")
def without_typer():
    """What each of these arguments prints where typer is missing, and says at its exit; in one process."""
    code = f"""if True:
        import contextlib, io, json, sys
        sys.modules["typer"] = None
        import mdnorm.cli

        found = []
        for sys.argv[1:] in {WITHOUT_TYPER}:
            printed, said = io.StringIO(), None
            with contextlib.redirect_stdout(printed):
                try:
                    mdnorm.cli.main()
                except SystemExit as error:
                    said = error.code
            found.append((printed.getvalue(), said))
        print(json.dumps(found))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return {tuple(k): v for k, v in zip(WITHOUT_TYPER, json.loads(result.stdout), strict=True)}


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("audit", "features.npy"), "audit"),
        (("residualize", "--help"), "tables"),
    ],
)
def test_the_extra_is_that_of_the_command(without_typer, arguments, extra):
    printed, said = without_typer[arguments]
    assert printed == ""
    assert said.endswith(f"package 'typer': install it with  pip install 'mdnorm[{extra}]'")


def test_without_a_command_all_are_named(without_typer):
    for extra in ("audit", "tables"):
        assert f"pip install 'mdnorm[{extra}]'" in without_typer[()][1]


def test_every_command_and_extra_is_there():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert not app.registered_groups
    assert names == {*mdnorm.cli._EXTRAS, "info"}
    assert all(f"mdnorm {name}" in mdnorm.cli.__doc__ for name in names)
    extras = set(mdnorm.cli._EXTRAS.values())
    assert extras <= set(importlib.metadata.metadata("mdnorm").get_all("Provides-Extra"))


@pytest.mark.parametrize(
    ("command", "default"), [("audit", "(default: the larger)"), ("residualize", "(default: all measures)")]
)
def test_defaults_that_are_described_are_in_the_help(command, default):
    printed = CliRunner().invoke(app, [command, "--help"]).stdout
    assert default in " ".join(printed.replace("│", " ").split())


def test_info():
    def call(*arguments):
        return CliRunner().invoke(app, list(arguments))

    facts = json.loads(call("info", "--json").stdout)
    assert facts["mdnorm"] == mdnorm.__version__
    assert facts["estimators"] == ["batch", "dataset", "penalty", "recursive", "running"]
    assert "estimators    batch, dataset, penalty, recursive, running" in call("info").stdout


def test_version(without_typer):
    assert without_typer[("--version",)] == [f"{mdnorm.__version__}\n", None]
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{mdnorm.__version__}\n")
    assert "--version" in CliRunner().invoke(app, ["--help"]).stdout


def test_version_and_import_are_light():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, mdnorm.cli; sys.argv[1:] = ['--version']; mdnorm.cli.main()\n"
            "heavy = {'sklearn', 'scipy', 'matplotlib', 'pandas', 'typer', 'rich', 'jinja2', 'safetensors'}\n"
            "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.stdout, result.stderr) == (f"{mdnorm.__version__}\n[]\n", "")


def test_module_can_be_run():
    result = subprocess.run(
        [sys.executable, "-m", "mdnorm", "info"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert mdnorm.__version__ in result.stdout
