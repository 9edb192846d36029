"""Words that a model has not learned are told, and no others."""

import numpy as np
import pytest
import torch

from upperson.data.batches import pad_ids, tokenize
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.base import SMALL, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_rt.search import query as module
from upperson_rt.search.query import Vocabulary

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
        self.asked = []

    def encode_texts(self, texts):
        self.asked += texts
        ids_NL = self.tokenizer.encode(texts).input_ids
        rows_NLD = self.rows_VD[ids_NL] + self.places_LD[: ids_NL.shape[1]]
        summed_ND = (rows_NLD * (ids_NL > 0)[..., None]).sum(axis=1)
        return summed_ND / np.linalg.norm(summed_ND, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("quantum-zebra", ["quantum", "zebra"]),
        ("a woman in a red coat with a zebra", ["zebra"]),
        ("a volcano", ["volcano"]),  # Also a word that others are compared with.
        ("the woman, who is in a red coat without trousers", []),  # Small words tell nothing.
        ("Please find the woman in trousers", []),
        ("woman Woman WOMAN zebra", ["zebra"]),
        ("xqzvbnwk", ["xqzvbnwk"]),  # Three pieces and more: in no vocabulary.
    ],
)
def test_words_that_no_text_had_are_told(sentence, told):
    tower = TextTower("a woman in a red coat and blue trousers")
    assert unknown(Vocabulary(tower), sentence) == told


@pytest.mark.parametrize("sentence", ["quantum-zebra", "a volcano", "a woman in a red coat"])
def test_a_model_that_knows_all_words_is_believed(sentence):
    tower = TextTower()
    vocabulary = Vocabulary(tower)
    assert unknown(vocabulary, sentence) == []
    asked = len(tower.asked)
    assert unknown(vocabulary, "parliament") == []
    assert len(tower.asked) == asked  # Found out once.


def test_a_word_is_looked_at_once():
    tower = TextTower("red coat")
    vocabulary = Vocabulary(tower)
    assert unknown(vocabulary, "red zebra") == ["zebra"]
    asked = len(tower.asked)
    assert unknown(vocabulary, "zebra red") == ["zebra"]
    assert len(tower.asked) == asked


def test_a_sentence_is_told_whole_when_words_are_forgotten(monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 3)
    vocabulary = Vocabulary(TextTower("red coat"))
    assert unknown(vocabulary, "red zebra") == ["zebra"]
    assert unknown(vocabulary, "zebra coat bicycle") == ["zebra", "bicycle"]


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


def test_the_shipped_base_is_asked_rightly():
    vocabulary = Vocabulary(ShippedBase())
    told = {
        "quantum-zebra": ["quantum", "zebra"],
        "a boy riding a bicycle": ["riding", "bicycle"],
        "a woman in a red coat and black trousers": [],
        "man with a blue jacket": [],
        "person in a white shirt": [],
        "young guy wearing a hoodie and sneakers with a backpack": [],
        "gentleman with grey hair, glasses, a scarf and an umbrella": [],
        "girl with a ponytail in a striped t-shirt": [],
        "blond woman in jeans and boots, carrying a handbag": [],
        "please find the lady in the green dress": [],
    }
    assert {sentence: unknown(vocabulary, sentence) for sentence in told} == told
