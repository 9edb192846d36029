"""Token embeddings that a run trains for words that its base has never seen."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_ids, toy_model
from tests.helpers.toy_run import Recorder, StoppedError, toy_config
from upperson.components import build_components
from upperson.data.vocabulary import clip_tokenizer
from upperson.model import base as base_module
from upperson.model.encoder import TOKEN_IDS
from upperson.model.parts import GrownEmbedding
from upperson.plan import plan
from upperson.run import load_run, pack_adapter
from upperson.train import train
from upperson_export.fold import fold_text_tower

pytestmark = pytest.mark.timeout(120)


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
    config, recorder = make(), Recorder()
    train(config, tmp_path / "run", recorder)
    assert any("2 tokens" in note for note in recorder.notes)
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
    assert "never seen" in (tmp_path / "run/README.md").read_text("utf-8")
    # The exported tower has them.
    folded = fold_text_tower(model)
    torch.testing.assert_close(
        torch.nn.functional.normalize(folded(ids.int()), dim=-1), model.encode_text(ids)
    )


def test_a_resumed_run_ends_as_one_that_was_never_stopped(make, tmp_path):
    config = make(checkpoint_every=1)
    train(config, tmp_path / "whole", Recorder())
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", Recorder(stop_after=2))
    train(config, tmp_path / "run", Recorder(), resume=True)
    files = [tmp_path / name / "adapter.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


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


def test_a_tower_learns_tokens_once():
    model = toy_model()
    model.text.learn_tokens(torch.tensor([3, 9]))
    with pytest.raises(ValueError, match="already"):
        model.text.learn_tokens(torch.tensor([4]))
    assert model.trained_state()[TOKEN_IDS].tolist() == [3, 9]
