"""The two towers of the model: what their graphs are called, what runs one, and how it is run."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_count
from upperson_rt.errors import InputError, IntegrityError

__all__ = [
    "GRAPH_NAMES",
    "SHORTEST_TEXT",
    "TOWERS",
    "Backend",
    "Tower",
    "batch_slices",
    "run_tower",
]

Tower: TypeAlias = Literal["image", "text"]

TOWERS: tuple[Tower, ...] = get_args(Tower)

GRAPH_NAMES: dict[Tower, tuple[str, str]] = {
    "image": ("image", "image_embeds"),
    "text": ("input_ids", "text_embeds"),
}
"""Input and output of each tower's graph."""

SHORTEST_TEXT = 2
"""Tokens that every text has, a start and an end; text graphs are exported from there on."""


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


def run_tower(backend: Backend, tower: Tower, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    """Run one tower as it is, without a check of the result.

    Args:
        backend: The loaded tower. More rows than its `max_batch` go in several pieces.
        tower: Which of the two it is.
        inputs: uint8 [N, H, W, 3] for ``image``, int32 [N, L] for ``text``; N from 1.

    Returns:
        (N, D) float32.

    Raises:
        BackendError: The backend fails.
        IntegrityError: The graph has no output of the expected name.
    """
    most = backend.max_batch
    if most is not None and len(inputs) > most:
        pieces = [
            run_tower(backend, tower, inputs[rows]) for rows in batch_slices(len(inputs), most)
        ]
        return np.concatenate(pieces)
    input_name, output_name = GRAPH_NAMES[tower]
    outputs = backend.run({input_name: np.ascontiguousarray(inputs)})
    if output_name not in outputs:
        raise IntegrityError(
            f"the {tower} tower has no output '{output_name}', only {', '.join(outputs)}: "
            "export the bundle again"
        )
    return outputs[output_name].astype(np.float32, copy=False)


def batch_slices(total: int, batch_size: int) -> Iterator[slice]:
    """Return the slices that cut ``total`` rows into batches.

    Raises:
        InputError: The batch size is below 1.
    """
    batch_size = check_count(batch_size, "batch_size", InputError)
    return (slice(i, min(i + batch_size, total)) for i in range(0, total, batch_size))
