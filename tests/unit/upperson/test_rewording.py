"""Captions in other words: shorter ones are true, wrong ones are not."""

import numpy as np
import pytest

from upperson.data.rewording import require_phrases, shorter, wrong
from upperson_rt.errors import InputError
from upperson_rt.phrases import parse
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


def test_shorter_captions_of_rendered_people_say_part_of_the_same():
    rng = np.random.default_rng(3)
    lengths = []
    for person in sample_people(150, rng):
        caption = describe(person, (SOURCE, TARGET)[int(rng.integers(2))], rng)
        text = shorter(caption, rng)
        facts = {fact for fact in _facts(text) if fact[1] != "person"}
        assert facts <= _facts(caption), (caption, text)
        assert facts - {(kind, *rest) for kind, *rest in facts if kind == "person"}, text
        lengths.append(len(facts))
    assert set(range(1, 6)) <= set(lengths)


def test_wrong_captions_of_rendered_people_are_false_in_one_thing():
    rng = np.random.default_rng(4)
    spoilt = 0
    for person in sample_people(150, rng):
        caption = describe(person, (SOURCE, TARGET)[int(rng.integers(2))], rng)
        text = wrong(caption, rng)
        before, after = _facts(caption), _facts(text)
        spoilt += text != caption
        if text != caption:
            # Exchanged colours change two things.
            assert 1 <= len(before - after) <= 2, (caption, text)
            assert len(after - before) == len(before - after), (caption, text)
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


def test_an_option_that_would_do_nothing_is_refused():
    for option in ("shorten_captions", "wrong_captions"):
        for caption in ("Frau im roten Mantel", "somebody over there again", "a person walking"):
            message = (
                rf"{option} needs captions .* of 1000 captions it finds none.* switch {option} off"
            )
            with pytest.raises(InputError, match=message):
                require_phrases([caption] * 1000, option)


def test_each_option_needs_what_it_rewords():
    # A woman can be called a man, and nothing of her can be left out.
    assert require_phrases(["a woman over there"], "wrong_captions") == ""
    with pytest.raises(InputError, match="reads a thing, such as 'red coat'"):
        require_phrases(["a woman over there"], "shorten_captions")
    # Nothing is known that could stand in the place of a watch, but it can be denied.
    assert require_phrases(["somebody with a watch"], "shorten_captions") == ""
    assert require_phrases(["somebody with a watch"], "wrong_captions") == ""


@pytest.mark.parametrize("option", ["shorten_captions", "wrong_captions"])
def test_it_is_told_where_most_captions_stay(option):
    assert require_phrases(["somebody"] * 5 + [RED] * 5, option) == ""
    line = require_phrases(["somebody"] * 6 + [RED] * 4, option)
    assert line.startswith(f"{option} leaves most captions as they are: only 4 of 10 are captions ")
