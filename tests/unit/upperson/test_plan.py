"""The plan of a run: counts, steps, and memory against what autograd really keeps."""

from pathlib import Path

import pytest
import torch

from tests.helpers.toy_clip import IMAGE_SIZE, toy_clip, toy_model
from upperson import plan as planning
from upperson.components import Components
from upperson.config import TrainConfig
from upperson.data.records import Record
from upperson.data.transforms import CLIP_STATISTICS
from upperson.data.vocabulary import clip_tokenizer
from upperson.losses import Objective
from upperson.model.base import Base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP, UPPersonConfig
from upperson.plan import count_tokens, expected_step_s, measure_activations, plan

CONFIG = TrainConfig(root="people", base="toy", epochs=4, warmup_epochs=1, batch_size=8)
OBJECTIVE = Objective(("sdm", "id"), 24, 4)
CLASSIFIER = 25 * 4


def components(model, objective=OBJECTIVE):
    base = Base(None, "toy", "", CLIP_STATISTICS)
    return Components(SPLITS, base, model, objective, clip_tokenizer())


def record(pid, *captions):
    return Record(Path(f"{pid}.jpg"), pid, captions)


SPLITS = {
    "train": [
        *(record(index // 2, "a man in a red coat", "a man") for index in range(9)),
        record(90, "a woman " * 60),
    ],
    "val": [record(91, "a woman")],
    "test": [],
}


def kept_bytes(model, pairs, length):
    """What autograd keeps for one batch, counted in one pass of exactly that batch."""
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(
            torch.randn(pairs, 3, *IMAGE_SIZE), torch.randint(1, 40_000, (pairs, length))
        )
    for feature in features:
        pack(feature)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def test_parts_add_up_to_what_is_trained():
    lengths = count_tokens(clip_tokenizer(), ["man", "a red coat", "very " * 100])
    assert (lengths.longest, lengths.limit, lengths.cut) == (77, 77, 1)
    assert lengths.mean == pytest.approx((3 + 5 + 77) / 3)
    config = UPPersonConfig(
        prefix_length=2, lora_rank=0, adapter_reduction=4, prefix_blocks="2", adapter_blocks="1"
    )
    model = toy_model(config)
    found = plan(CONFIG, components(model))
    assert {part.part: part.total for part in found.parts}["LoRA"] == 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trained == trained + CLASSIFIER
    assert found.total == sum(p.numel() for p in model.parameters()) + CLASSIFIER
    assert found.percent == pytest.approx(100 * found.trained / found.total)
    found = plan(CONFIG, components(model, Objective(("sdm",), 24, 4)))
    assert [part.part for part in found.parts] == ["S-Prefix", "LoRA", "L-Adapter"]
    assert found.as_dict()["splits"] == {
        "train": {"images": 10, "captions": 19, "people": 6},
        "val": {"images": 1, "captions": 1, "people": 1},
        "test": {"images": 0, "captions": 0, "people": 0},
    }


def test_steps_and_the_pairs_kept_at_a_time():
    for batch_size, processes, accumulate, steps, pairs in (
        (8, 1, 1, 3, 8), (8, 3, 1, 3, 3), (8, 2, 3, 3, 2), (2, 1, 4, 10, 1), (18, 2, 1, 1, 9),
    ):  # fmt: skip
        config = TrainConfig(
            root="p", base="toy", epochs=5, batch_size=batch_size, accumulate=accumulate
        )
        found = plan(config, components(toy_model()), processes=processes)
        assert (found.steps_per_epoch, found.steps) == (steps, 5 * steps)  # 19 pairs.
        assert found.memory.pairs == pairs


def test_activations_are_what_autograd_keeps():
    model = toy_model()
    per_pair, fixed = measure_activations(model, 13, "fp32")
    for pairs in (1, 2, 5):
        assert per_pair * pairs + fixed == kept_bytes(model, pairs, 13)
    half = measure_activations(model, 13, "bf16")
    assert 0.4 * per_pair < half[0] < 0.8 * per_pair
    assert half[1] > fixed  # Converted weights.
    assert half == measure_activations(model, 13, "fp16")
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = UPPerson(toy_clip(), PLAIN_CLIP, IMAGE_SIZE)
    features = 2 * plain.embed_dim * 4  # Nothing else is kept without a trained part.
    assert measure_activations(plain, 13, "fp32") == (features, 0)


def test_checkpointing_keeps_the_blocks_inputs_and_one_block():
    model = toy_model()
    plain, _ = measure_activations(model, 13, "fp32")
    model.checkpoint_activations = True
    inputs, _ = measure_activations(model, 13, "fp32")
    tokens, width = model.image.positional_embedding.shape
    block_inputs = 4 * 2 * (tokens * width + 13 * 48)  # Two blocks a tower, float32.
    assert block_inputs <= inputs < 1.5 * block_inputs
    peak, _ = measure_activations(model, 13, "fp32", checkpointed=True)
    assert inputs < peak < plain


def test_memory_adds_up():
    model = toy_model()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    config = TrainConfig(root="p", base="toy", batch_size=10, accumulate=2, precision="bf16")
    memory = plan(config, components(model)).memory
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + CLASSIFIER
    assert memory.frozen_bytes == 2 * frozen + model.text.mask.numel()
    assert memory.trained_bytes == memory.gradient_bytes == 4 * trained
    assert memory.optimizer_bytes == 8 * trained
    assert memory.pairs == 5
    assert memory.activation_bytes_per_pair == measure_activations(model, 77, "bf16")[0]
    kept = memory.copies_bytes + 5 * memory.activation_bytes_per_pair
    assert memory.total_bytes == memory.frozen_bytes + 16 * trained + kept


@pytest.mark.parametrize("disturbed", [None, 2, 7])
def test_a_step_is_expected_to_take_what_it_takes_though_others_interfere_once(
    monkeypatch, disturbed
):
    """A pair takes 10 ms; the first pass, and one of the others, 2 s more."""
    sizes = []

    def passed(model, config, length, pairs):
        sizes.append(pairs)
        return 0.01 * pairs + 2.0 * (len(sizes) in (1, disturbed))

    monkeypatch.setattr(planning, "_pass_seconds", passed)
    for accumulate in (1, 4):
        sizes.clear()
        config = TrainConfig(root="people", accumulate=accumulate)
        expected = expected_step_s(toy_model(), config, length=9, pairs=128)
        assert expected == pytest.approx(1.28)
        assert max(sizes) == 32
    # A large tower is measured with few pairs.
    sizes.clear()
    monkeypatch.setattr(planning, "_pass_seconds", lambda *of: sizes.append(of[-1]) or of[-1] * 1.5)
    config = TrainConfig(root="people")
    assert expected_step_s(toy_model(), config, length=9, pairs=128) == pytest.approx(192)
    assert sizes == [1, 2, 2]
