"""The page in a real browser: it renders, works by mouse and keyboard, narrow and dark, and is accessible."""

import plotly.graph_objects as go
import pytest
from axe_playwright_python.sync_playwright import Axe

from chromium import needs_chromium, record_problems

pytestmark = needs_chromium


def view_name(view):
    return f"{view[0]}-{view[1]}"


VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
two_views = pytest.mark.parametrize("page", [VIEWS[0], VIEWS[3]], ids=view_name, indirect=True)


@pytest.fixture(scope="module")
def address(report, tmp_path_factory):
    return report.save(tmp_path_factory.mktemp("audit")).as_uri()


@pytest.fixture(params=VIEWS, ids=view_name)
def page(request, browser, address):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    problems = record_problems(page)
    page.goto(address)
    page.wait_for_selector("#overview-dependence .main-svg")
    yield page
    assert problems == []
    context.close()


def wait_until(page, expression):
    """Like `page.wait_for_function`, which the page's own security policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()
    wait_until(
        page,
        "[...document.querySelectorAll('[role=tabpanel]:not([hidden]) .plot')]"
        ".every(plot => plot.querySelector('.main-svg'))",
    )


def test_plotly_takes_every_figure(browser, address):
    """What is drawn says nothing that plotly does not know."""
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#overview-dependence .main-svg")
    for name in ("Overview", "site", "age", "diagnosis (label)"):
        open_tab(page, name)
    drawn = page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].map(({data, layout}) => ({data, layout}))"
    )
    assert len(drawn) == 4 + (5 + 2) + (5 + 2) + (2 + 2)
    for figure in drawn:
        go.Figure(figure)


def test_a_name_in_the_table_opens_its_tab(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.get_by_role("link", name="age").click()
    assert page.locator("#panel-1").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-1"
    page.goto(f"{address}#panel-2")
    page.reload()
    assert page.locator("#panel-2").is_visible()


def test_it_prints_a_table_on_white(browser, address):
    """At the width of a sheet of paper the table stays a table, and a dark screen prints no dark page."""
    page = browser.new_context(viewport={"width": 700, "height": 900}, color_scheme="dark").new_page()
    page.goto(address)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.querySelector('.verdicts tr')).display") == "table-row"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for part in ("document.documentElement", "document.querySelector('.verdicts').parentElement"):
        assert page.evaluate(f"{part}.scrollWidth <= {part}.clientWidth")


def test_every_tab_renders_and_fits(page):
    names = [tab.inner_text().strip() for tab in page.get_by_role("tab").all()]
    assert names == ["Overview", "site", "age", "shoe size", "diagnosis (label)", "Details"]
    for name in names:
        open_tab(page, name)
        visible = [panel for panel in page.get_by_role("tabpanel").all() if panel.is_visible()]
        assert len(visible) == 1
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        for plot in visible[0].locator(".plot").all():
            box = plot.locator(".main-svg").first.bounding_box()
            assert 200 < box["width"] <= page.viewport_size["width"]
            assert box["height"] > 100


@two_views
def test_points_answer_to_the_mouse(page):
    open_tab(page, "age")
    plot = page.locator("#panel-1 .plot").first
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .point").first
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = plot.locator(".hoverlayer .hovertext")
    hover.wait_for()
    assert "dcor²" in hover.text_content()
    assert "240 rows" in hover.text_content()


@two_views
def test_tabs_answer_to_the_keyboard(page):
    page.get_by_role("tab", name="Overview").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-0").is_visible()
    page.keyboard.press("End")
    assert page.locator("#panel-details").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-overview").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-overview"


@two_views
def test_text_can_be_read_on_its_background(page):
    """Labels of figures, which the accessibility check does not see, at 4.5 to 1 at least."""
    colours = page.evaluate(
        "[getComputedStyle(document.querySelector('#overview-dependence .xtick text')).fill,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    light, dark = sorted((luminance(colour) for colour in colours), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 4.5


def luminance(colour):
    channels = [int(part) / 255 for part in colour.strip("rgb()").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@two_views
def test_accessibility(page):
    axe = Axe()
    for name in ("Overview", "site", "diagnosis (label)", "Details"):
        open_tab(page, name)
        results = axe.run(page)
        assert results.violations_count == 0, results.generate_report()


def test_colours_follow_the_system(browser, address):
    page = browser.new_context(color_scheme="light").new_page()
    page.goto(address)
    page.wait_for_selector("#overview-dependence .xtick text")
    fill = "getComputedStyle(document.querySelector('#overview-dependence .xtick text')).fill"
    before = page.evaluate(fill)
    page.emulate_media(color_scheme="dark")
    wait_until(page, f"{fill} !== {before!r}")


def test_without_scripts_sentences_and_tables_are_there(browser, address):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(address)
    assert page.locator("table").first.is_visible()
    page.locator("summary").click()
    assert page.locator("ul.findings li").first.is_visible()
    assert page.locator("#panel-2").is_visible()
    assert not page.locator(".plot").first.is_visible()
