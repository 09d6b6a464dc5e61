"""The tutorials: each notebook runs from top to bottom as it is, and is stored with clean outputs."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PACKAGES = {
    "audit": ("formulaic", "jinja2", "plotly", "sklearn"),
    "huggingface": ("accelerate", "transformers"),
    "mri": ("formulaic", "monai", "nibabel", "nilearn", "pandas"),
    "nifti": ("formulaic", "jinja2", "monai", "nibabel", "pandas", "plotly", "sklearn"),
    "synthetic": (),
}
"""What a notebook needs beside matplotlib."""
LARGEST = 600_000
SLOWEST = 600
"""Seconds a cell may take on a machine that others use, too."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_every_notebook_says_what_it_needs():
    assert {path.stem for path in NOTEBOOKS} == set(PACKAGES)
    for path in NOTEBOOKS:
        first = source(cells(path, "markdown")[0])
        assert first.startswith("# "), path.name
        assert "pip install" in first, path.name
        assert "## Where next" in source(cells(path, "markdown")[-1]), path.name


@each_notebook
def test_runs_from_top_to_bottom(path, monkeypatch, tmp_path):
    needed = ("nbclient", "nbformat", "ipykernel", "matplotlib", *PACKAGES[path.stem])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    import nbformat
    from nbclient import NotebookClient

    settings, folder = tmp_path / "settings", tmp_path / "work"
    folder.mkdir()
    # The kernel is the interpreter that runs the tests, whatever is installed under the name python3.
    kernel = settings / "kernels" / "this-interpreter"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specification = {"argv": command, "display_name": "Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(specification), encoding="utf-8")
    for name in (
        "IPYTHONDIR",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_PATH",
        "JUPYTER_RUNTIME_DIR",
    ):
        monkeypatch.setenv(name, str(settings))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name="this-interpreter",
        timeout=SLOWEST,
        resources={"metadata": {"path": str(folder)}},
    ).execute()

    errors = [
        output["text"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert errors == []
    assert list(folder.iterdir()) == []


@each_notebook
def test_is_stored_with_clean_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < LARGEST
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data", "execute_result")
        assert output.get("name") != "stderr"
        # Pages with scripts make a notebook large, and GitHub does not show them.
        assert "<script" not in json.dumps(output)
    for cell in code:
        if re.search(r"plt\.show\(\)|^print\(", source(cell), re.MULTILINE) and "def " not in source(cell):
            assert cell["outputs"], source(cell)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|opt|usr)/|[A-Z]:\\\\", text)


@each_notebook
def test_links_exist(path):
    targets = [
        target for cell in cells(path, "markdown") for target in re.findall(r"\]\(([^)\s]+)\)", source(cell))
    ]
    assert targets
    for target in targets:
        file = target.split("#")[0]
        assert target.startswith("https://") or not file or (path.parent / file).exists(), target
