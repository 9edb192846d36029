"""ONVIF searches with a purpose, refused sentences, and failed logins in the log."""

import pytest

from tests.helpers.console import log_lines
from tests.unit.runtime.serve.onvif.conftest import fault, running
from tests.unit.runtime.serve.onvif.test_search import find
from upperson_console.oversight import Oversight, RefusedSentences, Stated

OVERSIGHT = Oversight(
    purposes=("Missing person",),
    accounts={"vms": Stated(purpose="Missing person", case="2026-1")},
    refused_sentences=RefusedSentences(),
)


@pytest.fixture
def onvif(served_folder, served_encoder, tmp_path):
    with running(served_folder / "gallery", tmp_path, served_encoder, OVERSIGHT) as made:
        yield made


def test_a_user_needs_a_purpose_in_the_file(onvif):
    find(onvif.client("vms").search)
    line = log_lines(onvif)[-1]
    assert (line["user"], line["purpose"], line["case"]) == ("vms", "Missing person", "2026-1")
    with fault("Action", match="state a purpose"):
        find(onvif.client("door").search)
    assert log_lines(onvif)[-1] == line


def test_a_sentence_is_refused(onvif):
    with fault("InvalidArgVal", match="words about origin"):
        find(onvif.client("vms").search, "black man")
    line = log_lines(onvif)[-1]
    assert (line["action"], line["user"], line["sentence"]) == ("refused", "vms", "black man")
    assert onvif.sessions._sessions == {}


def test_a_failed_login_is_logged(onvif):
    with fault("NotAuthorized"):
        find(onvif.client("vms", password="wrong-password").search)
    line = log_lines(onvif)[-1]
    assert (line["action"], line["details"]) == ("login-failed", {"onvif": "unknown"})
    assert "wrong-password" not in onvif.log.read_text()
