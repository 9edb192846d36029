"""Questions about attributes, held against simple models whose answers are known."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson.attributes import measure_attributes
from upperson.data.records import Record
from upperson.questions import (
    ANY,
    THINGS,
    attribute_columns,
    measure_evidence,
    short_questions,
    thing_questions,
)
from upperson_phrases.evidence import Evidence
from upperson_rt.errors import InputError
from upperson_synthetic.people import sample_people

VIEWS = 2


def record(number, person, view=0):
    caption = f"{person.gender} in {person.upper_colour} {person.upper} {number}"
    truth = dataclasses.asdict(person)
    return Record(Path(f"{number}_{view}.jpg"), number, (caption, caption), None, truth)


@pytest.fixture(scope="module")
def people():
    return sample_people(120, np.random.default_rng(3))


@pytest.fixture(scope="module")
def records(people):
    return [record(n, person, view) for n, person in enumerate(people) for view in range(VIEWS)]


class Knowing:
    """A model that knows some words: a place in the space for each value of some attributes."""

    def __init__(self, records, *names):
        self.names = names
        self.places: dict[tuple[str, str], int] = {}
        rows = []
        for record in records:
            assert record.attributes is not None
            values = [(name, str(record.attributes[name])) for name in names]
            rows.append([self.places.setdefault(value, len(self.places)) for value in values])
        self.image_GE = np.zeros((len(records), len(self.places) + 1), dtype=np.float32)
        for row, places in zip(self.image_GE, rows, strict=True):
            row[[*places, -1]] = 1 / np.sqrt(len(places) + 1)

    def embed_texts(self, texts):
        text_NE = np.zeros((len(texts), self.image_GE.shape[1]), dtype=np.float32)
        for row, text in zip(text_NE, texts, strict=True):
            for (name, value), place in self.places.items():
                # The trousers' colour, which comes after "and", is not the coat's.
                said = text.split(" and ")[0] if name == "upper_colour" else text
                row[place] = f" {value} " in f" {said} "
            row[-1] = 0.1
        return text_NE / np.linalg.norm(text_NE, axis=1, keepdims=True)


def measure(model, records):
    texts = [text for record in records for text in record.captions]
    return measure_attributes(records, model.embed_texts(texts), model.image_GE, model.embed_texts)


def test_a_model_that_knows_the_words_is_right(records):
    model = Knowing(records, "gender", "upper", "upper_colour", *THINGS)
    report = measure(model, records)
    short = report.short["person"]
    assert short.asked == 13 * 12
    assert 0 < short.present < short.asked
    assert {share.top1 for share in short.parts.values()} == {100.0}
    assert short.map == short.presence_auroc == 100.0
    assert short.parts["all"].at10 == pytest.approx(short.parts["all"].at10_most)
    assert short.parts["all"].at10_most < 100
    for values in report.with_thing.values():
        assert all(share.at10 == share.at10_most for share in values.values())
    assert report.clothed["wears it"].top1 == 100, "what is denied takes nothing from what is asked"
    assert report.clothed["all as asked"].top1 == 100
    assert report.clothed["wears it without the denial"].top1 == 100
    assert report.clothed["all as asked without the denial"].top1 < 100
    # What is denied is weighed and goes down, though the model takes no notice of "without".
    for name, values in report.without_thing.items():
        assert values["all"].at10 == 0
        assert values["all"].chance > 5
        assert report.with_thing[name]["all"].at10 > 80
    assert report.captions["gender"].top1 == report.captions["upper"].top1 == 100


def test_a_model_that_sees_colours_alone(records):
    class Mixing(Knowing):
        def embed_texts(self, texts):
            return super().embed_texts([text.replace(" and ", " ") for text in texts])

    report = measure(Knowing(records, "upper_colour"), records)
    assert report.short["person"].parts["colour"].top1 == 100
    assert report.captions["upper_colour"].r1_lost == 0
    assert report.captions["upper"].r1_lost > 0
    mixes = measure(Mixing(records, "upper_colour"), records).swapped
    assert report.swapped.pictures == mixes.pictures > 50
    assert (report.swapped.right, mixes.right) == (100, 0), "equal scores are not right"


def test_numbers_are_those_of_a_slow_and_simple_count(records):
    rng = np.random.default_rng(0)
    image_GE = rng.normal(size=(len(records), 8)).astype(np.float32)
    image_GE[:, -1] = -20  # No score is above zero.
    directions = {}

    def embed(texts):
        for text in texts:
            direction = np.append(rng.normal(size=7), 1.0).astype(np.float32)
            directions.setdefault(text, direction)
        return np.stack([directions[text] for text in texts])

    captions = [text for record in records for text in record.captions]
    report = measure_attributes(records, embed(captions), image_GE, embed)
    truth = [record.attributes for record in records]

    def ranking(text):
        return sorted(range(len(records)), key=lambda i: -float(directions[text] @ image_GE[i]))

    hits, best = [], {True: [], False: []}
    columns = attribute_columns(records)
    for question in short_questions(columns, "{gender} in {upper_colour} {upper}"):
        order = ranking(question.text)
        right = [all(truth[i][k] == v for k, v in question.wanted.items()) for i in order]
        best[any(right)].append(float(directions[question.text] @ image_GE[order[0]]))
        if any(right):
            hits.append(right)
    short = report.short["person"]
    assert short.present == len(hits)
    assert short.parts["all"].top1 == pytest.approx(100 * np.mean([right[0] for right in hits]))
    assert short.parts["all"].at10 == pytest.approx(100 * np.mean([r[:10] for r in hits]))
    precision = [
        np.mean([sum(right[: place + 1]) / (place + 1) for place in np.flatnonzero(right)])
        for right in hits
    ]
    assert short.map == pytest.approx(100 * np.mean(precision))
    above = [present > absent for present in best[True] for absent in best[False]]
    assert short.presence_auroc == pytest.approx(100 * np.mean(above))

    bags = [row["bag"] == "backpack" for row in truth]
    with_bag = report.with_thing["bag"]["backpack"]
    order = ranking("a person with a backpack")
    assert with_bag.at10 == pytest.approx(10 * sum(bags[i] for i in order[:10]))
    assert with_bag.chance == pytest.approx(100 * np.mean(bags))

    shared, right, kept = [], [], []
    for row, record in enumerate(records):
        for text in record.captions:
            order = ranking(text)
            same = [i for i in order if truth[i]["upper"] == truth[row]["upper"]]
            right.append(records[order[0]].pid == record.pid)
            shared.append(same[0] == order[0])
            kept.append(records[same[0]].pid == record.pid)
    assert report.r1 == pytest.approx(100 * np.mean(right))
    assert report.captions["upper"].top1 == pytest.approx(100 * np.mean(shared))
    lost = 100 * (np.mean(kept) - np.mean(right))
    assert report.captions["upper"].r1_lost == pytest.approx(lost)
    assert "skin" not in report.captions, "captions never say it"


def test_what_a_caption_says_is_counted_apart():
    # Everybody's first picture is number 1, a man in a red coat with a phone and no bag.
    truth = {"gender": "man", "upper": "coat", "upper_colour": "red"}
    truth |= {"bag": None, "accessory": "phone", "pattern": "plain", "glasses": "yes"}
    people = [
        (truth, "A man in a red overcoat is holding a phone."),
        (truth, "a person with glasses"),
        (truth | {"gender": "woman", "bag": "backpack"}, "A lady with a rucksack, red shoes."),
        (truth | {"upper_colour": "blue", "accessory": None}, "male, coat, not in a green dress"),
    ]
    records = [
        Record(Path(f"{pid}.jpg"), pid, (text,), None, attributes)
        for pid, (attributes, text) in enumerate(people)
    ]
    image_GE = np.array([[1], [2], [0], [0]], dtype=np.float32)
    found = measure_attributes(records, _same(range(4)), image_GE, _same).captions
    assert {
        name: (share.said, share.said_top1, share.said_chance) for name, share in found.items()
    } == {
        "gender": (3, pytest.approx(200 / 3), pytest.approx(175 / 3)),
        "upper": (2, 100, 100),
        "upper_colour": (1, 100, 75),
        "bag": (1, 0, 25),
        "accessory": (1, 100, 75),
        "glasses": (1, 100, 100),
        "pattern": (0, None, None),
    }


def test_the_chance_of_map_is_its_mean_over_all_rankings(records):
    few = [
        dataclasses.replace(
            records[0], attributes={"upper": upper, "upper_colour": "red"}, pid=number
        )
        for number, upper in enumerate(["coat", "coat", "dress", "dress"])
    ]
    found = []
    for scores in itertools.permutations(range(1, 5)):
        image_GE = np.array(scores, dtype=np.float32)[:, None]
        report = measure_attributes(few, _same(range(8)), image_GE, _same)
        found.append(report.short["clothes"].map)
    assert report.short["clothes"].map_chance == pytest.approx(np.mean(found))
    assert report.short.keys() == {"clothes"}, "no gender is known"
    assert report.short["clothes"].presence_auroc is None
    assert (report.with_thing, report.swapped) == ({}, None)


def test_evidence_is_held_against_what_is_true(records):
    columns = attribute_columns(records)
    model = Knowing(records, "gender", "upper", "upper_colour", "bag")
    found = measure_evidence(columns, model.image_GE, Evidence(model.embed_texts))
    colours = {name for name in columns if name.endswith("_colour")} - {"accessory_colour"}
    things = {"gender", "upper", "lower", "shoes", "headwear", "bag", "accessory", "glasses"}
    assert found.keys() == things | colours | {"any bag", "any headwear"}
    for name in ("gender", "upper", "upper_colour", "bag", "any bag"):
        assert found[name].auroc > 95, name
    assert found["bag"].phrases == len({*columns["bag"]} - {"none"})
    assert found["any bag"].phrases == 1
    blind = measure_evidence(columns, model.image_GE[:, :1] * 0 + 1, Evidence(_same))
    assert {truth.auroc for truth in blind.values()} == {50.0}
    alike = {"upper": np.full(len(records), "coat"), "gender": np.full(len(records), "zzz")}
    assert measure_evidence(alike, model.image_GE[:, :1], Evidence(_same)) == {}


def _same(texts):
    return np.ones((len(texts), 1), dtype=np.float32)


def test_what_is_not_annotated_is_not_guessed_and_null_is_no_such_thing():
    known = Record(Path("0.jpg"), 0, ("a",), None, {"gender": "man", "upper": "coat"})
    bare, partial, odd = (
        Record(Path("1.jpg"), 1, ("b",), None, attributes)
        for attributes in (None, {"gender": "man"}, {"mood": "sad"})
    )
    with refused("attributes_missing", InputError, image=bare.image):
        attribute_columns([known, bare])
    with refused("attribute_missing", InputError, image=partial.image, attribute="upper"):
        attribute_columns([known, partial])
    with refused("no_known_attribute", InputError):
        attribute_columns([odd])
    bags = [
        Record(Path(f"{pid}.jpg"), pid, ("a",), None, {"bag": bag})
        for pid, bag in enumerate(["backpack", None])
    ]
    columns = attribute_columns(bags)
    assert columns["bag"].tolist() == ["backpack", "none"]
    assert len(thing_questions(columns, "bag")) == 1
    report = measure(Knowing(bags, "bag"), bags)
    assert (report.clothed, report.clothed_without) == ({}, {})
    assert set(report.without_thing["bag"]) == {ANY, "all", "backpack"}
