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

from tests.helpers.command_line import run_code, run_program
from tests.helpers.invoke import run_rt as run
from tests.helpers.invoke import run_rt_json
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_rt.bundle import Bundle
from upperson_rt.gallery import Gallery, Item
from upperson_rt.phrases import grammar
from upperson_rt.tokenizer import Tokenizer

NOW = 1_790_000_000.0


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A bundle, six pictures in two folders, and a gallery of them with everything set."""
    folder = tmp_path_factory.mktemp("query")
    bundle = make_toy_bundle(folder / "bundle")
    encoder = Bundle.open(bundle, threads=1).encoder()
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
    return {hit["key"] for hit in found(*arguments)["hits"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--camera", "gate"], {"red", "green", "blue"}),
        (["--camera", "gate", "--camera", "hall"], set(COLOURS)),
        (["--track", "t1"], {"blue", "yellow"}),
        (["--track", "t1", "--camera", "hall"], {"yellow"}),
        (["--where", "floor=1"], {"yellow", "white", "black"}),
        (["--where", "floor=0", "--where", "guard=true"], {"red"}),
        (["--where", 'door="1"'], set(COLOURS)),
        (["--where", "door=1"], set()),
        (["--where", "floor=one"], set()),
        (["--since", NOW + 1, "--until", NOW + 3], {"green", "blue"}),
        (["--until", "2026-09-21T14:13:21Z"], {"red"}),
    ],
)
def test_conditions(work, options, expected):
    assert keys("person", *options) == expected


def test_how_long_ago(work, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: NOW + 7200)
    assert keys("person", "--since", "2h") == set(COLOURS)
    assert keys("person", "--since", "-2h") == set(COLOURS)
    assert keys("person", "--since", "119.95m") == {"white", "black", "yellow"}
    assert keys("person", "--since", "1h") == set()
    assert keys("person", "--since", "1w", "--until", "7198s") == {"red", "green"}


def test_json_carries_everything(work):
    result = found("red", "--camera", "gate", "--where", "floor=0", "--since", "5", "--track", "t0")
    assert result["filter"] == {
        "cameras": ["gate"],
        "since": 5.0,
        "until": None,
        "track": "t0",
        "attributes": {"floor": 0},
    }
    assert (result["query"], result["image"], result["by_track"]) == ("red", None, False)
    first = result["hits"][0]
    assert (first["key"], first["time"], first["track"]) == ("red", NOW, "t0")
    assert (first["span"], first["crop"]) == (None, None)
    assert first["attributes"] == {"floor": 0, "guard": True, "door": "1"}


def test_one_hit_a_track(work):
    hits = found("red", "--by-track", "-k", 10)["hits"]
    # Track t1 is in both cameras, which makes it two.
    assert (hits[0]["camera"], hits[0]["track"]) == ("gate", "t0")
    assert len(hits) == 4
    assert hits[0]["span"] == {"first_time": NOW, "last_time": NOW + 1, "pictures": 2}
    lines = run("query", "red", "--by-track", "-k", 1).stdout.splitlines()
    assert lines[0].split() == [
        "rank", "score", "camera", "time", "track", "pictures", "period", "picture",
    ]  # fmt: skip
    first, last = (datetime.datetime.fromtimestamp(NOW + second) for second in (0, 1))
    assert f"  {first:%Y-%m-%d %H:%M:%S} to {last:%H:%M:%S}  " in lines[1]


@pytest.mark.parametrize("options", [[], ["--by-track"]])
@pytest.mark.parametrize("columns", [20, 80, 100, 400])
def test_names_can_be_copied_from_any_terminal(work, monkeypatch, options, columns):
    name = "a-track-whose-name-is-longer-than-a-line-of-twenty"
    encoder = Bundle.open("bundle", threads=1).encoder()
    with Gallery.open("gallery", encoder.fingerprint, 16) as gallery:
        red = Item(key="red", source=str(work / "crops/p0/red.png"), time=NOW, track=name)
        gallery.add([red], encoder.encode_images([red.source]))
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # What makes rich take a pipe for a terminal.
    lines = run("query", "red", "-k", 2, *options).stdout.splitlines()
    picture = str(Path("crops/p0/red.png"))
    assert name in " ".join(lines).split()
    if columns == 400:
        assert len(lines) == 3, "a line for the header and for each hit"
        assert lines[1].split()[-1] == picture
    else:
        assert len(lines) == 6
        assert (lines[1], lines[3]) == ("      picture", f"      {picture}")


def test_a_picture_as_query(work):
    result = found("--image", "crops/p1/yellow.png", "-k", 2, "--sheet", "found.png")
    assert result["hits"][0]["key"] == "yellow"
    assert result["hits"][0]["score"] == pytest.approx(1, abs=0.01)
    assert (result["query"], result["image"]) == (None, "crops/p1/yellow.png")
    assert (work / "found.png").stat().st_size > 1000


def test_an_unknown_camera_is_named(work):
    result = found("red", "--camera", "gaet", "--camera", "hall")
    assert {hit["camera"] for hit in result["hits"]} == {"hall"}
    (notice,) = result["notices"]
    assert (notice["code"], notice["fields"]["cameras"]) == ("camera_unknown", ["gaet"])


def test_why_nothing_is_found(work):
    where = ["--since", "24h", "--where", "site=north"]
    (notice,) = found("red", *where)["notices"]
    assert (notice["code"], notice["fields"]["by"]) == (
        "filter_matches_nothing",
        ["since", "where"],
    )
    assert notice["fields"]["pictures"] == 6
    run("index", "crops", "-g", "untimed")
    (notice,) = found("red", "-g", "untimed", *where)["notices"]
    assert notice["fields"]["without_time"] == 6


def test_the_query_log(work, monkeypatch):
    assert run("query", "red", "-k", 2, "--query-log", "asked.log").exit_code == 0
    monkeypatch.setenv("UPPERSON_QUERY_LOG", str(work / "asked.log"))
    result = found("--image", "crops/p0/red.png", "-k", 1, "--camera", "gate")
    first, second = (json.loads(line) for line in (work / "asked.log").read_text().splitlines())
    assert (first["sentence"], first["k"], len(first["ids"])) == ("red", 2, 2)
    assert second["picture"]["file"] == str(work / "crops" / "p0" / "red.png")
    assert second["ids"] == [result["hits"][0]["id"]]
    assert result["query_log"] == str(work / "asked.log")


def test_no_results_without_the_log(work, monkeypatch):
    write = os.write

    def full_disk(file, content):
        if content.startswith(b'{"time"'):
            raise OSError(28, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(os, "write", full_disk)
    result = run("query", "red", "--query-log", "asked.log", "--sheet", "found.png")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "No space left on device" in result.stderr
    assert not (work / "found.png").exists()


UNUSED = [
    "PIL", "cv2", "faiss", "openvino", "pandas", "prometheus_client", "pyarrow", "pymilvus",
    "rich.progress", "tensorrt", "torch", "upperson_rt.preprocess", "upperson_rt.sheet",
    "upperson_rt.ingest.files",
    "upperson_milvus", "upperson_doctor.diagnosis", "upperson_openvino.backend",
]  # fmt: skip


def test_a_query_loads_only_what_it_uses(work, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(work / "cache"))  # Nothing has been measured.
    code = (
        "import atexit, sys; from upperson_rt.cli import main; "
        f"atexit.register(lambda: print(*(n for n in {UNUSED!r} if n in sys.modules))); main()"
    )
    (work / "bundle" / "image.int8.onnx").write_bytes(
        bytes((work / "bundle" / "image.int8.onnx").stat().st_size)
    )  # Neither loaded nor hashed.
    done = run_code(code, "query", "red", "-k", "1")
    assert done.returncode == 0, done.stderr
    *table, loaded = done.stdout.splitlines()
    assert loaded == ""
    assert table[1].split()[:3] == ["1", table[1].split()[1], "gate"]
    # A sheet needs Pillow, so this list can tell.
    done = run_code(code, "query", "red", "-k", "1", "--sheet", "found.png")
    assert done.stdout.splitlines()[-1].split() == [
        "PIL",
        "upperson_rt.preprocess",
        "upperson_rt.sheet",
    ]


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
    hits = found("person", "-g", "new", "--where", "floor=3", "--track", "p0")["hits"]
    times = {os.path.basename(hit["source"]): hit["time"] for hit in hits}
    expected = datetime.datetime(2026, 11, 24, 13, tzinfo=datetime.timezone.utc).timestamp()
    assert times == {"timed.jpg": expected, "red.png": None, "green.png": None, "blue.png": None}
    assert {hit["attributes"]["site"] for hit in hits} == {"north"}

    shutil.copy(work / "crops/p1/white.png", work / "gate_20261124_140000.png")
    result = run("index", "gate_20261124_140000.png", "-g", "new", "--time-from", "name", "--json")
    assert json.loads(result.stdout)["timed"] == 1
    local = datetime.datetime(2026, 11, 24, 14).timestamp()
    assert found("person", "-g", "new", "--since", local, "--until", local + 1)["hits"]

    os.utime(work / "crops/p1/white.png", (NOW, NOW))
    result = run("index", "crops/p1/white.png", "-g", "third", "--time-from", "mtime", "--json")
    assert json.loads(result.stdout)["timed"] == 1
    assert found("person", "-g", "third")["hits"][0]["time"] == NOW


def test_bad_pictures_of_all_kinds_are_counted(work):
    bad = work / "bad"
    bad.mkdir()
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "cut.png").write_bytes((work / "crops/p0/red.png").read_bytes()[:200])
    (bad / "text.webp").write_text("no picture")
    Image.new("1", (20_000, 20_000)).save(bad / "huge.png", compress_level=1)
    Image.new("CMYK", (20, 60), (0, 255, 255, 0)).save(bad / "fine.jpg")
    done = run_program("upperson-rt", "index", "bad", "-g", "new", "--json", cwd=work)
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    assert report["indexed"] == 1
    reasons = {os.path.basename(one["path"]): one["reason"] for one in report["skipped"]}
    assert set(reasons) == {"empty.jpg", "cut.png", "text.webp", "huge.png"}
    assert "is too large to be a person's picture" in reasons["huge.png"]
    assert "4 of 5 pictures could not be used" in done.stderr


def test_phrases_are_weighed(work):
    sentence = "woman in red coat, no blue coat"
    result = found(sentence, "--explain", "-k", 6)
    assert [(p["text"], p["kind"], p["noun"], p["colours"], p["negated"]) for p in (
        result["phrases"]
    )] == [
        ("woman", "person", "woman", [], False),
        ("red coat", "upper", "coat", ["red"], False),
        ("blue coat", "upper", "coat", ["blue"], True),
    ]  # fmt: skip
    assert [sentence[p["start"] : p["end"]] for p in result["phrases"]] == (
        [p["text"] for p in result["phrases"]]
    )
    assert result["contradictions"] == []
    evidence = {hit["key"]: hit["evidence"] for hit in result["hits"]}
    assert max(evidence, key=lambda key: evidence[key][1]) == "red"
    assert max(evidence, key=lambda key: evidence[key][2]) == "blue"
    assert all(0 <= value <= 1 for row in evidence.values() for value in row)
    assert result["hits"][0]["key"] == "red"
    plain = found(sentence, "-k", 6)
    assert {"phrases", "contradictions"}.isdisjoint(plain)
    assert "evidence" not in plain["hits"][0]

    done = run("query", sentence, "-k", 2, "--explain", "--sheet", "found.png")
    header, first = done.stdout.splitlines()[:2]
    assert ' "woman"  "red coat"  "blue coat" excluded  picture' in header
    assert first.split()[0] == "1"
    assert "blue coat" in done.stderr
    with Image.open("found.png") as explained:
        size = explained.size
    assert run("query", sentence, "-k", 2, "--sheet", "found.png").exit_code == 0
    with Image.open("found.png") as without_bars:
        assert without_bars.size == (size[0], size[1] - 3 * 34)


@pytest.mark.parametrize(
    ("sentence", "codes"),
    [
        ("the and a", ["not_understood"]),
        ("a man and a woman", ["contradiction"]),
        ("a red coat, without a coat", ["contradiction"]),
        ("red red blue coat", ["colours_joined"]),
        ("red and blue coat", []),
        ("red coat", []),
        ("red " * 300, ["sentence_truncated"]),
        ("zzz", ["words_unknown"]),
    ],
)
def test_odd_sentences_are_answered_with_a_notice(work, sentence, codes):
    result = found(sentence, "--explain", "-k", 2)
    assert [notice["code"] for notice in result["notices"]] == codes
    assert len(result["hits"]) == 2
    assert result["truncated"] == (codes == ["sentence_truncated"])


@pytest.mark.parametrize("options", [[], ["--explain"], ["--paraphrases", 16]])
def test_a_sentence_is_parsed_and_tokenized_once(work, monkeypatch, options):
    sentence, parsed, batches = "a woman in a red coat", [], []
    read, encode = grammar._Parser.__init__, Tokenizer.encode
    monkeypatch.setattr(
        grammar._Parser, "__init__", lambda self, text: parsed.append(text) or read(self, text)
    )
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, texts: batches.append(texts) or encode(self, texts)
    )
    assert found(sentence, *options)["hits"][0]["key"] == "red"
    assert parsed == [sentence]
    (own,) = [texts for texts in batches if sentence in texts]
    assert own.count(sentence) == 1
    assert (len(own) > 1) == ("--paraphrases" in options)
