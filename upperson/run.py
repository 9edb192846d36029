"""The run folder: what training leaves behind and everything later steps read.

    config.yaml          resolved TrainConfig
    last/                newest two checkpoints, to resume
    adapter.safetensors  trained tensors only; metadata names the base they belong to
    metrics.csv          a line an epoch
    results.json         best epoch, its validation and test accuracy, parameter counts
    README.md            model card
    curves.png, events*  for people

A run is a few megabytes; the frozen base is found again by name or file and checked by hash.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upperson.config import TrainConfig, read_config, settings_from
from upperson.data.batches import pad_ids, tokenize
from upperson.data.pictures import Pictures
from upperson.data.transforms import prepare_pixels
from upperson.data.vocabulary import clip_tokenizer
from upperson.model.base import SMALL, Base, load_base
from upperson.model.encoder import TOKEN_IDS, UPPerson
from upperson.model.parts import UPPersonConfig
from upperson.model.student import build_student, read_size
from upperson.model.weights import require_finite
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import sha256_of_file
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    ModelSection,
    TextSection,
    space_fingerprint,
)
from upperson_rt.strict import parse_json
from upperson_rt.tokenizer import Tokenizer
from upperson_rt.towers import Tower

CONFIG = "config.yaml"
ADAPTER = "adapter.safetensors"
METRICS_CSV = "metrics.csv"
RESULTS = "results.json"
LAST = "last"
CURVES = "curves.png"
CARD = "README.md"


class Run(NamedTuple):
    """A run that was read back."""

    config: TrainConfig
    base: Base
    model: UPPerson


def load_run(path: Path) -> Run:
    """Rebuild the trained model of a run, in evaluation mode.

    Raises:
        InputError: Not a run folder, or damaged.
        IntegrityError: The base is not the one it was trained on.
    """
    _require_run_folder(path)
    adapter = path / ADAPTER
    config = read_config(path / CONFIG)
    state, trained_on = _read_adapter(adapter)
    image_size = (config.height_px, config.width_px)
    pretrained = config.pretrained
    if pretrained is not None and os.path.isfile(path / pretrained):
        pretrained = str(path / pretrained)  # An imported run brings its base along.
    with settings_from(path / CONFIG):
        base = load_base(config.base, pretrained, image_size)
        model = UPPerson(base.clip, config.model, image_size, base.statistics)
        if TOKEN_IDS in state:
            model.text.learn_tokens(_token_ids(state[TOKEN_IDS], model, adapter))
        if config.student is not None:
            size = read_size(config.student.size)
            model.image = build_student(model.image, size, image_size).requires_grad_(True)
    if trained_on.get("sha256") != base.sha256:
        if base.name == SMALL and config.pretrained is None:
            what = "that base ships with another version: use that one, or train the run anew"
        else:
            what = f"put the original weights at the path in its {CONFIG}"
        raise IntegrityError(
            f"{path} was trained on base '{trained_on.get('name')}' with weights "
            f"{str(trained_on.get('sha256'))[:12]}, found '{base.name}' with "
            f"{base.sha256[:12]}: {what}",
            code="base_changed",
            path=path,
            expected=trained_on.get("sha256"),
            found=base.sha256,
        )
    _fill(model, state, adapter)
    return Run(config, base, model.eval())


def space_of_run(path: Path, run: Run) -> str:
    """Return the fingerprint of bundles of a run; for a student, that of its teacher."""
    if run.config.student is not None:
        return run.config.student.space
    tokenizer = run.base.tokenizer_json.encode()
    name = run.base.name
    return space_fingerprint(
        ModelSection(
            name=name,
            base=name,
            base_sha256=run.base.sha256,
            adapter_sha256=sha256_of_file(path / ADAPTER),
            embed_dim=run.model.embed_dim,
        ),
        ImageSection(
            height_px=run.config.height_px,
            width_px=run.config.width_px,
            resize="bilinear-antialias",
        ),
        TextSection(
            context_length=run.model.text.context_length,
            tokenizer=FileEntry(
                file="tokenizer.json",
                sha256=hashlib.sha256(tokenizer).hexdigest(),
                size_bytes=len(tokenizer),
            ),
        ),
    )


def start_from(source: Path, model: UPPerson, base: Base, parts: UPPersonConfig) -> None:
    """Give a fresh model, built of a base and parts, the trained tensors of another run.

    Raises:
        InputError: No run folder, a damaged one, or one with another base or other parts.
    """
    _require_run_folder(source)
    state, trained_on = _read_adapter(source / ADAPTER)
    if trained_on.get("sha256") != base.sha256:
        raise InputError(
            f"init_from wants a run over the same base: {source} was trained on "
            f"'{trained_on.get('name')}' with weights {str(trained_on.get('sha256'))[:12]}, this "
            f"run has '{base.name}' with {base.sha256[:12]}: pass that base and its weights",
            code="init_from_other_base",
            path=source,
        )
    before = read_config(source / CONFIG).model
    differing = [
        f"model.{field.name} {getattr(before, field.name)} (here {getattr(parts, field.name)})"
        for field in fields(parts)
        if getattr(before, field.name) != getattr(parts, field.name)
    ]
    if differing and _shapes(state) != _shapes(model.trained_state()):
        raise InputError(
            f"init_from wants a run with the same trained parts: {source} has "
            f"{', '.join(differing)}: pass the same with --set",
            code="init_from_other_parts",
            path=source,
            differing=differing,
        )
    _fill(model, state, source / ADAPTER)


def pack_adapter(state: dict[str, Tensor], base: Base) -> bytes:
    """Serialise trained tensors as safetensors that name their base; equal input, equal bytes."""
    # One entry: safetensors writes several in an order that changes from call to call.
    identity = json.dumps({"name": base.name, "sha256": base.sha256})
    return save(state, metadata={"base": identity})


def _require_run_folder(path: Path) -> None:
    if not (path / CONFIG).is_file() or not (path / ADAPTER).is_file():
        raise InputError(
            f"expected a run folder with {CONFIG} and {ADAPTER} at {path}: "
            "pass the folder that  upperson train  printed",
            code="not_a_run",
            path=path,
        )


def _fill(model: UPPerson, state: dict[str, Tensor], adapter: Path) -> None:
    """Copy the trained tensors of a file into a model built from the settings beside it."""
    expected, found = _shapes(model.trained_state()), _shapes(state)
    if expected != found:
        names = sorted(expected.keys() | found.keys())
        unfit = [name for name in names if expected.get(name) != found.get(name)]
        raise InputError(
            f"{adapter} does not fit {CONFIG}: {len(unfit)} tensors differ, first '{unfit[0]}'",
            code="adapter_does_not_fit",
            path=adapter,
            tensors=unfit,
        )
    for name, tensor in state.items():
        if name != TOKEN_IDS:
            require_finite(f"{adapter}: {name}", tensor)
        elif not torch.equal(tensor, model.trained_state()[name]):
            raise InputError(
                f"{adapter} has trained embeddings of other tokens than this model: train on "
                "captions with the same new words",
                code="adapter_does_not_fit",
                path=adapter,
                tensors=[name],
            )
    model.load_state_dict(state, strict=False)


def _token_ids(ids_T: Tensor, model: UPPerson, adapter: Path) -> Tensor:
    """Check which tokens a file has rows for: different ones of the vocabulary."""
    vocabulary = model.text.token_embedding.weight.shape[0]
    fits = ids_T.dtype == torch.int64 and ids_T.ndim == 1 and len({*ids_T.tolist()}) == len(ids_T)
    if not fits or not bool(((ids_T >= 0) & (ids_T < vocabulary)).all()):
        raise InputError(
            f"{adapter}: '{TOKEN_IDS}' must be different tokens from 0 to {vocabulary - 1}",
            code="adapter_does_not_fit",
            path=adapter,
            tensors=[TOKEN_IDS],
        )
    return ids_T


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `pack_adapter` made: tensors, and ``name`` and ``sha256`` of their base."""
    try:
        with safe_open(path, framework="pt") as file:
            base = parse_json((file.metadata() or {}).get("base", "{}"), "base")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, InputError) as error:
        raise InputError(
            f"{path} cannot be read: {error}",
            code="adapter_unreadable",
            path=path,
            reason=str(error),
        ) from error
    if not isinstance(base, dict):
        raise InputError(f"{path}: base: expected an object, found {base!r}")
    return state, base


# --- A trained model behind the calls of the runtime's encoder, which its exports are compared with
#
# Shapes: N items, L tokens, H image height, W image width, E embedding.


class TrainedEncoder:
    """Embeds in torch with everything unfolded, and reads files and captions as training does.

    Without a tokenizer of the model's base it takes CLIP's.
    """

    def __init__(self, model: UPPerson, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer or clip_tokenizer(model.text.context_length)

    @torch.inference_mode()
    def run(self, tower: Tower, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Embed what a graph reads, uint8 [N, H, W, 3] or int32 [N, L], as one batch: [N, E]."""
        if tower == "text":
            return _array(self.model.encode_text(torch.from_numpy(inputs).long()))
        return _array(self.model.encode_image(self._normalise(inputs)))

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Path], batch_size: int) -> NDArray[np.float32]:
        """Embed N files: [N, E]."""
        image_N3HW = self._read(images)
        embeds = [self.model.encode_image(batch) for batch in torch.split(image_N3HW, batch_size)]
        return _array(torch.cat(embeds))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        """Embed N captions: [N, E]."""
        ids = tokenize(self.tokenizer, texts)
        starts = range(0, len(ids), batch_size)
        embeds = [self.model.encode_text(pad_ids(ids[i : i + batch_size])) for i in starts]
        return _array(torch.cat(embeds))

    def read_pixels(self, files: Sequence[Path]) -> NDArray[Any]:
        """Read files and undo the normalisation: float levels of 0 to 255, [N, H, W, 3]."""
        mean, std = (torch.tensor(values)[:, None, None] for values in self.model.statistics)
        return _array(((self._read(files) * std + mean) * 255).permute(0, 2, 3, 1))

    def _read(self, files: Sequence[Path]) -> Tensor:
        return self._normalise(read_pixels(files, self.model.image_size))

    def _normalise(self, pixels_NHW3: NDArray[Any]) -> Tensor:
        return prepare_pixels(torch.from_numpy(pixels_NHW3), None, self.model.statistics)


def read_pixels(files: Sequence[Path], image_size: tuple[int, int]) -> NDArray[Any]:
    """Read files through the data set of training, without a model: uint8 [N, H, W, 3]."""
    return Pictures(files, image_size).read(range(len(files)))


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    return array
