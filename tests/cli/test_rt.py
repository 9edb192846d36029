"""`upperson-rt` from pictures to hits, and what all its commands have in common."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.helpers.invoke import refusal, snapshot
from tests.helpers.invoke import run as upperson_run
from tests.helpers.invoke import run_rt as run
from tests.helpers.invoke import run_rt_json as run_json
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from upperson_rt import preprocess
from upperson_rt.bundle import read_manifest
from upperson_rt.cli import main
from upperson_rt.encoder import Encoder
from upperson_rt.gallery.sqlite import SqliteGallery
from upperson_rt.manifest import space_fingerprint


@pytest.fixture
def work(enter, bundle_and_crops):
    """A working folder with ./bundle and ./crops; no gallery yet."""
    return enter(bundle_and_crops)


def test_from_pictures_to_hits(work):
    result = run("index", "crops", "--camera", "gate", "--batch-size", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "indexed 6 pictures; gallery 'gallery' now holds 6\n"
    (backend,) = [line for line in result.stderr.splitlines() if line.startswith("backend: ")]
    assert " on cpu (auto: " in backend

    head, first, _ = run("query", "woman in red coat", "-k", 2).stdout.splitlines()
    assert head.split() == ["rank", "score", "camera", "picture"]
    assert first.split()[0::3] == ["1", "crops/red.png"]
    loose = run_json("query", "a", "red", "picture", "-k", 2)  # Quotes are optional.
    assert loose["query"] == "a red picture"
    assert loose["hits"] == run_json("query", "a red picture", "-k", 2)["hits"]

    (work / "crops/bad.jpg").write_text("junk")  # It ends with 3 after the rest is in.
    result = run("index", "crops", "-g", "other")
    assert (result.exit_code, result.stdout[:18]) == (3, "indexed 6 pictures")
    assert f"{work}/crops/bad.jpg" in result.stderr
    assert run("index", "crops", "--skip-bad").exit_code == 0
    result = run("index", "crops", "--json")
    assert result.exit_code == 3
    (skipped,) = json.loads(result.stdout)["skipped"]  # The one JSON object; the error is a line.
    assert skipped["path"] == f"{work}/crops/bad.jpg"


def test_json_is_the_only_thing_on_stdout(work, monkeypatch):
    (work / "bundle").rename(work / "elsewhere")
    monkeypatch.setenv("UPPERSON_BUNDLE", "elsewhere")
    monkeypatch.setenv("UPPERSON_GALLERY", "shelf")
    assert run_json("index", "crops", "--backend", "onnxruntime") == {
        "shard": None,
        "indexed": 6,
        "replaced": 0,
        "timed": 0,
        "wide": 0,
        "empty": 0,
        "too_small": 0,
        "skipped": [],
        "others": {},
        "gallery": "shelf",
        "items": 6,
        "bundle": "elsewhere",
        "variant": "int8",
        "backend": "onnxruntime",
        "device": "cpu",
    }
    found = run_json("query", "blue", "-k", 3, "--variant", "fp32", "--sheet", "found.png")
    assert (found["truncated"], found["variant"], found["items"]) == (False, "fp32", 6)
    assert (found["bundle"], found["gallery"]) == ("elsewhere", "shelf")
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3]
    assert found["hits"][0]["source"] == str(work / "crops" / "blue.png")
    assert (work / found["sheet"]).read_bytes().startswith(b"\x89PNG")
    assert run_json("gallery", "info")["variants"] == {"int8": 6}
    assert run_json("gallery", "verify") == {
        "gallery": "shelf",
        "items": 6,
        "ok": True,
        "problems": [],
        "crops_without_hash": 0,
    }


def test_interrupted_index_keeps_what_is_committed(work, monkeypatch):
    add = SqliteGallery.add

    def interrupt_third(self, *arguments):
        if self.count() == 4:
            raise KeyboardInterrupt
        return add(self, *arguments)

    monkeypatch.setattr(SqliteGallery, "add", interrupt_third)
    result = run("index", "crops", "--batch-size", 2)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert "4 of 6 pictures" in result.stderr
    assert run_json("gallery", "info")["items"] == 4


@pytest.mark.parametrize("shard", [(), ("--shard", "1/1")])
def test_index_counts_what_it_left_out_of_folders(work, monkeypatch, shard):
    monkeypatch.setattr(preprocess, "obstacle_to", lambda kind: "needs another package")
    for name in ("a.heic", "b.HEIC", "notes.txt", "more.zip"):
        (work / "crops" / name).touch()
    result = run("index", "crops", "--json", *shard)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["others"] == {"heic": 2, "txt": 1, "zip": 1}
    assert "2 heic (" in result.stderr
    assert "1 txt, 1 zip (" in result.stderr


def test_an_index_without_a_usable_picture_leaves_no_gallery(work):
    names = ["bad.jpg", "worse.png"]
    for name in names:
        (work / name).write_text("junk")
    for options in ((), ("--skip-bad",)):
        result = run("index", *names, "-g", "new/gallery", *options)
        assert (result.exit_code, result.stdout) == (
            0 if options else 3, "indexed 0 pictures; no gallery was made\n"
        )  # fmt: skip
        assert result.stderr.count("bad.jpg") == 1
        assert not (work / "new").exists()
    run("index", "crops", "-g", "old")
    before = snapshot(work / "old")
    result = run("index", *names, "-g", "old", "--json")
    assert (result.exit_code, json.loads(result.stdout)["items"]) == (3, 6)
    assert snapshot(work / "old") == before


def test_an_index_that_is_interrupted_before_its_first_row_leaves_no_gallery(work, monkeypatch):
    def interrupt(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "encode_pixels", interrupt)
    assert run("index", "crops").exit_code == 130
    assert not (work / "gallery").exists()


def test_a_model_that_is_refused_leaves_no_gallery(work):
    file = work / "bundle" / "image.int8.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert run("index", "crops", "--variant", "int8").exit_code == 6
    assert not (work / "gallery").exists()


REFUSED = [
    (["query"], 2, "sentence_missing"),
    (["query", " "], 2, "sentence_empty"),
    (["query", ""], 2, "sentence_empty"),
    (["query", "red", "--image", "crops/red.png"], 2, "sentence_and_picture"),
    (["query", "--image", "crops/red.png", "--explain"], 2, "sentence_missing"),
    (["query", "--image", "crops/red.png", "--paraphrases", "4"], 2, "sentence_missing"),
    (["query", "red", "--sheet", "none/found.png"], 3, "folder_not_found"),
    (["query", "red", "--sheet", "found.jpg"], 2, "sheet_not_png"),
    (["query", "red", "--sheet", "found"], 2, "sheet_not_png"),
    (["index", "crops", "--detector-score", "0.5"], 2, "detector_missing"),
    (["doctor", "--image", "crops/red.png"], 2, "detector_missing"),
    (["index", "crops", "--output", "nowhere"], 2, "extension_not_found"),
    (["log", "verify", "crops/red.png", "--expect", "5"], 2, "chain_malformed"),
    (["log", "acknowledge", "nowhere"], 3, "log_not_found"),
    (["gallery", "merge", "crops", "-g", "milvus://host/people"], 2, "gallery_not_a_folder"),
    (["bench", "towers", "--batch-size", "1,none"], 2, "batch_sizes_malformed"),
    (["bench", "towers", "--batch-size", "0"], 2, "batch_sizes_malformed"),
    (["index", "crops.zip"], 3, "archive"),
    (["query", "red", "-b", "crops.zip"], 3, "archive"),
    # Of other modules.
    (["query", "red"], 3, None),
    (["query", "red", "--since", "1790000005", "--until", "1790000004"], 2, "filter_invalid"),
    (["query", "red", "--variant", "int4"], 2, None),
    (["query", "red", "--query-log", "crops"], 3, None),
    (["index", "empty"], 3, None),
    (["index", "nowhere"], 3, None),
    (["index", "crops", "--device", "cuda"], 5, None),
    (["gallery", "info"], 3, None),
    *(
        (words, 2, "time_without_unit")
        for words in (
            ["query", "red", "--since", "24"],
            ["gallery", "delete", "--since", "20261124"],
            ["gallery", "export", "out", "--until", "7.5"],
            ["watch", "street.avi", "--start", "1e5"],
        )
    ),
    *(
        (["query", *words], 2, "flag_value")
        for words in (
            ["--explain", "true", "woman", "in", "red"],
            ["woman", "in", "red", "--explain", "False"],
            ["woman in red", "--explain", "yes"],
        )
    ),
    (["index", "crops", "--skip-bad", "true"], 2, "flag_value"),
    (["query", "red", "--since", "nan"], 2, "time_malformed"),
    (["query", "red", "--since", "tomorrow"], 2, "time_malformed"),
    # Refused by Typer.
    (["query", "red", "--kk", "3"], 2, None),
    (["index", "crops", "--time-from", "sun"], 2, None),
]


def test_errors_are_one_line_and_a_code(work):
    (work / "empty").mkdir()
    (work / "crops.zip").write_bytes(b"PK\3\4")
    for arguments, exit_code, code in REFUSED:
        result = run(*arguments, "--json")
        refusal(result, exit_code, code)
        left = {path.name for path in work.iterdir()}
        assert left == {"bundle", "crops", "crops.zip", "empty"}, arguments


def test_a_students_gallery_needs_allow_distilled(work, tmp_path):
    """The student here has its teacher's graphs: only what the manifest says differs."""
    run("index", "crops")
    teacher = read_manifest(work / "bundle")
    student = shutil.copytree(work / "bundle", tmp_path / "student")
    model = replace(teacher.model, adapter_sha256="5" * 64, distilled_from=teacher.fingerprint)
    changed = replace(
        teacher, model=model, fingerprint=space_fingerprint(model, teacher.image, teacher.text)
    )
    (student / "bundle.json").write_text(changed.to_json(), "utf-8")
    assert run("index", "crops", "-b", student, "-g", "small").exit_code == 0

    for bundle, gallery in (("bundle", "small"), (student, "gallery")):
        for command in (["query", "red"], ["index", "crops"]):
            result = run(*command, "-b", bundle, "-g", gallery)
            assert (result.exit_code, result.stdout) == (6, "")
        found = run_json("query", "red", "-b", bundle, "-g", gallery, "--allow-distilled")
        assert found["hits"][0]["source"].endswith("red.png")
    other = make_toy_bundle(tmp_path / "other", seed=4)
    assert run("query", "red", "-b", other, "--allow-distilled").exit_code == 6


def test_integrity_errors_end_with_6(work, tmp_path, monkeypatch):
    run("index", "crops")
    other = make_toy_bundle(tmp_path / "other", seed=4)
    assert run("query", "red", "-b", other).exit_code == 6
    with monkeypatch.context() as patch:
        patch.setattr(SqliteGallery, "verify", lambda self: ["item a: vector of 3 bytes"])
        result = run("gallery", "verify", "--json")
        assert "item a: vector of 3 bytes" in result.stderr
        found = json.loads(result.stdout)
        assert (result.exit_code, found["ok"], len(found["problems"])) == (6, False, 1)

    replace_in_bundle(work / "bundle", "text.int8.onnx", (other / "text.int8.onnx").read_bytes())
    assert run("query", "red").exit_code == 6
    result = run("doctor", "--json")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (6, False)
    (work / "bundle" / "image.int8.onnx").write_bytes(b"tampered")
    assert run("index", "crops").exit_code == 6
    (work / "gallery" / "gallery.sqlite").write_bytes(b"junk" * 999)
    for command in ("info", "verify"):
        assert run("gallery", command).exit_code == 6


def test_a_defect_is_one_line_and_a_traceback_only_with_debug(work, monkeypatch):
    result = run("query", "red", "--debug")
    assert (result.exit_code, "Traceback" in result.stderr) == (3, True)
    run("index", "crops")
    monkeypatch.setattr(SqliteGallery, "info", lambda self: {}["defect"])
    result = run("gallery", "info")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: internal error: KeyError: 'defect'; ")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" in run("gallery", "info", "--debug").stderr

    def on_a_full_disk(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SqliteGallery, "info", on_a_full_disk)
    refusal(run("gallery", "info"), 3)
    # `main` would end this process, whatever signal a later test gets.
    monkeypatch.setattr(sys.modules["upperson_rt.cli.app"], "listen", lambda: None)
    for code, *arguments in ((0, "--version"), (2, "query", " ")):
        monkeypatch.setattr("sys.argv", ["upperson-rt", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code


# --- signed bundles


def write_key(name):
    """Write NAME.pem and NAME.pub; return the fingerprint."""
    write_keys(Path(), name, ec.generate_private_key(ec.SECP256R1()))
    return hashlib.sha256(Path(f"{name}.pub").read_bytes()).hexdigest()


def signature_facts(*options):
    checks = run_json("doctor", "-b", "bundle", *options)["checks"]
    (row,) = [row for row in checks if row["name"] == "signature"]
    return row["facts"]


def test_a_trusted_deployment_takes_signed_bundles_only(work, monkeypatch):
    """What each command does without the option is tested with the command."""
    fingerprint, _ = write_key("ours"), write_key("other")
    assert run("index", "crops", "--backend", "onnxruntime").exit_code == 0
    for arguments in (
        ("index", "crops"),
        ("query", "red"),
        ("watch", "rtsp://127.0.0.1:9/none"),
        ("gallery", "delete", "--like", "crops/red.png", "--min-score", "0.5"),
        ("bench", "query"),
        ("bench", "towers"),
        ("bench", "pipeline"),
        ("compile", "bundle", "--variant", "int8"),
        ("doctor",),
    ):
        result = run(*arguments, "--trust", "ours.pub")
        assert result.exit_code == 6, (arguments, result.stderr)
        assert "is not signed" in " ".join((result.stderr + result.stdout).split())
    assert signature_facts() == {"key": None, "verified": False}

    signed = upperson_run("sign", "bundle", "ours.pem", "--json")
    assert json.loads(signed.stdout)["key"] == fingerprint
    assert run("query", "red", "--trust", "ours.pub").exit_code == 0
    monkeypatch.setenv("UPPERSON_TRUST", "other.pub")
    assert run("query", "red").exit_code == 6
    monkeypatch.setenv("UPPERSON_TRUST", "")  # Such as a unit's that names an unset variable.
    for arguments in (("query", "red"), ("doctor",)):
        assert run(*arguments).exit_code == 2
    assert run("query", "red", "--trust", "ours.pub").exit_code == 0
    monkeypatch.delenv("UPPERSON_TRUST")
    assert signature_facts() == {"key": fingerprint, "verified": False}
    assert signature_facts("--trust", "ours.pub") == {"key": fingerprint, "verified": True}

    with (work / "bundle" / "text.fp32.onnx").open("r+b") as file:
        file.write(b"x")
    (work / "bundle/model.sig").unlink()
    assert upperson_run("sign", "bundle", "ours.pem").exit_code == 6, "it is damaged"
    assert not (work / "bundle/model.sig").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("serving", "bundle", "--triton", "models"),
        ("serving", "bundle", "--deepstream", "models", "--variant", "fp32"),
        ("evaluate", "bundle", "--root", "people"),
        ("parity", "bundle", "--count", "2", "--batch-size", "1"),
    ],
    ids=lambda arguments: arguments[0] + arguments[2],
)
def test_the_commands_for_bundles_of_the_other_package_insist_too(work, monkeypatch, arguments):
    write_key("ours"), write_key("other")
    result = upperson_run(*arguments, "--trust", "ours.pub")
    assert result.exit_code == 6, result.stderr
    assert upperson_run("sign", "bundle", "ours.pem").exit_code == 0
    for key in ("other.pub", ""):
        monkeypatch.setenv("UPPERSON_TRUST", key)
        assert upperson_run(*arguments).exit_code == (6 if key else 2)
        assert not (work / "models").exists()
    monkeypatch.setenv("UPPERSON_TRUST", "ours.pub")
    assert "not trusted" not in upperson_run(*arguments).stderr
    assert (work / "models").exists() == (arguments[0] == "serving")
