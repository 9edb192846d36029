"""faiss, loaded when it is first needed; its type hints are incomplete."""

from importlib import import_module
from typing import Any

from upperson_rt.errors import BackendError

__all__ = ["load_faiss"]


def load_faiss() -> Any:
    """Return the module.

    Raises:
        BackendError: It is not installed.
    """
    try:
        return import_module("faiss")
    except ImportError as error:
        raise BackendError(
            "searching a gallery needs the package 'faiss', which is not installed: run "
            " pip install faiss-cpu"
        ) from error
