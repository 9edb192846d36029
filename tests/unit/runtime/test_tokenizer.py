import json

import numpy as np
import pytest
import tokenizers

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import EOT, SOT, make_toy_tokenizer_json
from upperson.data.vocabulary import clip_tokenizer_json
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.tokenizer import Tokenizer, token_lengths

CAPTIONS = [
    "A woman in a red coat.",
    "It\u2019s \u201c42\u201d \n caf\u00e9s & a na\u0308ive <|endoftext|> dog",
]
JSON = make_toy_tokenizer_json()
IDS = json.loads(JSON)["model"]["vocab"]


@pytest.fixture(scope="module")
def clip_json():
    return clip_tokenizer_json()


def padded(sequences):
    longest = max(map(len, sequences))
    return [ids + [0] * (longest - len(ids)) for ids in sequences]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_json(JSON, context_length=6)


def test_special_ids_are_read_from_the_file(tokenizer):
    assert (tokenizer.sot_id, tokenizer.eot_id) == (IDS[SOT], IDS[EOT])
    assert Tokenizer.from_json(JSON).context_length == 77
    assert Tokenizer.from_json(make_toy_tokenizer_json(9)).context_length == 9


@pytest.mark.parametrize(
    ("texts", "rows", "truncated"),
    [
        (["Red", "a man in", "Blue coat"],
         [[SOT, "red", EOT], [SOT, "a", "man", "in", EOT], [SOT, "blue", "coat", EOT]], []),
        (["red", "a man in a red", "a man in a", "red " * 50],
         [[SOT, "red", EOT], [SOT, "a", "man", "in", "a", EOT], [SOT, "a", "man", "in", "a", EOT],
          [SOT, *["red"] * 4, EOT]], [1, 3]),
        (["  red \t\n &amp;amp;  coat "], [[SOT, "red", "&", "coat", EOT]], []),
    ],
    ids=["as long as the longest", "cut to the context", "entities and white space"],
)  # fmt: skip
def test_ids_of_a_batch(tokenizer, texts, rows, truncated):
    batch = tokenizer.encode(texts)
    assert batch.input_ids.dtype == np.int32
    assert batch.input_ids.tolist() == padded([[IDS[word] for word in row] for row in rows])
    assert batch.truncated == truncated


def test_special_tokens_in_a_sentence_and_zeros_before_its_end_are_ordinary(tokenizer):
    ids = tokenizer.encode([f"red {EOT} coat"]).input_ids[0]
    assert np.count_nonzero(ids == IDS[EOT]) == 1
    assert ids[-1] == IDS[EOT]
    batch = tokenizer.encode(["red ! coat", "red"])
    assert IDS["!"] == 0
    assert token_lengths(batch.input_ids).tolist() == [5, 3]


def test_bad_arguments_are_refused(tokenizer):
    for text in ("", " \t\n", "&nbsp;"):
        with refused("sentence_empty", InputError, index=1):
            tokenizer.encode(["red", text])
    with refused("no_sentence", InputError):
        tokenizer.encode([])
    with refused("no_list", InputError, what="sentences"):
        tokenizer.encode("red")
    with refused("no_unicode", InputError, what="sentence 0"):
        tokenizer.encode(["red \udc80"])
    with refused("out_of_range", InputError, what="context_length"):
        Tokenizer.from_json(JSON, context_length=2)


def test_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with refused("tokenizer_unreadable", InputError):
        Tokenizer.from_file(path)
    path.write_text(JSON, encoding="utf-8")
    assert Tokenizer.from_file(path).eot_id == IDS[EOT]
    for content, code in (
        (JSON[:100].encode(), "no_json"),
        (b"\xff\xfe{", "no_utf8"),
    ):
        path.write_bytes(content)
        with refused(code, IntegrityError):
            Tokenizer.from_file(path)


HOSTILE = {
    "merges by chance": ("model", {"type": "BPE", "vocab": IDS, "merges": [], "dropout": 0.5}),
    "no such unknown token": ("model", {"type": "WordLevel", "vocab": IDS, "unk_token": "x"}),
    "no id": ("model", {"type": "WordLevel", "vocab": {}, "unk_token": None}),
    "an added token of its own": ("added_tokens", [{"id": 40, "content": ""}]),
    "padding": ("padding", {"strategy": {"Fixed": 1 << 40}}),
    "a key of its own": ("more", {}),
}
"""Beside `tests.helpers.hostile_tokenizers`."""


@pytest.mark.parametrize("key_and_value", HOSTILE.values(), ids=HOSTILE)
def test_what_exports_do_not_write_never_reaches_the_library(key_and_value):
    key, value = key_and_value
    with refused("tokenizer_unfit", IntegrityError):
        Tokenizer.from_json(json.dumps(json.loads(JSON) | {key: value}), context_length=12)


@pytest.mark.parametrize("number", [-1, 5000, 1, 2.0, True, "2"])
def test_ids_are_those_of_a_table(number):
    assert IDS["red"] == 2
    with refused(
        "tokenizer_unfit", IntegrityError, what="model.vocab, tokens with the ids from 0 on,"
    ):
        Tokenizer.from_json(JSON.replace('"red":2', f'"red":{json.dumps(number)}'))


def test_a_tokenizer_is_put_together_as_the_library_reads_it(clip_json):
    ours = Tokenizer.from_json(clip_json)
    library = tokenizers.Tokenizer.from_str(clip_json)
    library.encode_special_tokens = True
    texts = [" ".join(text.split()) for text in CAPTIONS]
    assert ours.encode(CAPTIONS).input_ids.tolist() == padded(
        [encoding.ids for encoding in library.encode_batch(texts)]
    )
