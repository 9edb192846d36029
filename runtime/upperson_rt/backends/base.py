"""What a backend is: one loaded ONNX graph that runs on one device."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from numpy.typing import NDArray

__all__ = ["Backend", "BackendName"]

BackendName: TypeAlias = Literal["auto", "onnxruntime", "openvino", "tensorrt"]


class Backend(Protocol):
    """A loaded graph; safe to call from several threads."""

    @property
    def name(self) -> str:
        """The library, such as ``onnxruntime``."""

    @property
    def device(self) -> str:
        """The device that really runs the graph, such as ``cpu`` or ``cuda:0``."""

    @property
    def version(self) -> str:
        """Version of the library."""

    @property
    def max_batch(self) -> int | None:
        """Most rows that run at once; None for any number. `run_tower` splits what is larger."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph.

        Args:
            inputs: Arrays by the input names of the graph, in its dtypes.

        Returns:
            Arrays by the output names of the graph; they belong to the caller.

        Raises:
            BackendError: The library refuses the inputs or fails.
        """
