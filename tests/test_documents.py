"""The code blocks of the documents, run one after the other as a reader would, and their links."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path)], ids=lambda path: path.name)
def test_code_blocks_run_and_print_what_stands_below(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match[1], str(path), "exec"), names)
        if match[2] is not None:
            assert printed.getvalue() == match[2]
    if path.name in ("README.md", "estimators.md"):
        assert names["logits"].shape == (10,)


def test_the_readme_prints_a_dependence(capsys):
    assert len(blocks(DOCUMENTS[0])) == 2
    names: dict[str, object] = {}
    for block in blocks(DOCUMENTS[0]):
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("tensor(")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_links_exist(path):
    # Code and mathematics have such pairs of brackets, too.
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target in ("changelog.md", "contributing.md"):  # made by the site from those in the root
            continue
        file = target.split("#")[0]
        assert target.startswith("http") or not file or (path.parent / file).exists(), target
