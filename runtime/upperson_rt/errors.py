"""Errors of the toolkit, one small tree shared by all its packages.

    UppersonError                 exit code
    ├── UsageError                2  the command or call itself is wrong
    ├── InputError                3  a file, folder, image or record is not usable
    ├── AccuracyGateError         4  no variant stayed within the allowed accuracy drop
    ├── BackendError              5  a backend, device or optional package is missing
    └── IntegrityError            6  a hash, golden sample or fingerprint does not match

Every message says what was expected, what was found and what to do.
"""

from pathlib import Path
from typing import ClassVar


class UppersonError(Exception):
    """Base class: anything the toolkit reports to its user in one line.

    ``code`` is stable: programs and tests compare it, and not the message. ``fields`` hold what the
    message names.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "error"

    def __init__(self, message: str = "", *, code: str | None = None, **fields: object) -> None:
        """Make an error with a message of one line; ``code`` is by default that of the class."""
        super().__init__(message)
        self.code = code or self.default_code
        self.fields = fields

    def as_json(self) -> dict[str, object]:
        """Return code, exit code, message and fields, for ``--json``."""
        return {
            "code": self.code,
            "exit_code": self.exit_code,
            "message": str(self),
            "fields": {
                name: value if isinstance(value, str | int | float | bool | None) else str(value)
                for name, value in self.fields.items()
            },
        }


class UsageError(UppersonError):
    """The command line or a call contradicts itself or names something unknown."""

    exit_code = 2
    default_code = "usage"


class InputError(UppersonError):
    """Input data cannot be used: unreadable, empty, malformed or missing."""

    exit_code = 3
    default_code = "input"


class AccuracyGateError(UppersonError):
    """Every candidate artefact lost more retrieval accuracy than allowed."""

    exit_code = 4
    default_code = "accuracy_gate"


class BackendError(UppersonError):
    """A requested backend, device or optional package is not available."""

    exit_code = 5
    default_code = "backend_unavailable"


class IntegrityError(UppersonError):
    """Stored data is not what was written: hash, golden sample or fingerprint mismatch."""

    exit_code = 6
    default_code = "integrity"


_TEGRA = Path("/etc/nv_tegra_release")
JETPACK_ADVICE = (
    "use JetPack's TensorRT (sudo apt install python3-libnvinfer) in a virtual environment made "
    "with --system-site-packages, see docs/how-to/jetson.md"
)
"""TensorRT and OpenCV come with JetPack; PyPI has neither for a Jetson."""


def missing_extra(package: str, extra: str, purpose: str) -> BackendError:
    """Build the error for an optional package that is missing; ``purpose`` needed it."""
    return BackendError(
        f"{purpose} needs the package '{package}', which is not installed: "
        f"run  {install_command(extra)}",
        code="extra_missing",
        package=package,
        extra=extra,
    )


def install_command(extra: str) -> str:
    """Return the command that adds an extra to the installed distribution.

    That is ``upperson``, which has all extras of ``upperson-rt``, else ``upperson-rt``. A Jetson
    and other machines of its kind get what takes the place of what PyPI lacks for them.
    """
    import platform
    from importlib import metadata

    try:
        metadata.distribution("upperson")
        distribution = "upperson"
    except metadata.PackageNotFoundError:
        distribution = "upperson-rt"
    if extra == "gpu" and platform.machine() == "aarch64":
        return f"pip install '{distribution}[cpu]', then {JETPACK_ADVICE}"
    if extra == "camera" and jetson_line() is not None:
        return "sudo apt install nvidia-opencv, then  pip install av  (PyPI's has no GStreamer)"
    if extra == "trackers":  # It asks for opencv-python, which would overwrite the OpenCV there is.
        return f"pip install '{distribution}[trackers]' && pip install --no-deps 'trackers>=2.6'"
    return f"pip install '{distribution}[{extra}]'"


def jetson_line() -> str | None:
    """Return how a Jetson names its Linux, ``R36 (release), REVISION: 4.3``; None elsewhere."""
    if not _TEGRA.is_file():
        return None
    return _TEGRA.read_text("utf-8", errors="replace").split(", GCID")[0].strip("# \n")
