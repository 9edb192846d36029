"""Weights of a CLIP: from a local file, whatever it was saved as, or published under a tag.

Loading never executes code of a file.
"""

import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import open_clip
import torch
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch import Tensor

from upperson.data.transforms import CLIP_STATISTICS, PixelStatistics
from upperson.model.torchscript import MOST_DESCRIPTION_BYTES, is_torchscript, read_torchscript
from upperson_rt.arguments import check_path
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import get_logger

_OPENAI_FACTS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries beside the weights in what OpenAI published, and in state dicts taken from it."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Where a repository keeps its weights when a tag names only the repository; best first."""

_PUBLISHED = re.compile(r"-[0-9a-f]{8}\.pt$")
"""The end of a file's name in open_clip's releases: the first digits of its SHA-256."""

_PROBE_S = 10.0

TOKENIZER_FILE = "tokenizer.json"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, on the CPU, in the dtypes of the file.

    Args:
        path: safetensors (by its suffix), a TorchScript archive, or a state dict of torch, bare or
            under ``state_dict`` in a checkpoint, with or without ``module.`` before the names.

    Raises:
        InputError: The file is missing, damaged, or holds something other than tensors.
    """
    check_path(path, "the weights")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(
            f"expected a file of weights at {path}, found {found}",
            code="weights_not_found",
            path=path,
            found=found,
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = read_torchscript(path) if is_torchscript(path) else _read_state_dict(path)
    # Hostile or damaged bytes make pickle, zipfile and torch fail in any way they can.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} cannot be read as weights: {reason}",
            code="weights_unreadable",
            path=path,
            reason=reason,
        ) from error
    for name, tensor in state.items():
        if not is_stored(tensor):
            reason = "more numbers than the file holds"
            raise InputError(
                f"{path} cannot be read as weights: '{name}' {tuple(tensor.shape)} has {reason}",
                code="weights_unreadable",
                path=path,
                reason=reason,
                tensor=name,
            )
    if any(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError if a tensor of a file has no values, or others than finite floats."""
    found = str(tensor.dtype)
    if tensor.is_meta:
        found += " without values (of device meta)"
    elif tensor.layout != torch.strided:
        found += f" in layout {tensor.layout}"
    elif tensor.dtype in _FLOATS:
        found = ""
    if found:
        raise InputError(
            f"{name} must be a plain tensor of floats of 16 to 64 bits, found {found}",
            code="tensor_not_floats",
            tensor=name,
            found=found,
        )
    # A float64 that float32 cannot hold becomes infinite when it is used.
    used = tensor.float() if tensor.dtype == torch.float64 else tensor
    # A finite sum has finite terms, and is found in a tenth of the time that looking at each takes.
    if not (used.sum().isfinite() or torch.isfinite(used).all()):
        raise InputError(
            f"{name} has NaN or infinite values: the training diverged or half precision "
            "overflowed, take an earlier checkpoint",
            code="tensor_not_finite",
            tensor=name,
        )


def pop_openai_facts(state: dict[str, Tensor]) -> bool:
    """Remove OpenAI's entries that are not weights; return whether all of them were there."""
    found = _OPENAI_FACTS & state.keys()
    for name in found:
        del state[name]
    return found == _OPENAI_FACTS


def saved_fault(path: Path) -> str | None:
    """Return why a file cannot come from ``torch.save``, without unpacking it; None if it can.

    torch would inflate compressed records, which it never writes, to any size. OSError or
    ``zipfile.BadZipFile`` if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(4)
        if not start:
            return "it is empty"
        if not start.startswith(b"PK"):
            file.seek(0)
            return _description_fault(file)
    if not zipfile.is_zipfile(path):
        return "it is cut off: fetch or copy it again"
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "its records are compressed, which torch.save never does: save it again with torch"
    # Records of a hostile file may overlap.
    if sum(record.file_size for record in records) > path.stat().st_size:
        return "its records are larger than the file"
    pickles = (record.file_size for record in records if record.filename.endswith(".pkl"))
    if max(pickles, default=0) > MOST_DESCRIPTION_BYTES:
        return f"its description takes more than {MOST_DESCRIPTION_BYTES >> 20} MiB"
    return None


def is_stored(tensor: Tensor) -> bool:
    """Return whether a file stores all numbers of a tensor; stride 0 repeats one of them."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return True  # `require_finite` refuses it.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _description_fault(file: BinaryIO) -> str | None:
    """Check the size of the pickles at the beginning of a file of the format before zip."""
    try:
        for _ in range(4):  # A number, the version, facts about the machine, the tensors.
            for _ in pickletools.genops(file):
                if file.tell() > MOST_DESCRIPTION_BYTES:
                    return f"its description takes more than {MOST_DESCRIPTION_BYTES >> 20} MiB"
    except ValueError:  # No pickle, or a damaged one, which torch refuses.
        pass
    return None


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    fault = saved_fault(path)
    if fault is not None:
        raise UnpicklingError(fault)
    try:
        with warnings.catch_warnings():
            # Of pickle protocols other than 2, which load or fail all the same.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own message recommends to load with weights_only=False.
        raise UnpicklingError(
            "expected safetensors, TorchScript or a state dict of plain tensors, found something "
            "else, of which nothing was executed"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise UnpicklingError(f"expected a state dict, found {type(state).__name__}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def tag_facts(name: str, tag: str) -> dict[str, Any]:
    """Return ``url``, ``hf_hub``, ``mean``, ``std`` and ``quick_gelu`` of a tag, as known."""
    facts: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not facts:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UsageError(
            f"--pretrained '{tag}' is neither a file nor a tag of '{name}': its tags are {tags}",
            code="tag_unknown",
            tag=tag,
            base=name,
            known=tags,
        )
    return facts


def published_activation(path: Path) -> bool | None:
    """Return whether a file that open_clip publishes has QuickGELU, by its name with a hash.

    None for any other file.
    """
    if not _PUBLISHED.search(path.name):
        return None
    for name, tag in open_clip.list_pretrained():
        facts = open_clip.get_pretrained_cfg(name, tag)
        if os.path.basename(facts.get("url") or "") == path.name:
            return bool(facts.get("quick_gelu"))
    return None


def pixel_statistics(facts: Mapping[str, Any]) -> PixelStatistics:
    """Return mean and standard deviation of RGB in 0..1; CLIP's own where no tag says otherwise."""
    mean = facts.get("mean") or CLIP_STATISTICS[0]
    std = facts.get("std") or CLIP_STATISTICS[1]
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def fetch(name: str, tag: str, facts: Mapping[str, Any]) -> Path:
    """Return the file of a tag: from the cache of Hugging Face, else downloaded."""
    repository, file = os.path.split(facts.get("hf_hub") or "")
    files = (file,) if file else _HUB_FILES
    try:
        if repository and (cached := _cached_or_reachable(repository, files)):
            return cached
        get_logger(__name__).info("fetching weights '%s' of %s", tag, name)
        return Path(open_clip.download_pretrained(facts))
    except (OSError, RuntimeError) as error:
        reason = _first_sentence(error)
        advice = _manual_download(name, facts, repository, files)
        raise InputError(
            f"weights '{tag}' of '{name}' are not here and could not be fetched ({reason}): "
            f"{advice}",
            code="weights_not_fetched",
            tag=tag,
            base=name,
            reason=reason,
            advice=advice,
        ) from error


def find_tokenizer(repository: str, beside: Path | None) -> Path:
    """Return the ``tokenizer.json`` of a repository: beside the weights, else from the hub's cache.

    ``repository`` is on the hub of Hugging Face, ``beside`` the folder of a local file of weights.
    """
    if beside is not None and (local := beside / TOKENIZER_FILE).is_file():
        return local
    try:
        cached = _cached_or_reachable(repository, (TOKENIZER_FILE,))
        return cached or Path(hf_hub_download(repository, TOKENIZER_FILE))
    except (OSError, RuntimeError, ValueError) as error:
        place = "the Hugging Face cache" if beside is None else f"{beside}, beside the weights"
        raise InputError(
            f"the tokenizer of this base is not here and could not be fetched "
            f"({_first_sentence(error)}): get https://huggingface.co/{repository}/resolve/main/"
            f"{TOKENIZER_FILE} on a machine with network and put it into {place}",
            code="tokenizer_not_fetched",
            repository=repository,
            reason=_first_sentence(error),
            folder=beside,
        ) from error


def _cached_or_reachable(repository: str, files: tuple[str, ...]) -> Path | None:
    """Return a file of the hub from its cache, or None after a first request for it.

    Without network the download itself would retry for minutes.
    """
    for file in files:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(repository, files[0]), timeout=_PROBE_S)
    except HfHubHTTPError:
        pass  # It answered: the download tries other files too and reports what is wrong.
    except Exception as error:  # The errors of its HTTP client differ between versions.
        raise ConnectionError(_first_sentence(error)) from error
    return None


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def _manual_download(
    name: str, facts: Mapping[str, Any], repository: str, files: tuple[str, ...]
) -> str:
    """Describe how to get the file of a tag onto a machine without network."""
    if pixel_statistics(facts) != pixel_statistics({}):
        return (
            "its pixel statistics are not CLIP's and a plain file would lose them: fetch "
            f"{repository} into the Hugging Face cache of a machine with network and copy the cache"
        )
    source = facts.get("url") or f"https://huggingface.co/{repository} ({' or '.join(files)})"
    # OpenAI's own files are recognised by their content, others with QuickGELU only by the name.
    quick = facts.get("quick_gelu") and "openaipublic" not in source
    base = f"{name.removesuffix('-quickgelu')}-quickgelu" if quick else name
    return f"get {source} on a machine with network and pass --base {base} --pretrained FILE"
