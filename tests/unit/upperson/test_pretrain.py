"""How the small base is made."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.unit.upperson.test_synthetic import generator
from upperson.data.batches import tokenize
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.base import load_base
from upperson.pretrain import (
    PretrainConfig,
    _Attributes,
    _augment,
    _contrastive,
    _Heads,
    _is_true,
    _logit_scale,
    _render,
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


def test_the_scale_rises_in_the_first_stage_and_stays_in_the_second(tmp_path):
    assert _logit_scale(0, second_stage(tmp_path)) == pytest.approx(100)
    assert _logit_scale(0, TINY) == pytest.approx(1 / 0.07)


def test_the_loss_is_zero_at_best_and_counts_every_true_pair():
    true_TN = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 0]]).bool()
    assert float(_contrastive(1000 * true_TN.float(), true_TN)) == pytest.approx(0, abs=1e-5)
    logits_TN = 10 * true_TN.float()
    one_missed_TN = logits_TN.clone()
    one_missed_TN[0, 1] = 0
    assert _contrastive(one_missed_TN, true_TN) > _contrastive(logits_TN, true_TN) + 1


def test_an_attribute_counts_by_its_weight():
    attributes = _Attributes(sample_look_alikes(10, generator(1)))
    weights = attributes.weights(3.0)
    assert (max(weights), sorted(weights)[-2], len(weights)) == (3.0, 1.0, len(attributes.sizes))
    heads = _Heads(4, [2, 3], [3.0, 1.0])
    unit_NE, values_NA = (
        F.normalize(torch.randn(5, 4), dim=1),
        torch.tensor([[1, 2]] * 4 + [[0, -1]]),
    )
    logits = heads._linear(unit_NE * heads._log_scale.exp())
    first = F.cross_entropy(logits[:, :2], values_NA[:, 0], reduction="sum")
    second = F.cross_entropy(logits[:4, 2:], values_NA[:4, 1], reduction="sum")
    torch.testing.assert_close(heads.loss(unit_NE, values_NA), (3 * first + second) / (3 * 5 + 4))
    # What a text does not mention teaches nothing.
    heads.loss(unit_NE, torch.tensor([[1, -1]] * 5)).backward()
    gradient = heads._linear.weight.grad
    assert gradient[:2].any()
    assert not gradient[2:].any()


def test_jpeg_files_leave_their_traces():
    people = sample_look_alikes(2, generator(1))
    plain, files = (
        _render(people, dataclasses.replace(TINY, jpeg=jpeg), generator(2)).astype(int)
        for jpeg in (False, True)
    )
    assert 0 < np.abs(plain - files).mean() < 12


def test_pictures_seen_again_look_otherwise_but_alike():
    torch.manual_seed(0)
    pixels_N3HW = F.interpolate(torch.rand(8, 3, 6, 2), size=(192, 64), mode="bilinear")
    again_N3HW = _augment(pixels_N3HW, generator(2))
    assert again_N3HW.shape == pixels_N3HW.shape
    assert 0 <= again_N3HW.min() <= again_N3HW.max() <= 1
    changes_2N = torch.stack(
        [(again_N3HW - x).abs().mean(dim=(1, 2, 3)) for x in (pixels_N3HW, pixels_N3HW.flip(3))]
    )
    assert 0.02 < changes_2N.amin(dim=0).min() <= changes_2N.amin(dim=0).max() < 0.2
