"""The synthetic pedestrians: people, pictures, captions, data sets, and the sites of their own."""

import dataclasses
import hashlib
import json
import re
import shutil
from functools import cache
from io import BytesIO
from itertools import chain, combinations
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.refused import refused
from upperson.data.records import SPLITS, read_dataset
from upperson.model.base import load_base
from upperson_rt.errors import InputError, UsageError
from upperson_synthetic import (
    LOOKS,
    SyntheticSpec,
    describe,
    generate_people,
    iter_samples,
    write_dataset,
)
from upperson_synthetic.captions import brief, caption
from upperson_synthetic.dataset import FORMAT, _views
from upperson_synthetic.look import SITES, SOURCE, TARGET
from upperson_synthetic.people import (
    COLOURS,
    GLASSES,
    SLEEVES,
    TABLES,
    Person,
    is_consistent,
    sample_look_alikes,
    sample_people,
)
from upperson_synthetic.scene import render_person

BOTH_LOOKS = pytest.mark.parametrize("look", [SOURCE, TARGET], ids=lambda look: look.name)
SPEC = SyntheticSpec(
    look="street", train_ids=3, val_ids=1, test_ids=2, views=2, captions_per_image=2, seed=7
)
CAPTIONS = {"studio": "8c40b4c351a0f804", "street": "ce99cf3b7d9d1445"}
"""How SHA-256 of 400 captions with the attributes of who is described begins."""


def generator(*key):
    return np.random.default_rng(key)


def differing_fields(first, second):
    return [
        field.name
        for field in dataclasses.fields(Person)
        if getattr(first, field.name) != getattr(second, field.name)
    ]


@cache
def crowd():
    return sample_people(300, generator(1))


def files(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def says(text, name, value):
    if name in {"glasses", "sleeves", "hair_style"}:
        words = {"glasses": GLASSES, "hair_style": [value]}.get(name) or SLEEVES[value]
    else:
        words = TABLES.get(name, COLOURS)[value].words or [value]
    # A size stands before the colour: a long red coat.
    return any(word in text.lower() or word.split(" ")[-1] in text.lower() for word in words)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The data set of `SPEC`; not to be changed."""
    return write_dataset(tmp_path_factory.mktemp("written") / "set", SPEC)


def lines_of(root):
    return [json.loads(line) for line in (root / "annotations.jsonl").read_text().splitlines()]


# --- People


def test_distractors_and_look_alikes_differ_in_exactly_one_attribute():
    people = sample_people(200, generator(2), distractors=0.4)
    doubles = sum(
        any(len(differing_fields(person, other)) == 1 for other in people) for person in people
    )
    assert doubles >= 0.4 * 200
    # Without distractors, look-alikes are next to impossible: there are billions of people.
    pairs = combinations(sample_people(60, generator(2), distractors=0.0), 2)
    assert min(len(differing_fields(*pair)) for pair in pairs) > 1
    people = sample_look_alikes(200, generator(3))
    assert all(is_consistent(person) for person in people)
    pairs = zip(people[::2], people[1::2], strict=True)
    assert [len(differing_fields(*pair)) for pair in pairs] == [1] * 100


def test_crowds_have_the_size_asked_for_and_nobody_of_other_crowds():
    assert [len(sample_people(count, generator(0))) for count in (0, 1, 2)] == [0, 1, 2]
    # The same generator would draw the same people.
    assert not {*sample_people(50, generator(1), exclude=crowd())} & {*crowd()}
    for count, share in ((-1, 0.3), (3, -0.1), (3, 1.0)):
        with pytest.raises(ValueError, match="expected count"):
            sample_people(count, generator(0), distractors=share)


# --- Pictures


# --- Captions


@BOTH_LOOKS
def test_a_caption_says_what_it_says(look):
    mentioned = set()
    for index, person in enumerate(crowd()[:100]):
        written = caption(person, look, generator(6, index))
        assert written.text == describe(person, look, generator(6, index))
        assert written.holds(person)
        assert not written.excluded
        assert len(written.mentioned) >= 3  # the gender and two more
        for name, value in written.mentioned.items():
            assert says(written.text, name, value), (name, value, written.text)
        assert sum(written.holds(other) for other in crowd()) < 100
        mentioned |= written.mentioned.keys()
    assert mentioned == {field.name for field in dataclasses.fields(Person)} - {"skin"}


def test_a_short_question_is_true_and_short():
    lengths, denials, genderless = [], 0, 0
    for index, person in enumerate(crowd() * 5):
        asked = brief(person, generator(7, index))
        assert asked.holds(person)
        assert asked.text.isascii()
        assert asked.text == asked.text.lower()
        denies = bool(re.search(r"without (an?|any) |with no |not (wearing|carrying) ", asked.text))
        for name, value in asked.mentioned.items():
            bagless = denies and asked.text.endswith(" bag")
            assert bagless if value == "none" else says(asked.text, name, value), asked
        for name, value in asked.excluded.items():
            assert denies if value != "none" else asked.text.endswith((" with a bag", "ing a bag"))
            assert not asked.holds(dataclasses.replace(person, **{name: value}))
        lengths.append(len(asked.text.split()))
        denials += denies
        genderless += "gender" not in asked.mentioned
    assert np.median(lengths) <= 6
    assert max(lengths) <= 22
    assert 0.12 < denials / len(lengths) < 0.3
    assert 0.15 < genderless / len(lengths) < 0.45


# --- Data sets


@BOTH_LOOKS
def test_the_format_stands_for_these_people_captions_and_pictures(look):
    # Reused folders and published numbers rely on them: a change raises FORMAT.
    spec = dataclasses.replace(SPEC, train_ids=60, val_ids=20, test_ids=40)
    people = [person for split in SPLITS for person in generate_people(spec, split)]
    rng = generator(5)
    texts = [
        f"{dataclasses.astuple(person)} {describe(person, look, rng)}"
        for person in (people * 4)[:400]
    ]
    found = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    assert (FORMAT, found) == (3, CAPTIONS[look.name])


def test_written_data_sets_are_equal_byte_for_byte(tmp_path, written):
    again = write_dataset(tmp_path / "a", SPEC, progress := Mock())
    assert progress.mock_calls == [call(done, 12) for done in range(1, 13)]
    first = files(written)
    assert first == files(again)
    other = files(write_dataset(tmp_path / "b", dataclasses.replace(SPEC, seed=8)))
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_annotations_describe_the_files(written):
    lines = lines_of(written)
    assert len(lines) == 6 * 2 * 2
    keys = {"image", "pid", "caption", "split", "camera", "attributes"}
    assert all(set(line) == keys for line in lines)
    pids = {split: {line["pid"] for line in lines if line["split"] == split} for split in SPLITS}
    assert pids == {"test": {0, 1}, "val": {2}, "train": {3, 4, 5}}
    assert lines[0]["image"] == "images/train/00003_0.jpg"
    for line in lines:
        assert line["image"].startswith(f"images/{line['split']}/{line['pid']:05d}_")
        person = generate_people(SPEC, line["split"])[line["pid"] - SPEC.first_pid(line["split"])]
        assert line["attributes"] == dataclasses.asdict(person)
        (camera,) = (camera for camera in TARGET.cameras if camera.name == line["camera"])
        Image.new("RGB", (8, 8)).save(buffer := BytesIO(), "JPEG", quality=camera.jpeg_quality)
        with Image.open(written / line["image"]) as image, Image.open(buffer) as expected:
            assert image.quantization == expected.quantization
    records = read_dataset("jsonl", written)["train"]
    assert [record.attributes for record in records] == [
        line["attributes"] for line in lines[:12:2]
    ]
    images = {str(path.relative_to(written)) for path in written.rglob("*.jpg")}
    assert images == {line["image"] for line in lines}
    views = {(line["pid"], line["camera"]) for line in lines}
    assert len(views) == 12, "the views of a person come from different cameras"


def test_samples_in_memory_equal_those_on_disk_also_where_work_is_shared_out(written):
    lines = [line for line in lines_of(written) if line["split"] == "train"]
    parts = [iter_samples(SPEC, "train", stop=2), iter_samples(SPEC, "train", start=2)]
    for (image, text, pid), line in zip(chain(*parts), lines, strict=True):
        assert (text, pid) == (line["caption"], line["pid"])
        with Image.open(written / line["image"]) as file:
            assert image.tobytes() == file.convert("RGB").tobytes()


def test_a_split_depends_neither_on_the_others_nor_on_the_look():
    larger, studio = (
        dataclasses.replace(SPEC, **changes)
        for changes in ({"train_ids": 20, "val_ids": 4}, {"look": "studio"})
    )
    one, two = (
        [(image.tobytes(), text, pid) for image, text, pid in iter_samples(spec, "test")]
        for spec in (SPEC, larger)
    )
    assert one == two
    assert generate_people(SPEC, "test") == generate_people(studio, "test")
    spec = dataclasses.replace(SPEC, train_ids=400, val_ids=50, test_ids=100)
    people = [person for split in SPLITS for person in generate_people(spec, split)]
    assert len({dataclasses.replace(person, skin=0) for person in people}) == 550
    assert [spec.first_pid(split) for split in SPLITS] == [150, 100, 0]


def test_an_interrupted_run_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "set", SPEC, Mock(side_effect=[None] * 3 + [KeyboardInterrupt]))
    assert list(tmp_path.iterdir()) == []


def test_an_equal_data_set_is_reused(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    never = Mock()
    assert write_dataset(written, SPEC, never) == written
    never.assert_not_called()
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


@pytest.fixture
def older(tmp_path, written):
    """The data set of `SPEC` as a version before attributes would have left it."""
    root = shutil.copytree(written, tmp_path / "older")
    lines = [{k: v for k, v in line.items() if k != "attributes"} for line in lines_of(root)]
    (root / "annotations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    set_format(root, 1)
    return root


def set_format(root, number):
    document = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(document | {"format": number}))


def test_an_older_set_is_rendered_anew_only_on_request_and_with_nothing_else_in_it(older, written):
    before = files(older)
    another = "dataset_of_another_version"
    with refused(another, InputError, path=older, found=1, expected=FORMAT):
        write_dataset(older, SPEC)
    (older / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"notes\.txt"):
        write_dataset(older, SPEC, replace_older=True)
    (older / "notes.txt").unlink()
    assert files(older) == before
    set_format(older, FORMAT + 1)
    with refused(another, InputError, found=FORMAT + 1):
        write_dataset(older, SPEC, replace_older=True)
    set_format(older, 1)
    assert files(write_dataset(older, SPEC, replace_older=True)) == files(written)


def test_anything_else_in_the_way_is_an_error(tmp_path, written):
    with refused("another_dataset", InputError, path=written, differences=" (views is 2, not 3)"):
        write_dataset(written, dataclasses.replace(SPEC, views=3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with refused("not_synthetic", InputError):
        write_dataset(tmp_path / "mine", SPEC)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("look", "moon"), ("train_ids", -1), ("views", 0), ("captions_per_image", 0), ("seed", -1)],
)
def test_impossible_specifications_are_rejected(setting, value):
    with refused("setting_out_of_range", UsageError, setting=setting):
        dataclasses.replace(SPEC, **{setting: value})


LOOKS_BEFORE_SITES = {
    "studio": "9177ab6fde40627e", "indoor": "26a8480f8c3ef5db", "street": "b854fde5d0a880f7",
    "night": "b90dc2fdb84fbd50", "low-resolution": "fe7f4a6488524dd3", "hard": "c4dbe4e783e07a2b",
}  # fmt: skip
"""How SHA-256 of 16 JPEG files with their captions and people began before there were sites."""


@pytest.mark.parametrize("look", LOOKS_BEFORE_SITES)
def test_sites_leave_the_other_looks_as_they_were(look):
    spec = SyntheticSpec(look=look, train_ids=2, val_ids=2, test_ids=4, views=2, seed=11)
    digest = hashlib.sha256()
    for view in chain.from_iterable(_views(spec, split) for split in ("test", "val", "train")):
        digest.update(view.jpeg)
        digest.update("\n".join(view.captions).encode())
        digest.update(repr(view.person).encode())
    assert digest.hexdigest()[:16] == LOOKS_BEFORE_SITES[look]


def words_of(things):
    """The words of garments and bags of sites, without *bag*, which all looks have."""
    texts = [text for thing in things for text in TABLES[thing.field][thing.value].words]
    return {word for text in texts for word in text.split()} - {"bag"}


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_a_site_has_people_in_things_and_words_of_its_own(site):
    spec = SyntheticSpec(look=site.name, train_ids=300, val_ids=20, test_ids=300, views=1)
    test, train = generate_people(spec, "test"), generate_people(spec, "train")
    everyone = [*test, *generate_people(spec, "val"), *train]
    assert all(is_consistent(person) for person in everyone)
    assert len({dataclasses.replace(person, skin=0) for person in everyone}) == 620
    street = generate_people(dataclasses.replace(spec, look="street"), "test")
    assert sum(person == other for person, other in zip(test, street, strict=True)) / 300 > 0.4
    rng = np.random.default_rng(12)
    for thing in site.things:
        having = [person for person in test if getattr(person, thing.field) == thing.value]
        assert abs(len(having) / 300 - thing.share) < 0.08
        colours = {getattr(person, f"{thing.field}_colour") for person in having}
        assert colours == {*thing.colours}
        assert not [p for p in street if getattr(p, thing.field) == thing.value]
        captions = " ".join(describe(person, site, rng) for person in having for _ in range(8))
        assert all(word in captions for word in words_of([thing]))
        # The picture differs from that of the same person in a coat, or with a handbag.
        other = {"upper": "coat", "bag": "handbag"}[thing.field]
        for person in having[:5]:
            plain = dataclasses.replace(person, **{thing.field: other})
            first, second = (
                render_person(p, SOURCE, np.random.default_rng(8)) for p in (person, plain)
            )
            assert first.tobytes() != second.tobytes()


def test_no_base_has_seen_the_words_of_a_site():
    words = words_of([thing for site in SITES for thing in site.things])
    assert {"steward", "vest", "blazer", "porter", "uniform", "branded", "tote"} < words
    values = {thing.value for site in SITES for thing in site.things}
    rng = np.random.default_rng(13)
    people = sample_people(1500, rng)
    assert not values & {value for person in people for value in (person.upper, person.bag)}
    people += sample_look_alikes(1500, rng)
    assert not values & {value for person in people for value in (person.upper, person.bag)}
    looks = [LOOKS[name] for name in ("studio", "street", "indoor")]
    texts = [describe(person, look, rng) for person in people for look in looks]
    texts += [brief(person, rng).text for person in people]
    found = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    assert not found & words
    base = load_base("upperson-small", None)
    tokens = base.tokenizer().encode([" ".join(sorted(words))]).input_ids[0]
    seen = base.clip.token_embedding.weight[torch.from_numpy(tokens.astype(np.int64))].any(dim=1)
    assert seen[0]
    assert seen[-1]
    assert not seen[1:-1].any()
