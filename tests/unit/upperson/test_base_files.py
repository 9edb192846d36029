"""Bases that are not plain CLIPs of open_clip's names: their files, tokenizers, and refusals."""

from __future__ import annotations

import json
import re
from copy import deepcopy

import open_clip
import pytest
import torch
from open_clip.tokenizer import get_clean_fn
from safetensors.torch import save_file
from timm.layers import RotaryEmbedding, SwiGLU
from timm.models.eva import EvaAttention
from tokenizers import Tokenizer as PublishedTokenizer
from torch import nn

from tests.helpers.data_sets import write_cuhk_pedes
from tests.helpers.refused import refused
from tests.helpers.toy_bases import (
    CONTEXT,
    SIZE,
    gemma_file,
    gemma_vocabulary,
    know_toy_towers,
    toy_base,
    write_base,
)
from upperson.components import build_components
from upperson.config import TrainConfig
from upperson.data.vocabulary import gemma_tokenizer_json
from upperson.model import weights
from upperson.model.architecture import image_architecture
from upperson.model.base import load_base
from upperson.model.configs import base_config
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_rt.errors import InputError, UsageError
from upperson_rt.tokenizer import Tokenizer
from upperson_synthetic import SyntheticSpec, write_dataset


@pytest.fixture(autouse=True)
def towers_of_timm(monkeypatch):
    know_toy_towers(monkeypatch)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: None)


@pytest.mark.parametrize("kind", ["clip", "siglip", "pecore", "mobileclip"])
def test_a_file_gives_the_base_that_it_describes(tmp_path, kind):
    config, file = write_base(tmp_path, kind)
    base = load_base(str(config), str(file), SIZE)
    expected = toy_base(kind).state_dict()
    found = base.clip.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for (name, buffer), other in zip(
        base.clip.named_buffers(), toy_base(kind).buffers(), strict=True
    ):  # Those of rotary embeddings are not in the file.
        assert torch.equal(buffer, other), name
    assert base.name == f"toy-{kind}"
    assert base.statistics == ((0.5, 0.4, 0.3), (0.5, 0.4, 0.6))
    assert base.has_clips_vocabulary == (kind != "siglip")
    assert base.tokenizer().context_length == (77 if kind == "clip" else CONTEXT)
    assert base.sha256 == load_base(str(config), str(file)).sha256


def test_what_a_file_says_and_the_tokenizer_identify_the_base(tmp_path):
    config, file = write_base(tmp_path, "siglip")
    before = load_base(str(config), str(file)).sha256
    change_json(tmp_path / "tokenizer.json", lambda content: content["model"]["merges"].pop())
    assert load_base(str(config), str(file)).sha256 != before

    config, file = write_base(tmp_path / "clip", "clip")
    gelu, _ = write_base(tmp_path / "gelu", "clip", quick_gelu=False)
    assert load_base(str(config), str(file)).sha256 != load_base(str(gelu), str(file)).sha256
    published = config.rename(config.parent / "open_clip_config.json")
    assert base_config(str(published)).name == "clip"


ENTRIES = {
    "clip": [
        "embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "vision_cfg.image_size",
        "vision_cfg.patch_size", "vision_cfg.width", "vision_cfg.layers",
        "text_cfg.context_length", "text_cfg.vocab_size", "text_cfg.width", "text_cfg.heads",
        "text_cfg.layers",
    ],
    "siglip": [
        "vision_cfg.timm_pool", "vision_cfg.timm_proj", "text_cfg.no_causal_mask",
        "text_cfg.pool_type", "text_cfg.norm_kwargs", "text_cfg.act_kwargs",
        "text_cfg.tokenizer_kwargs",
    ],
}  # fmt: skip


def change_json(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_missing_entry_is_an_error_and_never_a_guess(tmp_path, kind):
    config, file = write_base(tmp_path, kind)
    whole = json.loads(config.read_text("utf-8"))
    for entry in ENTRIES[kind]:
        content = deepcopy(whole)
        part, _, last = entry.rpartition(".")
        del (content["model_cfg"][part] if part else content["model_cfg"])[last]
        config.write_text(json.dumps(content), "utf-8")
        with refused("base_file_wrong", InputError, entry=entry):
            load_base(str(config), str(file))


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (lambda c: c.pop("preprocess_cfg"), ""),
        (lambda c: c["preprocess_cfg"].pop("mean"), "preprocess_cfg.mean"),
        (lambda c: c["preprocess_cfg"].update(std=[0, 1, 1]), "preprocess_cfg.std"),
        (lambda c: c["preprocess_cfg"].update(means=[0]), "preprocess_cfg"),
        (lambda c: c["model_cfg"].update(embed_dim="24"), "embed_dim"),
        (lambda c: c["model_cfg"].update(quick_gelu=1), "quick_gelu"),
        (lambda c: c["model_cfg"]["text_cfg"].update(heads=5), "text_cfg"),
        (lambda c: c["model_cfg"]["text_cfg"].update(heads=0), "text_cfg.heads"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(width=100), "vision_cfg"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(image_size=[48]), "vision_cfg.image_size"),
    ],
)
def test_a_file_with_wrong_values_is_refused(tmp_path, change, entry):
    config, file = write_base(tmp_path, "clip")
    change_json(config, change)
    with refused("base_file_wrong", InputError, entry=entry):
        load_base(str(config), str(file))
    with refused("base_file_missing", InputError, path=tmp_path / "gone.json"):
        load_base(str(tmp_path / "gone.json"), "gone.pt")
    config.write_text("[]")
    with refused("base_file_wrong", InputError):
        load_base(str(config), str(file))


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("vision_cfg", {"timm_model_name": "resnet50"}, "timm_model_name resnet50"),
        ("vision_cfg", {"timm_model_name": "gone"}, "timm_model_name gone"),
        ("vision_cfg", {"timm_pool": "avg"}, "timm_pool 'avg'"),
        ("vision_cfg", {"timm_proj": "mlp"}, "timm_proj 'mlp'"),
        ("text_cfg", {"vocab_size": 1000}, "vocab_size 1000 where CLIP's is 49408"),
        ("text_cfg", {"ls_init_value": 1.0}, "ls_init_value"),
    ],
)
def test_another_architecture_is_refused_with_the_reason(tmp_path, part, change, reason):
    config, file = write_base(tmp_path, "mobileclip")
    change_json(config, lambda content: content["model_cfg"][part].update(change))
    with refused("base_unsupported", UsageError) as found:
        load_base(str(config), str(file))
    assert reason in found.value.fields["reasons"]


TIMM_TOWERS = {
    "mobileclip": [
        (lambda t: setattr(t, "pos_embed", None), "no table of positions"),
        (lambda t: setattr(t, "fc_norm", nn.LayerNorm(48)), "norms what it has pooled"),
        (lambda t: setattr(t, "num_prefix_tokens", 5), "register tokens"),
        (lambda t: setattr(t, "global_pool", "avg"), "pools by 'avg'"),
        (lambda t: setattr(t.blocks[1], "ls1", nn.LayerNorm(48)), "layer scale"),
        (lambda t: setattr(t.blocks[0].attn, "q_norm", nn.LayerNorm(16)), "custom attention"),
        (lambda t: setattr(t.blocks[0].mlp, "act", nn.SiLU()), "activation"),
        (lambda t: setattr(t.patch_embed, "proj", nn.LayerNorm(48)), "patches in an unknown way"),
        (lambda t: setattr(t.patch_embed.backbone[0].conv, "stride", (2, 2)), "unknown way"),
    ],
    "siglip": [
        (lambda t: setattr(t.attn_pool, "pool", "avg"), "another kind than SigLIP's"),
        (lambda t: setattr(t.attn_pool, "latent_len", 2), "another kind than SigLIP's"),
        (lambda t: setattr(t.attn_pool, "k_norm", nn.LayerNorm(16)), "another kind than SigLIP's"),
    ],
    "pecore": [
        (lambda t: setattr(t, "global_pool", "token"), "pools by 'token'"),
        (lambda t: setattr(t, "rope", RotaryEmbedding(16)), "rotary embeddings are of another"),
        (lambda t: setattr(t.rope, "rotate_half", True), "rotary embeddings are of another"),
        (lambda t: setattr(t.blocks[1], "gamma_1", nn.Parameter(torch.ones(48))), "layer scale"),
        (lambda t: setattr(t.blocks[0].attn, "norm", nn.LayerNorm(48)), "custom attention"),
        (lambda t: setattr(t.blocks[0].attn, "qkv", None), "custom attention"),
        (lambda t: setattr(t.blocks[0], "attn", EvaAttention(48, 3, scale_norm=False)), "custom"),
        (lambda t: setattr(t.blocks[0], "mlp", SwiGLU(48, 96)), "activation"),
    ],
}


@pytest.mark.parametrize("kind", TIMM_TOWERS)
def test_a_tower_of_timm_that_computes_otherwise_is_refused(kind):
    for change, reason in TIMM_TOWERS[kind]:
        clip = toy_base(kind)
        change(clip.visual.trunk)
        with refused("base_unsupported", UsageError) as found:
            UPPerson(clip, PLAIN_CLIP, SIZE)
        assert reason in found.value.fields["reasons"]


@pytest.mark.parametrize(
    ("name", "grid", "has_pool", "embed_dim", "mean", "std"),
    [
        ("ViT-B-16-SigLIP2-256", (16, 16), True, 768, 0.5, 0.5),
        ("PE-Core-B-16", (14, 14), True, 1024, 0.5, 0.5),
        ("MobileCLIP2-B", (14, 14), False, 512, 0.0, 1.0),
    ],
)
def test_the_real_architectures_are_understood(name, grid, has_pool, embed_dim, mean, std):
    config = base_config(name)
    with torch.device("meta"):
        clip = open_clip.model.CustomTextCLIP(**config.model)
        tower = image_architecture(clip)
        model = UPPerson(clip, PLAIN_CLIP, (384, 128))
    assert (tower.patch_px, len(tower.blocks), tower.grid) == ((16, 16), 12, grid)
    assert (tower.class_embedding is None) == name.endswith("256")
    assert (tower.pool is not None) == has_pool
    assert (model.image.rotary is not None) == name.startswith("PE-Core")
    assert model.embed_dim == embed_dim
    assert config.statistics == ((mean,) * 3, (std,) * 3)  # Of a local file, which has none.


def test_pixel_statistics_in_which_the_tags_of_a_name_differ_are_not_taken(monkeypatch):
    facts = {
        tag: {"mean": (mean,) * 3, "std": (1.0,) * 3} for tag, mean in (("a", 0.0), ("b", 0.5))
    }
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: list(facts))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _, tag: facts[tag])
    assert base_config("ViT-B-16-SigLIP2-256").statistics is None


def test_names_of_tinyclips_checkpoints_are_understood(tmp_path):
    config, _ = write_base(tmp_path, "clip")
    state = toy_base("clip").state_dict()
    renamed = {}
    for name, value in state.items():
        tower = "_image_encoder" if name.startswith("visual.") else "_text_encoder"
        tower = "_logit_scale" if name == "logit_scale" else tower
        renamed[f"{tower}.module.{name}"] = value
    torch.save({"state_dict": renamed}, tmp_path / "tiny.pt")
    found = load_base(str(config), str(tmp_path / "tiny.pt")).clip.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    # OpenAI's format has QuickGELU, whatever a file says.
    config, _ = write_base(tmp_path, "clip", quick_gelu=False)
    facts = {"input_resolution": 48, "context_length": 77, "vocab_size": 49408}
    save_file(state | {k: torch.tensor(v) for k, v in facts.items()}, tmp_path / "o.safetensors")
    with refused("activation_contradicts", InputError, config=config):
        load_base(str(config), str(tmp_path / "o.safetensors"))


# --- tokenizers ---


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
def test_gemmas_vocabulary_splits_text_as_the_published_file_does(tmp_path, clean):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(gemma_file()), "utf-8")
    found = Tokenizer.from_json(gemma_tokenizer_json(path, len(gemma_vocabulary()), clean), 64)
    published = PublishedTokenizer.from_str(json.dumps(gemma_file()))
    published.encode_special_tokens = True
    cleaned = get_clean_fn(clean)
    for text in (
        "A Man, in RED_coat!",
        "  a  woman\twith blue-green jeans",
        "Zoë\u2019s 漢字 hat & \u201cbag\u201d",
        "a <eos> bag &amp; <pad>", "ein Mann\nmit",
    ):  # fmt: skip
        ids = published.encode(cleaned(text), add_special_tokens=False).ids
        assert found.encode([text]).input_ids.tolist() == [[*ids, 1]], text
    assert (found.sot_id, found.eot_id) == (None, 1)
    batch = found.encode(["a man", "a man in red " * 99])
    assert batch.truncated == [1]
    assert batch.input_ids.shape == (2, 64)
    assert batch.input_ids[1, -1] == 1


def test_a_tokenizer_that_is_not_there_is_named(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(weights, "get_hf_file_metadata", fail)
    config, file = write_base(tmp_path, "siglip")
    (tmp_path / "tokenizer.json").unlink()
    with refused("tokenizer_not_fetched", InputError, repository="toy/siglip", folder=tmp_path):
        load_base(str(config), str(file))
    with refused("tokenizer_not_fetched", InputError, repository="timm/ViT-B-16-SigLIP2-256"):
        load_base("ViT-B-16-SigLIP2-256", "webli")
    (tmp_path / "cached.json").write_text(json.dumps(gemma_file()), "utf-8")
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: str(tmp_path / "cached.json"))
    tokenizer = load_base(str(config), str(file)).tokenizer()
    assert tokenizer.eot_id == 1
    with pytest.raises(InputError, match="sentence 1 "):  # Nothing is left of it.
        tokenizer.encode(["a man", "?!"])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda f: f["model"].update(type="Unigram"), "tokenizer_unsupported"),
        (lambda f: f.pop("model"), "tokenizer_unsupported"),
        (lambda f: f["model"]["vocab"].update({"more": 999}), "tokenizer_size"),
        (lambda f: f["model"]["vocab"].update({"<pad>": 2, "<bos>": 0}), "tokenizer_unsupported"),
        (lambda f: f["model"]["vocab"].update({"<mask>": 3}), "tokenizer_unsupported"),
        (lambda f: f["model"]["merges"].append(["q", "qq"]), "tokenizer_unsupported"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path, change, code):
    config, file = write_base(tmp_path, "siglip")
    change_json(tmp_path / "tokenizer.json", change)
    with refused(code, InputError):
        load_base(str(config), str(file))


def test_captions_of_another_vocabulary_are_not_masked_as_clips(tmp_path):
    config, file = write_base(tmp_path, "siglip")
    people = SyntheticSpec(look="street", train_ids=2, val_ids=0, test_ids=0, views=1)
    settings = {
        "root": str(write_dataset(tmp_path / "people", people)), "base": str(config),
        "pretrained": str(file), "height_px": SIZE[0], "width_px": SIZE[1], "batch_size": 2,
    }  # fmt: skip
    with refused("vocabulary_without_mask", UsageError):
        build_components(TrainConfig(**settings))
    built = build_components(TrainConfig(**settings, mask_captions=False))
    assert built.tokenizer.eot_id == 1


def test_training_needs_the_whole_published_set(tmp_path):
    config = TrainConfig(dataset="cuhk-pedes", root=str(write_cuhk_pedes(tmp_path)))
    with refused("counts_differ", InputError, dataset="cuhk-pedes"):
        build_components(config)


@pytest.mark.parametrize(
    ("file", "base"),
    [
        ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "ViT-B-32"),
        ("vit_b_16-laion400m_e32-55e67d44.pt", "ViT-B-16-quickgelu"),
    ],
)
def test_a_published_file_under_a_base_of_the_other_activation_is_refused(tmp_path, file, base):
    torch.save({"any": torch.ones(1)}, tmp_path / file)
    with refused("activation_contradicts", InputError, base=base):
        load_base(base, str(tmp_path / file))
    (tmp_path / file).rename(tmp_path / "own.pt")  # Of other names nothing is known.
    with refused("weights_of_another_base", InputError):
        load_base(base, str(tmp_path / "own.pt"))


def test_the_names_of_published_files_say_one_activation_each():
    found = {}
    for name, tag in open_clip.list_pretrained():
        facts = open_clip.get_pretrained_cfg(name, tag)
        file = (facts.get("url") or "").rpartition("/")[2]
        found.setdefault(file, set()).add(bool(facts.get("quick_gelu")))
    hashed = {file: kinds for file, kinds in found.items() if re.search(r"-[0-9a-f]{8}\.pt$", file)}
    assert len(hashed) >= 8
    assert all(len(kinds) == 1 for kinds in hashed.values())
