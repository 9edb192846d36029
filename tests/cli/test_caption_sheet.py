"""The command, and its page in a real browser."""

import shutil

import pytest

from tests.helpers.invoke import run_failing, run_json
from upperson.data.records import read_dataset


@pytest.fixture
def crops(work, bundle_and_crops):
    """Six crops in the working folder, and a name with a quote, HTML and a space in it."""
    folder = work / "crops"
    shutil.copytree(bundle_and_crops / "crops", folder)
    (folder / "red.png").rename(folder / '<i>a "red" one.png')
    return folder


def sheet_of(crops, bundle_and_crops, *options):
    return run_json("caption-sheet", crops, "-b", bundle_and_crops / "bundle", *options)


def test_a_page_is_made_and_never_replaced(crops, bundle_and_crops, work):
    (crops / "broken.png").write_bytes(b"no picture")
    made = sheet_of(crops, bundle_and_crops, "-n", "3", "--output", "page.html")
    assert (made["chosen"], made["crops"], made["captioned"]) == (3, 6, 0)
    assert [skipped["path"] for skipped in made["skipped"]] == [str(crops / "broken.png")]
    assert made["distance"]["mean"] < made["random_distance"]["mean"]
    page = (work / "page.html").read_bytes()
    arguments = ("caption-sheet", crops, "-b", bundle_and_crops / "bundle", "--output", "page.html")
    run_failing(3, "output_exists", *arguments)
    assert (work / "page.html").read_bytes() == page


def test_sentences_survive_a_reload_and_become_a_data_set(crops, bundle_and_crops, work, browser):
    sheet_of(crops, bundle_and_crops)
    wrong, requests = [], []

    def open_page(context):
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: dialog.accept())  # It warns of sentences not saved.
        page.goto((work / "caption-sheet.html").as_uri())
        return page

    def states(page):
        return page.locator("#crops button").evaluate_all("all => all.map(one => one.className)")

    context = browser.new_context(viewport={"width": 320, "height": 700})
    page = open_page(context)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    assert page.is_disabled("#save")
    page.keyboard.type('A woman in a "red"  coat ')
    page.keyboard.press("Enter")
    page.keyboard.type("A man.")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#text") == 'A woman in a "red"  coat '
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.click("#skip")
    assert states(page) == ["written", "written", "skipped", "open", "open", "open"]

    page.wait_for_timeout(500)  # Chromium passes on what a page has stored a little later.
    page.reload()
    page.wait_for_selector("#crops .skipped")
    assert states(page) == ["written", "written", "skipped", "open", "open", "open"]
    page.keyboard.type("A child.")  # In the first open crop.
    other = open_page(context)  # A second tab begins at the next one.
    other.keyboard.type("Somebody.")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.keyboard.type("The last one.")
    for tab in (page, other):  # Each hears of the other's sentences.
        tab.wait_for_function("document.querySelectorAll('#crops .written').length === 5")

    with page.expect_download() as download:
        page.keyboard.press("Enter")  # All are done: it goes to the button that saves.
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "annotations.jsonl"
    download.value.save_as(crops / "annotations.jsonl")
    context.close()
    assert wrong == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data", "blob"}

    checked = run_json("data", "check", "--dataset", "jsonl", "--root", crops)
    assert set(checked["findings"]) <= {"unlisted_image", "unused_train_ids"}
    splits = read_dataset("jsonl", crops)
    captions = [text for split in splits.values() for one in split for text in one.captions]
    assert sorted(captions) == [
        "A child.",
        "A man.",
        'A woman in a "red" coat',
        "Somebody.",
        "The last one.",
    ]
