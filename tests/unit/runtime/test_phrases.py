"""The grammar: what phrases it finds in sentences as people write them."""

import numpy as np
import pytest

from upperson_phrases import grammar, parse, parse_query
from upperson_synthetic import captions
from upperson_synthetic.captions import brief
from upperson_synthetic.look import SOURCE, TARGET
from upperson_synthetic.people import BAGS, HAIR_STYLES, sample_people


def _texts(phrases):
    return [phrase.text for phrase in phrases]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The woman is wearing a red coat with black buttons, blue jeans, and she carries a "
         "brown purse over her shoulder",
         ["woman", "red coat with black buttons", "blue jeans", "brown purse"]),
        ("The man is wearing a gray long sleeved button up shirt and a pair of black dress pants. "
         "He has a black backpack on and is carrying a white plastic bag in his right hand.",
         ["man", "gray long sleeved button up shirt", "black dress pants", "black backpack",
          "white plastic bag"]),
        ("His shoes are white. His hair is short and black. He wears a red, white and blue shirt, "
         "and his boots are brown boots.",
         ["man", "white shoes", "short black hair", "red, white and blue shirt", "brown boots"]),
        ("man jeans backpack", ["man", "jeans", "backpack"]),
        ("She dresses in a coat of red color.", ["woman", "red coat"]),
        ("a shirt without sleeves", ["shirt without sleeves"]),
        ("a green bag in front of a mysterious zorb", ["green bag", "mysterious zorb"]),
        ("red red blue coat", ["red red blue coat"]),  # What is not understood stays whole.
        ("the of and a", []),
        ("", []),
        ("一个穿红色外套的女人", ["一个穿红色外套的女人"]),
    ],
)  # fmt: skip
def test_sentences_as_people_write_them(sentence, expected):
    assert _texts(parse(sentence).phrases) == expected


def test_a_phrase_says_what_it_is_about():
    sentence = "a lady in a dark blue striped overcoat with white buttons"
    coat = parse(sentence).phrases[1]
    assert (coat.kind, coat.noun, coat.pattern) == ("upper", "coat", "striped")
    assert coat.colours == ("navy",), "buttons do not colour the coat"
    assert sentence[coat.start : coat.end] == coat.text
    assert parse("hair").phrases[0].colours == ()
    assert parse("一个穿红色外套的女人").phrases[0].kind == "other"


@pytest.mark.parametrize(
    ("sentence", "excluded", "wanted"),
    [
        ("a woman in a red coat without a bag", ["bag"], "a woman in a red coat"),
        ("a person without a backpack", ["backpack"], "a person"),
        ("a man with no hat and blue jeans", ["hat"], "a man with blue jeans"),
        ("a woman without a bag and a black hat", ["bag"], "a woman and a black hat"),
        ("a man without a hat and a bag", ["hat", "bag"], "a man"),
        ("A man not wearing glasses or a hat, in a coat.", ["glasses", "hat"], "A man, in a coat."),
        ("The pedestrian isn't carrying a bag and has short hair.",
         ["bag"], "The pedestrian has short hair."),
        ("girl with neither a hat nor a bag", ["hat", "bag"], "girl"),
        ("a man without a hat, bag or glasses", ["hat", "bag", "glasses"], "a man"),
        ("a man without a hat, blue jeans or a skirt", ["hat"], "a man, blue jeans or a skirt"),
        ("a coat that is not red", ["red coat"], "a coat"),
        ("not a man", ["man"], "a person"),
        ("empty-handed woman in a red coat", ["bag"], "woman in a red coat"),
        ("woman with nothing on her head, red coat", ["headwear"], "woman, red coat"),
        ("a hatless man", ["headwear"], "a man"),
        ("no luggage", ["luggage"], "a person"),
    ],
)  # fmt: skip
def test_what_is_excluded_leaves_the_sentence(sentence, excluded, wanted):
    parsed = parse(sentence)
    assert (_texts(parsed.excluded), parsed.wanted) == (excluded, wanted)


@pytest.mark.parametrize(
    "sentence",
    [
        "He is not only wearing a cap",
        "his face is not visible",
        "nothing special, a red coat",
        "a man with a backpack on his back and nothing in his hands",
        "nothing in her left hand, a phone in her right hand",
        "carrying nothing other than a backpack",
        "she carries nothing, only a backpack",
        "a woman who is not empty-handed",
        "carrying nothing but a red bag",
    ],
)
def test_what_only_sounds_like_an_exclusion_stays(sentence):
    parsed = parse(sentence)
    assert (parsed.excluded, parsed.wanted) == ((), sentence)


@pytest.mark.parametrize(
    ("sentence", "readings", "unread"),
    [
        ("man in a red coat or woman in a blue dress",
         ["man in a red coat", "woman in a blue dress"], ()),
        ("red coat or blue jacket or green dress", ["red coat", "blue jacket", "green dress"], ()),
        ("man no hat red coat", ["man red coat"], ()),
        ("a coat that isn't red or blue", ["a coat"], ()),
        ("coat that's not red", ["coat"], ()),
        ("he is not wearing a hat", ["a man"], ()),
        ("Woman in RED Coat", ["woman in red coat"], ()),
        ("woman in a red coat without a bag", ["woman in a red coat"], ()),
        ("everyone except women in red coats", None, ("in",)),
        ("woman in a red coat and without", None, ("without",)),
        ("woman with long hair, no grey", None, ("no",)),
        ("woman with glasses or without a bag", None, ("or",)),
        ("woman with any bag but a handbag", None, ("but",)),
        ("woman in non-red, non-blue coat", None, ("non",)),
        ("red or white or blue or green or pink or black coat", None, ("or",)),
    ],
)  # fmt: skip
def test_choices_and_exclusions_reach_as_far_as_people_mean_or_say_what_was_not_understood(
    sentence, readings, unread
):
    parsed = parse_query(sentence)
    assert parsed.unread == unread
    assert readings is None or {*parsed.readings} == {*readings}


@pytest.mark.parametrize(
    ("sentence", "contradictions", "excluded"),
    [
        ("a man and a woman", ["man and woman"], []),
        ("a woman with a backpack without a backpack", ["with and without backpack"], []),
        ("a woman with a backpack but no bag", ["with and without bag"], []),
        ("a bag but no backpack", [], ["backpack"]),
        ("a red bag that is not blue", [], ["blue bag"]),
        ("a man with a red bag, no blue bag", [], ["blue bag"]),
        ("a red coat without red clothes", ["with and without red clothes"], ["red clothes"]),
        ("a woman. The lady carries a bag", [], []),
    ],
)
def test_contradictions_are_found_and_what_is_wanted_is_not_excluded(
    sentence, contradictions, excluded
):
    parsed = parse(sentence)
    assert ([*parsed.contradictions], _texts(parsed.excluded)) == (contradictions, excluded)


def test_colours_side_by_side_are_found():
    assert _texts(parse("red red blue coat").unjoined) == ["red red blue coat"]
    assert _texts(parse("a red coat that is blue").unjoined) == ["red blue coat"]
    for joined in (
        "a coat, red blue", "woman in a red and blue coat", "blue-green coat", "navy blue coat",
        "black white striped shirt", "red coat, blue coat",
    ):  # fmt: skip
        assert parse(joined).unjoined == (), joined


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


def _read(phrases):
    """Put what phrases say into the fields of a rendered person."""
    said = {}
    for phrase in phrases:
        colour = phrase.colours[0] if phrase.colours else None
        if phrase.kind == "person" and phrase.noun != "person":
            said["gender"] = phrase.noun
        elif phrase.kind in ("upper", "lower", "shoes", "headwear"):
            name = "leather shoes" if phrase.noun == "shoes" else phrase.noun
            said |= {phrase.kind: name, f"{phrase.kind.removesuffix('s')}_colour": colour}
            if phrase.pattern not in ("", "plain"):
                said["pattern"] = phrase.pattern
        elif phrase.kind in ("carried", "accessory") and phrase.noun != "bag":
            thing = "bag" if phrase.noun in BAGS else "accessory"
            said |= {thing: phrase.noun, f"{thing}_colour": colour}
        elif phrase.kind == "glasses":
            said["glasses"] = True
        elif phrase.kind == "hair":
            words = phrase.text.lower().split()
            styles = [style for style in HAIR_STYLES if style in words]
            hair = {"dark": "black", "ginger": "red"}.get(colour, colour)
            if "brunette" in words:
                hair = "brown"
            said |= {"hair_style": styles[0] if styles else None, "hair_colour": hair}
    return {name: value for name, value in said.items() if value is not None}


@pytest.mark.parametrize("kind", ["list", "sentences", "brief"])
def test_phrases_of_rendered_captions_are_the_attributes_they_mention(kind):
    rng = np.random.default_rng(11)
    denials = 0
    for person in sample_people(200, rng):
        if kind == "brief":
            caption = brief(person, rng)
        else:
            caption = captions.caption(person, SOURCE if kind == "list" else TARGET, rng)
        parsed = parse(caption.text)
        expected = {
            name: value
            for name, value in caption.mentioned.items()
            if name != "sleeves" and (name, value) not in (("pattern", "plain"), ("bag", "none"))
        }
        denied = {name: value for name, value in caption.excluded.items() if value != "none"}
        assert _read(parsed.understood) == expected, caption
        assert _read(parsed.excluded) == denied, caption
        any_bag = {"none"} & {caption.mentioned.get("bag"), caption.excluded.get("bag")}
        assert bool(any_bag) == ("bag" in [phrase.noun for phrase in parsed.phrases]), caption
        assert parsed.contradictions == ()
        denials += bool(parsed.excluded)
        if not parsed.excluded:
            assert parsed.wanted == caption.text
    assert denials > 10 or kind != "brief"
