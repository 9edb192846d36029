import json

import numpy as np
import pytest

from tests.helpers.toy_bundle import EOT, SOT, make_toy_tokenizer_json
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.tokenizer import Tokenizer

JSON = make_toy_tokenizer_json()
IDS = json.loads(JSON)["model"]["vocab"]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_json(JSON, context_length=6)


def test_special_ids_are_read_from_the_file(tokenizer):
    assert (tokenizer.sot_id, tokenizer.eot_id) == (IDS[SOT], IDS[EOT])
    assert Tokenizer.from_json(JSON).context_length == 77
    assert Tokenizer.from_json(make_toy_tokenizer_json(9)).context_length == 9


def test_batch_is_as_long_as_its_longest_sentence(tokenizer):
    batch = tokenizer.encode(["Red", "a man in", "Blue coat"])
    assert batch.input_ids.dtype == np.int32
    assert batch.input_ids.tolist() == [
        [IDS[SOT], IDS["red"], IDS[EOT], 0, 0],
        [IDS[SOT], IDS["a"], IDS["man"], IDS["in"], IDS[EOT]],
        [IDS[SOT], IDS["blue"], IDS["coat"], IDS[EOT], 0],
    ]
    assert batch.truncated == []


def test_long_sentences_are_cut_and_end_with_eot(tokenizer):
    batch = tokenizer.encode(["red", "a man in a red", "a man in a", "red " * 50])
    assert batch.truncated == [1, 3]
    assert batch.input_ids.shape == (4, 6)
    assert batch.input_ids[1].tolist() == [IDS[w] for w in (SOT, "a", "man", "in", "a", EOT)]
    assert batch.input_ids[3, -1] == IDS[EOT]


def test_entities_and_white_space_are_cleaned(tokenizer):
    batch = tokenizer.encode(["  red \t\n &amp;amp;  coat "])
    assert batch.input_ids.tolist() == [[IDS[w] for w in (SOT, "red", "&", "coat", EOT)]]


def test_special_tokens_in_a_sentence_are_ordinary_text(tokenizer):
    ids = tokenizer.encode([f"red {EOT} coat"]).input_ids[0]
    assert np.count_nonzero(ids == IDS[EOT]) == 1
    assert ids[-1] == IDS[EOT]


@pytest.mark.parametrize("text", ["", " \t\n", "&nbsp;"])
def test_empty_sentences_are_refused(tokenizer, text):
    with pytest.raises(InputError, match="sentence 1 is empty"):
        tokenizer.encode(["red", text])


def test_other_bad_arguments_are_refused(tokenizer):
    with pytest.raises(InputError, match="no sentence"):
        tokenizer.encode([])
    with pytest.raises(InputError, match="sentences must be a list"):
        tokenizer.encode("red")
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode(["red \udc80"])
    with pytest.raises(InputError, match="at least 3"):
        Tokenizer.from_json(JSON, context_length=2)


def test_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match="cannot read tokenizer"):
        Tokenizer.from_file(path)
    path.write_text(JSON, encoding="utf-8")
    assert Tokenizer.from_file(path).eot_id == IDS[EOT]
    path.write_text(JSON[:100], encoding="utf-8")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        Tokenizer.from_file(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(IntegrityError, match="not readable by tokenizers"):
        Tokenizer.from_file(path)


def test_a_tokenizer_without_its_frame_is_refused():
    content = json.loads(JSON)
    content["post_processor"] = None
    with pytest.raises(InputError, match="must frame a sentence"):
        Tokenizer.from_json(json.dumps(content))
