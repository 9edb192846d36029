"""``index --shard`` on several machines, and ``gallery merge`` with its checks."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers.command_line import ROOT
from tests.helpers.gallery_places import sql
from tests.helpers.invoke import refusal, run_rt, run_rt_json, snapshot
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from tests.packaging.test_docs import commands_in
from upperson_alerts.outbox import outbox_of
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite import store
from upperson_shards import merge as merging
from upperson_shards.records import RECORD_FILE, Shard, ShardRecord, Tally

SHARDS = 3


def index(number, of=SHARDS, crops=None, bundle="bundle", to=None, more=()):
    """Index a shard of the original's pictures, or all of them for shard 0."""
    crops = crops or Path("bundle").resolve().parent / "crops"
    to = to or f"shards/{number}"
    shard = ("--shard", f"{number}/{of}") if number else ()
    return run_rt("index", crops, "-b", bundle, "-g", to, "--threads", 1, *shard, *more)


def merge(*shards, to="gallery", more=()):
    shards = shards or sorted(Path("shards").iterdir())
    return run_rt("gallery", "merge", *shards, "-g", to, *more)


def merged(*shards, to="gallery"):
    result = merge(*shards, to=to, more=["--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refuses(result, exit_code, *facts):
    """Check that nothing was made, and that the error names some facts."""
    refusal(result, exit_code)
    assert not Path("gallery").exists()
    assert not list(Path().glob(".gallery*"))
    assert [fact for fact in facts if fact not in result.stderr] == [], result.stderr


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with ./bundle, ./shards, and ./crops of two cameras and what is no picture."""
    folder = tmp_path_factory.mktemp("shards")
    make_toy_bundle(folder / "bundle")
    for camera in ("gate", "hall"):
        (folder / "crops" / camera).mkdir(parents=True)
        for colour in COLOURS:
            draw_person(folder / "crops" / camera / f"{colour}.png", colour, seed=len(camera))
    (folder / "crops" / "bad.png").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number in range(1, SHARDS + 1):
            assert index(number).exit_code in (0, 3)
    return folder


@pytest.fixture
def work(original, tmp_path, monkeypatch):
    """A copy of it; its shards name the original's pictures."""
    monkeypatch.chdir(shutil.copytree(original, tmp_path / "work"))
    shutil.rmtree("bundle")
    Path("bundle").symlink_to(original / "bundle")
    return tmp_path / "work"


def test_every_picture_is_there_once(work, original):
    found = merged()
    assert (found["shards"], found["pictures"], found["items"]) == (3, 13, 12)
    assert (found["with_items"], found["empty"], found["out_of_reach"]) == (12, 0, 0)
    assert [Path(one["path"]).name for one in found["skipped"]] == ["bad.png"]
    with Gallery.open("gallery") as gallery:
        keys = [item.key for item in gallery.items()]
        assert gallery.verify() == []
        assert gallery.info().variants == {"int8": 12}
    wanted = {str(path) for path in (original / "crops").rglob("*.png")}
    assert sorted(keys) == sorted(wanted - {str(original / "crops/bad.png")})
    assert found["keys"] == Tally.of(keys).total
    # It is a gallery like any other, with the hits of all shards.
    hits = run_rt_json("query", "red", "-b", "bundle", "-k", 2, "--threads", 1)["hits"]
    assert {Path(hit["source"]).name for hit in hits} == {"red.png"}
    assert index(0, to="gallery").exit_code == 3  # Only for the bad picture: it is no shard.


def test_alerts_of_the_shards_are_kept_and_compare_new_pictures(work, monkeypatch):
    monkeypatch.setenv("UPPERSON_BUNDLE", "bundle")
    for number, sentence in ((1, "man in red coat"), (3, "woman in blue coat")):
        add = ("alert", "add", sentence, "-g", f"shards/{number}", "--max-false", "1/day")
        assert run_rt_json(*add)["state"] == "collecting"
    assert run_rt("alert", "pause", "man in red coat", "-g", "shards/1").exit_code == 0
    wanted = {
        one["id"]: one["state"]
        for number in (1, 3)
        for one in run_rt_json("alert", "list", "-g", f"shards/{number}")["alerts"]
    }
    assert merged()["alerts"] == 2
    found = run_rt_json("alert", "list", "-g", "gallery")["alerts"]
    assert {one["id"]: one["state"] for one in found} == wanted
    draw_person("new.png", "blue", seed=9)
    assert index(0, crops="new.png", to="gallery").exit_code == 0
    with Gallery.open("gallery") as gallery, outbox_of(gallery) as outbox:
        assert gallery.count() == 13
        assert outbox.document("alerts/visits") == {"": 1}


def test_shards_do_not_depend_on_machine_or_order(work):
    """Pictures that are not where another machine had them are reported."""
    shutil.copytree("crops", "mounted")
    index(2, crops="mounted", to="others/2")
    record = ShardRecord.read(Path("shards/2", RECORD_FILE))
    other = ShardRecord.read(Path("others/2", RECORD_FILE))
    assert (record.whole, record.own) == (other.whole, other.own)
    shutil.move("mounted", "gone")
    # So parts of both belong together.
    found = merged("others/2", "shards/3", "shards/1")
    assert (found["items"], found["out_of_reach"]) == (12, other.with_items)
    assert found["first_out_of_reach"].startswith(f"{work}/mounted/")


def test_each_name_is_in_one_shard():
    names = [f"camera {n % 7}/{n}.jpg" for n in range(3000)] + ["é.jpg", "\udcff.jpg"]
    shards = [Shard(number=number, of=16) for number in range(1, 17)]
    held = [[name for name in names if shard.holds(name)] for shard in shards]
    assert sorted(name for part in held for name in part) == sorted(names)
    assert all(100 < len(part) < 300 for part in held)
    assert sum(map(Tally.of, held), Tally()) == Tally.of(names) == Tally.of(reversed(names))
    # Machines of all kinds and releases must agree.
    assert [shard.number for shard in shards if shard.holds("gate/red.png")] == [6]


def test_a_shard_is_not_repeated_from_another_mount_point(work, original):
    """Keys are paths: every picture would be there twice."""
    shutil.copytree(original / "crops", "elsewhere")
    before = snapshot(work / "shards/2")
    refuses(index(2, crops="elsewhere"), 3, f"{original}/crops", f"{work}/elsewhere")
    assert snapshot(work / "shards/2") == before
    shutil.rmtree("shards/2")
    index(2, crops="elsewhere")
    # The other machine gives the place the name that it had.
    shutil.move("elsewhere", "mounted")
    Path("elsewhere").symlink_to("mounted")
    again = index(2, crops="elsewhere")
    count = ShardRecord.read(Path("shards/2", RECORD_FILE)).items.count
    assert f"indexed {count} pictures, {count} in place of earlier ones" in again.stdout
    assert merged()["items"] == 12


def test_a_shard_grows_by_a_folder_beside_the_first(work, original):
    def days(*names):
        folders = [Path("days", name) for name in names]
        return run_rt("index", *folders, "-b", "bundle", "-g", "grown", "--shard", "1/1")

    for name in ("mon", "tue"):
        shutil.copytree(original / "crops/gate", Path("days", name))
    count = len(list(Path("days/mon").iterdir()))
    assert days("mon").exit_code == 0
    assert f"{count} in place of earlier ones" in days("mon", "tue").stdout
    refuses(days("tue"), 3)
    assert merged("grown")["items"] == 2 * count


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--attribute", "site=north", "--attribute", "n=3"], "--attribute n=3 site='north'"),
        (
            ["--detector", "hog", "--detector-score", "0.5"],
            "--detector hog (width 640, scores from 0.5)",
        ),
    ],
)
def test_options_that_change_rows_are_the_same_for_all(work, options, shown):
    name = options[0]
    before = snapshot(work / "shards/3")
    refuses(index(3, more=options), 3, f"no {name}", shown)
    assert snapshot(work / "shards/3") == before
    shutil.rmtree("shards/3")
    index(3, more=options)
    refuses(merge(), 3, f"shards/1 with no {name}", f"shards/3 with {shown}")


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_shard_is_not_finished_until_it_is_run_again(work, monkeypatch):
    """If it had added nothing, with other options, too."""
    shutil.rmtree("shards/1")
    with monkeypatch.context() as patch:
        patch.setattr("upperson_rt.gallery.sqlite.SqliteGallery.add", interrupt)
        assert index(1, more=["--camera", "gaet"]).exit_code == 130
        assert index(2).exit_code == 130
    refuses(merge(), 3, "1/3")
    index(1)
    refuses(merge(), 3, "2/3")
    index(2)
    assert merged()["items"] == 12


def test_what_is_no_shard(work):
    for shard in ("0/3", "4/3", "3", "a/b"):
        refuses(run_rt("index", "crops", "-b", "bundle", "--shard", shard), 2)


def test_shards_do_not_mix_while_they_are_indexed(work):
    refuses(index(2, to="shards/1"), 3, "1/3", "2/3")
    refuses(index(0, to="shards/1"), 3, "1/3")
    index(0, to="plain")
    refuses(index(1, to="plain"), 3)


def another_list(work):
    (work / "crops/gate/red.png").unlink()
    index(3, crops="crops", to="shards/x")


def another_model(work):
    make_toy_bundle(work / "other", seed=1)
    index(3, bundle="other", to="shards/x")


@pytest.mark.parametrize(
    ("prepare", "others", "exit_code", "fact"),
    [
        (None, ["3"], 3, "1 of 3 shards"),
        (None, ["2", "2", "3"], 3, "in shards/2 and shards/2"),
        (lambda _: shutil.copytree("shards/2", "shards/x"), ["2", "x", "3"], 3, "shard 2/3"),
        (lambda _: index(3, of=4, to="shards/x"), ["2", "x"], 3, "shards/1 is 1/3, shards/x 3/4"),
        (another_list, ["2", "x"], 3, "shards/1 is of 13 pictures, shards/x of 12"),
        (another_model, ["2", "x"], 6, "two models"),
        (None, ["4"], 3, "shards/4"),
    ],
)
def test_shards_that_make_no_whole(work, prepare, others, exit_code, fact):
    if prepare is not None:
        prepare(work)
    refuses(merge("shards/1", *(f"shards/{one}" for one in others)), exit_code, fact)


def delete_picture(shard):
    with Gallery.open(shard) as gallery:
        gallery.delete([next(iter(gallery.items())).key])


def rewrite(old, new):
    def damage(shard):
        file = shard / RECORD_FILE
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return damage


def stop_halfway(shard):
    record = ShardRecord.read(shard / RECORD_FILE)
    dataclasses.replace(record, finished=False).write(shard / RECORD_FILE)


@pytest.mark.parametrize(
    ("damage", "exit_code", "fact"),
    [
        (lambda shard: sql(shard, "UPDATE items SET camera = 'x' WHERE id = 2"), 6, "with id 2"),
        (lambda shard: sql(shard, "UPDATE items SET vector = x'00' WHERE id = 1"), 6, "with id 1"),
        (lambda shard: sql(shard, "DELETE FROM items WHERE id = 1"), 6, "shards/2"),
        (rewrite('"empty": 0', '"empty": 1'), 6, "shard.json"),
        (rewrite("{", ""), 3, "shard.json"),
        (lambda shard: (shard / RECORD_FILE).unlink(), 3, "shards/2"),
        (lambda shard: (shard / "gallery.sqlite").unlink(), 3, "shards/2"),
        (delete_picture, 6, "shards/2"),
        (stop_halfway, 3, "2/3"),
    ],
)
def test_a_damaged_shard(work, damage, exit_code, fact):
    damage(work / "shards/2")
    refuses(merge(), exit_code, fact)


def test_one_picture_in_two_shards(work):
    """As only a record that lies can have it: names are divided by a hash."""
    with Gallery.open("shards/1") as one, Gallery.open("shards/2") as two:
        (items, vectors), *_ = one.vectors()
        two.add(items[:1], vectors[:1])
        items = Tally.of(item.key for item in two.items())
    record = ShardRecord.read(work / "shards/2" / RECORD_FILE)
    dataclasses.replace(record, items=items).write(work / "shards/2" / RECORD_FILE)
    refuses(merge(), 6, "shards/2")


def test_a_place_that_is_taken_is_left_alone(work):
    Path("gallery").mkdir()
    (work / "gallery/mine").write_text("mine")
    for shards in ((), ("nowhere",)):  # Refused before anything is read.
        refusal(merge(*shards), 3)
    assert (work / "gallery/mine").read_text() == "mine"
    result = merge("shards/1", to="milvus://host:19530/a", more=["--json"])
    refusal(result, 2, "gallery_not_a_folder")


def test_a_merge_that_went_wrong_is_noticed_and_not_kept(work, monkeypatch):
    """A sound gallery, but not of all rows."""
    append = merging._append
    monkeypatch.setattr(merging, "_append", lambda to, shard, batch: append(to, shard, batch[1:]))
    refuses(merge(), 6)


@pytest.mark.parametrize("step", ["_check_keys", "_check_merged"])
def test_a_killed_merge_leaves_nothing_or_all(work, monkeypatch, step):
    """In the middle of the copying, and where the new gallery gets its name."""
    before = snapshot(work / "shards")
    child = os.fork()
    if not child:
        monkeypatch.setattr(merging, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        merge()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not Path("gallery").exists()
    monkeypatch.setattr(store, "_ROWS_AT_A_TIME", 1)
    assert merged()["items"] == 12
    assert snapshot(work / "shards") == before
    assert not list(Path().glob(".gallery*"))


def test_the_commands_of_the_page_run(work, original):
    """Those of "From several boxes" in docs/how-to/gallery.md, in order."""
    page = (ROOT / "docs/how-to/gallery.md").read_text("utf-8")
    section = page[page.index("## From several boxes") :]
    commands = list(commands_in(section[: section.index("\n## ", 1)]))
    shutil.rmtree("shards")
    shutil.copytree(original / "crops", "pictures", ignore=shutil.ignore_patterns("bad.png"))
    for program, *words in commands:
        assert program == "upperson-rt"
        result = run_rt(*words)
        assert result.exit_code == 0, result.stderr
    assert len(commands) == 5
    assert result.stdout == "gallery 'gallery' is sound: 12 pictures\n"
