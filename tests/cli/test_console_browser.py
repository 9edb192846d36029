"""The console in a real browser, by mouse and keyboard, in both sizes and themes."""

import base64
import io
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

from tests.helpers.served import served
from tests.helpers.toy_bundle import COLOURS, calibrate_toy_bundle, draw_person
from upperson_alerts.alerts import add_alert
from upperson_console.accounts import add_token
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery, Item

AXE = Path(sys.prefix, "axe", "node_modules", "axe-core", "axe.min.js")
SIZES = {"wide": (1280, 860), "narrow": (390, 844)}
SCREENSHOTS = os.environ.get("UPPERSON_TEST_SCREENSHOTS")
"""A folder that gets pictures of all pages."""
SHOWN = os.environ.get("UPPERSON_TEST_SHOWN")
"""A folder with the bundle and the gallery that those pictures show."""
START = 1_790_000_000.0

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bundle_and_crops):
    """A bundle, and a gallery with a track of three pictures of each colour at two cameras."""
    folder = tmp_path_factory.mktemp("browsed")
    shutil.copytree(bundle_and_crops / "bundle", folder / "bundle")
    calibrate_toy_bundle(folder / "bundle")
    encoder = open_encoder(folder / "bundle", threads=1)
    space = encoder.fingerprint, encoder.embed_dim
    with Gallery.open(folder / "gallery", *space, create=True) as gallery:
        gallery.crops_dir.mkdir()
        items = [
            Item(
                key=f"{colour}-{number}",
                camera=("gate", "hall")[number // 3],
                time=START + 300 * place + 5 * number,
                track=f"{colour}-{number // 3}",
                crop=f"{colour}{number}.png",
            )
            for place, colour in enumerate(COLOURS)
            for number in range(6)
        ]
        files = [
            draw_person(gallery.crops_dir / f"{colour}{number}.png", colour, seed=number)
            for colour in COLOURS
            for number in range(6)
        ]
        vectors = encoder.encode_images(files)
        gallery.add(items, vectors)
        crop = draw_person(gallery.crops_dir / "binned.png", "red", seed=9).name
        gallery.add([Item(key="binned", camera="gate", time=START, crop=crop)], vectors[:1])
        gallery.bin.add(["binned"], "Adam", "At the person's request")
        add_alert(gallery, encoder, "woman in a red coat", rate=1.0)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with served(folder, "--blur") as running:  # As the busiest: its pages say more.
        yield running


@pytest.fixture
def open_page(browser, server):
    """Opens pages; in the end nothing went wrong in them, and all they loaded was ours."""
    contexts, requests, wrong, pending = [], [], [], set()

    def open_page(path="/", url=server.url, **options):
        options = {"viewport": {"width": 1280, "height": 860}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("request", lambda request: pending.add(request))
        page.on("requestfinished", lambda request: pending.discard(request))
        page.on("requestfailed", lambda request: pending.discard(request))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None
        )
        page.goto(url + path)
        return page

    def settle(page):
        """Wait as for `networkidle`, which is half a second without a request."""
        page.wait_for_load_state("load")
        page.wait_for_timeout(50)
        while pending:
            page.wait_for_timeout(50)

    open_page.wrong, open_page.settle = wrong, settle
    yield open_page
    for context in contexts:
        context.close()
    assert requests
    ours = ("http://127.0.0.1:", "https://127.0.0.1:", "data:")
    elsewhere = [url for url in requests if not url.startswith(ours)]
    assert elsewhere == []
    assert wrong == []


def keys_shown(page):
    return page.locator("#cards .open").evaluate_all("links => links.map(one => one.pathname)")


def search(page, sentence):
    page.fill("#q", sentence)
    page.keyboard.press("Enter")
    page.wait_for_selector("#cards .card")


def wait_for_cards(page, count):
    page.wait_for_function(f"() => document.querySelectorAll('#cards .card').length === {count}")


def test_a_search_is_narrowed_opened_and_gone_back_to(open_page):
    page = open_page()
    search(page, "a woman in red")
    assert page.url.endswith("/?q=a+woman+in+red")
    found = keys_shown(page)
    assert len(found) == 12
    page.wait_for_selector("#timeline svg .bar")
    page.locator("[name=camera][value=gate]").check()
    page.wait_for_url("**camera=gate*")
    wait_for_cards(page, 6)
    narrowed = keys_shown(page)
    page.locator("#cards .open").first.click()
    page.wait_for_selector(".strip")
    assert page.url.split("?")[0].endswith(narrowed[0])
    page.go_back()
    page.wait_for_selector("#cards .card")
    assert keys_shown(page) == narrowed
    page.go_back()
    wait_for_cards(page, 12)
    assert keys_shown(page) == found
    page.reload()
    assert keys_shown(page) == found


def test_the_keyboard_is_enough(open_page):
    page = open_page("/?q=red")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    assert page.evaluate("document.activeElement.value") == "red"
    page.keyboard.press("ArrowDown")
    found = keys_shown(page)
    focused = "document.activeElement.pathname"
    assert page.evaluate(focused) == found[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert found.index(page.evaluate(focused)) > 2
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == found[1]
    page.keyboard.press("Enter")
    page.wait_for_selector(".portrait")
    assert page.url.split("?")[0].endswith(found[1])


def focused_card(page):
    return page.evaluate("document.activeElement.closest('.card')?.id")


def test_keys_mark_the_focused_card_and_stay_on_it(open_page):
    page = open_page("/?q=a+jacket")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    yes = focused_card(page)
    page.keyboard.press("y")
    page.wait_for_selector(f"#{yes}.is-yes")
    assert focused_card(page) == yes
    page.keyboard.press("ArrowRight")
    no = focused_card(page)
    page.keyboard.press("n")
    page.wait_for_selector(f"#{no}.is-no")
    assert focused_card(page) == no != yes
    # A held key repeats: it marks once. Pressed again it removes the mark.
    page.locator(f"#{yes} .open").focus()
    page.keyboard.down("y")
    page.keyboard.down("y")
    page.wait_for_function(f"() => !document.querySelector('#{yes}').matches('.is-yes')")
    page.keyboard.up("y")
    assert focused_card(page) == yes
    assert page.url.split("marks=")[1] == no.replace("card-", "n")
    # Keys that are quicker than the server: no mark is lost.
    page.goto(page.evaluate("origin") + "/?q=a+shirt")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("y")
    page.get_by_text("Refined by 3 yes and 0 no.").wait_for()


def test_a_time_is_typed_by_keys_and_half_of_one_changes_nothing(open_page):
    page = open_page("/?order=time")
    field = page.locator("[name=since]")
    field.focus()
    page.keyboard.type("01022020")
    page.locator("#q").focus()
    assert "since" not in page.url
    assert page.locator("#wrong").inner_text()
    page.locator("[name=camera][value=gate]").check()
    assert "camera" not in page.url
    field.focus()
    page.keyboard.type("01022020101500AM")
    assert field.input_value() == "2020-01-02T10:15"
    page.locator("#q").focus()
    page.wait_for_url("**since=2020-01-02T10*camera=gate*")


def test_a_lost_session_leads_to_the_login_and_back(open_page, folder):
    (folder / "home").mkdir()
    for name in ("bundle", "gallery"):
        (folder / "home" / name).symlink_to(folder / name)
    token = add_token(folder / "home" / "tokens.json", "olga", "operator", None)
    with served(folder / "home", "--token-file", "tokens.json") as running:
        page = open_page("/?q=a+coat", url=running.url)

        def log_in():
            page.wait_for_url("**/login?next=*")
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Log in").click()
            page.wait_for_selector("#cards .card")
            assert page.url == f"{running.url}/?q=a+coat"

        log_in()
        for lost_at in ("Yes, this person", "Export these"):
            page.locator("summary", has_text="Export").click()
            page.context.clear_cookies()
            page.get_by_role("button", name=lost_at).first.click()
            log_in()
        page.context.clear_cookies()
        page.set_input_files("#file", folder / "gallery" / "crops" / "blue0.png")
        log_in()
        page.goto(f"{running.url}/live")
        page.wait_for_selector(".live-card")
        add_token(folder / "home" / "tokens.json", "olga", "operator", None)  # Ends the session.
        page.wait_for_url("**/login?next=%2Flive")
    open_page.wrong[:] = [text for text in open_page.wrong if "401" not in text]


@pytest.mark.parametrize("with_script", [True, False])
def test_selected_cards_are_marked_exported_and_deleted(open_page, with_script):
    sentence = f"shoes+{with_script}"
    page = open_page(f"/?q={sentence}", java_script_enabled=with_script)
    bar = page.locator("#selected")
    assert not bar.is_visible()

    def select():
        for place in (1, 3):
            page.locator("#cards .select").nth(place).check()

    select()
    if with_script:
        assert bar.locator("strong").inner_text() == "Selected cards: 2, pictures: 6"
    with page.expect_download():
        bar.get_by_role("button", name="Export").click()
    bar.get_by_role("button", name="Yes").click()
    page.get_by_text("Refined by 2 yes and 0 no.").wait_for()
    assert page.locator("#cards .is-yes").count() == 2
    select()
    bar.get_by_role("button", name="Delete").click()
    page.get_by_role("heading", name="Delete 6 pictures").wait_for()
    page.reload()
    page.get_by_label("Why?").fill("At her request")
    page.get_by_role("button", name="Move 6 pictures to the bin").click()
    page.get_by_role("heading", name="Moved 6 pictures to the bin").wait_for()
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("heading", name="Restored 6 pictures").wait_for()


GIVEN = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], "person.png", { type: "image/png" }));
  const options = { bubbles: true, cancelable: true, dataTransfer: given, clipboardData: given };
  const kind = name === "paste" ? ClipboardEvent : DragEvent;
  document.body.dispatchEvent(new kind(name, options));
}"""


def test_a_picture_is_chosen_dropped_or_pasted_and_a_slider_mixes(open_page, folder):
    file = folder / "gallery" / "crops" / "blue0.png"
    page = open_page()
    for way in ("drop", "paste"):
        page.goto(page.evaluate("origin") + "/?q=coat&camera=gate")
        page.evaluate(GIVEN, [way, base64.b64encode(file.read_bytes()).decode()])
        page.wait_for_url("**picture=*")
        page.wait_for_selector("#cards .card")
        assert "q=coat" in page.url
        assert "camera=gate" in page.url
        assert page.locator(".chosen img").count() == 1
    page.goto(page.evaluate("origin") + "/")
    page.set_input_files("#file", file)
    page.wait_for_url("**picture=*")
    page.wait_for_selector("#cards .card")
    by_picture = keys_shown(page)
    page.wait_for_function("() => document.querySelector('.chosen img').naturalWidth > 0")
    search(page, "red")
    page.wait_for_selector("input[name=share]")
    page.locator("input[name=share]").fill("0")
    page.wait_for_url("**share=0*")
    first_is = "first => document.querySelector('#cards .open').pathname !== first"
    page.wait_for_function(first_is, arg=by_picture[0])
    page.get_by_label("Leave the picture out").click()
    page.wait_for_url("**/?q=red")


def test_more_comes_when_the_end_is_near(open_page, folder):
    with Gallery.open(folder / "gallery") as gallery:
        _, vectors = next(gallery.vectors())
        more = [Item(key=f"more-{number}") for number in range(24)]
        gallery.add(more, vectors[: len(more)])
    try:
        page = open_page("/?q=red&by=picture")
        wait_for_cards(page, 48)
        page.locator("#cards .card").last.scroll_into_view_if_needed()
        wait_for_cards(page, 60)
    finally:
        with Gallery.open(folder / "gallery") as gallery:
            gallery.delete([one.key for one in more])
    found = keys_shown(page)
    assert len(set(found)) == 60
    page.get_by_text("These are all hits.").wait_for()
    assert "cursor" not in page.url
    page.locator("summary", has_text="Export").click()  # It has what is shown now.
    with page.expect_download() as download:
        page.get_by_role("button", name="Export these 60").click()
    assert download.value.suggested_filename.endswith("-red-36-pictures.zip")  # The others went.


def test_pages_work_without_a_script_and_with_one_the_live_page_is_renewed(open_page):
    page = open_page(java_script_enabled=False)
    page.fill("#q", "red")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_url("**/?q=red*")
    assert page.locator("#cards .card").count() == 12
    page.locator("#cards .open").first.click()
    page.wait_for_url("**/people/*")
    assert page.locator(".strip li").count() == 3
    page.goto(page.evaluate("origin") + "/live")
    assert "every two seconds" not in page.locator("#stale").inner_text()
    page = open_page("/live")
    page.get_by_text("renewed every two seconds").wait_for()
    page.evaluate("document.querySelector('.live-card').remove()")
    page.wait_for_function("() => document.querySelectorAll('.live-card').length === 2")


@pytest.fixture(scope="module")
def shown(server):
    """What is looked at: what the pictures shall show, and the small gallery else."""
    with nullcontext(server) if SHOWN is None else served(Path(SHOWN)) as running:
        query = {"sentence": "woman in a red coat", "limit": 1}
        found = httpx.post(f"{running.url}/api/v1/search", json=query, timeout=60).json()
        yield SimpleNamespace(url=running.url, person=found["hits"][0]["id"])


def _violations(page):
    """Return what axe-core finds; nothing where it is not installed."""
    if not AXE.exists():
        return {}
    page.add_script_tag(path=AXE)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return {
        one["id"]: [node["html"][:120] for node in one["nodes"]] for one in result["violations"]
    }


PAGES = {
    "start": "/",
    "browse": "/?order=time",
    "found": "/?q=woman+in+a+red+coat",
    "nobody": "/?q=woman+in+a+purple+coat",
    "uncalibrated": "/?q=zebra",
    "nothing": "/?q=woman&camera=gate&last=hour",
    "person": "/people/{person}?q=woman+in+a+red+coat",
    "delete": "/people/{person}/delete?what=track",
    "live": "/live",
    "alerts": "/alerts?q=woman+in+a+red+coat&camera=gate",
    "bin": "/bin",
    "records": "/records",
    "problem": "/?q=woman&since=noon",
    "login": "/login",
    "settings": "/settings",
}


def test_every_page_fits_a_narrow_screen_while_frames_are_blurred(open_page, server, folder):
    more = [Item(key=f"n{n}", camera="gate", time=START + 1500 + n, track=f"{n}") for n in range(5)]
    with Gallery.open(folder / "gallery") as gallery:
        gallery.add(more, next(gallery.vectors())[1][:5])
    found = {}
    for language in ("de", "fr"):  # English is looked at below.
        options = {"viewport": {"width": 320, "height": 800}, "locale": language}
        page = open_page("/?q=red", bypass_csp=True, color_scheme="dark", **options)
        person = keys_shown(page)[0].rpartition("/")[2]
        for name, path in PAGES.items():
            page.goto(server.url + path.format(person=person))
            page.wait_for_load_state() if name == "live" else open_page.settle(page)
            assert page.locator("html").get_attribute("lang") == language
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert (name, language, wide) <= (name, language, 320)
            broken = _violations(page) if language == "de" else {}
            found |= {(name, language, id_): nodes for id_, nodes in broken.items()}
        page.goto(server.url + "/?q=red&by=picture&order=time")
        page.locator("details.save > summary").first.click()
        fits = "one => one.getBoundingClientRect().right <= innerWidth"
        assert page.locator("#export").evaluate(fits)
        assert page.locator("#export > *").evaluate_all(f"all => all.every({fits})")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, language
    assert found == {}
    with Gallery.open(folder / "gallery") as gallery:
        gallery.delete([one.key for one in more])
    open_page.wrong[:] = [text for text in open_page.wrong if "422" not in text]


def test_the_header_shows_the_purpose_of_the_page_and_accounts_fit(open_page, folder):
    token = add_token(folder / "tokens.json", "ada", "admin", None)
    (folder / "oversight.yaml").write_text("purposes: [Theft, Missing person]\n")
    options = ("--token-file", "tokens.json", "--oversight", "oversight.yaml")
    with served(folder, *options) as running:
        page = open_page("/", url=running.url, bypass_csp=True)
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("combobox", name="Purpose").select_option("Theft")
        page.get_by_role("button", name="Continue").click()
        search(page, "red")
        other = page.context.new_page()
        other.goto(f"{running.url}/?q=blue")
        other.get_by_role("link", name="Change").click()
        other.get_by_role("combobox", name="Purpose").select_option("Missing person")
        other.get_by_role("button", name="Continue").click()
        other.wait_for_url("**/?q=blue")
        search(page, "coat")
        page.wait_for_url("**/?q=coat")
        assert page.locator("aside.purpose").inner_text().startswith("Missing person")
        page.set_viewport_size({"width": 320, "height": 860})
        page.goto(f"{running.url}/accounts")
        new = page.locator(".alert-form")
        new.get_by_label("Name, as in the query log").fill("otto")
        new.get_by_role("radio", name="operator").check()
        new.get_by_role("button", name="Create").click()
        assert page.locator("code.token").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        assert _violations(page) == {}
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Token").wait_for()
        assert page.locator("aside.purpose").count() == 0


LOOKS = [("wide", "light"), ("narrow", "dark"), ("wide", "dark"), ("narrow", "light")]
"""The first of them is looked at, if no pictures are wanted: above it was narrow and dark."""


@pytest.mark.parametrize(("size", "theme"), LOOKS if SCREENSHOTS is not None else LOOKS[:1])
def test_every_page_is_readable_in_both_sizes_and_themes(open_page, shown, size, theme):
    width, height = SIZES[size]
    options = {"viewport": {"width": width, "height": height}, "color_scheme": theme}
    page, wrong = open_page("/", url=shown.url, bypass_csp=True, **options), open_page.wrong
    found = {}
    for name, path in PAGES.items():
        page.goto(shown.url + path.format(person=shown.person))
        page.wait_for_load_state() if name == "live" else open_page.settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        unsized = "image => !image.width || !image.height"
        assert page.locator("img").evaluate_all(f"images => images.filter({unsized}).length") == 0
        if SCREENSHOTS is not None:
            with Image.open(io.BytesIO(page.screenshot())) as image:  # Few colours last in git.
                picture = image.convert("RGB").quantize(128)
            file = Path(SCREENSHOTS, f"console-{name}-{size}-{theme}.png")
            picture.save(file, optimize=True)
        found |= {(name, id_): nodes for id_, nodes in _violations(page).items()}
    wrong[:] = [text for text in wrong if "422" not in text]  # The browser itself logs that status.
    if not AXE.exists():
        pytest.skip(f"no axe-core: npm install --prefix {Path(sys.prefix, 'axe')} axe-core")
    assert found == {}
