"""``upperson distill``: a student of the demo's run, its bundle, and what is refused."""

import json

import pytest

from tests.helpers.invoke import run, run_json
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
    ("arguments", "code", "message"),
    [
        (
            ["run", "--student", "8x768"],
            2,
            "must be smaller than its teacher, 4x192@16x16: no more blocks",
        ),
        (["run", "--student", "2x100"], 2, "must be a multiple of 64"),
        (["run", "--student", "4x128@20x16"], 2, "does not divide into patches of 20x16"),
        (["run", "--student", "4x192@8x8"], 2, "no smaller patches"),
        (["run", "--student", "small"], 2, "a student is BLOCKSxWIDTH"),
        (["run"], 2, "--student missing"),
        (["people", "--student", "1x64"], 3, "expected a run folder"),
        (["run", "--student", "1x64", "--precision", "int4"], 2, "precision: expected one of fp32"),
        (["run", "--student", "1x64", "--lr", "nan"], 2, "lr: expected a finite number"),
        (["run", "--student", "1x64", "--pictures", "nowhere"], 3, "no such file or folder"),
        (["--resume", "run"], 2, "names no student"),
        (["--resume", "people"], 3, "wants the folder of a student"),
        (["run", "--resume", "run"], 2, "takes everything from the run"),
        (["--cache", "cache", "--resume", "run"], 2, "takes everything from the run"),
    ],
)
def test_what_cannot_be_a_student_is_refused_in_one_line(
    copied_run, work, arguments, code, message
):
    output = () if "--resume" in arguments else ("--output", "small")
    result = run("distill", *arguments, *output)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (work / "small").exists()
