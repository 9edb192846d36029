import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import upperson_rt
from tests.helpers.invoke import run as upperson_run
from tests.helpers.invoke import run_rt as run
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from upperson_rt.bundle import read_manifest
from upperson_rt.cli import main
from upperson_rt.gallery.sqlite import SqliteGallery
from upperson_rt.manifest import space_fingerprint


@pytest.fixture
def work(enter, bundle_and_crops):
    """A working folder with ./bundle and ./crops; no gallery yet."""
    return enter(bundle_and_crops)


def run_json(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_from_pictures_to_hits(work):
    result = run("index", "crops", "--camera", "gate", "--batch-size", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "indexed 6 pictures; gallery 'gallery' now holds 6\n"
    (backend,) = [line for line in result.stderr.splitlines() if line.startswith("backend: ")]
    assert " on cpu (auto: " in backend

    result = run("query", "woman in red coat", "-k", 2)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["rank", "score", "camera", "picture"]
    assert lines[1].split()[0::3] == ["1", "crops/red.png"]
    assert len(lines) == 3


def test_json_is_the_only_thing_on_stdout(work):
    indexed = run_json("index", "crops", "--backend", "onnxruntime")
    assert indexed == {
        "shard": None,
        "indexed": 6,
        "replaced": 0,
        "timed": 0,
        "wide": 0,
        "empty": 0,
        "too_small": 0,
        "skipped": [],
        "gallery": "gallery",
        "items": 6,
        "bundle": "bundle",
        "variant": "int8",
        "backend": "onnxruntime",
        "device": "cpu",
    }
    found = run_json("query", "blue", "-k", 3, "--variant", "fp32", "--sheet", "found.png")
    assert (found["truncated"], found["variant"], found["items"]) == (False, "fp32", 6)
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3]
    assert found["hits"][0]["source"] == str(work / "crops" / "blue.png")
    assert (work / found["sheet"]).read_bytes().startswith(b"\x89PNG")
    assert run_json("gallery", "info")["variants"] == {"int8": 6}
    assert run_json("gallery", "verify") == {
        "gallery": "gallery",
        "items": 6,
        "ok": True,
        "problems": [],
        "crops_without_hash": 0,
    }
    checks = run_json("doctor")
    assert checks["ok"]
    assert {"bundle", "canaries", "gallery"} <= {check["name"] for check in checks["checks"]}


def test_environment_names_the_folders(work, monkeypatch):
    (work / "bundle").rename(work / "elsewhere")
    monkeypatch.setenv("UPPERSON_BUNDLE", "elsewhere")
    monkeypatch.setenv("UPPERSON_GALLERY", "shelf")
    assert run_json("index", "crops")["gallery"] == "shelf"
    assert run_json("query", "red", "-k", 1)["bundle"] == "elsewhere"
    assert run("query", "red", "-g", "other").exit_code == 3


def test_bad_pictures_end_with_3_after_the_rest_is_in(work):
    (work / "crops" / "bad.jpg").write_text("junk")
    result = run("index", "crops")
    assert result.exit_code == 3
    assert "indexed 6 pictures" in result.stdout
    assert f"warning: skipped: cannot read image {work}/crops/bad.jpg" in result.stderr
    assert "could not be used (listed above), the others are in the gallery;" in result.stderr
    assert "error: 1 of 7 pictures could not be used" in result.stderr
    alone = run("index", "crops/bad.jpg")
    assert "error: 1 of 1 picture could not be used (listed above); --skip" in alone.stderr
    assert run("index", "crops", "--skip-bad").exit_code == 0

    result = run("index", "crops", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["skipped"][0]["path"] == f"{work}/crops/bad.jpg"


def test_interrupted_index_keeps_what_is_committed(work, monkeypatch):
    add = SqliteGallery.add

    def interrupt_third(self, *arguments):
        if self.count() == 4:
            raise KeyboardInterrupt
        return add(self, *arguments)

    monkeypatch.setattr(SqliteGallery, "add", interrupt_third)
    result = run("index", "crops", "--batch-size", 2)
    assert result.exit_code == 130
    assert "4 of 6 pictures are done and stay in the gallery" in result.stderr
    assert "error: interrupted" in result.stderr
    assert run_json("gallery", "info")["items"] == 4


def test_long_sentences_are_cut_with_a_warning(work):
    run("index", "crops")
    result = run("query", "red " * 40, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["truncated"] is True
    assert "warning: the sentence is longer than the model's 12 tokens" in result.stderr


def test_filters(work):
    run("index", "crops", "--camera", "gate")
    assert len(run_json("query", "red", "--camera", "gate")["hits"]) == 6
    assert run_json("query", "red", "--camera", "hall")["hits"] == []
    assert run_json("query", "red", "--since", "2026-01-01")["hits"] == []
    assert run_json("query", "red", "--since", "2026-01-01T00:00:00Z", "--until", "1e10")
    result = run("query", "red", "--camera", "hall")
    assert result.exit_code == 0
    assert "nothing found: of 6 pictures none passes --camera\n" in result.stderr
    result = run("query", "red", "--since", "24h", "--where", "site=north")
    named = "none passes --since and --where; 6 have no time: index them with  --time-from name"
    assert named in result.stderr


def test_quotes_may_be_left_out(work):
    run("index", "crops")
    loose = run_json("query", "a", "red", "picture", "-k", 2)
    assert loose["query"] == "a red picture"
    assert loose["hits"] == run_json("query", "a red picture", "-k", 2)["hits"]
    assert "sentence is empty" in run("query", "").stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["query"], 2, "error: describe the person, such as"),
        (["query", "red", "--image", "crops/red.png"], 2, "exclude each other"),
        (["query", "red", "--where", "colour"], 2, "--where colour is not KEY=VALUE"),
        (["query", "red", "--query-log", "crops"], 3, "query log crops: not a regular file"),
        (["query", "--image", "gone.png"], 3, "error: cannot read image gone.png: No such file"),
        (["query", "red", "--since", "nan"], 2, "'nan' is no time"),
        (["index", "crops", "--time-from", "sun"], 2, "Invalid value for '--time-from'"),
        (["index", "crops", "--attribute", "=5"], 2, "--attribute =5 is not KEY=VALUE"),
        (["query", "red", "--kk", "3"], 2, "No such option"),
        (["query", "red", "-k", "0"], 2, "Invalid value"),
        (["query", "red", "--since", "tomorrow"], 2, "neither unix seconds nor"),
        (["query", "red", "--since", "5", "--until", "4"], 2, "since must be earlier"),
        (["query", " "], 2, "error: the sentence is empty"),
        (["query", "red", "--variant", "int4"], 2, "did you mean 'int8'"),
        (["index", "crops", "--backend", "tensorflow"], 2, "error: no backend 'tensorflow'"),
        (["query", "red"], 3, "error: no gallery at gallery"),
        (["query", "red", "-b", "crops"], 3, "error: crops is not a bundle"),
        (["index", "empty"], 3, "error: no images in folder empty"),
        (["index", "nowhere"], 3, "error: no such file or folder: nowhere"),
        (["gallery", "info"], 3, "error: no gallery at gallery"),
        (["index", "crops", "--device", "cuda"], 5, "error: device 'cuda' needs ONNX Runtime's"),
    ],
)
def test_errors_are_one_line_and_a_code(work, arguments, code, message):
    (work / "empty").mkdir()
    result = run(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (work / "gallery").exists()


@pytest.mark.parametrize("asked", ["red", "--image=crops/red.png"])
def test_no_model_is_loaded_for_a_gallery_that_is_not_there(work, asked):
    result = run("query", asked)
    assert result.exit_code == 3
    assert "backend:" not in result.stderr


def test_a_students_gallery_is_searched_on_purpose_alone(work, tmp_path):
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
            assert "was made with the student or the teacher" in result.stderr
        result = run("query", "red", "-b", bundle, "-g", gallery, "--allow-distilled", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["hits"][0]["source"].endswith("red.png")
    other = make_toy_bundle(tmp_path / "other", seed=4)
    result = run("query", "red", "-b", other, "--allow-distilled")
    assert result.exit_code == 6


def test_integrity_errors_end_with_6(work, tmp_path):
    run("index", "crops")
    other = make_toy_bundle(tmp_path / "other", seed=4)
    result = run("query", "red", "-b", other)
    assert result.exit_code == 6
    assert "error: gallery gallery holds embeddings of another model" in result.stderr

    replace_in_bundle(work / "bundle", "text.int8.onnx", (other / "text.int8.onnx").read_bytes())
    assert run("query", "red").exit_code == 6
    result = run("doctor", "--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout)["ok"] is False

    (work / "bundle" / "image.int8.onnx").write_bytes(b"tampered")
    result = run("index", "crops")
    assert result.exit_code == 6
    assert "image.int8.onnx has 8 bytes, expected" in result.stderr

    (work / "gallery" / "gallery.sqlite").write_bytes(b"junk" * 999)
    for command in ("info", "verify"):
        assert run("gallery", command).exit_code == 6


def test_an_index_removes_what_a_killed_one_left(work):
    left = work / "gallery" / ".gallery.sqlite.abcd_123"
    left.mkdir(parents=True)
    (left / "gallery.sqlite").touch()
    os.utime(left, (1e9, 1e9))
    assert run("index", "crops").exit_code == 0
    assert not left.exists()


def test_verify_lists_problems(work, monkeypatch):
    run("index", "crops")
    monkeypatch.setattr(SqliteGallery, "verify", lambda self: ["item a: vector of 3 bytes"])
    result = run("gallery", "verify")
    assert result.exit_code == 6
    assert "item a: vector of 3 bytes" in result.stderr
    result = run("gallery", "verify", "--json")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (6, False)


def test_traceback_only_with_debug(work, monkeypatch):
    result = run("query", "red", "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "error: no gallery" in result.stderr

    run("index", "crops")
    monkeypatch.setattr(SqliteGallery, "info", lambda self: {}["defect"])
    result = run("gallery", "info")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: internal error: KeyError: 'defect'; run the command again with --debug for the "
        "details\n"
    )
    assert "Traceback" in run("gallery", "info", "--debug").stderr


def test_version_and_main(monkeypatch, capsys):
    assert run("--version").stdout == f"upperson-rt {upperson_rt.__version__}\n"
    # It would end this process, whatever signal a later test gets.
    monkeypatch.setattr(sys.modules["upperson_rt.cli.app"], "listen", lambda: None)
    monkeypatch.setattr("sys.argv", ["upperson-rt", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    monkeypatch.setattr("sys.argv", ["upperson-rt", "query", " "])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: the sentence is empty" in capsys.readouterr().err


def test_names_that_look_like_markup_are_shown_as_they_are(capsys):
    from upperson_rt.cli.output import new_table, print_table

    table = new_table("camera")
    table.add_row("[/gate]")
    print_table(table)
    assert "[/gate]" in capsys.readouterr().out


def test_json_is_ascii_whatever_a_file_is_called(capsys):
    from upperson_rt.cli.output import print_json

    print_json({"path": "gänge/\udcff.jpg"})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == {"path": "gänge/\udcff.jpg"}


def write_key(name):
    """Write NAME.pem and NAME.pub; return the fingerprint."""
    write_keys(Path(), name, ec.generate_private_key(ec.SECP256R1()))
    return hashlib.sha256(Path(f"{name}.pub").read_bytes()).hexdigest()


OPENING = [
    ("index", "crops"),
    ("query", "red"),
    ("watch", "rtsp://127.0.0.1:9/none"),
    ("gallery", "delete", "--like", "crops/red.png", "--min-score", "0.5"),
    ("bench", "query"),
    ("bench", "towers"),
    ("bench", "pipeline"),
    ("doctor",),
]


def test_a_trusted_deployment_takes_signed_bundles_only(work, monkeypatch):
    """What each command does without the option is tested with the command."""
    fingerprint, _ = write_key("ours"), write_key("other")
    assert run("index", "crops", "--backend", "onnxruntime").exit_code == 0
    for arguments in OPENING:
        result = run(*arguments, "--trust", "ours.pub")
        assert result.exit_code == 6, (arguments, result.stderr)
        assert "bundle is not trusted: it is not signed" in " ".join(
            (result.stderr + result.stdout).split()
        )
    assert "is not signed" in signature_row(run_json("doctor", "-b", "bundle"))["detail"]

    signed = upperson_run("sign", "bundle", "ours.pem")
    assert signed.exit_code == 0, signed.stderr
    assert f"signed bundle with the key sha256:{fingerprint}" in signed.stdout
    assert run("query", "red", "--trust", "ours.pub").exit_code == 0
    monkeypatch.setenv("UPPERSON_TRUST", "other.pub")
    result = run("query", "red")
    assert result.exit_code == 6
    assert "its signature is not one of the trusted key" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    monkeypatch.setenv("UPPERSON_TRUST", "")  # Such as a unit's that names an unset variable.
    for arguments in (("query", "red"), ("doctor",)):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Invalid value for '--trust' (env var: 'UPPERSON_TRUST')" in result.stderr
    assert run("query", "red", "--trust", "ours.pub").exit_code == 0
    monkeypatch.delenv("UPPERSON_TRUST")

    row = signature_row(run_json("doctor", "-b", "bundle"))
    assert row["facts"] == {"key": fingerprint, "verified": False}
    row = signature_row(run_json("doctor", "-b", "bundle", "--trust", "ours.pub"))
    assert row["facts"] == {"key": fingerprint, "verified": True}


@pytest.mark.parametrize(
    "arguments",
    [
        ("serving", "bundle", "--triton", "models"),
        ("serving", "bundle", "--deepstream", "ds", "--variant", "fp32"),
        ("evaluate", "bundle", "--root", "people"),
        ("parity", "bundle", "--count", "2", "--batch", "1"),
    ],
)
def test_the_commands_for_bundles_of_the_other_package_insist_too(work, monkeypatch, arguments):
    write_key("ours"), write_key("other")
    result = upperson_run(*arguments, "--trust", "ours.pub")
    assert result.exit_code == 6, result.stderr
    assert "bundle is not trusted: it is not signed" in result.stderr
    assert upperson_run("sign", "bundle", "ours.pem").exit_code == 0
    monkeypatch.setenv("UPPERSON_TRUST", "other.pub")
    result = upperson_run(*arguments)
    assert result.exit_code == 6, result.stderr
    assert "its signature is not one of the trusted key" in result.stderr
    assert not {"models", "ds"} & {path.name for path in work.iterdir()}
    monkeypatch.setenv("UPPERSON_TRUST", "ours.pub")
    assert "not trusted" not in upperson_run(*arguments).stderr
    assert {"models", "ds"} & {path.name for path in work.iterdir()} or arguments[0] != "serving"
    monkeypatch.setenv("UPPERSON_TRUST", "")
    result = upperson_run(*arguments)
    assert result.exit_code == 2
    assert "Invalid value for '--trust' (env var: 'UPPERSON_TRUST')" in result.stderr


def test_compile_insists_on_the_signature_first(work):
    write_key("ours")
    result = run("compile", "bundle", "--variant", "int8", "--trust", "ours.pub")
    assert result.exit_code == 6
    assert "bundle is not trusted: it is not signed" in result.stderr


def test_what_is_damaged_is_not_signed(work):
    write_key("ours")
    with (work / "bundle" / "text.fp32.onnx").open("r+b") as file:
        file.write(b"x")
    result = upperson_run("sign", "bundle", "ours.pem")
    assert result.exit_code == 6
    assert "text.fp32.onnx has sha256" in result.stderr
    assert not (work / "bundle" / "model.sig").exists()


def signature_row(found):
    (row,) = [row for row in found["checks"] if row["name"] == "signature"]
    return row
