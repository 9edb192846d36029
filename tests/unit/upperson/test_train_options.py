"""What a run may do beside plain training: leave out pairs, rehearse people, learn words."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_ids
from tests.helpers.toy_run import Recorder, StoppedError, toy_config
from upperson.components import build_components
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.division import matching_losses, noisy_pairs
from upperson.model import base as base_module
from upperson.model.encoder import TOKEN_IDS
from upperson.model.parts import GrownEmbedding
from upperson.plan import plan
from upperson.run import load_run, pack_adapter
from upperson.train import train
from upperson_export.fold import fold_text_tower
from upperson_rt.errors import IntegrityError
from upperson_synthetic import SyntheticSpec, write_dataset

pytestmark = pytest.mark.timeout(120)


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_two_overlapping_gaussians_are_divided():
    rng = np.random.default_rng(1)
    clean, noisy = rng.normal(2, 1.5, 800), rng.normal(12, 2, 200)
    losses = np.concatenate([clean, noisy, [-8.0]])
    found = noisy_pairs(losses)
    wrong = set(found) ^ set(range(800, 1000))
    assert len(wrong) <= 5
    assert 1000 not in found, "a loss far below all others is of a right pair"


@pytest.mark.parametrize("losses", [[], [3.0], [1.0] * 5])
def test_losses_that_are_all_equal_accuse_nobody(losses):
    assert noisy_pairs(np.array(losses)).tolist() == []


def test_a_pair_loses_as_much_as_goes_to_other_people():
    rng = np.random.default_rng(2)
    text, image = unit(rng, 5, 8), unit(rng, 5, 8)
    pids = np.array([7, 9, 7, 4, 4])
    found = matching_losses(text, image, pids, batch_size=5, temperature=0.02, seed=[0])
    for i in range(5):
        expected = 0.0
        for query, gallery in ((text[i], image), (image[i], text)):
            weights = np.exp(gallery @ query / 0.02)
            expected -= np.log(weights[pids == pids[i]].sum() / weights.sum())
        assert found[i] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_captions_of_somebody_else_are_found_and_left_out(tmp_path, monkeypatch):
    """Of 30 people who each look like their caption six get another one's."""
    people = unit(np.random.default_rng(3), 30, 16)
    text = np.concatenate([people[[1, 2, 3, 4, 5, 0]], people[6:]])
    found = noisy_pairs(matching_losses(text, people, np.arange(30), 15, 0.02, [0]))
    assert found.tolist() == [0, 1, 2, 3, 4, 5]

    recorder = Recorder()
    config = replace(toy_config(tmp_path, monkeypatch, epochs=3), leave_out_noisy=True)
    train(config, tmp_path / "run", recorder)
    notes = [note for note in recorder.notes if "left out as noisy" in note]
    assert [note.split(":")[0] for note in notes] == ["epoch 2", "epoch 3"]
    header, *rows = (tmp_path / "run/metrics.csv").read_text("utf-8").splitlines()
    column = header.split(",").index("left out")
    left_out = [row.split(",")[column] for row in rows]
    assert left_out == ["0", *(note.split()[2] for note in notes)]
    assert 0 < int(left_out[1]) < 24


@pytest.fixture
def others(tmp_path):
    spec = SyntheticSpec(look="street", train_ids=3, val_ids=2, test_ids=2, views=2, seed=9)
    return write_dataset(tmp_path / "others", spec)


def test_people_to_rehearse_are_trained_on_and_never_selected_on_or_measured(
    tmp_path, monkeypatch, others
):
    own = toy_config(tmp_path, monkeypatch)
    before = build_components(own).splits
    after = build_components(replace(own, rehearse=str(others))).splits
    added = after["train"][len(before["train"]) :]
    expected = read_dataset("jsonl", others)["train"]
    assert [(record.image, record.captions) for record in added] == [
        (record.image, record.captions) for record in expected
    ]
    assert len({record.pid for record in added}) == 3
    assert not {record.pid for record in added} & {record.pid for record in before["train"]}
    assert {name: after[name] for name in ("val", "test")} == {
        name: before[name] for name in ("val", "test")
    }


def test_a_resumed_run_needs_the_same_people_to_rehearse(tmp_path, monkeypatch, others):
    config = toy_config(tmp_path, monkeypatch, rehearse=str(others), epochs=1)
    train(config, tmp_path / "run", Recorder())
    with pytest.raises(IntegrityError):
        train(replace(config, rehearse=None), tmp_path / "run", Recorder(), resume=True)


def test_people_of_the_data_set_itself_and_folders_without_people_are_refused(
    tmp_path, monkeypatch, others
):
    own = toy_config(tmp_path, monkeypatch)
    with refused("rehearsal_shared"):
        build_components(replace(own, rehearse=own.root))
    with refused("rehearsal_missing", path=tmp_path / "annotations.jsonl"):
        build_components(replace(own, rehearse=str(tmp_path)))
    file = others / "annotations.jsonl"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    kept = [json.dumps(line) + "\n" for line in lines if line["split"] != "train"]
    file.write_text("".join(kept), "utf-8")
    with refused("split_empty", split="train"):
        build_components(toy_config(tmp_path, monkeypatch, rehearse=str(others)))


def tokens_of(text):
    return clip_tokenizer().encode([text]).input_ids[0, 1:-1].tolist()


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a configuration over a toy base that has not seen *coat* and *jeans*, nor *vest*."""
    fill = base_module._fill

    def forget(clip, *arguments):
        fill(clip, *arguments)
        clip.token_embedding.weight.data[tokens_of("coat jeans vest")] = 0

    monkeypatch.setattr(base_module, "_fill", forget)
    return lambda **changes: toy_config(
        tmp_path, monkeypatch, learn_words=True, adam_eps=1e-8, warmup_epochs=0, **changes
    )


def test_a_run_learns_the_words_that_its_base_has_not_seen(make, tmp_path):
    config, recorder = make(checkpoint_every=1), Recorder()
    train(config, tmp_path / "run", recorder)
    assert any("2 tokens" in note for note in recorder.notes)
    # A resumed run ends as one that was never stopped.
    with pytest.raises(StoppedError):
        train(config, tmp_path / "stopped", Recorder(stop_after=2))
    train(config, tmp_path / "stopped", Recorder(), resume=True)
    files = [tmp_path / name / "adapter.safetensors" for name in ("run", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    state = load_file(tmp_path / "run/adapter.safetensors")
    assert sorted(state[TOKEN_IDS].tolist()) == sorted(tokens_of("coat jeans"))
    _, base, model = load_run(tmp_path / "run")
    embedding = model.text.token_embedding
    assert isinstance(embedding, GrownEmbedding)
    weight, before = embedding.weight, base.clip.token_embedding.weight
    changed = (weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(tokens_of("coat jeans"))
    assert not weight[tokens_of("vest")].any()
    ids = toy_ids([7, 5]).long()
    ids[0, 2] = tokens_of("coat")[0]
    expected = torch.nn.functional.embedding(ids, weight)
    torch.testing.assert_close(embedding(ids), expected, rtol=0, atol=1e-6)
    counted = {part.part: part.total for part in plan(config, build_components(config)).parts}
    assert counted["learned words"] == state["text.token_embedding.rows"].numel() == 2 * 48
    # The exported tower has them.
    folded = fold_text_tower(model)
    torch.testing.assert_close(
        torch.nn.functional.normalize(folded(ids.int()), dim=-1), model.encode_text(ids)
    )


def test_a_base_that_has_seen_all_words_learns_none(tmp_path, monkeypatch):
    components = build_components(toy_config(tmp_path, monkeypatch, learn_words=True))
    assert not isinstance(components.model.text.token_embedding, GrownEmbedding)
    assert TOKEN_IDS not in components.model.trained_state()
    assert any("learn_words" in note for note in components.notes)


def test_files_with_other_tokens_are_refused(make, tmp_path):
    config = make()
    train(config, tmp_path / "run", Recorder())
    adapter = tmp_path / "run/adapter.safetensors"
    base = load_run(tmp_path / "run").base
    good = load_file(adapter)
    for ids in ([5, 5], [-1, 7], [3, 49408], [[1, 2]]):
        adapter.write_bytes(pack_adapter(good | {TOKEN_IDS: torch.tensor(ids)}, base))
        with refused("adapter_does_not_fit", tensors=[TOKEN_IDS]):
            load_run(tmp_path / "run")
    # Another run goes on from it only with the same words.
    adapter.write_bytes(pack_adapter(good | {TOKEN_IDS: torch.tensor([5, 6])}, base))
    with refused("adapter_does_not_fit", tensors=[TOKEN_IDS]):
        train(replace(config, init_from=str(tmp_path / "run")), tmp_path / "next", Recorder())
