"""Which sentences are refused, and by which ways they come."""

import numpy as np
import pytest

from tests.helpers.console import log_lines, problem
from upperson_console.oversight import Oversight, RefusedSentences
from upperson_console.refused_sentences import built_in_phrases, extra_phrases, found_in
from upperson_synthetic.captions import brief, caption
from upperson_synthetic.look import anywhere
from upperson_synthetic.people import sample_people

REFUSING = Oversight(refused_sentences=RefusedSentences(extra=("tattoo*", "head scarf")))


@pytest.mark.parametrize(
    ("category", "sentences"),
    [
        ("origin", "black man; a White woman with a bag; two tall, asian men; man with dark skin"),
        (
            "origin",
            "black man's jacket; a white man\u2019s coat; black woman\u02bcs bag",
        ),
        ("religion", "a muslim's coat; Jehovah\u2019s witness; a Jew\u2018s hat"),
        ("origin", "a middle aged white man; an asian in jeans; man who is black; hispanic male"),
        ("religion", "Muslim woman; a catholic priest; jewish boy"),
        ("health", "a disabled person; mentally ill man; blind woman; pregnant"),
        ("politics", "protester with a flag; right-wing activist; trump supporter"),
        ("sexual orientation", "gay couple; straight man; LGBT person"),
    ],
)
def test_sentences_about_a_category_are_refused(category, sentences):
    for sentence in sentences.split("; "):
        found = found_in(sentence, built_in_phrases())
        assert (found and found[0], sentence) == (category, sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "woman in a black coat", "white jacket man", "man in white, woman in black",
        "man dressed in black", "white haired woman", "black bearded man",
        "man in black woman's shoes", "jacket black, man with bag", "Chinese dress",
        "a woman with straight hair",
        "man with Christian Dior bag", "man's black jacket", "skin colored tights",
        "man with a french braid", "polish shoes", "green party hat", "union jack shirt",
        "person with a right hand bag", "light brown hair", "German shepherd dog",
    ],
)  # fmt: skip
def test_clothes_and_things_are_not_refused(sentence):
    assert found_in(sentence, built_in_phrases()) is None


def test_no_drawn_caption_is_refused():
    rng = np.random.default_rng(0)
    for person in sample_people(500, rng):
        for made in (caption(person, anywhere(rng), rng), brief(person, rng)):
            assert found_in(made.text, built_in_phrases()) is None, made.text


def test_phrases_of_the_site_are_refused_as_whole_words():
    phrases = extra_phrases(("tattoo*", "Head scarf"))
    for sentence, words in (
        ("man with Tattoos", "tattoos"), ("blue head scarf", "head scarf"), ("overhead scarf", None)
    ):  # fmt: skip
        found = found_in(sentence, phrases)
        assert found == (words and ("extra", words))


def test_each_way_to_ask_refuses_and_logs(make_console):
    console = make_console(oversight=REFUSING)
    client, sentence = console.client, "black man"
    saved = {"name": "x", "address": "q=black+man", "shared": "true"}
    assert client.post("/saved", data=saved).status_code == 422
    assert console.service.user_state.saved("local") == []
    answers = [
        client.search(sentence=sentence),
        client.post("/v1/embeddings", json={"input": ["red", sentence]}),
        client.post("/api/v1/alerts", json={"sentence": sentence, "rate": "1/day"}),
    ]
    for answer in answers:
        problem(answer, 422, "sentence_refused")
        assert answer.json()["category"] == "origin"
    for path in ("/?q=black+man", "/timeline?q=black+man"):
        page = client.get(path)
        assert page.status_code == 422
        assert "words about origin" in page.text
    refusals = [(line["action"], line["sentence"], line["ids"]) for line in log_lines(console)]
    assert refusals == [("refused", sentence, [])] * 6
    assert log_lines(console)[0]["details"] == {"category": "origin", "words": "black man"}
    problem(client.search(sentence="man with tattoos"), 422, "sentence_refused")
    assert client.search(sentence="man in a black coat").status_code == 200
