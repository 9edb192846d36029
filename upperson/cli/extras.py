"""Optional packages of a command, checked before anything heavy is imported."""

from importlib.util import find_spec
from typing import Literal

from upperson_rt.errors import missing_extra

_TRAIN = (
    "accelerate", "torch", "torchvision", "open_clip", "safetensors", "yaml", "jinja2",
    "matplotlib", "tensorboard",
)  # fmt: skip
_PACKAGES = {"train": _TRAIN, "export": (*_TRAIN, "onnx", "onnx_ir", "onnxruntime", "onnxscript")}


def require_extra(extra: Literal["train", "export"], purpose: str) -> None:
    """Raise BackendError (exit 5) with the install command if a package of an extra is missing."""
    for package in _PACKAGES[extra]:
        if find_spec(package) is None:
            raise missing_extra(package, extra, purpose)
