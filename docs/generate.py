"""Makes the reference pages that follow from code: commands from their help, HTTP from OpenAPI.

MkDocs calls `on_files` before it builds the site, see ``hooks`` in ``mkdocs.yml``.
"""

import html
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))  # MkDocs runs from anywhere.
from tests.helpers.frozen_options import APPS, iter_commands, panel_of

_METHODS = ("get", "post", "put", "patch", "delete")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each program, and one for the HTTP API."""
    pages = {f"reference/{program}.md": command_page(program) for program in APPS}
    pages["reference/http.md"] = http_page(openapi_document())
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def command_page(program: str) -> str:
    """Return the page of a program: each command with its help and its options."""
    parts = [f"# {program}\n\nGenerated from `{program} --help`.\n"]
    for name, command in iter_commands():
        if not name.startswith(f"{program} "):
            continue
        text = _markdown(inspect.cleandoc(command.help or ""))
        parts.append(f"## {name.removeprefix(program).strip()}\n\n{text}\n")
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                panels.setdefault(panel_of(parameter), []).append(_option_row(parameter))
        for title, rows in panels.items():
            parts.append(f"| {title} | Default | Meaning |\n|---|---|---|\n" + "".join(rows))
    return "\n".join(parts)


def _option_row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    elif parameter.metavar:
        names += f" `{parameter.metavar}`"
    shown = parameter.show_default if isinstance(parameter.show_default, str) else None
    default = shown or _default_text(parameter.default)
    return f"| {names} | {_cell(default)} | {_cell(parameter.help or '')} |\n"


def _default_text(value: Any) -> str:
    if value is None or value is False or callable(value) or value in ([], ()):
        return ""
    return "on" if value is True else f"`{getattr(value, 'value', value)}`"


def _markdown(text: str) -> str:
    """Return help as Markdown: the word before an example is bold."""
    return re.sub(r"^(Example|Examples):", r"**\1:**", text, flags=re.MULTILINE)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document that the console serves."""
    from fastapi.testclient import TestClient

    from upperson_console.accounts import Access, Account
    from upperson_console.app import make_app

    service = MagicMock()  # The document does not depend on it.
    access = Access(None, Account(name="docs", role="viewer"))
    client = TestClient(make_app(service, access), base_url="http://127.0.0.1")
    document: dict[str, Any] = client.get("/api/v1/openapi.json").json()
    return document


def http_page(document: dict[str, Any]) -> str:
    """Return the page of the HTTP API: operations, then the objects that they take and give."""
    parts = [
        "# HTTP API\n\nGenerated from the OpenAPI document that the console serves at "
        "`/api/v1/openapi.json`. Errors are problems (RFC 9457), see [ProblemOut](#problemout).\n"
    ]
    for path, operations in document["paths"].items():
        parts += (
            "\n".join(_operation(method, path, operations[method]))
            for method in _METHODS
            if method in operations
        )
    parts.append("## Objects\n")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append("\n".join(_object(name, schema)))
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"## {method.upper()} {path}\n\n{operation.get('summary', '')}\n"
    if text := operation.get("description"):
        yield f"{text}\n"
    if parameters := operation.get("parameters"):
        yield "| parameter | in | type | |\n|---|---|---|---|"
        for one in parameters:
            name = f"`{one['name']}`" + (" (required)" if one.get("required") else "")
            text = _cell(one.get("description", ""))
            yield f"| {name} | {one['in']} | {_type(one['schema'])} | {text} |"
        yield ""
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body, `{kind}`: {_type(body['schema'])}\n"
    for code, response in operation["responses"].items():
        if code == "default":  # A problem, of every operation.
            continue
        content = response.get("content", {})
        types = ", ".join(f"`{k}` {_type(v.get('schema', {}))}".strip() for k, v in content.items())
        yield f"- **{code}** {response['description']}{': ' if types else ''}{types}"
    yield ""


def _object(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if text := schema.get("description"):
        yield f"{text}\n"
    if "properties" not in schema:
        yield f"{_type(schema)}\n"
        return
    yield "| field | type | |\n|---|---|---|"
    needed = schema.get("required", ())
    for field, one in schema["properties"].items():
        name = f"`{field}`" + (" (required)" if field in needed else "")
        yield f"| {name} | {_type(one)} | {_cell(_field_text(one))} |"
    yield ""


def _field_text(schema: dict[str, Any]) -> str:
    parts = [schema.get("description", "")]
    if "default" in schema and schema["default"] not in (None, [], {}):
        parts.append(f"Default: `{schema['default']}`.")
    return " ".join(filter(None, parts))


def _type(schema: dict[str, Any]) -> str:
    if ref := schema.get("$ref"):
        name = ref.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if options := schema.get(key):
            return " or ".join(_type(one) for one in options)
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = html.escape(str(schema.get("type", "any")))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = [
        f"{text} {schema[key]:g}"
        for key, text in (("minimum", "from"), ("maximum", "to"))
        if key in schema
    ]
    bounds += [f"up to {schema['maxLength']} characters"] if "maxLength" in schema else []
    return " ".join([kind, *bounds])
