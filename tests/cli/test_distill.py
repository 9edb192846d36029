"""``upperson distill``: a student of the demo's run, its bundle, and what is refused."""

import json

import pytest

from tests.helpers.invoke import run_failing, run_json
from upperson.config import read_config
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import InputError


@pytest.mark.timeout(180)
def test_a_student_becomes_a_bundle_in_its_teachers_space(copied_run, site, work, monkeypatch):
    options = ("--output", "small", "--epochs", 1)
    found = run_json("distill", copied_run, "--student", "1x64", *options)
    results = json.loads((work / "small/results.json").read_text("utf-8"))
    assert found == {"run": "small"} | results
    assert read_config(work / "small/config.yaml").warmup_epochs == 0, "less than all epochs"
    facts = results["distilled"]
    assert facts["teacher_operations"] > 3 * facts["operations"]
    before = json.loads((copied_run / "results.json").read_text("utf-8"))
    assert facts["teacher"]["test"] == before["test"]

    identities = []

    def export_bundle(model, identity, *_):
        identities.append(identity)
        raise InputError("far enough")

    monkeypatch.setattr("upperson.cli.exportable.export_bundle", export_bundle)
    run_failing(3, "input", "export", "small", "--output", "bundle", "--no-gate")
    (student,) = identities
    assert student.distilled_from == read_manifest(site / "bundle").fingerprint
    assert student.name == "up-person-small-1x64"


def test_what_cannot_be_a_student_is_refused_in_one_line(copied_run, work):
    student, to = ["run", "--student", "1x64"], ["--output", "small"]
    for status, code, *arguments in (
        (2, "student_not_smaller", "run", "--student", "8x768", *to),
        (2, "student_width", "run", "--student", "2x100", *to),
        (2, "image_size_indivisible", "run", "--student", "4x128@20x16", *to),
        (2, "student_malformed", "run", "--student", "small", *to),
        (2, "options_missing", "run", *to),
        (3, "not_a_run", "people", "--student", "1x64", *to),
        (2, None, *student, "--precision", "int4", *to),
        (2, None, *student, "--lr", "nan", *to),
        (3, None, *student, "--images", "nowhere", *to),
        (2, "no_student", "--resume", "run"),
        (3, "not_a_run", "--resume", "people"),
        (2, "options_beside_resume", "run", "--resume", "run"),
        (2, "options_beside_resume", "--cache", "cache", "--resume", "run"),
    ):
        run_failing(status, code, "distill", *arguments)
        assert list(work.iterdir()) == [copied_run], arguments
