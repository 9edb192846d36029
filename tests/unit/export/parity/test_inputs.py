"""What a parity check feeds: texts of every length, batches of every layout, pixels."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import CONTEXT_LENGTH
from tests.helpers.toy_parity import COUNT, toy_tokenizer
from upperson_export.parity.inputs import compare_pixels, iter_cases, length_buckets, read_inputs
from upperson_rt.errors import InputError


def test_texts_have_every_length_and_the_right_frame(inputs):
    assert inputs.lengths.min() == 3
    assert inputs.lengths.max() == CONTEXT_LENGTH
    frame = toy_tokenizer()
    for ids in inputs.ids:
        assert (ids[0], ids[-1]) == (frame.sot_id, frame.eot_id)
        assert not np.isin(ids[1:-1], [0, frame.sot_id, frame.eot_id]).any()
    # A text begins as its caption does.
    for sentence_ids, ids in zip(inputs.sentence_ids_NL, inputs.ids, strict=True):
        shared = min(len(ids), np.count_nonzero(sentence_ids)) - 1
        assert sentence_ids[:shared].tolist() == ids[:shared].tolist()


def test_buckets_share_out_all_texts(inputs):
    buckets = length_buckets(inputs.lengths)
    assert list(buckets) == ["3-8", "9-12"]
    assert (sum(mask.astype(int) for mask in buckets.values()) == 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
def test_every_item_is_in_a_batch_of_every_layout(inputs, size):
    for tower in ("image", "text"):
        cases = list(iter_cases(inputs, tower, [size]))
        layouts = [case.layout for case in cases]
        expected = ["like"] if tower == "image" else ["like", "mixed", "padded"]
        assert layouts == [name for name in expected if size > 1 or name != "mixed"]
        for case in cases:
            assert set(np.concatenate(case.batches).tolist()) == set(range(COUNT))
            assert len(case.batches[0]) == size
            rest = COUNT % size if size < COUNT else size
            assert len(case.batches[-1]) == (rest or size)


def test_text_batches_are_sorted_mixed_and_padded(inputs):
    like, mixed, padded = iter_cases(inputs, "text", [4])
    longest = [max(inputs.lengths[batch]) for batch in like.batches]
    assert longest == sorted(longest)
    spread = [np.ptp(inputs.lengths[batch]) for batch in mixed.batches]
    assert max(spread) > max(np.ptp(inputs.lengths[batch]) for batch in like.batches)
    for batch in padded.batches:
        ids = inputs.batch("text", batch, padded.width)
        assert ids.shape == (len(batch), CONTEXT_LENGTH)
        assert ids.dtype == np.int32
        for row, item in zip(ids, batch, strict=True):
            assert row[: inputs.lengths[item]].tolist() == inputs.ids[item].tolist()
            assert not row[inputs.lengths[item] :].any()


def test_nothing_to_compare_is_refused():
    with refused("nothing_to_compare", InputError, images=0, captions=1):
        read_inputs([], ["a man"], toy_tokenizer(), height_px=24, width_px=8)


def test_pixels_are_compared_in_levels(inputs):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 2, 3), dtype=np.uint8)
    given = replace(inputs, pixels_NHW3=pixels, image_names="abc")
    float32 = (pixels.astype(np.float32) / 255 - 0.48) / 0.27
    assert compare_pixels((float32 * 0.27 + 0.48) * 255, given).are_equal
    other = pixels.copy()
    other[1, 2, 0, 1] ^= 1
    found = compare_pixels(other, given)
    assert (found.max_difference, found.worst, found.are_equal) == (1.0, "b", False)
    assert "image b" in found.message()
