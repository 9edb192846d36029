"""The grammar: what phrases it finds in sentences as people write them."""

import numpy as np
import pytest

from upperson.data.synthetic import captions
from upperson.data.synthetic.look import SOURCE, TARGET
from upperson.data.synthetic.people import sample_people
from upperson_rt.errors import InputError
from upperson_rt.phrases import grammar, parse


def _texts(sentence):
    return [(phrase.kind, phrase.text) for phrase in parse(sentence).phrases if not phrase.negated]


def _denied(sentence):
    return [phrase.text for phrase in parse(sentence).denied]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "The woman is wearing a red coat with black buttons, blue jeans, and she carries a "
            "brown purse over her shoulder",
            ["woman", "red coat with black buttons", "blue jeans", "brown purse"],
        ),
        (
            "The man is wearing a gray long sleeved button up shirt and a pair of black dress "
            "pants. He has a black backpack on and is carrying a white plastic bag in his right "
            "hand.",
            ["man", "gray long sleeved button up shirt", "black dress pants", "black backpack",
             "white plastic bag"],
        ),
        (
            "A young Asian woman with long black hair pulled back in a ponytail wearing a "
            "knee-length floral print dress and black high heels.",
            ["young Asian woman", "long black hair pulled back in a ponytail",
             "knee-length floral print dress", "black high heels"],
        ),
        (
            "His shoes are white. His hair is short and black. He wears a red, white and blue "
            "shirt, and his boots are brown boots.",
            ["man", "white shoes", "short black hair", "red, white and blue shirt", "brown boots"],
        ),
        (
            "The lady wears a white top, black shorts with a belt around her waist and has a phone "
            "in her left hand while walking away from the camera.",
            ["lady", "white top", "black shorts", "belt", "phone", "walking away from the camera"],
        ),
        ("woman, navy coat, cap", ["woman", "navy coat", "cap"]),
        ("man jeans backpack", ["man", "jeans", "backpack"]),
        ("red coat", ["red coat"]),
        ("She dresses in a coat of red color.", ["woman", "red coat"]),
        ("a shirt without sleeves", ["shirt without sleeves"]),
        ("a green bag in front of a mysterious zorb", ["green bag", "mysterious zorb"]),
    ],
)  # fmt: skip
def test_sentences_as_people_write_them(sentence, expected):
    assert [phrase.text for phrase in parse(sentence).phrases] == expected


def test_a_phrase_says_what_it_is_about():
    sentence = "a lady in a dark blue striped overcoat with white buttons"
    coat = parse(sentence).phrases[1]
    assert (coat.kind, coat.noun, coat.pattern) == ("upper", "coat", "striped")
    assert coat.colours == ("navy",), "buttons do not colour the coat"
    assert sentence[coat.start : coat.end] == coat.text
    assert parse("hair").phrases[0].colours == ()


@pytest.mark.parametrize(
    ("sentence", "denied", "wanted"),
    [
        ("a woman in a red coat without a bag", ["bag"], "a woman in a red coat"),
        ("without a backpack", ["backpack"], "a person"),
        ("a person without a backpack", ["backpack"], "a person"),
        ("A man, no hat, blue jeans.", ["hat"], "A man, blue jeans."),
        ("a man with no hat and blue jeans", ["hat"], "a man with blue jeans"),
        (
            "a woman without a bag and a black hat",
            ["bag"],
            "a woman and a black hat",
        ),
        ("a man without a hat and a bag", ["hat", "bag"], "a man"),
        (
            "A man not wearing glasses or a hat, in a coat.",
            ["glasses", "hat"],
            "A man, in a coat.",
        ),
        (
            "The pedestrian isn't carrying a bag and has short hair.",
            ["bag"],
            "The pedestrian has short hair.",
        ),
        (
            "He wears a coat. He does not appear to be wearing a hat on his head.",
            ["hat"],
            "He wears a coat.",
        ),
        ("girl with neither a hat nor a bag", ["hat", "bag"], "girl"),
        (
            "A man without hat, bag or glasses in a coat",
            ["hat", "bag", "glasses"],
            "A man in a coat",
        ),
        ("a coat that is not red", ["red coat"], "a coat"),
        ("no red coat", ["red coat"], "a person"),
        ("not a man", ["man"], "a person"),
        ("He is not only wearing a cap", [], "He is not only wearing a cap"),
        ("his face is not visible", [], "his face is not visible"),
        ("a woman in a red coat", [], "a woman in a red coat"),
    ],
)
def test_what_is_denied_leaves_the_sentence(sentence, denied, wanted):
    assert _denied(sentence) == denied
    assert parse(sentence).wanted == wanted


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("red red blue coat", [("upper", "red red blue coat")]),
        ("the of and a", []),
        ("...,,, !?", []),
        ("", []),
        ("一个穿红色外套的女人", [("other", "一个穿红色外套的女人")]),
        ("Frau im roten Mantel", [("other", "Frau im roten Mantel")]),
    ],
)
def test_what_it_does_not_understand_stays_whole(sentence, expected):
    assert _texts(sentence) == expected


def test_contradictions_are_told():
    assert parse("a man and a woman").contradictions == ("man and woman",)
    both = parse("a woman with a backpack without a backpack")
    assert both.contradictions == ("with and without backpack",)
    assert both.denied == (), "what is asked for is not denied"
    red = parse("a red bag that is not blue")
    assert (red.contradictions, [phrase.text for phrase in red.denied]) == ((), ["blue bag"])
    assert parse("a man with a red bag, no blue bag").contradictions == ()
    assert parse("a woman. The lady carries a bag").contradictions == ()


def test_long_sentences_cost_no_more_than_their_length(monkeypatch):
    looks = 0
    look = grammar._Parser._noun_at

    def count(*args):
        nonlocal looks
        looks += 1
        return look(*args)

    monkeypatch.setattr(grammar._Parser, "_noun_at", count)
    sentence = "a woman in a red and blue coat without a hat or a bag, and, and no "
    parse(sentence * 20)
    few = looks
    parse(sentence * 200)
    assert looks - few < 11 * few
    assert [phrase.noun for phrase in parse("very " * 300 + "red coat").phrases] == ["coat"]


def test_only_text_is_parsed():
    with pytest.raises(InputError, match="the sentence"):
        parse(7)


_KINDS = {"bag": "carried", "umbrella": "carried", "phone": "carried", "scarf": "accessory"}


@pytest.mark.parametrize("look", [SOURCE, TARGET], ids=lambda look: look.caption_style)
def test_phrases_of_rendered_captions_are_the_attributes_they_mention(look, monkeypatch):
    told = []
    sample = captions._sample_clauses

    def remember(*args):
        told.append(sample(*args))
        return told[-1]

    monkeypatch.setattr(captions, "_sample_clauses", remember)
    rng = np.random.default_rng(11)
    for person in sample_people(400, rng):
        caption = captions.describe(person, look, rng)
        parsed = parse(caption)
        topics = [_KINDS.get(clause.topic, clause.topic) for clause in told[-1]]
        assert sorted(phrase.kind for phrase in parsed.understood if phrase.kind != "action") == (
            sorted(["person", *topics])
        ), caption
        assert (parsed.wanted, parsed.denied, parsed.contradictions) == (caption, (), ())
        for phrase in parsed.understood:
            truths = dict(_truths(person, phrase.kind))
            if not truths:
                assert phrase.kind in ("hair", "shoes", "action"), (caption, phrase)
                continue
            assert phrase.noun in truths, (caption, phrase)
            assert phrase.colours in ((), (truths[phrase.noun],)), (caption, phrase)
            assert phrase.kind != "upper" or phrase.pattern in ("", person.pattern), caption


def _truths(person, kind):
    return {
        "person": [(person.gender, None)],
        "upper": [(person.upper, person.upper_colour)],
        "lower": [(person.lower, person.lower_colour)],
        "headwear": [(person.headwear, person.headwear_colour)],
        "glasses": [("glasses", None)],
        "carried": [
            (person.bag, person.bag_colour),
            (person.accessory, person.accessory_colour),
        ],
        "accessory": [(person.accessory, person.accessory_colour)],
    }.get(kind, [])
