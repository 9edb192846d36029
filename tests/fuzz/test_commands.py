"""Commands end with an exit code of ours and a message, whatever stands on their lines."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st

import upperson_rt.cli
from tests.helpers.command_line import run_program
from tests.helpers.fuzzing import examples, fuzz, texts
from tests.helpers.invoke import run
from tests.helpers.toy_bundle import draw_person, make_toy_bundle
from upperson_rt.bundle import read_manifest
from upperson_rt.gallery import Gallery, Item
from upperson_rt.printable import escape_for_display

USUAL = [
    "bundle", "gallery", "crops", "red", "gate", "0", "1", "24h", "2026-11-24", "a=1", "fp32",
    "cpu", "onnxruntime", "people", "jsonl", "test", "street.avi", "out", "hog", "1,2",
]  # fmt: skip
arguments = st.one_of(st.sampled_from(USUAL), texts).filter(
    lambda text: (
        "\0" not in text
        and len(text) < 5100  # Each command is told so 60 times: they take long to write.
        and not any("\ud800" <= one < "\udc80" or "\udd00" <= one <= "\udfff" for one in text)
        # Nothing is written or asked for elsewhere.
        and ".." not in text
        and "/" not in text
        and not text.startswith(("milvus:", "rtsp:"))
    )
)

RUNTIME = {
    "alert add": ["--camera", "--max-false", "--name", "--cap", "--threads", "-g", "-b", "--json"],
    "alert deliver": ["--to", "--secret-file", "--ca", "--timeout", "--attempts", "-g"],
    "alert list": ["-g", "--json"],
    "alert messages": ["-k", "-g", "--json"],
    "alert test": ["--since", "-g", "--json"],
    "alert remove": ["-g", "--json"],
    "alert confirm": ["-g", "--json"],
    "query": ["--camera", "--since", "--until", "--track", "--attribute", "-k", "--image",
              "--sheet", "--variant", "--device", "--query-log", "--threads", "-g", "-b",
              "--by-track"],
    "index": ["--camera", "--time-from", "--track-from", "--attribute", "--batch-size",
              "--variant", "--device", "--threads", "-g", "-b", "--output", "--shard"],
    "log verify": ["--expect", "--json"],
    "gallery info": ["-g", "--json"],
    "gallery verify": ["-g", "--json"],
    "gallery rebuild": ["-g"],
    "gallery delete": ["--like", "--min-score", "--camera", "--since", "--until", "--track",
                       "--attribute", "-g", "--dry-run"],
    "gallery prune": ["--older-than", "--keep", "--camera", "-g", "--dry-run"],
    "gallery export": ["-g", "--camera", "--attribute", "--since"],
    "watch": ["--detector", "--every", "--stall", "--duration", "--start", "--camera", "--drop",
              "--hwaccel", "--reconnect-max"],
    "compile": ["--variant", "--max-batch", "--device", "--cache"],
}  # fmt: skip
TRAINING = {
    "data check": ["--root", "--dataset"],
    "evaluate": ["--root", "--dataset", "--split"],
    "train": ["--root", "--dataset", "--recipe", "--set", "--base", "--seeds", "--resume"],
    "export": ["--max-r1-drop", "--estimator", "--calib-size", "--calibration"],
    "parity": ["--batch-size", "--backend", "--images", "--count", "--max-error", "--min-cosine"],
    "serving": ["--triton", "--deepstream", "--variant"],
    "import": ["--output", "--dataset", "--base", "--height"],
}
FLAGS = ("--json", "--dry-run", "--by-track")


@st.composite
def lines(draw, commands):
    command = draw(st.sampled_from(sorted(commands)))
    line = command.split()
    for _ in range(draw(st.integers(0, 3))):
        option = draw(st.sampled_from(commands[command]))
        line += [option] if option in FLAGS else [option, draw(arguments)]
    line += draw(st.lists(arguments, max_size=2))
    if command in ("gallery delete", "gallery prune"):
        line.append("--dry-run")
    if command == "alert deliver":
        line.append("--once")
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bundle, a gallery and a picture."""
    folder = tmp_path_factory.mktemp("commands")
    make_toy_bundle(folder / "bundle")
    (folder / "crops").mkdir()
    draw_person(folder / "crops" / "red.png", "red")
    model = read_manifest(folder / "bundle")
    dim = model.model.embed_dim
    with Gallery.open(folder / "gallery", model.fingerprint, dim, create=True) as gallery:
        item = Item(key="a", camera="gate", time=1.8e9, attributes={"a": 1})
        gallery.add([item], np.eye(1, dim, dtype=np.float32))
    return folder


def check(line, **app):
    """Run a command, and remove what it wrote."""
    result = run(*line, **app)
    for name in set(os.listdir()) - {"bundle", "gallery", "crops"}:
        shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)
    assert result.exit_code in (0, 2, 3, 4, 5, 6), (line, result.output)
    printed = result.stdout + result.stderr
    assert all(escape_for_display(one) == one for one in printed.split("\n")), line
    assert "internal error" not in printed
    assert "Traceback" not in printed
    if result.exit_code:
        assert result.stderr, line


@fuzz(line=lines(RUNTIME), examples=25)
@examples(
    *({"line": line} for line in (
        ["alert", "add", "red", "\udcff"], ["alert", "list"], ["query", "--image", "\udcff"],
        ["alert", "add", "man in red", "--name", "\u202e", "--max-false", "9/day"],
        ["alert", "add", "man in red", "--max-false", "9" * 400 + "/day"],
        ["alert", "deliver", "--to", "command:\udcff", "--once"],
        ["query", "red", "--camera", "\udcff", "-b", "x" * 300],
        ["query", "red", "--attribute", "a=" + "[" * 5000],
        ["query", "red", "--attribute", "a=" + "9" * 5000],
        ["query", "red", "--since", "1e20"], ["query", "red", "--since", "9" * 400 + "w"],
        ["query", "red", "-k", "9" * 30], ["query", "red", "--threads", "9" * 12],
        ["query", "red", "--query-log", "x" * 300], ["query", "red", "--device", "\udcff"],
        ["gallery", "delete", "x" * 300, "--dry-run"], ["gallery", "export", "x" * 300],
        ["gallery", "prune", "--older-than", "9" * 400 + "w", "--dry-run"],
        ["index", "x" * 300], ["index", "crops", "--camera", "\udcff", "-g", "other"],
        ["watch", "\udcff"], ["watch", "crops", "--duration", "nan"], ["compile", "\xa0"],
    )),
)  # fmt: skip
def test_lines_of_the_runtime(place, monkeypatch, line):
    monkeypatch.chdir(place)
    if line[0] == "watch" and any(word in ("0", "1") for word in line):
        return  # Cameras of this machine are left alone.
    if line[0] in ("query", "index", "watch"):
        line = [*line, "--backend", "onnxruntime"]
    check(line, app=upperson_rt.cli.app)


@fuzz(line=lines(TRAINING), examples=10)
@example(line=["parity", "bundle", "--batch-size", "9" * 5000])
@example(line=["evaluate", "x" * 300])
@example(line=["serving", "x" * 300, "--triton", "out"])
@example(line=["import", "\udcff", "--output", "out"])
def test_lines_of_training(place, monkeypatch, line):
    monkeypatch.chdir(place)
    if line[0] == "parity" and "bundle" in line:
        line = [word for word in line if word != "bundle"]  # It would work, for seconds.
    check(line)


def test_bytes_that_are_no_text_in_a_real_process(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("UPPERSON_GALLERY", "gal\udcfflery")
    monkeypatch.setenv("UPPERSON_QUERY_LOG", "l\udcffog")
    done = run_program("upperson-rt", "query", "red", "--camera", "g\udcffate", "--debug")
    assert done.returncode == 2, done.stderr
    assert r"error: a filter's camera is not valid Unicode: 'g\udcffate'" in done.stderr
    done = run_program("upperson-rt", "query", "red", "--backend", "onnxruntime")
    assert done.returncode == 3, done.stderr
    assert r"no gallery at gal\udcfflery" in done.stderr
