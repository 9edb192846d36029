"""Embeddings in order and precision, both directions, and images that cannot be read."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.helpers.toy_clip import IMAGE_SIZE, toy_model
from tests.helpers.two_processes import in_two_processes
from upperson import evaluate as evaluate_module
from upperson.data.batches import pad_ids, tokenize
from upperson.data.records import Record
from upperson.data.transforms import evaluation_transform
from upperson.data.vocabulary import clip_tokenizer
from upperson.evaluate import embed_records, evaluate, pids_of
from upperson_rt.errors import InputError
from upperson_rt.preprocess import prepare_image
from upperson_scores import metrics


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture
def records(tmp_path):
    """Nine pictures of three people; captions differ in number and length."""
    rng = np.random.default_rng(0)
    words = ["man", "woman", "red", "coat", "bag", "white", "shoes", "walks"]
    records = []
    for index in range(9):
        path = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8)).save(path)
        captions = tuple(
            " ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(1 + index % 3)
        )
        records.append(Record(path, 7 * (index % 3), captions))
    return records


def damage(records):
    path = records[5].image
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_embeddings_are_in_the_order_of_the_records(model, records):
    tokenizer, seen = clip_tokenizer(), []
    text_QE, image_GE = embed_records(
        model, tokenizer, records, batch_size=4, progress=lambda *counts: seen.append(counts)
    )
    captions = [text for record in records for text in record.captions]
    arrays = [prepare_image(record.image, *IMAGE_SIZE) for record in records]
    images = [evaluation_transform()(torch.from_numpy(a).permute(2, 0, 1)) for a in arrays]
    with torch.no_grad():
        one_by_one = [model.encode_text(pad_ids(tokenize(tokenizer, [text]))) for text in captions]
        expected = model.encode_image(torch.stack(images))
    np.testing.assert_allclose(text_QE, torch.cat(one_by_one).numpy(), atol=1e-5)
    np.testing.assert_allclose(image_GE, expected.numpy(), atol=1e-5)
    assert seen == sorted(seen)
    assert seen[-1] == (len(captions) + 9, len(captions) + 9)


def test_both_directions_match_by_person(model, records):
    found = evaluate(model, clip_tokenizer(), records).as_dict()
    text_QE, image_GE = embed_records(model, clip_tokenizer(), records)
    pids_Q, pids_G = pids_of(records)
    first, last, precision = [], [], []
    for scores, pid in zip(image_GE @ text_QE.T, pids_G, strict=True):
        ranks = np.flatnonzero(pids_Q[np.argsort(-scores, kind="stable")] == pid) + 1
        first.append(ranks[0])
        last.append(len(ranks) / ranks[-1])
        precision.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    assert found["image_to_text"] == pytest.approx(
        {f"R@{k}": 100 * np.mean(np.array(first) <= k) for k in (1, 5, 10)}
        | {"mAP": 100 * np.mean(precision), "mINP": 100 * np.mean(last)}
    )


def test_workers_change_nothing_and_an_image_that_cannot_be_read_is_one_line(model, records):
    alone, helped = (
        embed_records(model, clip_tokenizer(), records, batch_size=2, workers=workers)
        for workers in (0, 2)
    )
    np.testing.assert_array_equal(alone[1], helped[1])
    broken = damage(records)
    model.train()
    for workers in (0, 2):
        with pytest.raises(InputError) as caught:
            evaluate(model, clip_tokenizer(), records, workers=workers)
        assert str(caught.value).startswith(f"cannot read image {broken}: ")
        assert len(str(caught.value).splitlines()) == 1
        assert model.training


def test_other_precisions_give_float32_of_unit_length(records):
    exact = embed_records(toy_model(), clip_tokenizer(), records)
    frozen = toy_model()
    for parameter in frozen.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    embeds = [embed_records(toy_model().bfloat16(), clip_tokenizer(), records)]
    with torch.autocast("cpu", torch.bfloat16):
        embeds += [
            embed_records(model, clip_tokenizer(), records) for model in (toy_model(), frozen)
        ]
    for other in embeds:
        for expected, found in zip(exact, other, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
            assert (expected * found).sum(axis=1).min() > 0.999
            assert not np.array_equal(expected, found)


@pytest.mark.parametrize("is_broken", [False, True])
def test_processes_encode_together_what_one_does_and_fail_together(model, records, is_broken):
    expected = embed_records(model, clip_tokenizer(), records, batch_size=2)
    broken = damage(records) if is_broken else None

    def together(rank):
        dist.init_process_group("gloo")
        model.encode_image = Mock(wraps=model.encode_image)
        try:
            embeds = embed_records(model, clip_tokenizer(), records, batch_size=2, together=True)
        except InputError as error:
            return str(error)
        return embeds, sum(len(args[0]) for args, _ in model.encode_image.call_args_list)

    found = in_two_processes(together)
    if is_broken:
        assert found[0] == found[1]
        assert found[0].startswith(f"cannot read image {broken}: ")
        return
    assert sorted(images for _, images in found) == [4, 5]
    for embeds, _ in found:
        for ours, theirs in zip(embeds, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_ranks_of_torch_are_those_of_the_runtime(monkeypatch):
    rng = np.random.default_rng(0)
    # Small integers: many equal scores, and sums that are exact in any order.
    queries, gallery = (rng.integers(-2, 3, (count, 6)).astype(np.float32) for count in (30, 70))
    query, image = (np.ravel(index) for index in np.indices((30, 70)))
    parts = queries, gallery, query, image
    expected = metrics._rank(np.empty((30, 70), np.float32), *parts)
    scores = queries @ gallery.T
    order = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(expected, np.argsort(order, axis=1).ravel() + 1)
    monkeypatch.setattr(evaluate_module, "_COMPARED_AT_A_TIME", 1000)
    np.testing.assert_array_equal(evaluate_module._rank_on(torch.device("cpu"), *parts), expected)
