"""``upperson distill``: a student of the demo's run, its bundle, and what is refused."""

import json

import pytest

from tests.helpers.invoke import run, run_failing, run_json
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import InputError


@pytest.mark.timeout(180)
def test_a_student_becomes_a_bundle_in_its_teachers_space(
    copied_run, demo_folder, work, monkeypatch
):
    options = ("--output", "small", "--epochs", 1)
    found = run_json("distill", copied_run, "--student", "1x64", *options)
    assert found["run"] == "small"
    results = json.loads((work / "small/results.json").read_text("utf-8"))
    assert found == {"run": "small"} | results
    facts = results["distilled"]
    assert facts["teacher_operations"] > 3 * facts["operations"]
    before = json.loads((copied_run / "results.json").read_text("utf-8"))
    assert facts["teacher"]["test"] == before["test"]

    identities = []

    def export_bundle(model, identity, *_):
        identities.append(identity)
        raise InputError("far enough")

    monkeypatch.setattr("upperson.cli.exportable.export_bundle", export_bundle)
    exported = run("export", "small", "--output", "bundle", "--no-gate", "--calib-size", 8)
    assert exported.exit_code == 3, exported.stderr
    (student,) = identities
    assert student.distilled_from == read_manifest(demo_folder / "bundle").fingerprint
    assert student.name == "up-person-small-1x64"


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["run", "--student", "8x768"], 2, "student_not_smaller"),
        (["run", "--student", "2x100"], 2, "student_width"),
        (["run", "--student", "4x128@20x16"], 2, "image_size_indivisible"),
        (["run", "--student", "small"], 2, "student_malformed"),
        (["run"], 2, "options_missing"),
        (["people", "--student", "1x64"], 3, "not_a_run"),
        (["run", "--student", "1x64", "--precision", "int4"], 2, None),
        (["run", "--student", "1x64", "--lr", "nan"], 2, None),
        (["run", "--student", "1x64", "--pictures", "nowhere"], 3, None),
        (["--resume", "run"], 2, "no_student"),
        (["--resume", "people"], 3, "not_a_run"),
        (["run", "--resume", "run"], 2, "options_beside_resume"),
        (["--cache", "cache", "--resume", "run"], 2, "options_beside_resume"),
    ],
)
def test_what_cannot_be_a_student_is_refused_in_one_line(copied_run, work, arguments, status, code):
    output = () if "--resume" in arguments else ("--output", "small")
    run_failing(status, code, "distill", *arguments, *output)
    assert not (work / "small").exists()
