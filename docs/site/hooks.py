"""What the site does beyond its generator: mathematics without a script, pages of files outside of docs/."""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
DOCUMENTS = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)]*)?\)")
_NOTEBOOK_LINK = re.compile(r'href="(?!https?:)([^"#]+)\.(?:md|ipynb)(#[^"]*)?"')
_PRE = re.compile(r"<pre>(.*?)</pre>", re.DOTALL)
_LONGEST = 115
"""Letters of a line that code and printed tables keep to; longer lines are sentences, which may be broken."""
_MATHS = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def _linked(source: str, path: str) -> str | None:
    """Return the path, from the root of the project, of a file outside of docs/ that a page links to."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), path))
    return None if target.startswith(("docs/", "../")) else target


def _page_of(target: str) -> str:
    return DOCUMENTS.get(target, f"source/{target}.md")


def on_files(files: Any, config: Any) -> Any:
    """Add the project's other documents, and a page for each file that is linked to."""
    targets = set(DOCUMENTS)
    for file in files.documentation_pages():
        if file.src_uri.endswith(".md"):
            for match in _LINK.finditer(Path(file.abs_src_path).read_text(encoding="utf-8")):
                target = _linked(file.src_uri, match["path"])
                if target is not None:
                    targets.add(target)
    for target in sorted(targets):
        text = (ROOT / target).read_text(encoding="utf-8")
        if target not in DOCUMENTS:
            language = {".py": "python", ".toml": "toml"}.get(Path(target).suffix, "text")
            text = f"---\nsearch:\n  exclude: true\n---\n# {target}\n\n````{language}\n{text}\n````\n"
        else:
            # Its links start from the root.
            text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", text).replace("](docs/", "](")
        files.append(File.generated(config, _page_of(target), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to files outside of docs/ to their pages."""

    def replaced(match: re.Match[str]) -> str:
        target = _linked(page.file.src_uri, match["path"])
        if target is None:
            return match[0]
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(_page_of(target), start)}{match['anchor'] or ''})"

    return _LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Turn TeX into MathML, which needs no script; point a notebook's links to pages; let sentences break."""

    def replaced(match: re.Match[str]) -> str:
        source = unescape(match[2]).strip()
        display = source.startswith(r"\[")
        return convert(source[2:-2].strip(), display="block" if display else "inline")

    def broken(match: re.Match[str]) -> str:
        longest = max(map(len, unescape(re.sub("<[^>]*>", "", match[1])).split("\n")))
        return f'<pre class="sentences">{match[1]}</pre>' if longest > _LONGEST else match[0]

    html = _PRE.sub(broken, html)
    if page.file.src_uri.endswith(".ipynb"):
        html = _NOTEBOOK_LINK.sub(r'href="\1.html\2"', html)
    return _MATHS.sub(replaced, html)
