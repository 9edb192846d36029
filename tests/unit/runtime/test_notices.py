"""Notices of a sentence, with the tokenizer of CLIP."""

from types import SimpleNamespace

import numpy as np
import pytest

from upperson.data.vocabulary import clip_tokenizer
from upperson_rt import SearchRequest
from upperson_rt.search.query import QueryEncoder
from upperson_rt.search.service import SearchService


@pytest.mark.parametrize(
    ("sentence", "unknown", "codes"),
    [
        ("一个穿红色外套的女人", [], ["language_unfamiliar"]),
        ("женщина в красном пальто", ["красном"], ["language_unfamiliar"]),  # Says so already.
        ("Frau im roten Mantel", [], []),
        ("t-shirt", [], []),
        ("a woman in a red coat", [], []),
        ("a person", [], []),
        ("adidas", [], []),
        ("no bag", [], ["excluded"]),
        ("a zebra", ["zebra"], ["words_unknown"]),
        ("the of and", [], ["not_understood"]),
        ("the of and", ["of"], ["words_unknown"]),
    ],
)
def test_how_a_sentence_was_read(sentence, unknown, codes):
    encoder = SimpleNamespace(
        tokenizer=clip_tokenizer(),
        encode_tokens=lambda tokens: np.full((len(tokens.input_ids), 4), 0.5, np.float32),
        encode_texts=None,
        embed_dim=4,
    )
    service = SearchService(QueryEncoder(encoder), SimpleNamespace(embed_dim=4))
    service.queries.vocabulary = SimpleNamespace(unknown=lambda words: unknown)
    (query,) = service.queries.embed([SearchRequest(sentence=sentence)])
    assert [notice.code for notice in service._of_sentence(query.sentence)] == codes
