"""Oversight in a real browser: purpose, approval by a second person and Records, at 320 px."""

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.served import served
from tests.helpers.toy_bundle import draw_person
from upperson_console.accounts import add_token
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery, Item

AXE = Path(sys.prefix, "axe", "node_modules", "axe-core", "axe.min.js")
SCREENSHOTS = os.environ.get("UPPERSON_TEST_SCREENSHOTS")
OVERSIGHT = """\
purposes: ["Theft, reported", "Missing person"]
case_number: required
case_pattern: '\\d{4}-\\d+'
two_persons: [export, delete, alert]
refused_sentences: {}
"""

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle_and_crops):
    """A console with a purpose and two persons, and the tokens of two operators and an admin."""
    folder = tmp_path_factory.mktemp("overseen")
    (folder / "bundle").symlink_to(bundle_and_crops / "bundle")
    encoder = open_encoder(folder / "bundle", threads=1)
    space = encoder.fingerprint, encoder.embed_dim
    with Gallery.open(folder / "gallery", *space, create=True) as gallery:
        gallery.crops_dir.mkdir()
        files = [draw_person(gallery.crops_dir / f"{n}.png", "red", seed=n) for n in range(4)]
        items = [Item(key=f"{n}", camera="gate", track=f"{n}", crop=f"{n}.png") for n in range(4)]
        gallery.add(items, encoder.encode_images(files))
    (folder / "oversight.yaml").write_text(OVERSIGHT)
    roles = {"olga": "operator", "otto": "operator", "ada": "admin"}
    tokens = {n: add_token(folder / "tokens.json", n, role, None) for n, role in roles.items()}
    options = ("--token-file", "tokens.json", "--oversight", "oversight.yaml")
    with served(folder, *options) as running:
        yield running.url, tokens


def test_a_search_with_a_purpose_and_an_export_that_a_second_person_approves(browser, server):
    (url, tokens), width, theme = server, 320, "dark"
    contexts, found = [], {}

    def look(page, name):
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        if SCREENSHOTS is not None:
            page.screenshot(path=Path(SCREENSHOTS, f"oversight-{name}-{width}-{theme}.png"))
        if AXE.exists():
            page.evaluate(AXE.read_text())
            result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            for one in result["violations"]:
                found[name, one["id"]] = [node["html"][:120] for node in one["nodes"]]

    def log_in(name):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.goto(f"{url}/?q=red")
        page.get_by_label("Token").fill(tokens[name])
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/purpose?next=*")
        look(page, "purpose")
        page.get_by_label("Purpose").select_option("Missing person")
        page.get_by_label("Case number").fill("2026-17")
        page.get_by_role("button", name="Continue").click()
        page.wait_for_url("**/?q=red")
        return page

    olga, otto, ada = map(log_in, tokens)
    look(olga, "found")
    assert "Case 2026-17" in olga.locator("aside.purpose").inner_text()
    olga.locator("summary", has_text="Export").click()
    olga.get_by_role("button", name="Export these").click()
    olga.wait_for_url("**/approvals")
    olga.get_by_text("pending").wait_for()
    otto.get_by_role("link", name="Approvals").click()
    otto.wait_for_url("**/approvals")
    look(otto, "approvals")
    otto.get_by_role("button", name="Refuse").first.click()
    otto.get_by_role("alert").wait_for()
    look(otto, "no-reason")
    otto.get_by_label("Reason").first.fill("seen")
    otto.get_by_role("button", name="Approve").first.click()
    otto.get_by_text("otto: seen").first.wait_for()
    olga.goto(f"{url}/approvals")
    look(olga, "approved")
    with olga.expect_download() as downloaded:
        olga.get_by_role("link", name="Download").first.click()
    assert downloaded.value.suggested_filename.endswith(".zip")
    ada.goto(f"{url}/records?case=2026-17&action=export")
    look(ada, "records")
    assert "otto" in ada.locator("table.log").inner_text()
    ada.goto(f"{url}/?q=black+man")
    look(ada, "refused")
    assert "words about origin" in ada.get_by_role("alert").inner_text()
    for context in contexts:
        context.close()
    assert found == {}
