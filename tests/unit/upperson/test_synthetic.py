"""The synthetic pedestrians: people, pictures, captions and data sets."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from functools import cache
from io import BytesIO
from itertools import chain, combinations
from typing import get_args, get_type_hints
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from upperson.data.annotations import ATTRIBUTE_KINDS
from upperson.data.records import SPLITS, read_dataset
from upperson_rt.errors import InputError, UsageError
from upperson_synthetic import SyntheticSpec, describe, generate_people, iter_samples, write_dataset
from upperson_synthetic.body import _rings
from upperson_synthetic.captions import brief, caption
from upperson_synthetic.dataset import FORMAT
from upperson_synthetic.drawing import Pose
from upperson_synthetic.look import SOURCE, TARGET, anywhere
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
from upperson_synthetic.sampling import choose
from upperson_synthetic.scene import draw_body, render_person

BOTH_LOOKS = pytest.mark.parametrize("look", [SOURCE, TARGET], ids=lambda look: look.name)
SPEC = SyntheticSpec(
    look="street", train_ids=3, val_ids=1, test_ids=2, views=2, captions_per_image=2, seed=7
)
CAPTIONS = {"studio": "8c40b4c351a0f804", "street": "ce99cf3b7d9d1445"}
"""How SHA-256 of 400 captions with the attributes of who is described begins."""
MAN = Person(
    gender="man", hair_colour="brown", hair_style="short", headwear="none", headwear_colour=None,
    glasses=False, upper="shirt", upper_colour="red", pattern="plain", sleeves="long",
    lower="trousers", lower_colour="gray", shoes="boots", shoe_colour="black", bag="none",
    bag_colour=None, accessory="none", accessory_colour=None, skin=0,
)  # fmt: skip
POSE = Pose(
    yaw=0.0, stride=0.0, side=1, width=200, height=400, scale=380.0, origin=(100.0, 10.0), tilt=0.0,
    roll=0.0, bag_visible=False,
)  # fmt: skip
PICTURES = {
    "studio": [
        [188, 151, 165, 170, 110, 174, 154, 76, 165, 183, 175, 186],
        [201, 126, 199, 126, 121, 109, 169, 122, 155, 152, 102, 138],
        [172, 103, 165, 94, 96, 93, 129, 48, 141, 141, 112, 139],
    ],
    "street": [
        [96, 85, 85, 84, 83, 77, 103, 71, 89, 111, 115, 108],
        [59, 56, 56, 78, 69, 57, 74, 70, 63, 70, 47, 53],
        [110, 104, 117, 103, 69, 110, 99, 55, 109, 113, 92, 112],
    ],
}
"""Grey levels of three people in 4 rows of 3 blocks."""


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


@cache
def captions(look, count):
    """The same texts for each test that reads them."""
    rng = generator(5)
    return [(person, describe(person, look, rng)) for person in (crowd() * count)[:count]]


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


def test_people_are_consistent_and_distinguishable():
    assert all(is_consistent(person) for person in crowd())
    assert len({dataclasses.replace(person, skin=0) for person in crowd()}) == 300


@pytest.mark.parametrize(
    "change",
    [
        {"headwear": "cap"},
        {"headwear": "hood"},
        {"upper": "dress"},
        {"upper": "dress", "lower": "none", "lower_colour": None},
        {"lower": "skirt"},
        {"lower_colour": None},
        {"lower": "jeans", "lower_colour": "pink"},
        {"upper": "t-shirt", "sleeves": "long"},
        {"upper": "sweater", "sleeves": "short"},
        {"upper": "coat", "pattern": "dotted"},
        {"pattern": "logo"},
        {"bag": "backpack"},
        {"accessory": "scarf"},
        {"skin": 4},
    ],
    ids=str,
)
def test_things_that_do_not_go_together(change):
    assert is_consistent(MAN)
    assert not is_consistent(dataclasses.replace(MAN, **change))


def test_distractors_differ_in_exactly_one_attribute():
    people = sample_people(200, generator(2), distractors=0.4)
    doubles = sum(
        any(len(differing_fields(person, other)) == 1 for other in people) for person in people
    )
    assert doubles >= 0.4 * 200
    # Without distractors, look-alikes are next to impossible: there are billions of people.
    pairs = combinations(sample_people(60, generator(2), distractors=0.0), 2)
    assert min(len(differing_fields(*pair)) for pair in pairs) > 1


def test_look_alikes_come_in_pairs_who_differ_in_one_attribute():
    people = sample_look_alikes(200, generator(3))
    assert len(people) == 200
    assert all(is_consistent(person) for person in people)
    pairs = zip(people[::2], people[1::2], strict=True)
    assert {len(differing_fields(*pair)) for pair in pairs} == {1}


def test_crowds_have_the_size_asked_for_and_nobody_of_other_crowds():
    assert [len(sample_people(count, generator(0))) for count in (0, 1, 2)] == [0, 1, 2]
    # The same generator would draw the same people.
    assert not {*sample_people(50, generator(1), exclude=crowd())} & {*crowd()}
    for count, share in ((-1, 0.3), (3, -0.1), (3, 1.0)):
        with pytest.raises(ValueError, match="expected count"):
            sample_people(count, generator(0), distractors=share)


def test_choose_follows_the_weights():
    rng = generator(0)
    drawn = [choose(rng, {"a": 3.0, "never": 0.0, "b": 1.0}) for _ in range(2000)]
    assert "never" not in drawn
    assert 0.7 < drawn.count("a") / 2000 < 0.8


# --- Pictures


def test_pictures_have_the_sizes_of_the_look_and_the_street_looks_unlike_the_studio():
    exposure, cast = {}, {}
    for look in (SOURCE, TARGET):
        images = [render_person(p, look, generator(9, i)) for i, p in enumerate(crowd()[:40])]
        assert {image.mode for image in images} == {"RGB"}
        assert all(look.width[0] <= image.width <= look.width[1] for image in images)
        assert all(look.height[0] <= image.height <= look.height[1] for image in images)
        sizes = {image.size for image in images}
        assert sizes == {(64, 192)} if look is SOURCE else len(sizes) > 10
        pixels = [np.asarray(image, dtype=np.float32) for image in images]
        exposure[look.name] = np.std([array.mean() for array in pixels])
        corners = [array[:16, :10] for array in pixels]
        cast[look.name] = np.std([(a[..., 0] - a[..., 2]).mean() for a in corners])
    assert exposure["street"] > 1.5 * exposure["studio"]
    assert cast["street"] > 1.3 * cast["studio"]


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow", "black", "white"])
def test_the_upper_garment_has_its_colour(colour):
    plain = dataclasses.replace(MAN, upper="sweater", upper_colour=colour)
    assert is_consistent(plain)
    chests = []
    for seed in range(8):
        pixels = np.asarray(render_person(plain, SOURCE, generator(6, seed)), dtype=np.float32)
        chests.append(np.median(pixels[62:78, 26:38].reshape(-1, 3), axis=0))
    chest = np.mean(chests, axis=0)
    distance = {name: float(np.linalg.norm(chest - tint.rgb)) for name, tint in COLOURS.items()}
    assert min(distance, key=lambda name: distance[name]) == colour


def test_every_kind_of_thing_changes_the_picture():
    doubles = {}
    for pair in combinations(crowd()[:150], 2):
        fields = differing_fields(*pair)
        if len(fields) == 1:
            doubles[fields[0]] = pair
    seen_from_everywhere = doubles.keys() - {"glasses", "bag", "bag_colour", "skin"}
    assert len(seen_from_everywhere) >= 5
    for field in seen_from_everywhere:
        # From one generator, so that pose, light and noise stay the same.
        first, second = (render_person(p, SOURCE, generator(8)).tobytes() for p in doubles[field])
        assert first != second, field


# --- Captions


@BOTH_LOOKS
def test_captions_vary_and_are_grammatical(look):
    written = captions(look, 1500)
    texts = [text for _, text in written]
    assert len(set(texts[:600])) > 550
    assert all(text.isascii() and text == text.strip() for text in texts)
    assert not [text for text in texts if "  " in text or ".." in text or " ," in text]
    assert {len(text.split()) for text in texts} <= {*range(3, 60)}
    plurals = "jeans|trousers|shorts|boots|sneakers|sandals|glasses|hair"
    for person, text in written:
        lowered = text.lower()
        for article, word in re.findall(r"\b(an?) (\S+)", lowered):
            assert (article == "an") == (word[0] in "aeiou"), text
        # No article before a plural, and never two articles.
        assert not re.search(rf"\ban? (?!print|logo)(?:\S+ )?(?:{plurals})[.,]", lowered), text
        assert not re.search(r"\b(?:a|an|the) (?:a|an|the)\b", lowered), text
        wrong = {"he", "his"} if person.is_female else {"she", "her"}
        assert not {*re.findall(r"[a-z]+", lowered)} & wrong, text


def spoken(table, text):
    """Finds the values whose words occur, longest words first, so that no part of one counts."""
    words = [(word, value) for value, row in table.items() for word in row.words]
    found = set()
    for word, value in sorted(words, key=lambda pair: -len(pair[0])):
        text, count = re.subn(rf"(?<![\w-]){word}(?![\w-])", "#", text)
        if count:
            found.add(value)
    return found


@BOTH_LOOKS
def test_captions_mention_only_true_things_in_their_own_colour(look):
    colours = {word: name for name, tint in COLOURS.items() for word in tint.words}
    names = "|".join(sorted(colours, key=len, reverse=True))
    checked = 0
    for person, text in captions(look, 1500):
        lowered = re.sub(r"\b(his|her) shoes are\b", "", text.lower())
        assert spoken(TABLES["gender"], lowered) == {person.gender}, text
        for field in ("upper", "lower", "shoes", "bag", "headwear", "pattern"):
            assert spoken(TABLES[field], lowered) <= {getattr(person, field)}, text
        assert ("glasses" in lowered or "spectacles" in lowered) <= person.glasses, text
        for accessory in ("umbrella", "phone", "scarf"):
            assert (accessory in lowered) <= (person.accessory == accessory), text
        for field, name in (("bag", "bag"), ("shoes", "shoe"), ("headwear", "headwear")):
            nouns = "|".join(TABLES[field][getattr(person, field)].words) or "!"
            for word in re.findall(rf"\b({names}) (?:{nouns})\b", text.lower()):
                assert colours[word] == getattr(person, f"{name}_colour"), text
                checked += 1
    assert checked > 300


def test_the_styles_differ_but_share_their_words():
    studio = [text for _, text in captions(SOURCE, 6000)]
    street = [text for _, text in captions(TARGET, 1500)]
    assert sum(text.endswith(".") for text in studio) < 0.15 * len(studio)
    assert all(text.endswith(".") and text[0].isupper() for text in street)

    def words(texts):
        return {word for text in texts for word in re.findall(r"[a-z-]+", text.lower())}

    assert words(street) <= words(studio)


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


def test_anywhere_is_another_place_each_time():
    looks = [anywhere(generator(8, index)) for index in range(200)]
    assert looks == [anywhere(generator(8, index)) for index in range(200)]
    assert {look.background for look in looks} == {"studio", "street"}
    gains = np.array([look.cameras[0].gains for look in looks])
    assert len(np.unique(gains, axis=0)) == 200
    for camera in TARGET.cameras:  # None of the cameras that a model is tested on, but their like.
        assert 0 < np.linalg.norm(gains - camera.gains, axis=1).min() < 0.2


def test_a_bag_is_in_the_hand_that_is_free():
    places = {}
    for accessory in ("none", "phone"):
        bare = dataclasses.replace(MAN, accessory=accessory)
        pose = dataclasses.replace(POSE, yaw=0.0, bag_visible=True)
        drawn = [
            np.asarray(draw_body(person, pose)).astype(int)
            for person in (bare, dataclasses.replace(bare, bag="handbag", bag_colour="red"))
        ]
        places[accessory] = np.nonzero((drawn[0] != drawn[1]).any(axis=2))[1].mean()
    assert places["phone"] < POSE.width / 2 < places["none"]


@pytest.mark.parametrize("yaw", [math.pi / 2, -math.pi / 2])
@pytest.mark.parametrize("upper", ["coat", "jacket", "t-shirt"])
def test_a_profile_shows_a_gender(yaw, upper):
    pose = dataclasses.replace(POSE, yaw=yaw)

    def trunk(gender):
        """How much slimmer the waist is than the chest, and how far behind it, in pixels."""
        person = dataclasses.replace(MAN, gender=gender, upper=upper)
        outline = np.array(pose.outline(_rings(person, pose)))
        chest, waist = (
            outline[np.abs(outline[:, 1] - (10 + 380 * y)) < 3, 0] for y in (0.27, 0.41)
        )
        return np.ptp(waist) / np.ptp(chest), (chest.mean() - waist.mean()) * math.sin(yaw)

    (woman, her_bust), (man, his_bust) = trunk("woman"), trunk("man")
    assert her_bust > 5
    assert his_bust < 0
    assert woman < 0.87
    assert man - woman > 0.1


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
    # In coarse blocks, so that Pillow may round otherwise; what changes a shape or a place is seen.
    for index, expected in enumerate(PICTURES[look.name]):
        image = render_person(crowd()[index], look, generator(11, index)).convert("L")
        blocks = np.asarray(image.resize((3, 4), Image.Resampling.BOX)).ravel()
        assert blocks.tolist() == pytest.approx(expected, abs=2)


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


def test_the_attributes_that_are_known_are_a_persons():
    kinds = get_type_hints(Person)
    assert list(ATTRIBUTE_KINDS) == list(kinds)
    for name, kind in kinds.items():
        values = [
            value for part in (get_args(kind) or (kind,)) for value in get_args(part) or [part]
        ]
        found = {type(value) if isinstance(value, str) else value for value in values}
        assert found - {type(None)} == {ATTRIBUTE_KINDS[name]}


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
