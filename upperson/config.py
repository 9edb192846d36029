"""The settings of a training run: one frozen object, read strictly from YAML.

A recipe is a file in ``upperson/recipes``; every key is a field of :class:`TrainConfig`, anything
else is refused. The run folder gets the resolved object as ``config.yaml``, which reads back to an
equal one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from upperson_settings.yaml_file import parse_yaml

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

_Range = tuple[str, Callable[[Any], bool]]
_COUNT: _Range = ("at least 1", lambda value: value >= 1)
_SIZE: _Range = (f"from 1 to {MOST_PX}", lambda value: 1 <= value <= MOST_PX)
_RATE: _Range = (f"above 0 and below {LARGEST:g}", lambda value: 0 < value < LARGEST)
_NUMBER: _Range = ("0 or more", lambda value: 0 <= value < math.inf)
_RANGES: dict[str, _Range] = {
    "height_px": _SIZE,
    "width_px": _SIZE,
    "epochs": _COUNT,
    "batch_size": ("at least 2 for a contrastive loss", lambda value: value >= 2),
    "accumulate": _COUNT,
    "eval_every": _COUNT,
    "checkpoint_every": _COUNT,
    "warmup_epochs": _NUMBER,
    "workers": _NUMBER,
    "seed": ("from 0 and below 2**63", lambda value: 0 <= value < 2**63),
    "lr": _RATE,
    "prefix_lr": _RATE,
    "adam_eps": _RATE,
    "weight_decay": _NUMBER,
    "temperature": (
        f"from {LOWEST_TEMPERATURE} to 1",
        lambda value: LOWEST_TEMPERATURE <= value <= 1,
    ),
    "shorten_captions": ("a share from 0 to 1", lambda value: 0 <= value <= 1),
    "kept_share": ("a share above 0 and at most 1", lambda value: 0 < value <= 1),
}

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

    rehearse: str | None = None
    """Folder of another data set, in the project's own format, whose people are trained on as well:
    people like those that the base was made for, so that the model keeps what the base knew of them
    (rehearsal, arXiv 1811.11682). None of them selects an epoch or is measured."""

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
    """A distilled image tower in place of the base's, from ``upperson distill``."""

    loss: str = "sdm"
    """One or more of sdm, asdm, tal, itc, cmpm and id, joined by + (``upperson/losses.py``)."""

    temperature: float = TEMPERATURE
    """tau of sdm, asdm, itc and wrong captions. The base's own, 1 / its logit scale, changes it
    least; the paper's value is twice that of CLIP's weights."""

    leave_out_noisy: bool = False
    """After the warm-up, leave noisy pairs out of every epoch: those whose caption probably
    describes another person (``upperson/division.py``)."""

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
    """Peak rate of the prefix tensors alone; none takes lr, see
    ``docs/explanation/decisions.md``."""

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
    to all of them. If there are any, a caption counts as right for every person whose captions
    mention the same attributes (``upperson/data/rewording.py`` does both)."""

    wrong_captions: bool = False
    """Also separate every image from a wrong version of its caption: another colour, exchanged
    colours, another thing, or an excluded one. For captions that the grammar reads."""

    learn_words: bool = False
    """Also train token embeddings: of the tokens of the training captions that the base has never
    seen, whose own embeddings are zero. ``upperson-small`` has such; a published CLIP has none."""

    kept_share: float = 1.0
    """Share of what LoRA and L-Adapters add to the base that is kept when a model is measured and
    saved; training itself goes on with all of it, and prefixes and learned words stay whole. Below
    1 a model is between the base and its fine-tuned version, which keeps more of what the base knew
    (WiSE-FT, arXiv 2109.01903)."""

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
        for name, (expected, is_valid) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                instead = _WITHOUT_TRAINING if name in ("epochs", "lr") and value == 0 else ""
                raise UsageError(
                    f"{name} must be {expected}, found {value}{instead}",
                    code="setting_out_of_range",
                    setting=name,
                    found=value,
                )
        if self.kept_share < 1 and not (self.model.lora_rank or self.model.adapter_reduction):
            raise UsageError("kept_share is a share of LoRA and L-Adapters: this model has none")
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"warmup_epochs ({self.warmup_epochs}) must be at most epochs ({self.epochs}): "
                "set it in the recipe, or with  --set warmup_epochs=N",
                code="warmup_too_long",
                warmup_epochs=self.warmup_epochs,
                epochs=self.epochs,
            )
        loss_names(self.loss)

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
        UsageError: No such recipe, or the overrides or settings are at fault.
        InputError: The file is at fault.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        if path.parent != RECIPES:
            text = f"expected a recipe at {path}, found no such file"
            raise UsageError(text, code="recipe_not_found", path=path)
        known = suggestion(name, recipe_names())
        text = f"recipe '{name}' is unknown: {known}"
        raise UsageError(text, code="recipe_unknown", recipe=name, suggestion=known)
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
        raise UsageError(str(error), code=error.code, **error.fields) from error


def read_config(path: Path) -> TrainConfig:
    """Read a YAML file of TrainConfig fields; InputError names the file and the key at fault."""
    return read_yaml(TrainConfig, path)


def read_yaml(kind: type[T], path: Path) -> T:
    """Read a YAML file into a dataclass; InputError names the file and the key at fault."""
    try:
        return _read(kind, _parse(path), str(path))
    except UsageError as error:  # A fault of the file, not of the command.
        raise InputError(str(error), code=error.code, **error.fields) from error


@contextmanager
def settings_from(path: Path) -> Iterator[None]:
    """Turn a UsageError about settings into an InputError that names their file."""
    try:
        yield
    except UsageError as error:
        fields = error.fields | {"path": path}
        raise InputError(f"{path}: {error}", code=error.code, **fields) from error


_MOST_BYTES = 1 << 20


def _parse(path: Path) -> dict[str, Any]:
    content = parse_yaml(read_bounded(path, _MOST_BYTES), path)
    if not isinstance(content, dict):
        text = f"{path}: expected keys and values, found {type(content).__name__}"
        raise InputError(text, code="not_yaml", path=path)
    return content


def _replace(content: dict[str, Any], setting: str) -> None:
    """Put the value of ``KEY=VALUE`` into a recipe's content."""
    path, equals, text = setting.partition("=")
    *groups, key = path.strip().split(".")
    refuse = partial(UsageError, code="setting_malformed", setting=setting)
    if not equals or not key:
        raise refuse(f"--set wants KEY=VALUE such as model.lora_rank=16, found '{setting}'")
    try:
        value = parse_yaml(text, setting)
    except InputError as error:
        raise refuse(f"--set {setting}: the value is not YAML") from error
    for group in groups:
        content = content.setdefault(group, {})
        if not isinstance(content, dict):
            raise refuse(f"--set {setting}: '{group}' has no settings of its own")
    content[key] = value


def _read(kind: type[T], content: dict[str, Any], where: str) -> T:
    if kind is TrainConfig and "root" not in content:
        raise InputError(
            f"{where}: 'root' is missing: set it in the file or as an option",
            code="root_missing",
            where=where,
        )
    return read_fields(kind, _as_read(content), where)


def _as_read(content: dict[str, Any]) -> dict[str, Any]:
    """Turn a single block, as ``lora_blocks: 3``, into text."""
    model = content.get("model")
    if not isinstance(model, dict):
        return content
    model = {
        key: str(value) if type(value) is int and str(key).endswith("_blocks") else value
        for key, value in model.items()
    }
    return {**content, "model": model}
