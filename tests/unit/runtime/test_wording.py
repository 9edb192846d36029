"""Sentences as people write them, rewritten into the wording of captions; misspelt words."""

import time

import numpy as np
import pytest

from upperson_phrases import parse_query as parse
from upperson_phrases.spelling import correction
from upperson_phrases.wording import alternatives, plain_wording
from upperson_synthetic.captions import describe
from upperson_synthetic.look import SOURCE, TARGET
from upperson_synthetic.people import sample_people


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("women in red coats", "woman in red coat"),
        ("Two women in red coats with black backpacks", "woman in red coat with black backpack"),
        ("ladies in dresses with glasses", "lady in dress with glasses"),
        ("woman w/o hat, w/ red bag", "woman without hat, with red bag"),
        ("everyone except men", "everyone without men"),
        ("woman in a non-red coat", "woman in a coat that is not red"),
        ("woman in a not red coat", "woman in a coat that is not red"),
        ("a bare-headed man", "a bareheaded man"),
        ("hat-less woman", "hatless woman"),
        ("woman in anything but jeans", "woman without jeans"),
        ("woman in anything but black", "woman without black clothes"),
        ("man not in black or red, jeans", "man not in black or red clothes, jeans"),
        ("she isn't wearing white and has a bag", "she isn't wearing white clothes and has a bag"),
        ("nothing red", "without red clothes"),
        ("woman with-out a hat", "woman without a hat"),
        ("Can you find women in either a red or a blue coat", "woman in a red or blue coat"),
        ("men or women with bags", "man or woman with bag"),
        ("any coat but red", "a coat that is not red"),
        ("woman in neither red nor blue", "woman without red or blue clothes"),
        ("they don\u2019t wear any red and blue", "they don\u2019t wear red or blue clothes"),
        ("a bag that is anything but black", "a bag that is not black"),
        ("a coat, but not a red one", "a coat that is not red"),
        ("all young women in red coats", "young woman in red coat"),
        ("a coat of any colour but red, jeans", "a coat that is not red, jeans"),
        ("red, dark blue or green coat", "red or dark blue or green coat"),
    ],
)
def test_other_ways_of_writing(sentence, expected):
    assert plain_wording(sentence) == expected
    assert plain_wording(expected) == expected


@pytest.mark.parametrize(
    "sentence",
    [
        "a woman beside two men with backpacks",
        "a man in boots with two bags",
        "a coat that is not red",
        "he is not red faced",
        "all black except for white shoes",
        "bald except for a beard",
        "Her coat is not red. Blue jeans.",
        "red coat (not black) jeans",
        "nurse pushing a wheelchair with people behind",
        "mother with children in red coats",
        "w/b shirt",
        "A woman, not a man, in a red/white coat.",
        "carrying nothing except a bag",
        "not in black and white shirt",
        "man without black shoes",
    ],
)
def test_plain_sentences_stay(sentence):
    assert plain_wording(sentence) == sentence


def test_captions_of_training_stay():
    rng = np.random.default_rng(7)
    for person in sample_people(60, rng):
        caption = describe(person, SOURCE if rng.random() < 0.5 else TARGET, rng)
        parsed = parse(caption)
        assert (parsed.read_as, parsed.readings) == (caption.lower(), (parsed.wanted,))


@pytest.mark.parametrize(
    ("sentence", "wanted", "excluded"),
    [
        ("woman in anything but a red coat", "woman", ["red coat"]),
        ("woman in a non-red coat", "woman in a coat", ["red coat"]),
        ("coat, not red", "coat", ["red coat"]),
        ("someone in jeans but not blue", "someone in jeans", ["blue jeans"]),
        ("a red coat, not blue jeans", "a red coat", ["blue jeans"]),
        ("no hat woman", "woman", ["hat"]),
        ("a woman without a red or blue bag", "a woman", ["red or blue bag"]),
    ],
)
def test_exclusions_in_other_words(sentence, wanted, excluded):
    parsed = parse(sentence)
    assert parsed.sentence == sentence
    assert (parsed.wanted, [one.text for one in parsed.excluded]) == (wanted, excluded)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("woman in red or blue coat", ["woman in red coat", "woman in blue coat"]),
        ("red or dark blue or black coat", ["red coat", "black coat", "dark blue coat"]),
        ("woman in a red coat or blue jacket", ["woman in a red coat", "woman in a blue jacket"]),
        ("man or woman in red coat", ["man in red coat", "woman in red coat"]),
        ("red or blue coat or jacket", ["red coat", "blue coat", "jacket"]),
        ("red or black and white shirt", ["red or black and white shirt"]),
        ("a woman without a red or blue bag", ["a woman"]),
    ],
)
def test_or_is_either(sentence, expected):
    parsed = parse(sentence)
    assert (sorted(parsed.readings), parsed.contradictions) == (sorted(expected), ())


@pytest.mark.parametrize("part", ["not red coat ", "red or blue coat ", "a or ", " " * 30])
def test_long_sentences_take_no_longer_than_their_length(part):
    assert len(alternatives("without a red or blue bag or " * 300)) == 1
    took = []
    for count in (100, 100, 800):  # The first one warms up.
        began = time.process_time()
        parse(part * count)
        took.append(time.process_time() - began)
    assert took[2] < 24 * took[1] + 0.1, "eight times as long, and not the square of it"


def test_corrections():
    for word, expected in (
        ("womna", "woman"), ("caot", "coat"), ("jackt", "jacket"), ("swetshirt", "sweatshirt"),
        ("RDE", "red"), ("jackts", "jacket"),
    ):  # fmt: skip
        assert correction(word) == expected
    for word in ("hag", "s" * 2000, "coat", "dresses", "nurse", "xy", ""):  # Not a purse.
        assert correction(word) is None
