import ast

import pytest

from tests.helpers.command_line import ROOT, SOURCES

FOLDERS = [ROOT / "upperson", *(source for source in SOURCES if source != ROOT)]
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
MOST_LINES = 600
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "misc", "tools", "util", "utils"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MOST_LINES, "one idea a file: split it"
    assert path.stem not in VAGUE_NAMES, "name the file after what it does"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "say at the top what the file is for"
    if "cli" not in path.parts:
        printed = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
        assert printed == [], "libraries do not print: return, log or take an observer"
