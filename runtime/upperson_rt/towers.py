"""The two towers of the model: what their graphs are called, what runs one, and how it is run."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_count
from upperson_rt.errors import InputError, IntegrityError

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
        """Run the graph on arrays by input name; return arrays by output name."""


def run_tower(backend: Backend, tower: Tower, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
    """Run one tower and return (N, D) float32, unchecked; more rows than `max_batch` go in pieces.

    ``inputs`` are uint8 [N, H, W, 3] for ``image``, int32 [N, L] for ``text``; N from 1.
    """
    most = backend.max_batch
    if most is not None and len(inputs) > most:
        pieces = (inputs[rows] for rows in batch_slices(len(inputs), most))
        return np.concatenate([run_tower(backend, tower, piece) for piece in pieces])
    input_name, output_name = GRAPH_NAMES[tower]
    outputs = backend.run({input_name: np.ascontiguousarray(inputs)})
    if output_name not in outputs:
        found = f"the {tower} tower has no output '{output_name}', only {', '.join(outputs)}"
        message = f"{found}: export the bundle again"
        raise IntegrityError(message, code="output_missing", tower=tower)
    return outputs[output_name].astype(np.float32, copy=False)


def batch_slices(total: int, batch_size: int) -> Iterator[slice]:
    """Return the slices that cut ``total`` rows into batches."""
    batch_size = check_count(batch_size, "batch_size", InputError)
    return (slice(i, min(i + batch_size, total)) for i in range(0, total, batch_size))
