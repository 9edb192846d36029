"""Reworded captions: shorter ones are true, wrong ones are not; whom a caption describes."""

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson.data.rewording import CaptionAttributes, require_phrases, shorter, wrong
from upperson_phrases import parse
from upperson_rt.errors import InputError
from upperson_synthetic.captions import describe
from upperson_synthetic.look import SOURCE, TARGET
from upperson_synthetic.people import sample_people

RED = "The woman is wearing a red coat, blue jeans, and she carries a brown purse."


def _facts(caption):
    return {
        (phrase.kind, phrase.noun, phrase.colours, phrase.pattern, phrase.negated)
        for phrase in parse(caption).phrases
        if phrase.noun and phrase.kind != "action"
    }


def captions():
    """Captions of 150 rendered people, and the generator that wrote them."""
    rng = np.random.default_rng(3)
    for person in sample_people(150, rng):
        yield describe(person, (SOURCE, TARGET)[int(rng.integers(2))], rng), rng


def test_shorter_captions_of_rendered_people_say_part_of_the_same():
    lengths = set()
    for caption, rng in captions():
        facts = {fact for fact in _facts(shorter(caption, rng)) if fact[1] != "person"}
        assert facts <= _facts(caption), caption
        assert any(kind != "person" for kind, *_ in facts), caption
        lengths.add(len(facts))
    assert lengths >= set(range(1, 6))


def test_wrong_captions_of_rendered_people_are_false_in_one_thing():
    spoilt = 0
    for caption, rng in captions():
        text = wrong(caption, rng)
        lost, new = _facts(caption) - _facts(text), _facts(text) - _facts(caption)
        # Exchanged colours change two things.
        assert text == caption or 1 <= len(lost) == len(new) <= 2, (caption, text)
        spoilt += text != caption
    assert spoilt > 145


def test_every_way_to_be_wrong():
    rng = np.random.default_rng(0)
    found = {wrong(RED, rng) for _ in range(300)}
    assert RED not in found
    for part in (
        "a blue coat, red jeans", "an orange coat, blue jeans", "a red jacket, blue jeans",
        "a red coat, no blue jeans", "carries no brown purse", "carries a red purse",
    ):  # fmt: skip
        assert any(part in caption for caption in found), part
    # *The man ... she* would give itself away.
    men = {caption for caption in found if "man is" in caption.replace("woman", "")}
    assert men == {RED.replace("woman", "man").replace("she", "he")}
    assert {"man in red coat", "girl in red coat", "boy in red coat"} < {
        wrong("woman in red coat", rng) for _ in range(300)
    }
    denied = {wrong("a girl in a red coat with blue jeans", rng) for _ in range(200)}
    assert "a girl without a red coat with blue jeans" in denied
    assert "a girl in a red coat without blue jeans" in denied
    assert not any("skirt" in caption or "a blue jeans" in caption for caption in denied)
    assert "a man without a bag" in {wrong("a man with a bag", rng) for _ in range(50)}


@pytest.mark.parametrize("caption", ["zzz qqq", "the of and a", "一个穿红色外套的女人", "walking"])
def test_what_the_grammar_does_not_read_stays(caption):
    rng = np.random.default_rng(0)
    assert (shorter(caption, rng), wrong(caption, rng)) == (caption, caption)


@pytest.mark.parametrize("option", ["shorten_captions", "wrong_captions"])
def test_an_option_that_rewords_nothing_is_refused_and_one_that_rewords_little_is_noted(option):
    for caption in ("Frau im roten Mantel", "somebody over there again", "a person walking"):
        with refused("captions_not_readable", InputError, option=option, sample=300):
            require_phrases([caption] * 300, option)
    assert require_phrases(["somebody"] * 5 + [RED] * 5, option) == ""
    assert "4 of 10" in require_phrases(["somebody"] * 6 + [RED] * 4, option)
    # A woman can be called a man, and nothing of her can be left out.
    if option == "shorten_captions":
        with refused("captions_not_readable", InputError):
            require_phrases(["a woman over there"], option)
    else:
        assert require_phrases(["a woman over there"], option) == ""
    # No other thing could replace a watch, but it can be excluded.
    assert require_phrases(["somebody with a watch"], option) == ""


# --- whom else a caption describes

CAPTIONS = (
    "A woman in a red coat with a backpack. She has short blond hair.",
    "A woman wearing a red coat and blue jeans.",
    "A man in a striped red coat without a backpack.",
    "A man in a blue coat with a tattoo on his arm.",
    "A woman in a red coat and blue jeans with a backpack. She has short blond hair.",
)
LABELS = np.array([0, 0, 1, 2, 3])
PEOPLE = np.arange(4)


@pytest.mark.parametrize(
    ("caption", "people"),
    [
        ("red coat", [0, 1, 3]),
        ("a person in a red overcoat", [0, 1, 3]),
        ("woman in red coat", [0, 3]),
        ("coat", [0, 1, 2, 3]),
        ("a red coat, a backpack and blue jeans", [0, 3]),  # Of the first in two captions.
        ("short blond hair", [0, 3]),
        ("backpack", [0, 3]),
        ("striped coat", []),  # Mentioned of one person only.
        ("without a backpack", []),
        ("blond hair", []),  # No caption has it so; it might be long.
        ("green coat", []),
        ("red coat and a tattoo", []),  # The grammar does not know what a tattoo is.
        ("a person", []),
        ("zzz", []),
    ],
)
def test_a_caption_describes_everybody_with_all_of_its_attributes(caption, people):
    attributes = CaptionAttributes(CAPTIONS, LABELS)
    mentioned_1K, known_4K = attributes.mentioned_by([caption]), attributes.known_of(PEOPLE)
    assert mentioned_1K.shape == (1, attributes.width)
    assert known_4K.shape == (4, attributes.width)
    fits_4 = ~(mentioned_1K & ~known_4K).any(axis=1)
    assert np.flatnonzero(fits_4).tolist() == people


def test_captions_without_a_phrase_describe_nobody_else():
    attributes = CaptionAttributes(["zzz", "qqq"], np.array([0, 1]))
    assert attributes.width == 1
    assert attributes.mentioned_by(["zzz"]).all()
    assert not attributes.known_of(np.array([0, 1])).any()
