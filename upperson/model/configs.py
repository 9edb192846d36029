"""Which bases there are: names of open_clip, our own small one, and configuration files.

A configuration that gives only sizes is a plain ViT CLIP. One that names a ViT of timm as image
tower (SigLIP 2, PE-Core, MobileCLIP-B) may say more about its text tower. Any other entry makes it
an architecture of which nothing is known here, and it is refused before anything is built or
fetched.

A file is what open_clip publishes beside weights, ``open_clip_config.json``: ``model_cfg`` and
``preprocess_cfg``. What weights do not show and a wrong guess would spoil must be in it.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm

from upperson.data.transforms import PixelStatistics
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import safe_repr
from upperson_rt.strict import read_json

SMALL = "upperson-small"
"""Name of the small base that ships with the package, made by ``upperson pretrain-small``."""

ASSETS = Path(__file__).parent.parent / "assets"

CLIP_VOCABULARY = 49408

_GEMMA_VOCABULARY = 256000

_SIZES = {"context_length", "vocab_size", "width", "layers", "heads"}
_PLAIN_ENTRIES = {
    "": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {
        "image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout"
    },
    "text_cfg": {*_SIZES, "mlp_ratio"},
}  # fmt: skip
"""Entries of open_clip's configurations that give sizes of its own towers.

Other towers, tokenizers, poolings, masks and layer scales are all other entries.
"""

_TIMM_ENTRIES = {
    "": {"embed_dim", "custom_text", "init_logit_bias", "vision_cfg", "text_cfg"},
    "vision_cfg": {
        "image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj",
        "timm_drop", "timm_drop_path",
    },
    "text_cfg": {
        *_SIZES, "mlp_ratio", "no_causal_mask", "pool_type", "proj_bias", "norm_kwargs",
        "act_kwargs", "hf_tokenizer_name", "tokenizer_kwargs",
    },
}  # fmt: skip
"""The same where the image tower is timm's."""

_PREPROCESSING_ENTRIES = {
    "mean",
    "std",
    "size",
    "mode",
    "interpolation",
    "resize_mode",
    "fill_color",
}

_TIMM_POOLS = {
    "timm.models.vision_transformer": ("map", "token"),
    "timm.models.vision_transformer_hybrid": ("map", "token"),
    "timm.models.eva": ("map",),
}
"""Where timm defines plain ViTs, and how they may pool; `upperson.model.architecture` looks at what
it builds. In the module ``eva`` PE-Core has plain blocks; others pool otherwise."""

_USUAL_CROPS = (384, 128)


@dataclass(frozen=True, slots=True)
class BaseConfig:
    """What a base is built of."""

    name: str
    """For display."""

    model: dict[str, Any]
    """Arguments of open_clip's ``CLIP``, or of ``CustomTextCLIP``."""

    custom_text: bool
    """Whether open_clip keeps the text tower in a module of its own."""

    statistics: PixelStatistics | None
    """Mean and standard deviation that a file gives, or all tags of a name over timm."""

    file: Path | None
    """Where it stands, if it is a file."""

    @property
    def tokenizer(self) -> str | None:
        """Repository with its tokenizer; None for CLIP's."""
        found: str | None = self.model["text_cfg"].get("hf_tokenizer_name")
        return found

    @property
    def over_timm(self) -> bool:
        """Whether the image tower is timm's."""
        return _is_over_timm(self.model)

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height_px, width_px) of crops: its own if it was made for people, not for squares."""
        size = self.model["vision_cfg"]["image_size"]
        if isinstance(size, int) or size[0] == size[1]:
            return _USUAL_CROPS
        return size[0], size[1]


def base_config(name: str) -> BaseConfig:
    """Look up ``upperson-small`` or a model of open_clip, or read a file that ends in ``.json``.

    Raises:
        UsageError: Unknown, or an architecture that does not work.
        InputError: The file cannot be read, or lacks something.
    """
    if name.endswith(".json"):
        return _read(Path(name))
    model: dict[str, Any] | None = None
    if name == SMALL:
        model = json.loads((ASSETS / f"{SMALL}.json").read_text("utf-8"))
    elif ":" not in name:  # open_clip would fetch hf-hub:NAME from the network.
        model = open_clip.get_model_config(name)
    if model is None:
        names = [SMALL, *filter(is_known_to_work, open_clip.list_models())]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise UsageError(
            f"base {safe_repr(name)} is unknown: expected {SMALL}, a ViT CLIP of open_clip, such "
            "as "
            + ", ".join(near or ["ViT-B-16", "ViT-B-32", "ViT-L-14"])
            + ", or the .json file of its configuration",
            code="base_unknown",
            base=name,
            near=near,
        )
    _require_supported(model, name, published=name != SMALL)
    statistics = _statistics_of_tags(name) if _is_over_timm(model) else None
    return _config(name, model, statistics, None)


def is_known_to_work(name: str) -> bool:
    """Return whether a model of open_clip works as a base."""
    return not _unsupported_entries(open_clip.get_model_config(name))


def _config(
    name: str, model: dict[str, Any], statistics: PixelStatistics | None, file: Path | None
) -> BaseConfig:
    model = dict(model)
    custom_text = bool(model.pop("custom_text", False))
    return BaseConfig(name, model, custom_text, statistics, file)


def _require_supported(model: Mapping[str, Any], name: str, *, published: bool) -> None:
    if reasons := ", ".join(_unsupported_entries(model, published=published)):
        raise UsageError(
            f"base '{name}' is not a ViT CLIP with plain blocks ({reasons} in its configuration): "
            "choose one such as ViT-B-16",
            code="base_unsupported",
            base=name,
            reasons=reasons,
        )


def _is_over_timm(model: Mapping[str, Any]) -> bool:
    return "timm_model_name" in model["vision_cfg"]


def _unsupported_entries(model: Mapping[str, Any], *, published: bool = True) -> list[str]:
    """Name what makes a configuration another architecture.

    Of what open_clip publishes it is known which vocabulary is no byte-pair one.
    """
    over_timm = _is_over_timm(model)
    found = {
        entry
        for part, known in (_TIMM_ENTRIES if over_timm else _PLAIN_ENTRIES).items()
        for entry in (model[part] if part else model).keys() - known
    }
    vision, text = model["vision_cfg"], model["text_cfg"]
    if isinstance(vision.get("layers"), list):
        found.add("a ResNet's layers")
    if over_timm and not found:
        trunk = vision["timm_model_name"]
        module = timm.model_entrypoint(trunk).__module__ if timm.is_model(trunk) else ""
        if module not in _TIMM_POOLS:
            found.add(f"timm_model_name {trunk}")
        elif vision.get("timm_pool") not in _TIMM_POOLS[module]:
            found.add(f"timm_pool '{vision.get('timm_pool')}'")
        if vision.get("timm_proj") not in (None, "none"):
            found.add(f"timm_proj '{vision['timm_proj']}'")
        if published and "hf_tokenizer_name" in text and text["vocab_size"] < _GEMMA_VOCABULARY:
            found.add(f"the vocabulary of {text['hf_tokenizer_name']}, a Unigram")
    if "hf_tokenizer_name" not in text and text.get("vocab_size", 0) != CLIP_VOCABULARY:
        found.add(f"vocab_size {text.get('vocab_size')} where CLIP's is {CLIP_VOCABULARY}")
    return sorted(found)


def _statistics_of_tags(name: str) -> PixelStatistics | None:
    """Return what all published weights of a model were trained with; None if they differ."""
    found = set()
    for tag in open_clip.list_pretrained_tags_by_model(name):
        facts = open_clip.get_pretrained_cfg(name, tag)
        found.add((tuple(facts["mean"]), tuple(facts["std"])))
    return found.pop() if len(found) == 1 else None


# --- files ---

_REQUIRED = {
    "": ("embed_dim", "vision_cfg", "text_cfg"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers"),
}
_REQUIRED_PLAIN = _REQUIRED | {
    "": (*_REQUIRED[""], "quick_gelu"),
    "vision_cfg": ("image_size", "patch_size", "width", "layers"),
}
_REQUIRED_OVER_TIMM = _REQUIRED | {
    "vision_cfg": ("image_size", "timm_model_name", "timm_pool", "timm_proj"),
}
_REQUIRED_WITH_TOKENIZER = (
    "no_causal_mask", "pool_type", "norm_kwargs", "act_kwargs", "tokenizer_kwargs"
)  # fmt: skip


def _read(path: Path) -> BaseConfig:
    """Read ``open_clip_config.json``.

    open_clip has a default for each entry. Those that are required here decide what weights of the
    same shapes compute, or where they do not fit.
    """
    if not path.is_file():
        raise InputError(
            f"expected the configuration of a base at {path}, found no such file",
            code="base_file_missing",
            path=path,
        )
    content = _object(path, "", read_json(path))
    if content.keys() != {"model_cfg", "preprocess_cfg"}:
        found = ", ".join(sorted(map(str, content))) or "none"
        keys = "the keys model_cfg and preprocess_cfg, as in an open_clip_config.json"
        raise _wrong(path, "", f"expected {keys}, found {found}")
    model = _object(path, "model_cfg", content["model_cfg"])
    parts = {"": model}
    for part in ("vision_cfg", "text_cfg"):
        parts[part] = _object(path, part, model.get(part))
    required = _REQUIRED_OVER_TIMM if _is_over_timm(model) else _REQUIRED_PLAIN
    for part, names in required.items():
        more = _REQUIRED_WITH_TOKENIZER if part and "hf_tokenizer_name" in parts[part] else ()
        for entry in (*names, *more):
            if entry not in parts[part]:
                raise _wrong(path, f"{part}.{entry}".lstrip("."), "missing")
    _require_sizes(path, parts)
    _require_supported(model, str(path), published=False)
    name = path.parent.resolve().name if path.stem == "open_clip_config" else path.stem
    return _config(name, model, _read_statistics(path, content["preprocess_cfg"]), path)


def _require_sizes(path: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    for part, entries in parts.items():
        for entry in entries.keys() & {*_SIZES, "embed_dim", "patch_size", "head_width"}:
            if type(entries[entry]) is not int or not 0 < entries[entry] < 1 << 20:
                found = safe_repr(entries[entry])
                place = f"{part}.{entry}".lstrip(".")
                raise _wrong(path, place, f"expected a positive number, found {found}")
    vision, text = parts["vision_cfg"], parts["text_cfg"]
    size = vision["image_size"]
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and 0 < side <= 4096 for side in sides):
        raise _wrong(path, "vision_cfg.image_size", f"expected pixels, found {safe_repr(size)}")
    if type(parts[""].get("quick_gelu", False)) is not bool:
        raise _wrong(path, "quick_gelu", "expected true or false")
    heads = {"text_cfg": text["width"] % text["heads"]}
    if "patch_size" in vision:
        heads["vision_cfg"] = vision["width"] % vision.get("head_width", 64)
    for part, rest in heads.items():
        if rest:
            raise _wrong(path, part, "its width does not divide into its heads")


def _read_statistics(path: Path, found: object) -> PixelStatistics:
    content = _object(path, "preprocess_cfg", found)
    if unknown := sorted(content.keys() - _PREPROCESSING_ENTRIES):
        raise _wrong(path, "preprocess_cfg", f"unknown key {safe_repr(unknown[0])}")
    values = []
    for entry in ("mean", "std"):
        value: Any = content.get(entry)
        numbers = isinstance(value, list) and len(value) == 3
        if not (numbers and all(type(x) in (int, float) and 0 <= x <= 1 for x in value)) or (
            entry == "std" and not all(value)
        ):
            limits = "from 0" if entry == "mean" else "above 0, up"
            expected = f"expected three numbers {limits} to 1, found {safe_repr(value)}"
            raise _wrong(path, f"preprocess_cfg.{entry}", expected)
        values.append((float(value[0]), float(value[1]), float(value[2])))
    return values[0], values[1]


def _object(path: Path, place: str, found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise _wrong(path, place, f"expected an object, found {safe_repr(found)}")
    return found


def _wrong(path: Path, place: str, problem: str) -> InputError:
    where = f"{path}: {place}" if place else str(path)
    return InputError(f"{where}: {problem}", code="base_file_wrong", path=path, entry=place)
