"""Counts, freezing and refusals of the model."""

import pytest
import torch
from open_clip.model import CLIP

from tests.helpers.refused import refused
from tests.helpers.toy_clip import IMAGE_SIZE, TOY, toy_clip, toy_model
from upperson.model.encoder import (
    UPPerson,
    causal_mask,
    interpolate_positions,
    patch_grid,
)
from upperson.model.parts import PLAIN_CLIP, KVLora, LAdapter, UPPersonConfig
from upperson_rt.errors import UsageError


def test_fresh_parts_other_than_the_prefix_change_nothing():
    clip = toy_clip()
    plain = UPPerson(clip, PLAIN_CLIP, IMAGE_SIZE)
    config = UPPersonConfig(prefix_length=0, lora_rank=4, adapter_reduction=4)
    fresh = UPPerson(clip, config, IMAGE_SIZE)
    image = torch.randn(2, 3, *IMAGE_SIZE)
    with torch.no_grad():
        assert torch.equal(plain.encode_image(image), fresh.encode_image(image))


def test_a_share_of_the_parts_adds_so_much_of_what_they_add():
    model = toy_model()
    for name, parameter in model.named_parameters():
        if name.endswith(("up", "up.weight", "up.bias", ".scale")):
            torch.nn.init.normal_(parameter, std=0.3)
    lora = next(part for part in model.modules() if isinstance(part, KVLora))
    adapter = next(part for part in model.modules() if isinstance(part, LAdapter))
    x_ND = torch.randn(5, lora.key.down.shape[1])

    def added():
        keys, values = lora(x_ND, torch.zeros_like(x_ND), torch.zeros_like(x_ND))
        return [keys, values, adapter(x_ND, torch.zeros_like(x_ND))]

    before, whole = model.trained_state(), added()
    with torch.no_grad(), model.keeping(0.25):
        for found, all_of_it in zip(added(), whole, strict=True):
            torch.testing.assert_close(found, all_of_it / 4)
        kept = model.trained_state()
    with pytest.raises(KeyboardInterrupt), model.keeping(0.3):
        raise KeyboardInterrupt
    for name, tensor in model.trained_state().items():
        assert torch.equal(tensor, before[name])
        scaled = name.endswith(".scale") and "prefix" not in name
        assert torch.equal(kept[name], tensor / 4 if scaled else tensor)


def test_positions_are_interpolated_and_the_mask_hides_later_tokens():
    positions = torch.nn.Parameter(torch.tensor([[9.0], [0.0], [2.0], [4.0], [6.0]]))
    found = interpolate_positions(positions, (2, 2), (4, 2))
    assert found[0].item() == 9.0
    # Half-pixel centres: 0, 1/4, 3/4 and 1 of the way from the upper to the lower row.
    assert found[1:].reshape(4, 2).tolist() == [[0, 2], [1, 3], [3, 5], [4, 6]]
    assert interpolate_positions(positions, (2, 2), (2, 2)) is positions
    assert causal_mask(3, 2).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_cfg": TOY["vision_cfg"] | {"pool_type": "avg"}}, "class token"),
        ({"text_cfg": TOY["text_cfg"] | {"pool_type": "last"}}, "but is causal"),
        ({"text_cfg": TOY["text_cfg"] | {"pool_type": "first"}}, "neither by EOT nor"),
        ({"vision_cfg": TOY["vision_cfg"] | {"ls_init_value": 0.1}}, "layer scale"),
    ],
)
def test_a_base_of_another_kind_is_refused(change, reason):
    with refused("base_unsupported", UsageError) as found:
        UPPerson(CLIP(**(TOY | change)), UPPersonConfig(), IMAGE_SIZE)
    assert reason in found.value.fields["reasons"]


def test_sizes_that_do_not_fit_are_refused():
    with refused("image_size_indivisible", UsageError, patch=(16, 16)):
        patch_grid((16, 16), 100, 32)
    for size in ("prefix_length", "lora_rank", "adapter_reduction"):
        with refused("size_out_of_range", UsageError, setting=size):
            UPPersonConfig(**{size: -1})
    for text in ("0-2", "3-2", "x", "1-", "", "1-99999"):
        with refused("blocks_malformed", UsageError, setting="lora_blocks"):
            UPPersonConfig(lora_blocks=text)
    with refused("blocks_out_of_range", UsageError, setting="adapter_blocks", blocks=2):
        toy_model(UPPersonConfig(adapter_blocks="1-3"))


def test_parts_sit_in_the_blocks_that_were_named():
    config = UPPersonConfig(prefix_blocks="1", lora_blocks="2-2", adapter_blocks="1-2")
    model = toy_model(config)
    for tower in (model.image, model.text):
        places = [(block.prefix is None, block.lora is None) for block in tower.blocks]
        assert places == [(False, True), (True, False)]
        assert all(block.adapter_attn is not None for block in tower.blocks)
