"""The system's Chromium, driven by Playwright."""

import os
import shutil
from contextlib import contextmanager

import pytest

_INSTALL = "install it with  apt install chromium  and  pip install playwright"


def missing(reason):
    """Skip, unless ``UPPERSON_TEST_BROWSER=required`` makes that a failure."""
    if os.environ.get("UPPERSON_TEST_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def launched():
    """A browser that may reach this machine alone."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        missing(f"there is no Chromium: {_INSTALL}")
    arguments = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=arguments)
        yield opened
        opened.close()
