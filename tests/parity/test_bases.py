"""Bases of every kind: open_clip itself, the literal formulas, folded towers, ONNX and int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import literal
from benchmarks.random_model import ModelSpec, random_batch, random_model, tower_inputs
from tests.helpers.toy_bases import (
    CONTEXT,
    SIZE,
    know_toy_towers,
    random_ids,
    shortened_base,
    toy_base,
    toy_person,
)
from tests.helpers.toy_clip import normalised
from tests.helpers.traces import once_in
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_calibration.ranges import estimate, observe
from upperson_calibration.smoothing import choose_smoothing
from upperson_export.fold import fold_image_tower, fold_text_tower, smooth
from upperson_export.graphs import build_variant
from upperson_export.lint import lint
from upperson_rt.agreement import row_cosines
from upperson_rt.backends import open_backend
from upperson_rt.towers import run_tower

TOLERANCE = 1e-5
KINDS = ("siglip", "pecore", "mobileclip")
LENGTHS = [2, 5, 9, 16, 3]


@pytest.fixture(autouse=True)
def towers_of_timm(monkeypatch):
    know_toy_towers(monkeypatch)


def pixels(count, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_parts_it_is_what_open_clip_computes(kind):
    """On pictures of the base's own size, where no position is interpolated."""
    clip = toy_base(kind)
    model = UPPerson(clip, PLAIN_CLIP, (32, 32)).eval()
    image, ids = normalised(model, pixels(3, (32, 32))), random_ids(kind, LENGTHS).long()
    padded = F.pad(ids, (0, CONTEXT - ids.shape[1]))
    with torch.no_grad():
        close(model.encode_image(image), F.normalize(clip.encode_image(image), dim=-1))
        close(model.encode_text(ids), F.normalize(clip.encode_text(padded), dim=-1))


def test_rotary_embeddings_follow_the_grid_as_timm_resizes_them():
    """Of crops that are no squares, from the same interpolated positions."""
    clip = toy_base("pecore")
    model = UPPerson(clip, PLAIN_CLIP, SIZE).eval()
    clip.visual.set_input_size(SIZE)
    clip.visual.trunk.pos_embed = nn.Parameter(model.image.positional_embedding[None])
    image = normalised(model, pixels(3))
    with torch.no_grad():
        found = model.encode_image(image)
        close(found, F.normalize(clip.encode_image(image), dim=-1))
        model.image.rotary = None
        assert float((model.encode_image(image) - found).abs().max()) > 0.01


def test_pe_core_at_its_real_sizes(monkeypatch):
    """Of real widths, with fewer blocks."""
    spec = ModelSpec(base="PE-Core-T-16-384", batch_size=2)
    clip = shortened_base(spec.base, 4, monkeypatch)
    model = random_model(spec, clip).eval()
    raw = torch.from_numpy(tower_inputs(spec)["image"])
    with torch.no_grad():
        close(fold_image_tower(model)(raw), model.encode_image(normalised(model, raw)))
        del model
        images, ids_NL, _ = random_batch(spec)
        visual, size = clip.visual, (spec.height_px, spec.width_px)
        plain = UPPerson(clip, PLAIN_CLIP, visual.image_size).eval()
        padded_NL = F.pad(ids_NL, (0, plain.text.context_length - ids_NL.shape[1]))
        close(plain.encode_text(ids_NL), F.normalize(clip.encode_text(padded_NL), dim=-1))
        squares = F.interpolate(images, visual.image_size)
        close(plain.encode_image(squares), F.normalize(clip.encode_image(squares), dim=-1))
        crops = UPPerson(clip, PLAIN_CLIP, size).eval()
        visual.set_input_size(size)
        # timm interpolates positions in another way than the paper.
        count = visual.trunk.pos_embed.shape[1]
        visual.trunk.pos_embed = nn.Parameter(crops.image.positional_embedding[None, -count:])
        close(crops.encode_image(images), F.normalize(clip.encode_image(images), dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_literal_formulas_and_the_folded_towers_agree(kind):
    model = toy_person(kind)
    raw, ids = pixels(3), random_ids(kind, LENGTHS)
    image = normalised(model, raw)
    with torch.no_grad():
        images, texts = model.encode_image(image), model.encode_text(ids.long())
        close(images, literal.encode_image(model, image))
        close(texts, literal.encode_text(model, ids.long()))
        close(fold_image_tower(model)(raw), images)
        text = fold_text_tower(model)
        for rows, length in enumerate(LENGTHS):  # Whatever it is padded to.
            close(text(ids[rows : rows + 1, :length]), texts[rows : rows + 1])
        close(text(F.pad(ids, (0, CONTEXT - ids.shape[1]))), texts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_tensor_counts_and_a_batch_norm_stays_what_it_was(kind):
    model = toy_person(kind)
    image, ids = normalised(model, pixels(2)), random_ids(kind, [4, 7]).long()
    embeds = model.encode_image(image)
    (embeds.sum() + model.encode_text(ids).sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
        else:
            assert parameter.grad is None, name
    with torch.no_grad():
        assert torch.equal(model.train().encode_image(image), embeds)


def test_padding_counts_where_it_was_trained_on():
    """A SigLIP attends to padding: its captions are padded to the context by the model."""
    clip, ids = toy_base("siglip"), random_ids("siglip", [5]).long()
    model = UPPerson(clip, PLAIN_CLIP, SIZE).eval()
    with torch.no_grad():
        shorter = clip.text.positional_embedding[:5] + clip.text.token_embedding(ids)
        unpadded = clip.text.ln_final(clip.text.transformer(shorter))[:, -1]
        unpadded = F.normalize(clip.text.text_projection(unpadded), dim=-1)
        found = model.encode_text(ids)
    assert float((found - unpadded).abs().max()) > 0.01  # Another embedding.
    close(model.encode_text(F.pad(ids, (0, 7))), found)


# The text towers of PE-Core and MobileCLIP are CLIP's.
@pytest.mark.parametrize(
    ("kind", "tower"),
    [("siglip", "image"), ("siglip", "text"), ("pecore", "image"), ("mobileclip", "image")],
)
def test_exported_smoothed_and_int8_towers_agree(kind, tower, shared_folder, tmp_path):
    model = toy_person(kind)
    if tower == "image":
        plain, given = fold_image_tower(model), pixels(12).numpy()
        example = torch.from_numpy(given[:4])
    else:
        plain, given = fold_text_tower(model), random_ids(kind, [*LENGTHS, 7, 11, 4]).numpy()
        example = torch.from_numpy(given[:4, :13])

    def embed(array, folded=plain):
        with torch.no_grad():
            return folded(torch.from_numpy(array)).numpy()

    expected = embed(given)
    traced = once_in(shared_folder / "traces")
    graph = traced(plain, tower, tmp_path / f"{tower}.onnx", example=example)
    assert not lint(graph.load())
    exact = open_backend(graph.file, "onnxruntime")
    alone = np.concatenate([run_tower(exact, tower, row[None]) for row in given])
    for found in (run_tower(exact, tower, given), alone):
        assert np.abs(found - expected).max() < TOLERANCE
    for width in (2, CONTEXT) if tower == "text" else ():
        ids = np.zeros((2, width), np.int32)
        ids[:, :2] = random_ids(kind, [2, 2]).numpy()
        assert np.abs(run_tower(exact, tower, ids) - embed(ids)).max() < TOLERANCE

    seen = observe(graph, given)
    sites = plain.sites()
    assert choose_smoothing(graph, seen).keys() == sites.keys()
    rng = np.random.default_rng(0)
    factors = {
        name: rng.uniform(0.5, 2, len(plain.weights()[site.readers[0]])).astype(np.float32)
        for name, site in sites.items()
    }
    assert np.abs(embed(given, smooth(plain, factors)) - expected).max() < TOLERANCE

    int8 = build_variant(graph, "int8", estimate(seen, "min-max"))
    assert not lint(int8)
    ir.save(int8, tmp_path / f"{tower}.int8.onnx")
    quantized = open_backend(tmp_path / f"{tower}.int8.onnx", "onnxruntime")
    cosines = row_cosines(expected, run_tower(quantized, tower, given))
    assert 0.99 < cosines.min() < 1 - 1e-7  # Close, and not float.
    covered = {linear.node for linear in graph.linears}
    assert len(covered) == len(plain.block_linears())
    if kind in ("siglip", "pecore") and tower == "image":
        assert {f"pool.{name}/MatMul" for name in ("kv", "out", "mlp.fc1", "mlp.fc2")} < covered
