"""Links from names to the reference: in docstrings, and in code literals such as ``selconv_jax.compact``."""

import importlib
import re
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import selconv_jax

__all__ = ["public_modules", "setup"]

_LOGGER = logging.getLogger(__name__)
_NAME = re.compile(r"selconv_jax(\.\w+)+")
_LINKS = (nodes.reference, addnodes.pending_xref)


def public_modules() -> list[str]:
    """List the modules whose ``__all__`` is the public API, without the package itself."""
    names = [name for name in selconv_jax.__all__ if isinstance(getattr(selconv_jax, name), ModuleType)]
    return ["selconv_jax.interop.torch", *(f"selconv_jax.{name}" for name in names)]


def _homes() -> dict[str, str]:
    """Map every public name, with or without its module, to its name in the reference."""
    homes, known = {}, {}
    for module in public_modules():
        for name in importlib.import_module(module).__all__:
            target = getattr(importlib.import_module(module), name)
            home = known.setdefault(id(target), f"{module}.{name}")
            homes[name] = homes[f"{module}.{name}"] = home
    for name in selconv_jax.__all__:
        homes[f"selconv_jax.{name}"] = known.get(id(getattr(selconv_jax, name)), f"selconv_jax.{name}")
    return homes


def _link_literals(app: Sphinx, doctree: nodes.document) -> None:
    for literal in list(doctree.findall(nodes.literal)):
        if _NAME.fullmatch(literal.astext()) and not isinstance(literal.parent, _LINKS):
            link = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=literal.astext(), refexplicit=False
            )
            link.source, link.line = literal.source, literal.line
            literal.replace_self(link)
            link += literal


def _resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Node) -> Any:
    """Resolve a public name to its entry in the reference; an attribute to that of its class."""
    if node.get("refdomain") != "py":
        return None
    target: str = node["reftarget"]
    homes = _homes()
    home = homes.get(target) or homes.get(target.rpartition(".")[0])
    if home is None:
        if target.startswith("selconv_jax.") and node["reftype"] == "obj":  # else a type in a signature
            _LOGGER.warning("%s is not a public name", target, location=node)
        return None
    kind = "mod" if home in public_modules() else "obj"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, kind, home, node, content)


def _shorten(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Remove the common fields of Flax modules, and module paths, from a signature."""
    if signature is None or "parent: " not in signature:
        return None
    signature = re.sub(r", parent: .*\)$", ")", signature)
    signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", signature)
    signature = re.sub(r"~?(?:[a-z_]\w*\.)+(\w+)", r"\1", signature)
    return re.sub(r"<function .*?>", "...", re.sub(r"<locals>\.", "", signature)), returned


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the event handlers with Sphinx."""
    app.connect("doctree-read", _link_literals)
    app.connect("missing-reference", _resolve)
    app.connect("autodoc-process-signature", _shorten)
    return {"parallel_read_safe": True}
