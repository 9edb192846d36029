"""Where captions end."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def token_lengths(input_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Return [N] tokens of each zero-padded row; a zero inside a sentence is a token (``!``)."""
    lengths: NDArray[np.int64] = input_ids.shape[1] - np.argmax(input_ids[:, ::-1] != 0, axis=1)
    return lengths
