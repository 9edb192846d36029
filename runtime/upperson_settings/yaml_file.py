"""YAML of recipes and of files of cameras, read as strictly as JSON.

It is YAML 1.1, but keys are text and never there twice, times stay text, and 1e-3 is a number, as
in YAML 1.2. Needs PyYAML, which is no part of the core.
"""

import re
from os import PathLike
from typing import Any

import yaml

from upperson_rt.errors import InputError

_MERGE = "tag:yaml.org,2002:merge"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str) or name in names:
                problem = "a key twice" if isinstance(name, str) else "a key without quotes"
                raise yaml.constructor.ConstructorError(problem, None, None, key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != _TIMESTAMP]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(content: bytes | str, where: str | PathLike[str]) -> Any:
    """Parse one YAML document, UTF-8 if bytes.

    Raises:
        InputError: It is none; ``where`` names its file. The file is not quoted: it may hold
            secrets.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        text = f"{where} cannot be read as YAML: {_problem(error)}"
        raise InputError(text, code="not_yaml", path=where) from error


def _problem(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "no text in UTF-8"
    if (mark := getattr(error, "problem_mark", None)) is not None:
        context = getattr(error, "context", None) or "not valid"
        return f"{context} at line {mark.line + 1}, column {mark.column + 1}"
    return f"{type(error).__name__} in it"
