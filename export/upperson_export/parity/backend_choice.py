"""Which backends are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from upperson_rt.backends import auto_order
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.tensorrt.cuda import probe_cuda_driver


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """A backend on a device."""

    name: str
    device: str
    asked: bool = True
    """Whether it was named; then it is an error if it runs nothing."""

    @property
    def place(self) -> str:
        """What messages call it before its version is known."""
        return f"{self.name} on {self.device}"


def choose_backends(names: Sequence[str]) -> list[BackendChoice]:
    """Return the backends to compare.

    Args:
        names: ``onnxruntime``, ``openvino`` or ``tensorrt``, each with ``:device`` behind it if not
            on its usual one; empty for all that are installed here.

    Raises:
        UsageError: ``auto`` is no single backend, or a name is empty.
        BackendError: None is named and none is installed.
    """
    choices = []
    for given in dict.fromkeys(names):
        name, _, device = given.strip().partition(":")
        if name in ("", "auto"):
            raise UsageError(
                f"'{given}' is no backend to compare: name onnxruntime, openvino or tensorrt, or "
                "leave --backends out to compare all that are installed"
            )
        choices.append(BackendChoice(name, device or _usual_device(name)))
    return choices or _installed_backends()


def _installed_backends() -> list[BackendChoice]:
    names = [name for name in auto_order("cpu") if find_spec(name) is not None]
    # TensorRT can crash a process on a machine without a driver.
    if find_spec("tensorrt") is not None and probe_cuda_driver().version is not None:
        names.append("tensorrt")
    if not names:
        raise BackendError("no backend is installed: run  pip install 'upperson[cpu]'")
    return [BackendChoice(name, _usual_device(name), asked=False) for name in dict.fromkeys(names)]


def _usual_device(name: str) -> str:
    return "cuda" if name == "tensorrt" else "cpu"
