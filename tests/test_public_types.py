"""What public functions and methods take and return, and what public classes derive from, is public too."""

import dataclasses
import functools
import inspect
import typing

import pytest

from public_names import public_values

PUBLIC = public_values()


def functions_of(value):
    if not inspect.isclass(value):
        return {"": value}
    public = {name: part for name, part in vars(value).items() if not name.startswith("_")}
    public["__call__"] = vars(value).get("__call__")
    if not dataclasses.is_dataclass(value):  # else its fields, some of which only the package makes
        public["__init__"] = vars(value).get("__init__")
    found = {}
    for name, part in public.items():
        part = part.fget if isinstance(part, property) else part
        part = part.func if isinstance(part, functools.cached_property) else part
        part = part.__func__ if isinstance(part, staticmethod | classmethod) else part
        if inspect.isfunction(part):
            found[name] = part
    return found


def classes_in(hint):
    if inspect.isclass(hint):
        yield hint
    for part in hint if isinstance(hint, list) else typing.get_args(hint):
        yield from classes_in(part)


def is_private(kind):
    return kind.__module__.startswith("selconv_jax") and kind not in PUBLIC.values()


@pytest.mark.parametrize("name", PUBLIC)
def test_types_are_public(name):
    value = PUBLIC[name]
    private = {
        kind.__qualname__
        for function in functions_of(value).values()
        for hint in typing.get_type_hints(function).values()
        for kind in classes_in(hint)
        if is_private(kind)
    }
    private |= {kind.__qualname__ for kind in getattr(value, "__mro__", ()) if is_private(kind)}
    assert not private
