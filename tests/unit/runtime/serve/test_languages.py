"""The pages in the languages of their readers: whole catalogues, and no text outside of them."""

import gettext
import io
import re
import string
import zipfile
from html.parser import HTMLParser

import pytest

from tests.helpers import catalogue
from tests.helpers.catalogue import FORMATS, TRANSLATED, flat, placeholders
from tests.helpers.console import ODD, Client, id_of, log_lines
from tests.unit.runtime.serve.test_snapshots import SQUARE, write
from upperson_alerts.alerts import add_alert
from upperson_console import translation
from upperson_console.accounts import Access, Account
from upperson_console.app import make_app
from upperson_console.oversight import Oversight
from upperson_console.rendering import STATIC, templates
from upperson_console.reported import problem_text
from upperson_console.translation import LANGUAGES, LOCALE, Locale
from upperson_rt.errors import InputError
from upperson_rt.search.notices import Notice
from upperson_rt.search.verdict import _REASONS

GERMAN = {"accept-language": "de-CH, fr;q=0.5"}


@pytest.mark.parametrize("language", TRANSLATED)
def test_each_catalogue_is_whole_and_its_compiled_file_is_of_it(language):
    wanted, found = catalogue.template(), catalogue.read_catalogue(language)
    fields = catalogue.problem_fields()

    def keys(texts):
        return {(one.context, one.id) for one in texts if one.id}

    assert keys(found) == keys(wanted), "run  python -m tests.helpers.catalogue"
    assert not found.obsolete
    for one in found:
        if not one.id:
            continue
        assert not one.fuzzy, one.id
        forms = flat(one.string)
        assert all(forms), one.id
        for form in forms:
            names = placeholders(form)
            if one.context == "problem":
                assert {*names} <= fields[one.id], one.id
            elif one.context not in ("notice", "reason", *FORMATS):
                assert names == placeholders(flat(one.id)[-1]), one.id
    compiled = catalogue.path_of(language, ".mo").read_bytes()
    assert compiled == catalogue.compiled(found), "run  python -m tests.helpers.catalogue"


NOTICES = [
    Notice("sentence_truncated", {"context_length": 77}),
    Notice("language_unfamiliar", {"letters": 9, "tokens": 8}),
    Notice("words_unknown", {"words": ["frock"]}),
    Notice("contradiction", {"contradiction": "red, not red"}),
    Notice("colours_joined", {"phrase": "red and blue coat", "noun": "coat", "colours": ["red"]}),
    Notice("excluded", {"phrases": ["hat"]}),
    Notice("not_understood"),
    Notice("indistinct"),
    Notice("camera_unknown", {"cameras": ["a%(b)s"] * 9}),
    Notice("did_you_mean", {"sentence": "red"}),
    Notice("rewritten", {"sentence": "red"}),
    Notice("either", {"sentences": ["red", "blue"]}),
    Notice("feedback_missing", {"count": 1234}),
    Notice("gallery_empty", {"gallery": "g"}),
    Notice("filter_matches_nothing", {"pictures": 12345, "without_time": 0, "by": ["time"]}),
    Notice("cameras_not_compared", {"cameras": ["gate"], "wanted": 30, "pictures": 4}),
]
REASONS = {
    "few_pictures": {"pictures": 3, "least": 40},
    "pictures_unlike": {"cameras": ["gate"], "at_night": True},
    "cameras_not_compared": {"wanted": 30},
    "words_unknown": {"words": ["frock"]},
}


@pytest.mark.parametrize("language", TRANSLATED)
def test_notices_and_reasons_of_the_core_are_translated_by_code_with_their_fields(language):
    context = LOCALE.set(lambda: Locale(language=language))
    try:
        assert {one.code for one in NOTICES} == set(catalogue.get_args(catalogue.NoticeCode))
        for one in NOTICES:
            text = translation.by_code("notice", one.code, one.fields, one.text)
            assert text not in (one.text, one.code)
            assert "<span" not in text, one.code
        text = translation.by_code("notice", "camera_unknown", NOTICES[8].fields, "")
        assert ("a%(b)s" in text, text.count("a%(b)s"), "\u2026" in text) == (True, 5, True)
        for code in _REASONS:
            text = translation.by_code("reason", code, REASONS.get(code, {}), "english")
            assert "english" not in text, code
        # What has no translation, or lacks a field, is in English, and says so.
        for kind, code in (("problem", "no such <code>"), ("notice", "feedback_missing")):
            text = translation.by_code(kind, code, {}, "a <b>\x1b")
            assert text == '<span lang="en">a &lt;b&gt;\\x1b</span>'
        assert translation.number(1234567.5, ",.2f") in ("1.234.567,50", "1\u202f234\u202f567,50")
    finally:
        LOCALE.reset(context)


@pytest.mark.parametrize("language", TRANSLATED)
def test_errors_from_outside_the_console_are_translated(language):
    context = LOCALE.set(lambda: Locale(language=language))
    try:
        for code in ("bin_files", "clips_not_removed", "key_taken", "timestamp_unavailable"):
            text = problem_text(InputError("english", code=code))
            assert "english" not in text, code
    finally:
        LOCALE.reset(context)


# --- No page has a text outside of the catalogue


class Marked(gettext.NullTranslations):
    """A language whose texts have no ASCII letters, but for placeholders."""

    letters = str.maketrans({one: chr(ord(one) + 0xFEE0) for one in string.ascii_letters})

    def gettext(self, text):
        parts = re.split(r"(%\(\w+\)s)", text)
        return "".join(
            one.translate(self.letters) if not i % 2 else one for i, one in enumerate(parts)
        )

    def ngettext(self, one, many, number):
        return self.gettext(many)

    def pgettext(self, context, code):
        return code if context in FORMATS else self.gettext(code)


SHOWN = ("title", "alt", "placeholder", "aria-label", "data-drop")
VOID = {"meta", "link", "img", "input", "br", "polygon", "rect", "line", "polyline", "image"}


class Texts(HTMLParser):
    """Collects what people read of a page, but for what is marked as English or as no text."""

    def __init__(self, page):
        super().__init__()
        self.found, self._skipped = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        skips = given.get("lang") == "en" or given.get("translate") == "no"
        skips |= tag in ("script", "style", "code", "kbd") or any(self._skipped)
        if not skips:
            self.found += [given[name] for name in SHOWN if given.get(name)]
        if tag not in VOID:
            self._skipped.append(skips)

    def handle_endtag(self, tag):
        if tag not in VOID and self._skipped:  # A template has both branches.
            self._skipped.pop()

    def handle_data(self, data):
        if not any(self._skipped):
            self.found.append(data)


def unmarked(page, *data):
    """The texts of a page that have letters, beside data of the gallery and of accounts."""
    names = sorted([*data, ODD, *DATA], key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(one) for one in names))
    texts = [pattern.sub("", one).strip() for one in Texts(page).found]
    return [one for one in texts if re.search("[A-Za-z]", one)]


DATA = (
    "UP-Person", "gate", "yard", "woman in a red coat", "red", "ada", "olga", "otto", "vera",
    "local", "English", "Deutsch", "Fran\u00e7ais", "UTC", "woman", "zebra", "theft",
    "woman in a rde coat",
)  # fmt: skip


@pytest.fixture
def marked(monkeypatch):
    """All pages are in the marked language."""
    monkeypatch.setattr(translation, "catalogue", lambda language: Marked())
    monkeypatch.setattr(Locale, "of", lambda *_, **__: Locale(language="de"))


def crawl(client, pages):
    """The unmarked texts of pages, by address."""
    found = {}
    for path in pages:
        answer = client.get(path)
        assert answer.headers["content-type"].startswith("text/html"), (path, answer.text)
        if texts := unmarked(answer.text):
            found[path] = texts
    return found


@pytest.mark.parametrize(
    "file", sorted((STATIC.parent / "templates").iterdir()), ids=lambda p: p.name
)
def test_no_branch_of_a_template_has_a_text_outside_of_the_catalogue(file):
    plain = re.sub(r"\{[{%].*?[%}]\}", "", file.read_text("utf-8"), flags=re.DOTALL)
    assert unmarked(plain, "items.json", "manifest.json", "manifest.tsr", "svg", "SHA-256") == []


def test_no_page_of_a_local_console_has_a_text_outside_of_the_catalogue(calibrated, marked):
    client, one = calibrated.client, id_of(calibrated, "red-0")
    write(calibrated, "gate", zones=(SQUARE,), masks=(SQUARE,))
    rows = calibrated.service.current.last.rows
    add_alert(rows, calibrated.service.encoder, "woman in a red coat", rate=1.0)
    (alert,) = client.get("/api/v1/alerts").json()
    query = "q=woman+in+a+red+coat"
    assert client.post("/saved", data={"name": "red", "address": query}).status_code == 303
    found = crawl(client, [
        "/", f"/?{query}", f"/?{query}&camera=gate&marks=y{one}", "/?order=time", "/?q=zebra",
        f"/?{query}&order=time&by=picture", "/?q=woman+in+a+rde+coat", f"/?like={one}&{query}",
        "/?q=woman&since=noon", "/?since=2026-11-25T10:00&until=2026-11-25T09:00", "/?camera=woman",
        "/?camera=gate&last=hour", "/?track=red", f"/?{query}&share=0.2&like=5",
        f"/timeline?{query}", "/timeline?q=zebra", f"/people/{one}", f"/people/{one}?{query}",
        f"/people/{one}/delete", f"/people/{one}/delete?what=alike&min_score=0.5",
        f"/people/{one}/delete?what=track", f"/delete?ids={one}", "/people/7", "/people/x",
        "/nowhere", "/live", "/live/camera?name=gate", "/live/camera?name=hall", "/alerts",
        "/alerts?q=red", f"/alerts/{alert['id']}/test", "/records", "/records?user=nobody",
        "/records?since=x", "/settings", "/login", "/purpose", f"/people/{one}/frame",
    ])  # fmt: skip
    assert found == {}
    for path, form in {
        "/records/prune": {"days": "1", "act": "look"},
        "/alerts": {"sentence": "the", "count": "1", "period": "day"},
        "/picture": {"address": ""},
        "/delete": {"ids": f"{one} 5", "reason": "asked"},
        "/export": {"ids": "5"},
        "/login": {"token": "wrong"},
    }.items():
        more = {"files": {"picture": ("a.png", b"no picture")}} if path == "/picture" else {}
        answer = client.post(path, data=form, **more)
        assert unmarked(answer.text) == [], path
    other = id_of(calibrated, "blue-0")
    answer = client.post("/export", data={"ids": [str(other)], "address": query})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        report = archive.read("index.html").decode()
    assert unmarked(report, "blue-False", "T", "pictures", "items.json") == []


def test_no_page_of_a_guarded_console_has_a_text_outside_of_the_catalogue(make_guarded, marked):
    oversight = Oversight(purposes=("theft",), two_persons=("delete", "export", "alert"))
    console = make_guarded(oversight=oversight)
    stated = {"upperson-purpose": "theft"}
    for role in ("admin", "operator", "viewer"):
        getattr(console, role).headers.update(stated)
    one = id_of(console, "red-0")
    console.operator.post("/export", data={"ids": str(one), "address": "q=red", "reason": "red"})
    console.admin.post("/delete", data={"ids": str(one), "reason": "red"})
    alert = {"sentence": "woman in a red coat", "count": "1", "period": "week"}
    console.operator.post("/alerts", data=alert)
    assert crawl(console.admin, ["/approvals", "/accounts", "/records", "/purpose", "/"]) == {}
    assert crawl(console.viewer, ["/approvals", "/records", "/live"]) == {}
    assert crawl(console.operator, ["/approvals"]) == {}
    del console.admin.headers["upperson-purpose"]
    for path, form in {
        "/purpose": {"purpose": "other"},
        "/accounts": {"name": "otto", "role": "operator"},
        "/accounts/change": {"name": "ada", "role": "admin"},
    }.items():
        answer = console.admin.post(path, data=form)
        assert "<code" in answer.text or answer.status_code in (403, 422)
        assert unmarked(answer.text) == [], path


def test_the_script_shows_nothing_outside_of_the_catalogue():
    script = (STATIC / "console.js").read_text("utf-8")
    code = re.sub(r"//.*", "", re.sub(r'\b_\("[^"]+"', "_(", script))
    texts = re.findall(r'"([^"\n]*)"|`([^`]*)`', code)
    told = [one for pair in texts for one in pair if re.search("[A-Za-z]{2,} [a-z]{2,}", one)]
    known = {"use strict", "note wrong", "shot bone"}
    assert {one for one in told if not re.search(r"[<>=\[#:*]", one)} <= known
    assert not re.findall(r'(?:announce\(|wrong\(|textContent = )["`]', code)


# --- Whose language it is


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"), ("de", "de"), ("de-AT,de;q=0.9,en;q=0.8", "de"), ("fr;q=0.2, de;q=0.1", "fr"),
        ("it, fr;q=0.5", "fr"), ("*", "en"), ("de;q=0", "en"), ("de;q=x, fr;q=0.1", "fr"),
        ("en, de", "en"), (",;,;q=" * 99, "en"), ("\x00\xff", "en"), ("de;q=nan", "en"),
    ],
)  # fmt: skip
def test_the_browsers_language_holds_until_an_account_chooses(reader, accepted, language):
    page = reader.client.get("/login", headers={"accept-language": accepted.encode("latin-1")})
    assert f'<html lang="{language}">' in page.text


def test_an_account_chooses_its_language_for_pages_alone(guarded):
    def choose(client, **form):
        return client.post("/settings", data=form).status_code

    assert choose(guarded.viewer, language="de", zone="Asia/Kathmandu") == 303
    for form in ({"language": "xx"}, {"zone": "../../etc/passwd"}, {"zone": "Mars/Base"}):
        assert choose(guarded.viewer, **form) == 422
    assert "Gespeichert." in guarded.viewer.get("/settings?saved=true").text
    page = guarded.viewer.get("/settings", headers={"accept-language": "fr"}).text
    assert "Gespeichert." not in page
    assert '<html lang="de">' in page
    assert '<option value="de" lang="de" selected>' in page
    assert '<option translate="no" selected>Asia/Kathmandu</option>' in page
    assert "Asia/Kathmandu, UTC+05:45" in page
    assert guarded.service.user_state.settings("vera") == ("de", "Asia/Kathmandu")
    assert '<html lang="fr">' in guarded.operator.get("/", headers={"accept-language": "fr"}).text
    assert "Describe the person in English" not in guarded.operator.get("/").text
    page = guarded.viewer.get("/").text
    assert "auf Englisch" in page
    assert 'title="Betrachter">vera' in page
    # The API and the log stay as they are.
    found = guarded.viewer.search(sentence="zebra", limit=1)
    assert found.json()["verdict"]["text"].startswith("uncalibrated: the bundle")
    answer = guarded.viewer.get("/api/v1/items/7", headers=GERMAN)
    assert answer.json()["detail"].startswith("there is no picture 7")
    assert "Dieses Bild gibt es nicht" in guarded.viewer.get("/people/7").text
    guarded.viewer.get("/?q=red")
    assert log_lines(guarded)[-1]["action"] == "query"
    assert choose(guarded.viewer) == 303
    assert '<html lang="en">' in guarded.viewer.get("/").text


def test_numbers_words_and_plurals_are_those_of_the_language(calibrated):
    page = calibrated.client.get("/?q=woman+in+a+red+coat", headers=GERMAN).text
    assert re.search(r"(Wahrscheinlich|Möglich|Niemand) \([<>]? ?\d+ %\)", page)
    assert re.search(r'title="Wert 0,\d{3}"', page)
    assert re.search(r"\d\d\.\d\d\.2026 \d\d:\d\d:\d\d", page)
    page = calibrated.client.get("/?q=red&track=red-0", headers=GERMAN).text
    assert "Nichts entspricht dem Filter" in page
    page = calibrated.client.get("/?q=zebra", headers={"accept-language": "fr"}).text
    assert "Non calibré\u00a0: " in page
    one = id_of(calibrated, "red-9")
    page = calibrated.client.get(f"/people/{one}/delete", headers={"accept-language": "fr"}).text
    assert "Supprimer 1 image définitivement" in page


def test_actions_of_the_log_are_chosen_and_shown_in_words(guarded):
    guarded.admin.get("/?q=red")
    page = guarded.admin.get("/records?action=query", headers=GERMAN).text
    assert '<option value="query" selected>Suche</option>' in page
    assert "<td>Suche</td>" in page
    assert "<td>query</td>" in guarded.admin.get("/records?action=query").text
    page = guarded.admin.get("/records?action=of-a-later-release").text
    assert '<option value="of-a-later-release" selected>' in page


def test_a_constant_number_is_in_the_language_of_each_reader():
    page = templates().from_string("{{ 2000|number }}")
    found = []
    for language in LANGUAGES:
        context = LOCALE.set(lambda language=language: Locale(language=language))
        found.append(page.render())
        LOCALE.reset(context)
    assert found == ["2,000", "2.000", "2\u202f000"]


def test_a_damaged_user_state_is_reported_in_the_browsers_language(console, monkeypatch):
    from upperson_rt.errors import IntegrityError

    def fails(user):
        raise IntegrityError("damaged")

    monkeypatch.setattr(console.service.user_state, "settings", fails)
    assert '<html lang="de">' in console.client.get("/?q=red", headers=GERMAN).text
    assert console.client.get("/settings", headers=GERMAN).status_code == 503


def test_a_name_cannot_break_out_of_a_translated_text(console):
    account = Account(name='<i>"%(x)s', role="operator", logs_in=False)
    client = Client(make_app(console.service, Access(None, account)), **GERMAN)
    page = client.get("/", params={"camera": '<b>"%(name)s\x1b'}).text
    assert "Keine Bilder der Kamera „&lt;b&gt;&#34;%(name)s\\x1b“" in page
    assert "<i>" not in page
    assert set(LANGUAGES) == {"en", *TRANSLATED}
