"""Words that a model has not learned are named, and no others; notices of a sentence."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from upperson.data.batches import pad_ids, tokenize
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.base import SMALL, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_rt import SearchRequest
from upperson_rt.search.query import QueryEncoder, Vocabulary
from upperson_rt.search.service import SearchService

D = 32


def unknown(vocabulary, sentence):
    return vocabulary.unknown(vocabulary._encoder.tokenizer.encode([sentence]).words(0))


class TextTower:
    """Adds up the rows of a sentence's tokens; those of words that it has not learned are zero."""

    def __init__(self, learned=None):
        self.tokenizer = clip_tokenizer()
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(49408, D)).astype(np.float32)
        self.rows_VD = rows
        if learned is not None:
            known = np.unique(self.tokenizer.encode([learned]).input_ids)
            self.rows_VD = np.zeros_like(rows)
            self.rows_VD[known] = rows[known]
        self.places_LD = 0.3 * rng.normal(size=(77, D)).astype(np.float32)
        self.embedded = []

    def encode_texts(self, texts):
        self.embedded += texts
        ids_NL = self.tokenizer.encode(texts).input_ids
        rows_NLD = self.rows_VD[ids_NL] + self.places_LD[: ids_NL.shape[1]]
        summed_ND = (rows_NLD * (ids_NL > 0)[..., None]).sum(axis=1)
        return summed_ND / np.linalg.norm(summed_ND, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("quantum-zebra", ["quantum", "zebra"]),
        ("a woman in a red coat with a zebra", ["zebra"]),
        ("a volcano", ["volcano"]),  # Also a word that others are compared with.
        ("the woman, who is in a red coat without trousers", []),  # Small words say nothing.
        ("xqzvbnwk", ["xqzvbnwk"]),  # Three pieces and more: in no vocabulary.
    ],
)
def test_words_that_no_text_had_are_named(sentence, expected):
    tower = TextTower("a woman in a red coat and blue trousers")
    assert unknown(Vocabulary(tower), sentence) == expected


class ShippedBase:
    """The small base that ships with the package, which has read captions of drawn people."""

    def __init__(self):
        self.tokenizer = clip_tokenizer()
        base = load_base(SMALL, None, (192, 64))
        self._model = UPPerson(base.clip, PLAIN_CLIP, (192, 64), base.statistics).eval()

    def encode_texts(self, texts):
        with torch.inference_mode():
            ids_NL = pad_ids(tokenize(self.tokenizer, texts))
            return torch.nn.functional.normalize(self._model.encode_text(ids_NL), dim=-1).numpy()


def test_the_shipped_base():
    vocabulary = Vocabulary(ShippedBase())
    expected = {
        "quantum-zebra": ["quantum", "zebra"],
        "a boy riding a bicycle": ["riding", "bicycle"],
        "a woman in a red coat and black trousers": [],
        "young guy wearing a hoodie and sneakers with a backpack": [],
        "gentleman with grey hair, glasses, a scarf and an umbrella": [],
        "please find the lady in the green dress": [],
    }
    assert {sentence: unknown(vocabulary, sentence) for sentence in expected} == expected


@pytest.mark.parametrize(
    ("sentence", "unknown", "codes"),
    [
        ("一个穿红色外套的女人", [], ["language_unfamiliar"]),
        ("женщина в красном пальто", ["красном"], ["language_unfamiliar"]),  # Says so already.
        ("Frau im roten Mantel", [], []),
        ("a woman in a red coat", [], []),
        ("no bag", [], ["excluded"]),
        ("a zebra", ["zebra"], ["words_unknown"]),
        ("the of and", [], ["not_understood"]),
        ("the of and", ["of"], ["words_unknown"]),
        ("women in red jackts", [], ["did_you_mean", "rewritten"]),
        ("women in red or blue coats", [], ["either"]),
        ("woman in a zebra jaket", ["zebra"], ["did_you_mean", "words_unknown"]),
        ("Mann mit roter Hose", ["mit", "roter", "hose"], ["words_unknown"]),  # Not: man.
        ("a Jaket", ["jaket", "jacket"], ["words_unknown"]),  # It does not know that either.
    ],
)
def test_how_a_sentence_was_read(sentence, unknown, codes):
    encoder = SimpleNamespace(
        tokenizer=clip_tokenizer(),
        fingerprint="none",
        encode_tokens=lambda tokens: np.full((len(tokens.input_ids), 4), 0.5, np.float32),
        encode_texts=None,
        embed_dim=4,
    )
    service = SearchService(QueryEncoder(encoder), SimpleNamespace(location="none", embed_dim=4))
    vocabulary = service.queries.vocabulary
    vocabulary.unknown = lambda words: [word for word in words if word.lower() in unknown]
    (query,) = service.queries.embed([SearchRequest(sentence=sentence)])
    assert [
        notice.code
        for notice in service._of_sentence(query.sentence, service._words(query.sentence))
    ] == codes
