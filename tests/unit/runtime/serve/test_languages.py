"""The pages in the languages of their readers: whole catalogues, and no text outside of them."""

import re
from html.parser import HTMLParser

import pytest

from tests.helpers import catalogue
from tests.helpers.catalogue import FORMATS, TRANSLATED, flat, placeholders
from tests.helpers.console import ODD, Client, log_lines
from upperson_console import translation
from upperson_console.accounts import Access, Account
from upperson_console.app import make_app
from upperson_console.rendering import STATIC
from upperson_console.reported import problem_text
from upperson_console.translation import LANGUAGES
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
    for one in filter(lambda one: one.id, found):
        assert (one.fuzzy, all(flat(one.string))) == (False, True), one.id
        for form in flat(one.string):
            names = placeholders(form)
            if one.context == "problem":
                assert {*names} <= fields[one.id], one.id
            elif one.context not in ("notice", "reason", *FORMATS):
                assert names == placeholders(flat(one.id)[-1]), one.id
    compiled = catalogue.path_of(language, ".mo").read_bytes()
    assert compiled == catalogue.compiled(found), "run  python -m tests.helpers.catalogue"


NOTICES = {
    "sentence_truncated": {"context_length": 77},
    "language_unfamiliar": {"letters": 9, "tokens": 8},
    "words_unknown": {"words": ["frock"]},
    "words_unread": {"words": ["without"]},
    "contradiction": {"contradiction": "red, not red"},
    "colours_joined": {"phrase": "red and blue coat", "noun": "coat", "colours": ["red"]},
    "excluded": {"phrases": ["hat"]},
    "camera_unknown": {"cameras": ["a%(b)s"] * 9},
    "did_you_mean": {"sentence": "red"},
    "rewritten": {"sentence": "red"},
    "either": {"sentences": ["red", "blue"]},
    "feedback_missing": {"count": 1234},
    "gallery_empty": {"gallery": "g"},
    "filter_matches_nothing": {"pictures": 12345, "without_time": 0, "by": ["time"]},
    "cameras_not_compared": {"cameras": ["gate"], "wanted": 30, "pictures": 4},
}
REASONS = {
    "few_pictures": {"pictures": 3, "least": 40},
    "pictures_unlike": {"cameras": ["gate"], "at_night": True},
    "cameras_not_compared": {"wanted": 30},
    "words_unknown": {"words": ["frock"]},
    "words_unread": {"words": ["without"]},
}


@pytest.mark.parametrize("language", TRANSLATED)
def test_notices_and_reasons_of_the_core_are_translated_by_code_with_their_fields(
    in_locale, language
):
    in_locale(language=language)
    for code in catalogue.get_args(catalogue.NoticeCode):
        one = Notice(code, NOTICES.get(code, {}))
        text = translation.by_code("notice", one.code, one.fields, one.text)
        assert (text in (one.text, one.code), "<span" in text) == (False, False), one.code
    text = translation.by_code("notice", "camera_unknown", NOTICES["camera_unknown"], "")
    assert (text.count("a%(b)s"), "\u2026" in text) == (5, True)
    for code in _REASONS:
        text = translation.by_code("reason", code, REASONS.get(code, {}), "english")
        assert "english" not in text, code
    for code in ("bin_files", "clips_not_removed", "key_taken", "timestamp_unavailable"):
        assert "english" not in problem_text(InputError("english", code=code)), code
    # What has no translation, or lacks a field, is in English, and says so.
    for kind, code in (("problem", "no such <code>"), ("notice", "feedback_missing")):
        text = translation.by_code(kind, code, {}, "a <b>\x1b")
        assert text == '<span lang="en">a &lt;b&gt;\\x1b</span>'
    assert translation.number(1234567.5, ",.2f") in ("1.234.567,50", "1\u202f234\u202f567,50")


# --- No page has a text outside of the catalogue


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


@pytest.mark.parametrize(
    "file", sorted((STATIC.parent / "templates").iterdir()), ids=lambda p: p.name
)
def test_no_branch_of_a_template_has_a_text_outside_of_the_catalogue(file):
    plain = re.sub(r"\{[{%].*?[%}]\}", "", file.read_text("utf-8"), flags=re.DOTALL)
    assert unmarked(plain, "items.json", "manifest.json", "manifest.tsr", "svg", "SHA-256") == []


# --- Whose language it is


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"), ("de-AT,de;q=0.9,en;q=0.8", "de"), ("de;q=0.1, fr;q=0.2", "fr"),
        ("it, fr;q=0.5", "fr"), ("de;q=0", "en"), ("de;q=x, fr;q=0.1", "fr"),
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
    page = guarded.viewer.get("/settings", headers={"accept-language": "fr"}).text
    chosen = '<option translate="no" selected>Asia/Kathmandu</option>'
    for part in ('<html lang="de">', '<option value="de" lang="de" selected>', chosen):
        assert part in page
    assert guarded.service.user_state.settings("vera") == ("de", "Asia/Kathmandu")
    assert '<html lang="fr">' in guarded.operator.get("/", headers={"accept-language": "fr"}).text
    # The API and the log stay as they are.
    found = guarded.viewer.search(sentence="zebra", limit=1)
    assert found.json()["verdict"]["text"].startswith("uncalibrated: scores of this bundle")
    answer = guarded.viewer.get("/api/v1/items/7", headers=GERMAN)
    assert answer.json()["detail"].startswith("there is no picture 7")
    assert "Dieses Bild gibt es nicht" in guarded.viewer.get("/people/7").text
    guarded.viewer.get("/?q=red")
    assert log_lines(guarded)[-1]["action"] == "query"
    assert "<td>Suche</td>" in guarded.admin.get("/records?action=query", headers=GERMAN).text
    assert choose(guarded.viewer) == 303
    assert '<html lang="en">' in guarded.viewer.get("/").text


def test_a_name_cannot_break_out_of_a_translated_text(console):
    account = Account(name='<i>"%(x)s', role="operator", logs_in=False)
    client = Client(make_app(console.service, Access(None, account)), **GERMAN)
    page = client.get("/", params={"camera": '<b>"%(name)s\x1b'}).text
    assert "Keine Bilder der Kamera „&lt;b&gt;&#34;%(name)s\\x1b“" in page
    assert "<i>" not in page
    assert set(LANGUAGES) == {"en", *TRANSLATED}
