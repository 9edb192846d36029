"""Bases from files and tags: formats, activation, pixel statistics, grids, and refusals."""

import re
import socket

import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from tests.helpers.openai_archive import FACTS, save_openai_archive
from tests.helpers.refused import refused
from tests.helpers.toy_clip import IMAGE_SIZE, TOY, toy_clip
from upperson.model import base as base_module
from upperson.model import weights
from upperson.model.architecture import image_architecture
from upperson.model.base import SMALL, build_clip, load_base
from upperson.model.configs import is_known_to_work
from upperson.model.encoder import UPPerson
from upperson.model.parts import UPPersonConfig
from upperson.model.weights import require_finite
from upperson_rt.errors import InputError, UsageError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail a test that opens a connection, and let none find files of this machine's user."""

    def refuse(*_, **__):
        raise AssertionError("a test wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: None)


@pytest.fixture
def toy(monkeypatch):
    """Make open_clip know the toy under two names, with GELU and with QuickGELU."""
    known = open_clip.get_model_config
    toys = {"toy": TOY | {"quick_gelu": False}, "toy-quickgelu": TOY}

    def config(name):
        return toys[name] | {"vision_cfg": dict(TOY["vision_cfg"])} if name in toys else known(name)

    monkeypatch.setattr(open_clip, "get_model_config", config)


@pytest.fixture(scope="module")
def state():
    return toy_clip().state_dict()


def activations(clip):
    towers = (clip.visual.transformer, clip.transformer)
    return {type(block.mlp.gelu) for tower in towers for block in tower.resblocks}


@pytest.mark.usefixtures("toy")
def test_every_format_gives_the_same_weights(tmp_path, state):
    save_openai_archive(state, tmp_path / "openai.pt")
    save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "wrapped.pt")
    unscaled = {name: value for name, value in state.items() if name != "logit_scale"}
    scale = torch.tensor([float(state["logit_scale"])])
    torch.save(unscaled | {"logit_scale": scale}, tmp_path / "scale.pt")
    hashes = {load_base("toy-quickgelu", str(path)).sha256 for path in tmp_path.iterdir()}
    assert len(hashes) == 1
    half = {name: value.half() for name, value in unscaled.items()}
    torch.save(half | {"extra": torch.ones(2)}, tmp_path / "unscaled.pt")
    found = load_base("toy-quickgelu", str(tmp_path / "unscaled.pt")).clip.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in half.items())
    assert found["ln_final.weight"].dtype == torch.float32
    require_finite("their sum is not", torch.full((3,), 3e38))


@pytest.mark.usefixtures("toy")
def test_openais_format_has_quickgelu_and_for_other_files_the_name_decides(tmp_path, state):
    archive, plain = tmp_path / "openai.pt", tmp_path / "plain.pt"
    save_openai_archive(state, archive)
    torch.save(state, plain)
    assert activations(load_base("toy", str(archive)).clip) == {QuickGELU}
    assert activations(load_base("toy", str(plain)).clip) == {torch.nn.GELU}
    assert activations(load_base("toy-quickgelu", str(plain)).clip) == {QuickGELU}
    torch.save(state | {name: torch.tensor(n) for name, n in FACTS.items()}, plain)
    assert activations(load_base("toy", str(plain)).clip) == {QuickGELU}
    small = load_base(SMALL, None)
    assert small.statistics == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    assert activations(small.clip) == {QuickGELU}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("name", "facts", "activation"),
    [
        ("toy", {"quick_gelu": True}, QuickGELU),
        ("toy", {}, torch.nn.GELU),
        ("toy-quickgelu", {"quick_gelu": False}, torch.nn.GELU),
        ("toy-quickgelu", {}, QuickGELU),
    ],
)
def test_a_tag_decides_activation_and_pixel_statistics(
    tmp_path, monkeypatch, state, name, facts, activation
):
    save_file(state, tmp_path / "fetched.safetensors")
    facts = facts | {"hf_hub": "org/toy/", "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: facts)
    monkeypatch.setattr(base_module, "fetch", lambda *_: tmp_path / "fetched.safetensors")
    base = load_base(name, "some_tag")
    assert activations(base.clip) == {activation}
    assert base.statistics == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))


@pytest.mark.usefixtures("toy")
def test_first_values_are_drawn_only_for_what_is_drawn_after_them(tmp_path, state):
    path = tmp_path / "toy.safetensors"
    save_file(state, path)
    after, hashes = [], set()
    for draw in (True, False):
        torch.manual_seed(0)
        hashes.add(load_base("toy", str(path), draw=draw).sha256)
        after.append(torch.rand(1))
    torch.manual_seed(0)
    CLIP(**TOY)
    assert torch.equal(after[0], torch.rand(1)), "runs of one seed start as ever"
    assert not torch.equal(*after)
    assert len(hashes) == 1


@pytest.mark.usefixtures("toy")
def test_the_image_size_is_for_weights_on_the_grid_of_the_crops(tmp_path, state):
    path = tmp_path / "crops.safetensors"
    crops = CLIP(**(TOY | {"vision_cfg": TOY["vision_cfg"] | {"image_size": [96, 32]}}))
    save_file(crops.state_dict(), path)
    base = load_base("toy", str(path), (96, 32))
    assert base.clip.visual.grid_size == (6, 2)
    model = UPPerson(base.clip, UPPersonConfig(), (96, 32))
    assert torch.equal(model.image.positional_embedding, crops.visual.positional_embedding)
    for image_size in (None, IMAGE_SIZE, (64, 64)):
        with refused("weights_of_another_base", InputError) as found:
            load_base("toy", str(path), image_size)
        assert found.value.fields["tensor"] == "visual.positional_embedding (7, 64)"
    save_file(state, path)
    # 48x32 and 32x48 have equally many patches: the grid of the name is meant.
    for image_size in ((96, 32), (32, 48), IMAGE_SIZE):
        base = load_base("toy", str(path), image_size)
        assert base.clip.visual.grid_size == (3, 2)
        assert base.sha256 == load_base("toy", str(path)).sha256


@pytest.mark.timeout(180)
def test_bases_that_the_name_check_passes_are_those_that_upperson_can_use(monkeypatch):
    known = open_clip.get_model_config

    def of_two_blocks(name):
        config = known(name)
        for tower in ("vision_cfg", "text_cfg"):
            if "layers" in config[tower]:
                config[tower] = config[tower] | {"layers": 2}
        return config

    names = [name for name in open_clip.list_models() if is_known_to_work(name)]
    monkeypatch.setattr(open_clip, "get_model_config", of_two_blocks)
    assert {"ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32", "ViT-B-32-256", "ViT-L-14"} <= set(names)
    # One of several that differ in the size of their pictures or in the activation alone.
    for name in {re.sub(r"-(\d{3}|quickgelu)$", "", name): name for name in names}.values():
        with torch.device("meta"):
            clip = build_clip(name)
            rows, columns = (size * 4 for size in image_architecture(clip).patch_px)
            UPPerson(clip, UPPersonConfig(), (rows, columns))


def test_other_architectures_are_refused_before_anything_is_built_or_fetched():
    for name in ("RN50", "coca_ViT-B-32", "EVA02-B-16", "convnext_base", "MobileCLIP2-S0"):
        for given in (None, "openai", "gone.pt"):
            with refused("base_unsupported", UsageError, base=name):
                load_base(name, given)


def test_an_unknown_name_is_answered_with_near_ones():
    hub = "hf-hub:laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
    near = {"ViT-B/16": "ViT-B-16", "uperson-small": SMALL, hub: "ViT-B-16", "?": "ViT-B-16"}
    for name, expected in near.items():
        with refused("base_unknown", UsageError, base=name) as found:
            load_base(name, "openai")
        assert expected in str(found.value)


@pytest.mark.parametrize(
    ("name", "tag", "wanted"),
    [
        ("ViT-B-16", "openai", ["https://openai", "--base ViT-B-16 --pretrained"]),
        ("ViT-B-16", "laion2b_s34b_b88k", ["laion2B-s34B-b88K", "--base ViT-B-16 --pretrained"]),
        ("ViT-B-16", "metaclip_400m", ["--base ViT-B-16-quickgelu --pretrained"]),
        ("ViT-L-14", "laion2b_s32b_b82k", ["cache"]),  # Its pixel statistics are not CLIP's.
    ],
)
def test_a_tag_without_network_says_what_to_fetch_and_how_to_pass_it(capfd, name, tag, wanted):
    with refused("weights_not_fetched", InputError, base=name, tag=tag) as found:
        load_base(name, tag)
    assert [part for part in wanted if part not in found.value.fields["advice"]] == []
    assert capfd.readouterr() == ("", "")


def test_a_dead_network_is_noticed_with_one_request(monkeypatch):
    requests = []

    def fail(url, timeout):
        requests.append((url, timeout))
        raise RuntimeError("No route. Check the cables.\nThen again.")

    monkeypatch.setattr(weights, "get_hf_file_metadata", fail)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_: pytest.fail("retries"))
    with refused("weights_not_fetched", InputError, reason="No route"):
        load_base("ViT-B-16", "openai")
    assert len(requests) == 1


def test_a_tag_comes_from_the_cache_or_the_network_and_an_unknown_one_names_the_known(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: str(tmp_path / "downloaded"))
    facts = weights.tag_facts("ViT-B-16", "openai")
    assert weights.fetch("ViT-B-16", "openai", facts) == tmp_path / "downloaded"
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda _, file: str(tmp_path / file))
    found = weights.fetch("ViT-B-16", "openai", facts)
    assert found == tmp_path / "open_clip_model.safetensors"
    # The second was trained with GELU, so it is no tag of the QuickGELU model.
    for base, tag in (("ViT-B-16", "opeanai"), ("ViT-B-16-quickgelu", "laion2b_s34b_b88k")):
        with refused("tag_unknown", UsageError, base=base, tag=tag) as found:
            load_base(base, tag)
        assert found.value.fields["known"].startswith("openai, ")


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_weights_give_one_line(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    for content, reason in (
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "nothing was executed"),
        (b"PK\x03\x04 and the rest is missing", "it is cut off"),
        (bytes(range(256)), ""),
        (b"\x80", ""),
    ):
        path.write_bytes(content)
        with refused("weights_unreadable", InputError, path=path) as found:
            load_base("toy", str(path))
        assert suffix != ".pt" or reason in found.value.fields["reason"]
        assert "\n" not in str(found.value)
        assert "weights_only" not in str(found.value)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda norm: norm.to("meta"), "tensor_not_floats"),
        (lambda norm: norm.to_sparse(), "tensor_not_floats"),
        (lambda norm: norm.to(torch.int8), "tensor_not_floats"),
        (lambda norm: norm.to(torch.float8_e4m3fn), "tensor_not_floats"),
        (lambda norm: norm / 0, "tensor_not_finite"),
        (lambda norm: norm.double() * 1e300, "tensor_not_finite"),
    ],
)
def test_what_cannot_be_a_weight_is_refused(tmp_path, state, change, code):
    path = tmp_path / "file.pt"
    torch.save(state | {"ln_final.weight": change(state["ln_final.weight"])}, path)
    with refused(code, InputError, tensor=f"{path}: ln_final.weight"):
        load_base("toy", str(path))


@pytest.mark.usefixtures("toy")
def test_other_things_of_torch_are_refused(tmp_path, state):
    path = tmp_path / "file.pt"
    for value in ([torch.ones(2)], torch.ones(2), {}, 3, {"state_dict": {}}):
        torch.save(value, path)
        with refused("weights_unreadable", InputError):
            load_base("toy", str(path))
    for base, value in (("toy", {"names": ["w"], "w": torch.ones(2)}), (SMALL, state)):
        torch.save(value, path)
        with refused("weights_of_another_base", InputError):
            load_base(base, str(path))
    (tmp_path / "folder.pt").mkdir()
    for name in ("folder.pt", "gone.pt"):
        with refused("weights_not_found", InputError, path=tmp_path / name):
            load_base("toy", str(tmp_path / name))
    with refused("weights_missing", UsageError, base="toy"):
        load_base("toy", None)
