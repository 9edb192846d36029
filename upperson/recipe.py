"""Recipes: training runs as YAML files, read strictly, with settings of the command line on top.

A recipe is a file in ``upperson/recipes``; every key is a field of :class:`TrainConfig`, anything
else is refused. The run folder gets the resolved object as ``config.yaml``, which reads back to an
equal one.
"""

import contextlib
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from upperson.config import TrainConfig
from upperson.model.base import SMALL
from upperson_rt.errors import InputError, UsageError
from upperson_rt.strict import suggestion

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str, overrides: dict[str, Any], settings: Sequence[str] = ()) -> TrainConfig:
    """Read a named recipe of the package, or a YAML file, and replace fields.

    Args:
        name: Name of a file in ``recipes`` without suffix, or a path ending in .yaml.
        overrides: Fields to replace, from the command line; None values are left out.
        settings: ``KEY=VALUE`` texts with a dotted key and a YAML value, replacing fields last.

    Raises:
        UsageError: No such recipe, or a setting that is not one.
        InputError: The file does not parse, or has an unknown key or a wrong type.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        if path.suffix and path != RECIPES / f"{name}.yaml":
            raise UsageError(f"expected a recipe at {path}, found no such file")
        raise UsageError(f"recipe '{name}' is unknown: {suggestion(name, recipe_names())}")
    content = _read_yaml(path)
    content |= {key: value for key, value in overrides.items() if value is not None}
    if overrides.get("base") == SMALL and overrides.get("pretrained") is None:
        content["pretrained"] = None  # It brings its own weights, whatever the recipe's base needs.
    for setting in settings:
        _replace(content, setting)
    return _config(content, f"recipe {name}")


def read_seeds(path: Path) -> tuple[TrainConfig, int]:
    """Read what :func:`seeds_yaml` wrote: the first run's configuration and the number of runs."""
    content = _read_yaml(path)
    count, config = content.get("seeds"), content.get("config")
    if type(count) is not int or count < 1 or not isinstance(config, dict):
        raise InputError(f"{path}: expected 'seeds', a number, and 'config', found others")
    return _config(config, str(path)), count


def seeds_yaml(config: TrainConfig, count: int) -> str:
    """Write down several runs that differ in their seed, counting up from the configuration's."""
    text: str = yaml.safe_dump(
        {"seeds": count, "config": dataclasses.asdict(config)}, sort_keys=False
    )
    return text


def read_config(path: Path) -> TrainConfig:
    """Read a YAML file of TrainConfig fields; InputError names the file and the key at fault."""
    return _config(_read_yaml(path), str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def _config(content: dict[str, Any], where: str) -> TrainConfig:
    config: TrainConfig = _dataclass(TrainConfig, content, where)
    return config


def _replace(content: dict[str, Any], setting: str) -> None:
    """Put the value of ``KEY=VALUE`` into a recipe's content."""
    path, equals, text = setting.partition("=")
    *groups, key = path.strip().split(".")
    if not equals or not key:
        raise UsageError(f"--set wants KEY=VALUE such as model.lora_rank=16, found '{setting}'")
    try:
        value = yaml.safe_load(text)
    except (RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--set {setting}: the value is not YAML") from error
    for group in groups:
        content = content.setdefault(group, {})
        if not isinstance(content, dict):
            raise UsageError(f"--set {setting}: '{group}' has no settings of its own")
    content[key] = value


def _dataclass(kind: type[Any], content: dict[str, Any], where: str) -> Any:
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
        return _dataclass(typing.cast("type[Any]", hint), value, where)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            options = ", ".join(map(str, typing.get_args(hint)))
            raise InputError(f"{where}: expected one of {options}, found {value!r}")
        return value
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if kinds == (str,) and type(value) is int:  # One block: lora_blocks: 3
        return str(value)
    # YAML 1.1 reads 1e-3 as text: only 1.0e-3 is a number there.
    if float in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{where}: expected {names}, found {value!r}")
    return value
