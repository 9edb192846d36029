"""Batches: who is in them, and what chance does to them."""

import pickle
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from upperson.data import batches
from upperson.data.batches import (
    BatchSampler,
    PairDataset,
    Sample,
    identity_labels,
    pair_loader,
    tokenize,
    usable_workers,
)
from upperson.data.pictures import Pictures
from upperson.data.records import Record, read_dataset
from upperson.data.rewording import shorter, wrong
from upperson.data.transforms import (
    AUGMENTATION_UNIFORMS,
    CLIP_STATISTICS,
    draw_augmentation,
    mask_caption,
    prepare_pixels,
)
from upperson.data.vocabulary import clip_tokenizer
from upperson_synthetic import SyntheticSpec, write_dataset

SOT, EOT, MASK = 49406, 49407, 49405
SIZE = (48, 32)


def pairs_of(batches):
    return [[sample.pair for sample in batch] for batch in batches]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_batches_of_one(processes):
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
    one.start_at(2, 3)
    assert list(one) == whole[3:]
    # A tail with fewer pairs than processes is left out.
    shares = [BatchSampler(11, 5, 0, rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [len(list(share)) for share in shares] == [2, 2]


def test_pairs_that_are_left_out_make_room_for_the_others():
    shares = [BatchSampler(23, 5, 4, rank, 2) for rank in range(2)]
    for share in shares:
        share.start_at(1, 0, left_out=[3, 4, 22])
    drawn = [pair for share in shares for batch in pairs_of(list(share)) for pair in batch]
    assert len(drawn) == 23
    counts = np.bincount(drawn, minlength=23)
    assert set(np.flatnonzero(counts == 0)) == {3, 4, 22}
    assert counts.max() == 2


def test_epochs_and_seeds_shuffle_and_draw_differently():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = BatchSampler(40, 40, seed)
        sampler.start_at(epoch, 0)
        orders.append(next(iter(sampler)))
    assert len({tuple(sample.pair for sample in order) for order in orders}) == 3
    seeds = [sample.seed for order in orders for sample in order]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    spec = SyntheticSpec(look="street", train_ids=3, val_ids=0, test_ids=0, views=2)
    return read_dataset("jsonl", write_dataset(tmp_path_factory.mktemp("people") / "p", spec))[
        "train"
    ]


def dataset_of(records, **options):
    pictures = Pictures([record.image for record in records], SIZE)
    options = {"augment": True, "mask_captions": True} | options
    return PairDataset(records, pictures, clip_tokenizer(), **options)


PLAIN = {"augment": False, "mask_captions": False}


def test_a_sample_depends_on_its_draw_alone(records):
    pairs = dataset_of(records)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pairs[[Sample(0, 7), Sample(5, 8)]]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = pairs[[Sample(5, 8)]]
    other = pairs[[Sample(5, 9)]]
    cpu = torch.device("cpu")
    images = [batch.to(cpu, CLIP_STATISTICS).image_N3HW for batch in (first, second, other)]
    assert torch.equal(images[0][1], images[1][0])
    assert not torch.equal(images[1], images[2])
    length = second.ids_NL.shape[1]
    assert torch.equal(first.ids_NL[1, :length], second.ids_NL[0])
    assert not torch.equal(second.ids_NL, other.ids_NL)


def test_labels_count_from_zero_whatever_the_identities_are(records):
    far = [
        Record(record.image, {0: -5, 1: 900, 2: 7}[index // 2], record.captions)
        for index, record in enumerate(records)
    ]
    assert identity_labels(far) == {-5: 0, 7: 1, 900: 2}
    pairs = dataset_of(far)
    batch = pairs[[Sample(index, 0) for index in range(len(pairs))]]
    assert batch.labels_N.tolist() == [0] * 4 + [2] * 4 + [1] * 4


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_started_in_any_way_give_the_same_batches(records, start):
    sampler = BatchSampler(12, 5, seed=3)
    pairs = dataset_of(records)
    loader = pair_loader(pairs, sampler, torch.device("cpu"), 2 if start == "fork" else 1)
    loader.multiprocessing_context = start
    for epoch in range(2):  # By the same workers.
        sampler.start_at(epoch, 0)
        expected = [pairs[samples] for samples in sampler]
        for found, batch in zip(loader, expected, strict=True):
            for there, here in zip(found, batch, strict=True):
                assert there is here is None or torch.equal(there, here)


def test_captions_are_reworded_as_they_are_drawn(records):
    tokenizer = clip_tokenizer()
    pairs = dataset_of(records, **PLAIN, shorten_captions=1.0, wrong_captions=True)
    samples = [Sample(pair, 40 + pair) for pair in range(len(pairs))]
    batch = pairs[samples]
    assert batch.wrong_NL.shape == batch.ids_NL.shape
    captions = [text for record in records for text in record.captions]
    for sample, ids_L, wrong_L in zip(samples, batch.ids_NL, batch.wrong_NL, strict=True):
        rng = np.random.default_rng(sample.seed)
        assert rng.random() < 1.0
        text = shorter(captions[sample.pair], rng)
        for expected, found in ((text, ids_L), (wrong(text, rng), wrong_L)):
            expected_L = tokenize(tokenizer, [expected])[0]
            assert found[: len(expected_L)].tolist() == expected_L.tolist()
            assert not found[len(expected_L) :].any()
    again = pairs[samples]
    assert torch.equal(again.ids_NL, batch.ids_NL)
    moved = batch.to(torch.device("cpu"), CLIP_STATISTICS)
    assert torch.equal(moved.wrong_NL, batch.wrong_NL)
    assert moved.mentioned_NK is batch.mentioned_NK
    assert moved.known_NK is batch.known_NK
    # Whatever a shorter caption says is said of its own person.
    assert (batch.known_NK[batch.mentioned_NK[:, :-1].nonzero(as_tuple=True)]).all()


def test_captions_are_as_long_as_their_texts():
    texts = ["a man", "a woman in a red coat", "!", "a man!"] * 1100
    captions = tokenize(clip_tokenizer(), texts)
    assert len(captions) == len(texts)
    assert captions[-4].tolist() == captions[0].tolist() == [SOT, 320, 786, EOT]
    assert [len(ids) for ids in captions] == captions.lengths().tolist()
    assert [ids.tolist() for ids in captions[1:3]] == [captions[1].tolist(), [SOT, 256, EOT]]
    assert captions[-1].tolist() == [SOT, 320, 786, 256, EOT]
    with pytest.raises(IndexError):
        captions[len(texts)]


def test_a_data_set_for_workers_is_a_few_arrays_whatever_its_size(records):
    """A tensor for each caption took a file handle each: spawned workers ran out of them."""
    captions = tuple(f"a man {number}" for number in range(500))
    pairs = dataset_of([Record(record.image, record.pid, captions) for record in records])
    pickled = pickle.dumps(pairs, protocol=5, buffer_callback=(buffers := []).append)
    assert (len(pairs), len(pickled) < 4000, len(buffers) < 10) == (3000, True, True)


def test_workers_are_shared_out_and_fit_into_shared_memory(monkeypatch, tmp_path):
    batch, gigabyte = 128 * 384 * 128 * 3, 1_000_000_000
    for processes, cpus, free, wanted, size, expected in (
        (1, 12, 1 << 40, (0, 1, 8, 64), 1, (0, 1, 8, 12)),
        (8, 12, 1 << 40, (0, 1, 8, 64), 1, (0, 1, 1, 2)),
        (1, 64, 64_000_000, (8,), batch, (0,)),  # What Docker gives.
        (1, 64, 64_000_000, (8,), batch // 2, (2,)),
        (1, 64, gigabyte, (8,), batch, (8,)),
        (8, 64, gigabyte, (64,), batch, (2,)),
        (8, 64, None, (64,), batch, (8,)),
    ):
        usage = shutil._ntuple_diskusage(0, 0, free)
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", str(processes))
            patch.setattr("os.sched_getaffinity", lambda _, n=cpus: set(range(n)), raising=False)
            patch.setattr(batches, "_SHARED_MEMORY", tmp_path if free else tmp_path / "none")
            patch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            assert tuple(usable_workers(number, size) for number in wanted) == expected


def test_chance_moves_pictures_as_torchvision_does():
    height, width, count = 384, 128, 20_000
    augmentation_N7 = draw_augmentation(
        np.random.default_rng(0).random((count, AUGMENTATION_UNIFORMS)), height, width
    ).numpy()
    flip_N, top_N, left_N, *erased = augmentation_N7.T
    assert flip_N.mean() == pytest.approx(0.5, abs=0.015)
    for start_N in (top_N, left_N):
        assert set(start_N) == set(range(21))
        assert start_N.mean() == pytest.approx(10, abs=0.2)
    erasing = v2.RandomErasing(p=1, scale=(0.02, 0.4), value=[0.0])
    torch.manual_seed(0)
    theirs = [erasing.make_params([torch.empty(3, height, width)]) for _ in range(4000)]
    drawn = np.stack(erased, axis=1)[erased[2] > 0]
    assert len(drawn) / count == pytest.approx(0.5, abs=0.015)
    for place, name in enumerate("ijhw"):
        found, expected = drawn[:, place], np.array([params[name] for params in theirs])
        # Two samples of one distribution: the Kolmogorov-Smirnov bound at 1 in 10,000.
        steps = np.unique(np.concatenate([found, expected]))
        apart = np.abs(
            np.searchsorted(np.sort(found), steps, "right") / len(found)
            - np.searchsorted(np.sort(expected), steps, "right") / len(expected)
        )
        assert apart.max() < 2.23 * np.sqrt(1 / len(found) + 1 / len(expected)), name


def test_moved_pictures_are_what_torchvision_makes_of_them():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, *SIZE, 3), dtype=torch.uint8, generator=generator)
    moves = [
        (0, 10, 10, 0, 0, 0, 0), (1, 10, 10, 0, 0, 0, 0), (0, 0, 20, 5, 6, 7, 8),
        (1, 20, 0, 0, 0, 47, 31), (1, 3, 14, 30, 2, 18, 30), (0, 7, 9, 47, 31, 1, 1),
    ]  # fmt: skip
    found = prepare_pixels(pixels, torch.tensor(moves, dtype=torch.int32), CLIP_STATISTICS)
    mean, std = CLIP_STATISTICS
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    for image, (flip, top, left, *erased), ours in zip(pixels, moves, found, strict=True):
        expected = image.permute(2, 0, 1)
        if flip:
            expected = v2.functional.horizontal_flip(expected)
        expected = normalise(
            v2.functional.crop(v2.functional.pad(expected, [10]), top, left, *SIZE)
        )
        expected = v2.functional.erase(expected, *erased, torch.tensor(mean)[:, None, None])
        assert torch.equal(ours, expected)
    alone = prepare_pixels(pixels, None, CLIP_STATISTICS)
    assert torch.equal(alone, torch.stack([normalise(x.permute(2, 0, 1)) for x in pixels]))


def test_masking_has_berts_shares_and_spares_the_frame():
    rng = np.random.default_rng(0)
    ids = np.array([SOT, *range(1000, 1030), EOT], dtype=np.int32)
    masked = np.stack([mask_caption(ids, rng) for _ in range(4000)])
    assert (masked[:, 0] == SOT).all()
    assert (masked[:, -1] == EOT).all()
    words = masked[:, 1:-1]
    hidden = (words == MASK).mean()
    changed = ((words != ids[1:-1]) & (words != MASK)).mean()
    # Nothing picked, which happens to 0.85^30 = 0.8 % of these captions, masks the first word.
    assert hidden == pytest.approx(0.15 * 0.8, abs=0.004)
    assert changed == pytest.approx(0.15 * 0.1, abs=0.002)
    random = words[(words != ids[1:-1]) & (words != MASK)]
    assert int(random.min()) > 0
    assert int(random.max()) < MASK


def test_masking_of_captions_with_one_word_none_or_the_mask_token():
    rng = np.random.default_rng(0)
    one = np.array([SOT, 320, EOT], dtype=np.int32)
    fates = [int(mask_caption(one, rng)[1]) for _ in range(2000)]
    assert one.tolist() == [SOT, 320, EOT]
    assert np.mean([fate == MASK for fate in fates]) == pytest.approx(0.85 + 0.15 * 0.8, abs=0.02)
    for ids in ([SOT, EOT], [SOT, MASK, MASK, EOT]):
        same = np.array(ids, dtype=np.int32)
        assert all(np.array_equal(mask_caption(same, rng), same) for _ in range(50))
