"""Sphinx directive ``configuration-keys``: every configuration key of a run, from its dataclasses."""

import dataclasses
import inspect
import json
import re
import types
import typing
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from selconv_jax.train import Config

__all__ = ["configuration_keys", "descriptions", "setup"]


def configuration_keys() -> str:
    """Format every key with type, default and description in Markdown, a table per section."""
    parts = [_section("Run", Config, "")]
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            parts.append(_section(f"`[{field.name}]`", field.type, f"{field.name}."))
    return "\n\n".join(parts)


def descriptions(kind: type) -> dict[str, str]:
    """Parse the description of each name from the section "Attributes" of a docstring."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", description) for name, description in found}


def _section(title: str, kind: Any, prefix: str) -> str:
    introduction = inspect.cleandoc(kind.__doc__).partition("\n\nAttributes:")[0]
    introduction = re.sub(r"^``\[\w+\]``: ", "", introduction)
    lines = [f"## {title}", introduction[:1].upper() + introduction[1:]]
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    described = descriptions(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            continue
        cells = (f"`{prefix}{field.name}`", _type(field.type), _default(field), described[field.name])
        rows.append(" | ".join(["", *(cell.replace("|", r"\|") for cell in cells), ""]).strip())
    return "\n\n".join([*lines, "\n".join(rows)])


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f'`"{value}"`' for value in typing.get_args(kind))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_type(part) for part in typing.get_args(kind))
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(kind, "table")


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "`{}`"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


class _ConfigurationKeys(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(configuration_keys(), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("configuration-keys", _ConfigurationKeys)
    return {"parallel_read_safe": True}
