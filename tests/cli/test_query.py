"""What `upperson-rt index` records, and how `upperson-rt query` narrows it down."""

import datetime
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.command_line import run_code
from tests.helpers.invoke import run_rt as run
from tests.helpers.invoke import run_rt_json
from tests.helpers.toy_bundle import COLOURS, calibrate_toy_bundle, draw_person, make_toy_bundle
from upperson_phrases import grammar
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.score_calibration import Background
from upperson_rt.tokenizer import Tokenizer

NOW = 1_790_000_000.0


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A bundle, six pictures in two folders, and a gallery of them with everything set."""
    folder = tmp_path_factory.mktemp("query")
    encoder = open_encoder(make_toy_bundle(folder / "bundle"), threads=1)
    items, files = [], []
    for i, colour in enumerate(COLOURS):
        file = folder / "crops" / f"p{i // 3}" / f"{colour}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        files.append(draw_person(file, colour))
        items.append(
            Item(
                key=colour,
                source=str(file),
                camera="gate" if i < 3 else "hall",
                time=NOW + i,
                track=f"t{i // 2}",
                attributes={"floor": i // 3, "guard": i == 0, "door": "1"},
            )
        )
    with Gallery.open(folder / "gallery", encoder.fingerprint, 16, create=True) as gallery:
        gallery.add(items, encoder.encode_images(files))
    return folder


@pytest.fixture
def work(enter, original):
    return enter(original)


found = partial(run_rt_json, "query")


def keys(*arguments):
    return {hit["key"] for hit in found("person", *arguments)["hits"]}


def test_conditions(work, monkeypatch):
    for options, expected in (
        (["--camera", "gate"], {"red", "green", "blue"}),
        (["--track", "t1"], {"blue", "yellow"}),
        (["--attribute", "floor=1"], {"yellow", "white", "black"}),
        (["--attribute", "floor=0", "--attribute", "guard=true"], {"red"}),
        (["--attribute", 'door="1"'], set(COLOURS)),
        (["--attribute", "door=1"], set()),
        (["--attribute", "floor=one"], set()),
        (["--since", NOW + 1, "--until", NOW + 3], {"green", "blue"}),
    ):
        assert keys(*options) == expected, options
    monkeypatch.setattr(time, "time", lambda: NOW + 7200)
    assert keys("--since", "2h") == set(COLOURS)
    assert keys("--since", "1w", "--until", "7198s") == {"red", "green"}

    result = found("red", "--camera", "gaet", "--camera", "hall")
    assert {hit["camera"] for hit in result["hits"]} == {"hall"}
    (notice,) = result["notices"]
    assert (notice["code"], notice["fields"]["cameras"]) == ("camera_unknown", ["gaet"])
    where = ["--since", "24h", "--attribute", "site=north"]
    (notice,) = found("red", *where)["notices"]
    by = {"by": ["since", "where"], "pictures": 6}
    assert (notice["code"], by.items() <= notice["fields"].items()) == (
        "filter_matches_nothing", True,
    )  # fmt: skip


def test_a_sentence_may_hold_the_words_of_a_switch(work):
    for words, query in (
        (("--explain", "no", "backpack"), "no backpack"),
        (("yes", "no", "--explain"), "yes no"),
        (("--explain", "--", "true", "red"), "true red"),
    ):
        assert json.loads(run("query", "--json", "-k", 3, *words).stdout)["query"] == query


def test_json_carries_everything(work):
    where = ("--camera", "gate", "--attribute", "floor=0", "--since", int(NOW), "--track", "t0")
    result = found("red", *where)
    assert result["filter"] == {
        "cameras": ["gate"],
        "since": NOW,
        "until": None,
        "track": "t0",
        "attributes": {"floor": 0},
    }
    assert (result["query"], result["image"], result["by_track"]) == ("red", None, False)
    first = result["hits"][0]
    assert (first["key"], first["time"], first["track"]) == ("red", NOW, "t0")
    assert (first["span"], first["crop"]) == (None, None)
    assert first["attributes"] == {"floor": 0, "guard": True, "door": "1"}

    hits = found("red", "--by-track", "-k", 10)["hits"]
    # Track t1 is in both cameras, which makes it two.
    assert (hits[0]["camera"], hits[0]["track"]) == ("gate", "t0")
    assert len(hits) == 4
    assert hits[0]["span"] == {"first_time": NOW, "last_time": NOW + 1, "pictures": 2}
    lines = run("query", "red", "--by-track", "-k", 1).stdout.splitlines()
    head = "rank score camera time track pictures period picture"
    assert lines[0].split() == head.split()
    first, last = (datetime.datetime.fromtimestamp(NOW + second) for second in (0, 1))
    assert f"  {first:%Y-%m-%d %H:%M:%S} to {last:%H:%M:%S}  " in lines[1]


def test_a_calibrated_query_has_a_verdict(work):
    verdict = found("a red coat")["verdict"]
    assert (verdict["word"], verdict["reason"]) == ("uncalibrated", "no_calibration")
    calibrate_toy_bundle(work / "bundle")
    verdict = found("a red coat")["verdict"]
    assert (verdict["reason"], verdict["fields"]) == ("few_pictures", {"pictures": 6, "least": 20})
    encoder = open_encoder("bundle", threads=1)
    with Gallery.open("gallery", encoder.fingerprint, 16) as gallery:
        for colour in COLOURS:
            files = [work / f"crops/p{place}/{colour}.png" for place in (0, 1)]
            (file,) = filter(Path.exists, files)
            items = [Item(key=f"{colour}{n}", source=str(file)) for n in range(3)]
            gallery.add(items, encoder.encode_images([file] * 3))
    result = found("a red coat", "-k", 5, "--sheet", "found.png", "--query-log", "queries.log")
    verdict = result["verdict"]
    assert (verdict["word"], verdict["reason"], verdict["expected_is_more"]) == (
        "likely", None, False,
    )  # fmt: skip
    assert verdict["likelihood"] == pytest.approx(0.96, abs=0.03)
    assert verdict["expected_matches"] == pytest.approx(4, abs=1)
    assert [hit["match"] for hit in result["hits"]] == ["likely"] * 4 + ["possible"]
    assert all(hit["likelihood"] > 0.9 for hit in result["hits"][:4])
    (line,) = map(json.loads, (work / "queries.log").read_text().splitlines())
    assert line["details"] == {"verdict": "likely", "likelihood": verdict["likelihood"]}
    calibrate_toy_bundle(work / "bundle", background=Background(middle=2.0, spread=0.1))
    nobody = found("a red coat")
    assert nobody["verdict"]["word"] == "nobody"
    assert {hit["match"] for hit in nobody["hits"]} == {"unlikely"}


def test_names_can_be_copied_from_any_terminal(work, monkeypatch):
    name = "a-track-whose-name-is-longer-than-a-line-of-twenty"
    encoder = open_encoder("bundle", threads=1)
    with Gallery.open("gallery", encoder.fingerprint, 16) as gallery:
        red = Item(key="red", source=str(work / "crops/p0/red.png"), time=NOW, track=name)
        gallery.add([red], encoder.encode_images([red.source]))
    monkeypatch.setenv("FORCE_COLOR", "1")  # What makes rich take a pipe for a terminal.
    picture = str(Path("crops/p0/red.png"))
    for columns in (20, 400):
        monkeypatch.setenv("COLUMNS", str(columns))
        for options in ([], ["--by-track"]):
            lines = run("query", "red", "-k", 2, *options).stdout.splitlines()
            assert name in " ".join(lines).split()
            if columns == 400:
                assert len(lines) == 3, "a line for the header and for each hit"
                assert lines[1].split()[-1] == picture
            else:
                assert len(lines) == 6
                assert (lines[1], lines[3]) == ("      picture", f"      {picture}")


def test_queries_are_logged_or_not_run(work, monkeypatch):
    assert run("query", "red", "-k", 2, "--query-log", "queries.log").exit_code == 0
    monkeypatch.setenv("UPPERSON_QUERY_LOG", str(work / "queries.log"))
    picture = ("--image", "crops/p0/red.png", "--camera", "gate", "-k", 1)
    result = found(*picture, "--sheet", "found.png")
    (hit,) = result["hits"]
    assert (hit["key"], hit["score"]) == ("red", pytest.approx(1, abs=0.01))
    assert (result["query"], result["image"]) == (None, "crops/p0/red.png")
    assert result["query_log"] == str(work / "queries.log")
    assert (work / "found.png").stat().st_size > 1000
    first, second = (json.loads(line) for line in (work / "queries.log").read_text().splitlines())
    assert (first["sentence"], first["k"], len(first["ids"])) == ("red", 2, 2)
    assert second["picture"]["file"] == str(work / "crops" / "p0" / "red.png")
    assert second["ids"] == [hit["id"]]
    (chain,) = run_rt_json("log", "verify", "queries.log", "--expect", second["chain"])["expected"]
    assert chain == second["chain"]
    assert run("log", "verify", "queries.log", "--expect", "5" * 64).exit_code == 6

    write = os.write

    def full_disk(file, content):
        if content.startswith(b'{"time"'):
            raise OSError(28, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(os, "write", full_disk)
    result = run("query", "red", "--sheet", "other.png")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "No space left on device" in result.stderr
    assert not (work / "other.png").exists()


UNUSED = [
    "PIL", "cv2", "faiss", "openvino", "pandas", "prometheus_client", "pyarrow", "pymilvus",
    "rapidfuzz", "rich.progress", "tensorrt", "torch", "upperson_rt.preprocess",
    "upperson_sheet.sheet", "upperson_rt.ingest.files",
    "upperson_milvus", "upperson_doctor.diagnosis", "upperson_openvino.backend",
]  # fmt: skip


def test_a_query_loads_only_what_it_uses(work, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(work / "cache"))  # Nothing has been measured.
    code = (
        "import atexit, sys; from upperson_rt.cli import main; "
        f"atexit.register(lambda: print(*(n for n in {UNUSED!r} if n in sys.modules))); main()"
    )
    image_tower = work / "bundle" / "image.int8.onnx"
    image_tower.write_bytes(bytes(image_tower.stat().st_size))  # Neither loaded nor hashed.
    done = run_code(code, "query", "red", "-k", "1")
    assert done.returncode == 0, done.stderr
    *table, loaded = done.stdout.splitlines()
    assert (loaded, table[1].split()[0::2][:2]) == ("", ["1", "gate"])
    # A sheet needs Pillow, so this list can tell.
    done = run_code(code, "query", "red", "-k", "1", "--sheet", "found.png")
    used = ["PIL", "upperson_rt.preprocess", "upperson_sheet.sheet"]
    assert done.stdout.splitlines()[-1].split() == used


def test_index_records_times_tracks_and_attributes(work):
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0x9003: "2026:11:24 14:00:00", 0x9011: "+01:00"})
    Image.new("RGB", (8, 24), "red").save(work / "crops" / "p0" / "timed.jpg", exif=exif)
    result = run(
        "index", "crops", "-g", "new", "--track-from", "folder", "--attribute", "floor=3",
        "--attribute", "site=north",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "6 of 7 pictures have no time (--time-from exif)" in result.stderr
    hits = found("person", "-g", "new", "--attribute", "floor=3", "--track", "p0")["hits"]
    times = {os.path.basename(hit["source"]): hit["time"] for hit in hits}
    expected = datetime.datetime(2026, 11, 24, 13, tzinfo=datetime.timezone.utc).timestamp()
    assert times == {"timed.jpg": expected, "red.png": None, "green.png": None, "blue.png": None}
    assert {hit["attributes"]["site"] for hit in hits} == {"north"}

    named = shutil.copy(work / "crops/p1/white.png", work / "gate_20261124_140000.png")
    assert run_rt_json("index", named, "-g", "new", "--time-from", "name")["timed"] == 1
    local = datetime.datetime(2026, 11, 24, 14).timestamp()
    assert found("person", "-g", "new", "--since", local, "--until", local + 1)["hits"]


def test_phrases_are_weighed(work):
    sentence = "woman in red coat, no blue coat"
    result = found(sentence, "--explain", "-k", 6)
    phrases = result["phrases"]
    assert [(p["text"], p["kind"], p["noun"], p["colours"], p["negated"]) for p in phrases] == [
        ("woman", "person", "woman", [], False),
        ("red coat", "upper", "coat", ["red"], False),
        ("blue coat", "upper", "coat", ["blue"], True),
    ]
    assert [sentence[p["start"] : p["end"]] for p in phrases] == [p["text"] for p in phrases]
    assert result["contradictions"] == []
    evidence = {hit["key"]: hit["evidence"] for hit in result["hits"]}
    assert max(evidence, key=lambda key: evidence[key][1]) == "red"
    assert max(evidence, key=lambda key: evidence[key][2]) == "blue"
    assert all(0 <= value <= 1 for row in evidence.values() for value in row)
    assert result["hits"][0]["key"] == "red"
    plain = found(sentence, "-k", 6)
    assert {"phrases", "contradictions"}.isdisjoint(plain)
    assert "evidence" not in plain["hits"][0]


def test_odd_sentences_get_a_notice(work):
    for sentence, codes in (
        ("the and a", ["not_understood"]),
        ("a man and a woman", ["contradiction"]),
        ("a red coat, without a coat", ["contradiction"]),
        ("red red blue coat", ["colours_joined"]),
        ("red and blue coat", []),
        ("red coat", []),
        ("red " * 300, ["sentence_truncated"]),
        ("zzz", ["words_unknown"]),
    ):
        result = found(sentence, "--explain", "-k", 2)
        assert [notice["code"] for notice in result["notices"]] == codes, sentence
        assert len(result["hits"]) == 2
        assert result["truncated"] == (codes == ["sentence_truncated"])


def test_a_sentence_is_parsed_and_tokenized_once(work, monkeypatch):
    sentence, parsed, batches = "a woman in a red coat", [], []
    read, encode = grammar._Parser.__init__, Tokenizer.encode
    monkeypatch.setattr(
        grammar._Parser, "__init__", lambda self, text: parsed.append(text) or read(self, text)
    )
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, texts: batches.append(texts) or encode(self, texts)
    )
    for options in ([], ["--explain"], ["--paraphrases", 16]):
        assert found(sentence, *options)["hits"][0]["key"] == "red"
        assert parsed == [sentence]
        (own,) = [texts for texts in batches if sentence in texts]
        assert own.count(sentence) == 1
        assert (len(own) > 1) == ("--paraphrases" in options)
        parsed.clear(), batches.clear()
