"""Batches: who is in them, and what chance does to them."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from upperson.data.batches import (
    Batch,
    BatchSampler,
    Draw,
    ImageDataset,
    PairDataset,
    identity_labels,
)
from upperson.data.records import Record, read_dataset
from upperson.data.synthetic import SyntheticSpec, write_dataset
from upperson.data.transforms import mask_caption, training_transform
from upperson.data.vocabulary import clip_tokenizer
from upperson_rt.errors import InputError

SOT, EOT, MASK = 49406, 49407, 49405


def pairs_of(batches: list[list[Draw]]) -> list[list[int]]:
    return [[draw.pair for draw in batch] for batch in batches]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_batches_of_one(processes: int) -> None:
    one = BatchSampler(23, 5, seed=4)
    shares = [BatchSampler(23, 5, 4, rank, processes) for rank in range(processes)]
    for sampler in (one, *shares):
        sampler.start_at(2, 0)
    whole, parts = list(one), [list(share) for share in shares]
    assert sorted(chain(*pairs_of(whole))) == list(range(23))
    assert [len(batch) for batch in whole] == [5, 5, 5, 5, 3]
    for step, batch in enumerate(whole):
        assert list(chain(*(part[step] for part in parts))) == batch
        assert one.share_sizes(step) == [len(batch)]
        assert shares[0].share_sizes(step) == [len(part[step]) for part in parts]


def test_a_tail_with_fewer_pairs_than_processes_is_left_out() -> None:
    shares = [BatchSampler(11, 5, 0, rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    assert [len(list(share)) for share in shares] == [2, 2]
    assert len(BatchSampler(11, 5, 0)) == 3


def test_an_epoch_can_be_entered_at_any_step() -> None:
    sampler = BatchSampler(23, 5, seed=4)
    sampler.start_at(1, 0)
    whole = list(sampler)
    sampler.start_at(1, 3)
    assert list(sampler) == whole[3:]


def test_pairs_that_are_left_out_make_room_for_the_others() -> None:
    shares = [BatchSampler(23, 5, 4, rank, 2) for rank in range(2)]
    for share in shares:
        share.start_at(1, 0, left_out=[3, 4, 22])
    drawn = [pair for share in shares for batch in pairs_of(list(share)) for pair in batch]
    assert len(drawn) == 23
    counts = np.bincount(drawn, minlength=23)
    assert set(np.flatnonzero(counts == 0)) == {3, 4, 22}
    assert counts.max() == 2


def test_epochs_and_seeds_shuffle_and_draw_differently() -> None:
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = BatchSampler(40, 40, seed)
        sampler.start_at(epoch, 0)
        orders.append(next(iter(sampler)))
    assert len({tuple(draw.pair for draw in order) for order in orders}) == 3
    seeds = [draw.seed for order in orders for draw in order]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    spec = SyntheticSpec(look="street", train_ids=3, val_ids=0, test_ids=0, views=2)
    return read_dataset("jsonl", write_dataset(tmp_path_factory.mktemp("people") / "p", spec))[
        "train"
    ]


def dataset_of(records: list[Record]) -> PairDataset:
    images = ImageDataset(records, (48, 32), training_transform(48, 32))
    return PairDataset(records, images, clip_tokenizer(), mask_captions=True)


def test_a_sample_depends_on_its_draw_alone(records: list[Record]) -> None:
    pairs = dataset_of(records)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pairs[[Draw(0, 7), Draw(5, 8)]]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = pairs[[Draw(5, 8)]]
    other = pairs[[Draw(5, 9)]]
    assert isinstance(first, Batch)
    assert isinstance(second, Batch)
    assert isinstance(other, Batch)
    assert torch.equal(first.image_N3HW[1], second.image_N3HW[0])
    assert not torch.equal(second.image_N3HW, other.image_N3HW)
    length = second.ids_NL.shape[1]
    assert torch.equal(first.ids_NL[1, :length], second.ids_NL[0])
    assert not torch.equal(second.ids_NL, other.ids_NL)


def test_labels_count_from_zero_whatever_the_identities_are(records: list[Record]) -> None:
    far = [
        Record(record.image, {0: -5, 1: 900, 2: 7}[index // 2], record.captions)
        for index, record in enumerate(records)
    ]
    assert identity_labels(far) == {-5: 0, 7: 1, 900: 2}
    pairs = dataset_of(far)
    batch = pairs[[Draw(index, 0) for index in range(len(pairs))]]
    assert isinstance(batch, Batch)
    assert batch.labels_N.tolist() == [0] * 4 + [2] * 4 + [1] * 4


def test_a_broken_image_is_the_batch(records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    broken = [Record(tmp_path / "broken.jpg", 0, ("a man",)), *records]
    found = dataset_of(broken)[[Draw(1, 0), Draw(0, 0)]]
    assert isinstance(found, InputError)
    assert "broken.jpg" in str(found)


def test_masking_has_berts_shares_and_spares_the_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([SOT, *range(1000, 1030), EOT])
    masked = torch.stack([mask_caption(ids, generator) for _ in range(4000)])
    assert (masked[:, 0] == SOT).all()
    assert (masked[:, -1] == EOT).all()
    words = masked[:, 1:-1]
    hidden = (words == MASK).float().mean().item()
    changed = ((words != ids[1:-1]) & (words != MASK)).float().mean().item()
    # Nothing picked, which happens to 0.85^30 = 0.8 % of these captions, masks the first word.
    assert hidden == pytest.approx(0.15 * 0.8, abs=0.004)
    assert changed == pytest.approx(0.15 * 0.1, abs=0.002)
    random = words[(words != ids[1:-1]) & (words != MASK)]
    assert int(random.min()) > 0
    assert int(random.max()) < MASK


def test_a_caption_of_one_word_is_masked_always_and_an_empty_one_never() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.tensor([SOT, 320, EOT])
    fates = [int(mask_caption(one, generator)[1]) for _ in range(2000)]
    assert one.tolist() == [SOT, 320, EOT]
    assert np.mean([fate == MASK for fate in fates]) == pytest.approx(0.85 + 0.15 * 0.8, abs=0.02)
    empty = torch.tensor([SOT, EOT])
    assert mask_caption(empty, generator).tolist() == [SOT, EOT]


def test_the_word_behind_the_mask_token_is_never_picked() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([SOT, MASK, MASK, EOT])
    assert all(torch.equal(mask_caption(ids, generator), ids) for _ in range(50))
