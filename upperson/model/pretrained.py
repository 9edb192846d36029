"""Published weights that open_clip knows by a tag: their facts, and where the file comes from."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from upperson_rt.errors import InputError, UsageError

_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Where a repository keeps its weights when a tag names only the repository; best first."""

_PROBE_S = 10.0

Statistics = tuple[float, float, float]


def tag_facts(name: str, tag: str) -> dict[str, Any]:
    """Return what open_clip knows of a tag: ``url``, ``hf_hub``, ``mean``, ``std``, ``quick_gelu``.

    Raises:
        UsageError: The model has no such tag.
    """
    facts: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not facts:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UsageError(
            f"--pretrained '{tag}' is neither a file nor a tag of '{name}': its tags are {tags}"
        )
    return facts


def pixel_statistics(facts: Mapping[str, Any]) -> tuple[Statistics, Statistics]:
    """Return mean and standard deviation of RGB in 0..1; CLIP's own where no tag says otherwise."""
    mean = facts.get("mean") or OPENAI_DATASET_MEAN
    std = facts.get("std") or OPENAI_DATASET_STD
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def fetch(name: str, tag: str, facts: Mapping[str, Any]) -> Path:
    """Return the file of a tag: from the cache of Hugging Face, else downloaded.

    Raises:
        InputError: It is not here and cannot be fetched; the message says what to do about it.
    """
    repository, file = os.path.split(facts.get("hf_hub") or "")
    files = (file,) if file else _HUB_FILES
    try:
        if repository:
            for file in files:
                cached = try_to_load_from_cache(repository, file)
                if isinstance(cached, str):
                    return Path(cached)
            _reach_hub(repository, files[0])
        logging.getLogger(__name__).info("fetching weights '%s' of %s", tag, name)
        return Path(open_clip.download_pretrained(facts))
    except (OSError, RuntimeError) as error:
        reason = _first_sentence(error)
        raise InputError(
            f"weights '{tag}' of '{name}' are not here and could not be fetched ({reason}): "
            f"{_by_hand(name, facts, repository, files)}"
        ) from error


def _reach_hub(repository: str, file: str) -> None:
    """Ask the hub once. The download itself would retry for minutes where there is no network."""
    try:
        get_hf_file_metadata(hf_hub_url(repository, file), timeout=_PROBE_S)
    except HfHubHTTPError:
        return  # It answered: the download asks for other files too and says what is wrong.
    except Exception as error:  # The errors of its HTTP client differ between versions.
        raise ConnectionError(_first_sentence(error)) from error


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def _by_hand(name: str, facts: Mapping[str, Any], repository: str, files: tuple[str, ...]) -> str:
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
