"""Sentences as people write them, rewritten into the wording of captions; misspelt words."""

import numpy as np
import pytest

from upperson_rt import phrases
from upperson_rt.phrases import parse_query as parse
from upperson_rt.phrases.spelling import correction, with_corrections
from upperson_rt.phrases.wording import alternatives, plain_wording
from upperson_synthetic.captions import describe
from upperson_synthetic.look import SOURCE, TARGET
from upperson_synthetic.people import sample_people


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("women in red coats", "woman in red coat"),
        ("Two women in red coats with black backpacks", "woman in red coat with black backpack"),
        ("all the men in jeans and black t-shirts", "man in jeans and black t-shirt"),
        ("ladies in dresses with glasses", "lady in dress with glasses"),
        ("people carrying boxes", "person carrying box"),
        ("woman w/o hat, w/ red bag", "woman without hat, with red bag"),
        ("man sans hat", "man without hat"),
        ("everyone except men", "everyone without men"),
        ("woman in a non-red coat", "woman in a coat that is not red"),
        ("woman in a not red coat", "woman in a coat that is not red"),
        ("non dark blue long coat", "long coat that is not dark blue"),
        ("a bare-headed man", "a bareheaded man"),
        ("hat-less woman", "hatless woman"),
        ("womans in red coat", "woman in red coat"),
        ("woman in anything but jeans", "woman without jeans"),
        ("a coat other than red", "a coat that is not red"),
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
        "in front of some people stands a woman in boots",
        "a man in boots with two bags",
        "a coat that is not red",
        "he is not red faced",
        "all black except for white shoes",
        "no bag except a small purse",
        "nothing in his hands except a phone",
        "not carrying anything but a bag",
        "bald except for a beard",
        "Her coat is not red. Blue jeans.",
        "hair is not black, red coat",
        "his shoes are not white; black trousers",
        "woman, coat not red, boots brown",
        "red coat (not black) jeans",
        "nurse pushing a wheelchair with people behind",
        "mother with children in red coats",
        "she has a red coat; people behind carry bags",
        "boys' shorts",
        "w/b shirt",
        "A woman, not a man, in a red/white coat.",
        "carrying nothing except a bag",
        "w",
        "",
    ],
)
def test_plain_sentences_stay(sentence):
    assert plain_wording(sentence) == sentence


@pytest.mark.parametrize("look", [SOURCE, TARGET])
def test_captions_of_training_stay(look):
    rng = np.random.default_rng(7)
    for person in sample_people(60, rng):
        caption = describe(person, look, rng)
        parsed = parse(caption)
        assert (parsed.read_as, parsed.readings) == (caption, (parsed.wanted,))


@pytest.mark.parametrize(
    ("sentence", "wanted", "excluded"),
    [
        ("woman in anything but a red coat", "woman", ["red coat"]),
        ("woman in a non-red coat", "woman in a coat", ["red coat"]),
        ("women w/o hats", "woman", ["hat"]),
        ("not a red coat", "a person", ["red coat"]),
        ("coat, not red", "coat", ["red coat"]),
        ("someone in jeans but not blue", "someone in jeans", ["blue jeans"]),
        ("a red coat, not blue jeans", "a red coat", ["blue jeans"]),
        ("no hat woman", "woman", ["hat"]),
        ("no man or woman", "a person", ["man", "woman"]),
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
        ("a coat or a jacket", ["a coat", "a jacket"]),
        ("woman in a red coat or blue jacket", ["woman in a red coat", "woman in a blue jacket"]),
        ("man or woman in red coat", ["man in red coat", "woman in red coat"]),
        ("red or blue coat or jacket", ["red coat", "blue coat", "jacket"]),
        ("red, blue or green coat", ["red coat", "blue coat", "green coat"]),
        ("red or black and white shirt", ["red or black and white shirt"]),
        ("red or blue/green coat", ["red or blue/green coat"]),
        ("a woman without a red or blue bag", ["a woman"]),
    ],
)
def test_or_is_either(sentence, expected):
    parsed = parse(sentence)
    assert (sorted(parsed.readings), parsed.contradictions) == (sorted(expected), ())


@pytest.mark.timeout(20)  # Milliseconds; minutes if each word looked at all others.
def test_long_sentences_take_no_longer_than_their_length():
    for part in (
        "not red coat ",
        "red or blue coat ",
        "a or ",
        "women in coats ",
        "w/o ",
        " " * 30,
    ):
        parse(part * 1000)
        assert len(alternatives("without a red or blue bag or " * 1000)) == 1


@pytest.mark.parametrize("sentence", ["red or dark blue coat", "a coat in red or dark blue"])
def test_or_between_colours_is_one_phrase(sentence):
    (coat,) = parse(sentence).phrases
    assert coat.colours == ("red", "navy")


def test_captions_of_data_sets_are_read_as_they_are():
    caption = "Two ladies in red coats"
    read = phrases.parse(caption)
    assert (read.sentence, read.read_as, read.wanted) == (caption,) * 3
    assert [caption[one.start : one.end] for one in read.phrases] == ["ladies", "red coats"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("womna", "woman"),
        ("jackt", "jacket"),
        ("swetshirt", "sweatshirt"),
        ("RDE", "red"),
        ("yellwo", "yellow"),
        ("jackts", "jacket"),
        ("yelow", "yellow"),
        ("peopel", "people"),
        ("hag", None),
        ("crutches", None),
        ("s" * 2000, None),
        ("coat", None),
        ("coats", None),
        ("dresses", None),
        ("nurse", None),  # No purse.
        ("police", None),
        ("rojo", None),
        ("xy", None),
        ("", None),
    ],
)
def test_corrections(word, expected):
    assert correction(word) == expected


def test_a_corrected_sentence_keeps_the_rest():
    meant = {"Jaket": "jacket", "rde": "red"}
    assert with_corrections("Man, RDE jaket (jakets)", meant) == "Man, red jacket (jakets)"
