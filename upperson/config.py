"""A training run as one frozen object, read strictly from YAML recipes.

A recipe is a file in ``upperson/recipes``; every key is a field below, anything else is refused.
The run folder gets the resolved object as ``config.yaml``, which reads back to an equal one.
"""

import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from upperson.model.base import SMALL
from upperson.model.block import UPPersonConfig
from upperson_rt._strict_json import suggestion
from upperson_rt.errors import InputError, UsageError

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides a run's result."""

    dataset: str = "jsonl"
    """Annotation format of the data set."""

    root: str
    """Folder of the data set."""

    base: str = SMALL
    """Frozen CLIP: ``upperson-small`` or a model name of open_clip."""

    pretrained: str | None = None
    """File or open_clip tag with the base's weights; none for ``upperson-small``."""

    height_px: int = 384
    width_px: int = 128

    model: UPPersonConfig = field(default_factory=UPPersonConfig)

    epochs: int = 60
    batch_size: int = 128
    lr: float = 1e-3
    warmup_epochs: int = 5
    """Epochs over which the rate rises from 0.1 lr to lr, before the cosine to 0."""

    weight_decay: float = 4e-5
    """Coupled L2 of Adam; biases are exempt."""

    adam_eps: float = 1e-3
    """The paper's value: large enough that the size of a gradient matters, not only its sign."""

    augment: bool = True
    """Flip, pad and crop, erase."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 autocasts the towers; parameters and loss stay float32."""

    eval_every: int = 1
    """Epochs between evaluations on the validation split."""

    workers: int = 0
    """Processes that decode images; 0 decodes in the training process."""

    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("height_px", "width_px", "epochs", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("warmup_epochs", "workers", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be 0 or more, found {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UsageError(f"seed must be below 2**63, found {self.seed}")
        for name in ("lr", "adam_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be above 0 and finite, found {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay must be 0 or more, found {self.weight_decay}")
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"warmup_epochs ({self.warmup_epochs}) must be at most epochs ({self.epochs}): "
                "set it in the recipe"
            )
        if self.batch_size < 2:
            raise UsageError("batch_size must be at least 2 for a contrastive loss, found 1")

    def to_yaml(self) -> str:
        """Return the object as YAML that :func:`read_config` reads back."""
        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text


def read_recipe(name: str, overrides: dict[str, Any]) -> TrainConfig:
    """Read a named recipe of the package, or a YAML file, and replace fields.

    Args:
        name: Name of a file in ``recipes`` without suffix, or a path ending in .yaml.
        overrides: Fields to replace, from the command line; None values are left out.

    Raises:
        UsageError: No such recipe.
        InputError: The file does not parse, or has an unknown key or a wrong type.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"recipe '{name}' is unknown: {suggestion(name, known)}")
    return read_config(path, {key: value for key, value in overrides.items() if value is not None})


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a YAML file of TrainConfig fields; InputError names the file and the key at fault."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}")
    config: TrainConfig = dataclass_from_mapping(
        TrainConfig, content | (overrides or {}), str(path)
    )
    return config


def dataclass_from_mapping(kind: type[Any], content: dict[str, Any], where: str) -> Any:
    """Build a dataclass from plain values, refusing unknown keys and wrong types.

    Raises:
        InputError: Names ``where``, the key, what was expected and what was found.
    """
    hints = typing.get_type_hints(kind)
    for key in content:
        if key not in hints:
            raise InputError(f"{where}: unknown key '{key}', {suggestion(str(key), list(hints))}")
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in content
    ]
    if missing:
        raise InputError(f"{where}: '{missing[0]}' is missing: set it in the file or as an option")
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in content.items()}
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return dataclass_from_mapping(typing.cast("type[Any]", hint), value, where)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            options = ", ".join(map(str, typing.get_args(hint)))
            raise InputError(f"{where}: expected one of {options}, found {value!r}")
        return value
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    # YAML 1.1 reads 1e-3 as text: only 1.0e-3 is a number there.
    if float in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{where}: expected {names}, found {value!r}")
    return value
