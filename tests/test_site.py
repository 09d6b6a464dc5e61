"""The documentation as a site: builds without a warning, every link leads somewhere, nothing is fetched."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from chromium import needs_chromium, record_problems

ROOT = Path(__file__).parent.parent
MAIN_PAGES = (
    "index.html",
    "confounding.html",
    "quick-start.html",
    "when-it-is-wrong.html",
    "maths.html",
    "peers.html",
    "results.html",
    "api/layer.html",
    "tutorials/synthetic.html",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # The theme's notice about a future version of the generator is no warning about these pages.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(built):
    return {
        path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in built.rglob("*.html")
    }


def test_every_page_has_its_place(built):
    for page in MAIN_PAGES:
        assert (built / page).is_file()


def test_links_and_their_anchors_exist(built, pages):
    anchors = {path: {tag.get("id") for tag in page.find_all(id=True)} for path, page in pages.items()}
    checked, missing = 0, []
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the server's root
            continue
        for tag, name in (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")):
            for element in page.find_all(tag, attrs={name: True}):
                parts = urlsplit(element[name])
                if parts.scheme in ("https", "http", "data", "mailto"):
                    continue
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                checked += 1
                known = not parts.fragment or target.suffix != ".html" or parts.fragment.startswith("__")
                if not target.is_file() or not (known or unquote(parts.fragment) in anchors[target]):
                    missing.append(f"{path.relative_to(built)}: {element[name]}")
    assert missing == []
    assert checked > 1000


def test_nothing_is_loaded_from_elsewhere(built, pages):
    for path, page in pages.items():
        for tag, name in (("script", "src"), ("img", "src"), ("iframe", "src")):
            for element in page.find_all(tag, attrs={name: True}):
                assert not element[name].startswith(("http", "//")), (path.name, element[name])
        for element in page.find_all("link", attrs={"rel": ["stylesheet", "preconnect", "icon"]}):
            assert not element["href"].startswith(("http", "//")), (path.name, element["href"])


def test_mathematics_needs_no_script(built):
    text = (built / "maths.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert 'class="arithmatex"' not in text


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_work_in_a_browser_from_the_disk(browser, built, width, scheme):
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        page = context.new_page()
        problems = record_problems(page)
        for name in MAIN_PAGES:
            page.goto((built / name).as_uri())
            page.wait_for_selector("h1")
            root = "document.documentElement"
            assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth + 1"), (name, "is too wide")
            assert problems == [], name
        wanted = "default" if scheme == "light" else "slate"
        assert page.evaluate("document.body.dataset.mdColorScheme") == wanted
        page.evaluate("document.getElementById('__search').click()")
        # By key, as a reader does: the page listens to keys.
        page.locator("input.md-search__input").press_sequentially("recalibrate", delay=60)
        page.wait_for_selector(".md-search-result__item a", state="attached", timeout=60_000)
        assert problems == []


# What would have to be scrolled to be read.
CUT = """() => [...document.querySelectorAll(".md-content :is(pre, pre code, .md-typeset__scrollwrap)")]
    .filter(part => part.clientWidth > 0 && part.scrollWidth > part.clientWidth + 2)
    .map(part => part.innerText.slice(0, 60))"""


@needs_chromium
def test_no_code_and_no_table_is_cut_at_1280_pixels(browser, built):
    pages = [page for page in built.rglob("*.html") if "source" not in page.relative_to(built).parts]
    assert len(pages) > 40
    cut = {}
    with browser.new_page(viewport={"width": 1280, "height": 900}) as page:
        for path in pages:
            page.goto(path.as_uri())
            page.wait_for_selector("h1")
            cut |= {path.name: found} if (found := page.evaluate(CUT)) else {}
    assert cut == {}
