"""Changes of a file of a bundle whose hashes are right afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tests.helpers.toy_bundle import replace_in_bundle

Change: TypeAlias = Callable[[Path], None]
"""Makes a sound bundle a hostile one."""


def changed(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Let a function change the content of a file."""

    def make(folder: Path) -> None:
        content = change((folder / name).read_bytes())
        if name == "bundle.json":
            (folder / name).write_bytes(content)
        else:
            replace_in_bundle(folder, name, content)

    return make


def changed_text(name: str, change: Callable[[str], str | bytes]) -> Change:
    """Let a function change the text of a file."""

    def made(content: bytes) -> bytes:
        text = change(content.decode())
        return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")

    return changed(name, made)


def changed_json(name: str, change: Callable[[Any], object]) -> Change:
    """Let a function change what a JSON file holds, in place."""

    def made(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return changed_text(name, made)
