"""What would be published: the built files have everything, and work without the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from filelock import FileLock

import mdnorm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mdnorm"
EXPERIMENTS = ROOT / "experiments"


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(tmp_path_factory, source, *options):
    """Build in a new folder; one process at a time, since builds leave files in the source tree meanwhile."""
    folder = tmp_path_factory.mktemp("dist")
    with FileLock(tmp_path_factory.getbasetemp().parent / "build.lock"):
        run("-m", "build", "--no-isolation", *options, "--outdir", folder, source)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = build(tmp_path_factory, ROOT)
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    folder = build(tmp_path_factory, EXPERIMENTS, "--wheel")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, built[0])
    return folder


def contents(wheel, package):
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if name.startswith(f"{package}/")}


def expected(package):
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.suffix in (".py", ".html", ".js") or path.name == "py.typed"
    }


def test_the_wheel_has_every_module_template_and_the_type_marker(built):
    names = contents(built[0], "mdnorm")
    assert names == expected(PACKAGE)
    assert "mdnorm/py.typed" in names


def test_the_experiments_are_a_wheel_of_their_own(experiments):
    names = contents(experiments, "mdnorm_experiments")
    assert names == expected(EXPERIMENTS / "src" / "mdnorm_experiments")
    assert {"mdnorm_experiments/py.typed", "mdnorm_experiments/templates/report.html"} <= names
    with zipfile.ZipFile(experiments) as wheel:
        folder = experiments.name.removesuffix("-py3-none-any.whl") + ".dist-info"
        metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
        entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == mdnorm.__version__
    assert {"image", "video", "mri"} == set(metadata.get_all("Provides-Extra"))
    assert "mdnorm-experiments = mdnorm_experiments.commands:main" in entry_points


def test_the_wheel_says_what_it_is(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (file,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(file).decode())
    assert metadata["Version"] == mdnorm.__version__
    assert metadata["License-Expression"] == "MIT"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in needed) == ["numpy", "torch"]


def test_the_source_distribution_can_be_built_again(built, tmp_path):
    with tarfile.open(built[1]) as source:
        source.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", folder)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as again, zipfile.ZipFile(built[0]) as first:
        assert sorted(again.namelist()) == sorted(first.namelist())


def test_the_installed_experiments_have_their_command(installed, experiments, tmp_path):
    folder = tmp_path / "experiments"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, experiments)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(installed)])}
    help_text = run("-m", "mdnorm_experiments", "--help", cwd=tmp_path, env=environment)
    for command in ("synthetic", "continual", "image", "digits", "video", "mri"):
        assert command in help_text


def test_the_installed_wheel_trains_and_has_its_command(installed, tmp_path):
    code = """
import torch, mdnorm
layer = mdnorm.MetadataNorm(4, 1, 1)
layer(torch.randn(8, 4, requires_grad=True), torch.randn(8, 1), torch.rand(8, 1).round()).sum().backward()
assert layer.eval()(torch.randn(2, 4), torch.randn(2, 1)).shape == (2, 4)
print(mdnorm.__file__)
"""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    file = run("-c", code, cwd=tmp_path, env=environment).strip()
    assert Path(file).is_relative_to(installed)
    help_text = run("-m", "mdnorm", "--help", cwd=tmp_path, env=environment)
    for command in ("audit", "residualize"):
        assert command in help_text
