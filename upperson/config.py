"""The settings of a training run: one frozen object, read strictly from YAML.

A recipe is a file in ``upperson/recipes``; every key is a field of :class:`TrainConfig`, anything
else is refused. The run folder gets the resolved object as ``config.yaml``, which reads back to an
equal one.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from upperson.losses import TEMPERATURE, loss_names
from upperson.model.base import SMALL
from upperson.model.parts import UPPersonConfig
from upperson.model.student import StudentConfig
from upperson_rt.errors import InputError, UsageError
from upperson_rt.files import read_bounded
from upperson_rt.strict import read_fields, require_values, suggestion

RECIPES = Path(__file__).parent / "recipes"

LARGEST = 1e30
"""A rate or epsilon may not exceed it: float32 would overflow."""

MOST_PX = 4096

LOWEST_TEMPERATURE = 1e-3
"""Ten times CLIP's largest logit scale: below it a softmax is a maximum."""

_WITHOUT_TRAINING = (
    "; to search without any training:  upperson export --base NAME --pretrained WEIGHTS --output "
    "bundle"
)

MixedPrecision = Literal["fp32", "bf16", "fp16"]
"""What the towers compute in while they are trained; fp32 is no mixture."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides a run's result."""

    dataset: str = "jsonl"
    """Annotation format of the data set."""

    root: str
    """Folder of the data set."""

    allow_partial: bool = False
    """Train on a published data set although it has other counts than published."""

    load_truncated: bool = False
    """Decode pictures that end early as far as they go, instead of ending the run."""

    base: str = SMALL
    """Frozen CLIP: ``upperson-small`` or a model name of open_clip."""

    pretrained: str | None = None
    """File or open_clip tag with the base's weights; none for ``upperson-small``."""

    init_from: str | None = None
    """Run folder whose trained tensors this run starts from: the same base and parts."""

    height_px: int = 384
    width_px: int = 128

    model: UPPersonConfig = field(default_factory=UPPersonConfig)

    student: StudentConfig | None = None
    """A distilled image tower in place of the base's; ``upperson distill`` makes such runs."""

    loss: str = "sdm"
    """One or more of sdm, asdm, tal, itc, cmpm and id, joined by + (``upperson/losses.py``)."""

    temperature: float = TEMPERATURE
    """tau of sdm, asdm, itc and wrong captions. The base's own, 1 / its logit scale, changes it
    least; the paper's value is twice that of CLIP's weights."""

    leave_out_noisy: bool = False
    """After the warm-up, leave out of every epoch the pairs whose losses say that the caption is of
    somebody else (``upperson/division.py``)."""

    epochs: int = 60
    batch_size: int = 128
    """Pairs of a step, over all processes: the batch the loss sees."""

    accumulate: int = 1
    """Parts in which a batch passes the towers. Exact, since the loss still sees the whole batch:
    less memory for one more forward pass."""

    checkpoint_activations: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again."""

    lr: float = 1e-3
    prefix_lr: float | None = None
    """Peak rate of the prefix tensors alone; none takes lr. See ``docs/decisions.md``."""

    warmup_epochs: int = 5
    """Epochs over which the rate rises from 0.1 lr to lr, before the cosine to 0."""

    weight_decay: float = 4e-5
    """Coupled L2 of Adam; biases are exempt."""

    adam_eps: float = 1e-3
    """The paper's value: large enough that the size of a gradient matters, not only its sign."""

    augment: bool = True
    """Flip, pad and crop, erase."""

    mask_captions: bool = True
    """Mask 15 % of the caption tokens."""

    shorten_captions: float = 0.0
    """Share of captions that are drawn with a random part of their phrases only, from *red coat*
    to all of them. If there are any, a caption counts as right for everybody whose captions say as
    much (``upperson/data/rewording.py`` does both)."""

    wrong_captions: bool = False
    """Keep every image away from a wrong version of its caption, too: another colour, exchanged
    colours, another thing, or one that is denied. For captions that the grammar reads."""

    kept_share: float = 1.0
    """Share of what LoRA and L-Adapters add to the base that is kept when a model is measured and
    saved; training itself goes on with all of it. Below 1 a model is between the base and its
    fine-tuned version, which keeps more of what the base knew (WiSE-FT, arXiv 2109.01903)."""

    precision: MixedPrecision = "fp32"
    """bf16 and fp16 run the towers in autocast and keep the frozen matrices in that type. Trained
    tensors, optimiser and loss stay float32."""

    select_on: Literal["val", "test"] = "val"
    """Split that chooses the best epoch. Choosing on test, as published numbers do, is optimistic,
    and results say so. Without a val split, val keeps the last epoch."""

    eval_every: int = 1
    """Epochs between evaluations on the split that selects."""

    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written after every epoch."""

    workers: int = 0
    """Processes of a machine that decode images, shared out over its training processes; 0 decodes
    in the training process."""

    cache: str | None = None
    """Folder that keeps every picture decoded and resized, so that none is decoded twice; built
    first where it is not there (``upperson/data/pictures.py``)."""

    compile: bool = False
    """Compile the blocks with ``torch.compile``: minutes at the beginning for faster steps."""

    seed: int = 1

    def __post_init__(self) -> None:
        for name in (
            "height_px", "width_px", "epochs", "batch_size", "accumulate", "eval_every",
            "checkpoint_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                instead = _WITHOUT_TRAINING if name == "epochs" else ""
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}{instead}")
        for name in ("warmup_epochs", "workers", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be 0 or more, found {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UsageError(f"seed must be below 2**63, found {self.seed}")
        for name in ("lr", "prefix_lr", "adam_eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < LARGEST:
                instead = _WITHOUT_TRAINING if name == "lr" and value == 0 else ""
                raise UsageError(
                    f"{name} must be above 0 and below {LARGEST:g}, found {value}{instead}"
                )
        for name in ("height_px", "width_px"):
            if getattr(self, name) > MOST_PX:
                raise UsageError(f"{name} must be at most {MOST_PX}, found {getattr(self, name)}")
        if not LOWEST_TEMPERATURE <= self.temperature <= 1:
            raise UsageError(
                f"temperature must be from {LOWEST_TEMPERATURE} to 1, found {self.temperature}"
            )
        if not 0 <= self.shorten_captions <= 1:
            raise UsageError(
                f"shorten_captions is a share from 0 to 1, found {self.shorten_captions}"
            )
        if not 0 < self.kept_share <= 1:
            raise UsageError(f"kept_share is above 0 and at most 1, found {self.kept_share}")
        if self.kept_share < 1 and not (self.model.lora_rank or self.model.adapter_reduction):
            raise UsageError("kept_share is a share of LoRA and L-Adapters: this model has none")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay must be 0 or more, found {self.weight_decay}")
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"warmup_epochs ({self.warmup_epochs}) must be at most epochs ({self.epochs}): "
                "set it in the recipe, or with  --set warmup_epochs=N"
            )
        loss_names(self.loss)
        if self.batch_size < 2:
            raise UsageError("batch_size must be at least 2 for a contrastive loss, found 1")

    def to_yaml(self) -> str:
        """Return the object as YAML that `read_config` reads back."""
        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text


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
        UsageError: No such recipe, an override or a setting that no recipe could have, or one that
            contradicts another.
        InputError: The file does not parse, or has an unknown key or a wrong type.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        if path.suffix and path != RECIPES / f"{name}.yaml":
            raise UsageError(f"expected a recipe at {path}, found no such file")
        raise UsageError(f"recipe '{name}' is unknown: {suggestion(name, recipe_names())}")
    given = {key: value for key, value in overrides.items() if value is not None}
    if overrides.get("base") == SMALL and overrides.get("pretrained") is None:
        given["pretrained"] = None  # It brings its own weights, whatever the recipe's base needs.
    content = _parse(path) | given
    for setting in settings:
        _replace(content, setting)
    require_settings(given, settings)
    return _read(TrainConfig, content, f"recipe {name}")


def require_settings(given: dict[str, Any], settings: Sequence[str] = ()) -> None:
    """Raise UsageError if options of a command have keys or values that no recipe could have."""
    content = dict(given)
    for setting in settings:
        _replace(content, setting)
    try:
        require_values(TrainConfig, _as_read(content), "options")
    except InputError as error:
        raise UsageError(str(error)) from error


def read_config(path: Path) -> TrainConfig:
    """Read a YAML file of TrainConfig fields; InputError names the file and the key at fault."""
    return read_yaml(TrainConfig, path)


def read_yaml(kind: type[T], path: Path) -> T:
    """Read a YAML file into a dataclass; InputError names the file and the key at fault."""
    try:
        return _read(kind, _parse(path), str(path))
    except UsageError as error:  # Values that contradict each other: not the command's fault.
        raise InputError(str(error)) from error


@contextmanager
def settings_from(path: Path) -> Iterator[None]:
    """Turn complaints about settings (UsageError) into one about the file they stand in."""
    try:
        yield
    except UsageError as error:
        raise InputError(f"{path}: {error}") from error


_MOST_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but with 1e-3 a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(read_bounded(path, _MOST_BYTES).decode("utf-8"), _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {_problem(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def _problem(error: Exception) -> str:
    """Say where a file is wrong, without a word of it: it may be a link to a secret."""
    if isinstance(error, UnicodeDecodeError):
        return "no text in UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        return f"{error.context or 'not valid'} at line {mark.line + 1}, column {mark.column + 1}"
    return f"{type(error).__name__} in it"


def _replace(content: dict[str, Any], setting: str) -> None:
    """Put the value of ``KEY=VALUE`` into a recipe's content."""
    path, equals, text = setting.partition("=")
    *groups, key = path.strip().split(".")
    if not equals or not key:
        raise UsageError(f"--set wants KEY=VALUE such as model.lora_rank=16, found '{setting}'")
    try:
        value = yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--set {setting}: the value is not YAML") from error
    for group in groups:
        content = content.setdefault(group, {})
        if not isinstance(content, dict):
            raise UsageError(f"--set {setting}: '{group}' has no settings of its own")
    content[key] = value


def _read(kind: type[T], content: dict[str, Any], where: str) -> T:
    if kind is TrainConfig and "root" not in content:
        raise InputError(f"{where}: 'root' is missing: set it in the file or as an option")
    return read_fields(kind, _as_read(content), where)


def _as_read(content: dict[str, Any]) -> dict[str, Any]:
    """Take a single block for text, as ``lora_blocks: 3``."""
    model = content.get("model")
    if not isinstance(model, dict):
        return content
    model = {
        key: str(value) if type(value) is int and str(key).endswith("_blocks") else value
        for key, value in model.items()
    }
    return {**content, "model": model}
