"""An output: prints each committed row as a JSON line, ``upperson-rt index crops --output print``.

Its lines go to stderr, since stdout belongs to the command.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from upperson_rt.gallery import Item


class PrintOutput:
    """Made once a run, without arguments."""

    def committed(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Print the rows of one transaction."""
        for item in items:
            row = asdict(item) | {"replaced": item.key in replaced}
            print(json.dumps(row), file=sys.stderr)

    def close(self) -> None:
        """Flush what was printed; also called after an error."""
        sys.stderr.flush()
