"""How the small base is made."""

import dataclasses
import math

import pytest
from safetensors.torch import load_file

from tests.unit.upperson.test_synthetic import generator
from upperson.data.batches import tokenize
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.base import load_base
from upperson.pretrain import (
    PretrainConfig,
    _Attributes,
    _is_true,
    _logit_scale,
    pretrain_small,
    second_stage,
)
from upperson_synthetic.captions import Caption
from upperson_synthetic.people import sample_look_alikes

TINY = PretrainConfig(people=8, views=1, steps=2, batch_size=8, warmup_steps=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path, rendered = tmp_path_factory.mktemp("base") / "base.safetensors", []
    losses = [loss for _, loss in pretrain_small(TINY, path, lambda *of: rendered.append(of))]
    assert rendered == [(person, 8) for person in range(1, 9)]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    return path


def test_a_base_is_written_and_loads(base):
    embedding_VD = load_file(base)["token_embedding.weight"]
    known_V = embedding_VD.any(dim=1)
    # The words of eight people's texts are known, a helicopter was in none.
    (ids,) = tokenize(clip_tokenizer(), ["woman helicopter"])
    assert 20 < int(known_V.sum()) < 300
    assert not known_V[ids[2]]
    assert load_base("upperson-small", str(base)).clip.text_projection.shape == (128, 128)


def test_a_second_stage_goes_on_from_a_file_and_forgets_no_word(base, tmp_path):
    second = tmp_path / "second.safetensors"
    stage = dataclasses.replace(
        second_stage(base), people=8, views=1, steps=2, batch_size=8, warmup_steps=1, lr=1e-5
    )
    assert all(math.isfinite(loss) for _, loss in pretrain_small(stage, second))
    assert _logit_scale(0, TINY) == pytest.approx(1 / 0.07)
    before, after = load_file(base), load_file(second)
    assert before.keys() == after.keys()
    for name in after.keys() - {"logit_scale"}:
        assert float((after[name].float() - before[name].float()).abs().max()) < 0.01
    assert after["logit_scale"].float().exp() == pytest.approx(100, rel=2e-3)
    known_V = [state["token_embedding.weight"].any(dim=1) for state in (before, after)]
    assert not (known_V[0] & ~known_V[1]).any()
    assert (known_V[1] & ~known_V[0]).any()  # Other people, other words.


def test_texts_are_true_of_whom_they_hold_for():
    people = sample_look_alikes(40, generator(1))
    attributes = _Attributes(people)
    texts = [
        Caption("woman", {"gender": "woman"}),
        Caption("red coat", {"upper": "coat", "upper_colour": "red"}),
        Caption("no backpack", {}, {"bag": "backpack"}),
        Caption("man without a cap", {"gender": "man"}, {"headwear": "cap"}),
        *(Caption("", {"upper": person.upper, "bag": person.bag}) for person in people[:4]),
    ]
    mentioned_TA, excluded_TA = attributes.of_texts(texts)
    true_TN = _is_true(mentioned_TA, excluded_TA, attributes.of_people)
    assert true_TN.tolist() == [[text.holds(person) for person in people] for text in texts]
    assert 0.1 < float(true_TN.float().mean()) < 0.9
