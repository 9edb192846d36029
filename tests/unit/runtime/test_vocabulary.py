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


def test_words_that_no_text_had_are_named():
    base = ShippedBase()
    vocabulary = Vocabulary(base)
    for sentence, unknown in {
        "quantum-zebra": ["quantum", "zebra"],
        "a woman in a red coat with a zebra": ["zebra"],
        "a volcano": ["volcano"],  # Also a word that others are compared with.
        "xqzvbnwk": ["xqzvbnwk"],  # Three pieces and more: in no vocabulary.
        "a boy riding a bicycle": ["riding", "bicycle"],
        "the woman, who is in a red coat without trousers": [],  # Small words say nothing.
        "young guy wearing a hoodie and sneakers with a backpack": [],
        "gentleman with grey hair, glasses, a scarf and an umbrella": [],
        "please find the lady in the green dress": [],
    }.items():
        assert vocabulary.unknown(base.tokenizer.encode([sentence]).words(0)) == unknown, sentence


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
        (
            "woman in a red jaket with a kippah and thobe",
            ["kippah", "thobe"],
            ["did_you_mean", "words_unknown"],
        ),
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
    notices = service._of_sentence(query.sentence, service._words(query.sentence))
    assert [notice.code for notice in notices] == codes
