"""The model against the paper's formulas and against plain open_clip."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import literal
from tests.helpers.toy_clip import IMAGE_SIZE, normalised, toy_clip, toy_ids, toy_model, toy_pixels
from upperson.losses import same_identity, sdm_loss
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP, UPPersonConfig

TOLERANCE = 1e-5
LENGTHS = [3, 9, 20, 77, 2]
CONFIGS = [
    UPPersonConfig(lora_rank=4, adapter_reduction=4, **others)
    for others in (
        {"prefix_length": 0},
        {"prefix_length": 5},
        {"prefix_length": 5, "prefix_blocks": "2", "lora_blocks": "1", "adapter_blocks": "1-1"},
    )
]


def close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_towers_equal_the_literal_formulas(config):
    model = toy_model(config)
    image, ids = normalised(model, toy_pixels(3)), toy_ids(LENGTHS).long()
    with torch.no_grad():
        close(model.encode_image(image), literal.encode_image(model, image))
        close(model.encode_text(ids), literal.encode_text(model, ids))


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_equal_the_literal_ones(config):
    """Every trained tensor must train as in the formulas, not only give the same output.

    S in particular: it stands before the prefix values here, and on the attention there.
    In float64, because the gradient of a scalar is a sum over a batch that nearly cancels.
    """
    fast, slow = toy_model(config).double(), toy_model(config).double()
    image, ids = normalised(fast, toy_pixels(5)).double(), toy_ids(LENGTHS).long()
    weights = torch.randn(2, 5, fast.embed_dim, dtype=torch.float64)
    found_2NE = [F.normalize(features, dim=-1) for features in fast(image, ids)]
    (torch.stack(found_2NE) * weights).sum().backward()
    expected_2NE = [literal.encode_image(slow, image), literal.encode_text(slow, ids)]
    (torch.stack(expected_2NE) * weights).sum().backward()
    for (name, found), expected in zip(fast.named_parameters(), slow.parameters(), strict=True):
        if not expected.requires_grad:
            assert found.grad is None, name
            continue
        assert found.grad is not None, name
        assert float(expected.grad.abs().max()) > 0, name
        error = (found.grad - expected.grad).abs().max()
        assert float(error) <= 1e-8 * float(expected.grad.abs().max()), name


def test_without_parts_it_is_plain_clip():
    clip = toy_clip()
    model = UPPerson(clip, PLAIN_CLIP, IMAGE_SIZE).eval()
    image, ids = normalised(model, toy_pixels(3)), toy_ids(LENGTHS).long()
    padded = F.pad(ids, (0, 77 - ids.shape[1]))
    with torch.no_grad():
        close(model.encode_image(image), clip.encode_image(image, normalize=True), 1e-6)
        close(model.encode_text(ids), clip.encode_text(padded, normalize=True), 1e-6)


def test_text_length_does_not_change_the_embedding():
    model = toy_model()
    ids = toy_ids([6, 11]).long()
    with torch.no_grad():
        expected = model.encode_text(ids)
        for more in (1, 29, 66):
            close(model.encode_text(F.pad(ids, (0, more))), expected, 1e-6)


@pytest.mark.parametrize("pids", [[0, 1, 2, 3, 4], [7, 7, 2, 7, 2], [1, 1, 1, 1, 1]])
def test_sdm_equals_the_entry_by_entry_sum(pids):
    generator = torch.Generator().manual_seed(5)
    image, text = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    found = sdm_loss(image, text, same_identity(torch.tensor(pids))).item()
    assert found == pytest.approx(literal.sdm_loss(image, text, pids), rel=1e-4)
