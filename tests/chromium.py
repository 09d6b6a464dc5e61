"""A headless browser for the tests of pages."""

import shutil

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# `make test` installs Chromium where it may.
needs_chromium = pytest.mark.skipif(BROWSER is None, reason="no Chromium: install it to test the pages")


def record_problems(page):
    """Return a list that fills with what the page complains of, and with what it loads from elsewhere."""
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: (
            problems.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
        ),
    )
    return problems
