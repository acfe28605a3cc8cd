"""Recognition of a state dict by its names and shapes: the layout, and the network that it is of."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn

from selconv_jax.errors import CheckpointError
from selconv_jax.interop._names import AUTHORS, DENSENET, LAYOUTS, RESNETV2, Layout, Shape, layout_of
from selconv_jax.models import create_model

Problems = Mapping[str, list[str]]  # names by kind
Shapes = Mapping[str, Shape]  # by name, with prefixes

# Endings of the authors' names in which the variants of a network differ.
_ALLOCATION = ("is_open", "_ind_ptr", "_bias", "_eye")
_SHOWN = 5
_STEMS = {DENSENET: "features.conv0.weight", RESNETV2: "stem.conv.weight"}
_LAST_LAYERS = {DENSENET: "classifier.weight", RESNETV2: "head.fc.weight"}


def recognize(shapes: Shapes) -> Layout | None:
    """Return the layout of a state dict; None: it is none of ours."""
    return next((layout for layout in LAYOUTS if _layers(layout, shapes)), None)


def unknown(shapes: Shapes) -> str:
    """Describe a state dict of no known layout."""
    names = ", ".join([name for name, shape in shapes.items() if shape][:3]) or "none"
    known = "; ".join(f"{layout.owner} ({layout.example})" for layout in LAYOUTS)
    return f"has an unknown layout. Its first names: {names}. Known are {known}."


def _obstacle(layout: Layout, shapes: Shapes) -> str | None:
    """Describe why a network of a layout cannot be one of ours; None: no reason is known."""
    if layout is AUTHORS:
        return None
    deep = [name for name in ("features.conv1.weight", "stem.conv1.weight") if _find(name, shapes)]
    if deep:
        return f"its stem has several convolutions ({deep[0]}), ours has one"
    if not any(name.endswith(".running_var") for name in shapes):
        return (
            "it has no running statistics, so its norms are not batch norms (timm's resnetv2_*_bit, *_gn, "
            "*_evos and *_frn have others)"
        )
    if layout is RESNETV2 and not _find("stages.0.blocks.0.conv3.weight", shapes):
        return "its residual blocks have two convolutions (as resnetv2_18 and resnetv2_34), ours have three"
    outputs, inputs, *_ = next(iter(_layers(layout, shapes).values()))
    stem = next(iter(_find(_STEMS[layout], shapes)), 0)
    if layout is DENSENET and (inputs != 4 * outputs or stem not in (0, 2 * outputs)):
        return (
            f"its growth is {outputs}, its stem has {stem} and its bottlenecks {inputs} channels, ours have "
            "2 and 4 times the growth"
        )
    if layout is RESNETV2 and stem not in (0, inputs):
        return f"its first bottleneck has {inputs} channels and its stem {stem}, ours have the same number"
    return None


def network_in(layout: Layout, shapes: Shapes, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the network that a state dict is of, with ``arguments`` beside those that follow from it.

    Raises:
        CheckpointError: The state dict does not determine the network, or it cannot be one of ours. The
            message continues after the name of the file.
        ConfigError: An argument is invalid.
    """
    if layout is AUTHORS:
        raise CheckpointError(
            "is of the authors' code, whose names do not determine the network (such as the stride of its "
            "stem): build it by selconv_jax.models.create_model, and pass it to load_state_dict."
        )
    if obstacle := _obstacle(layout, shapes):
        raise CheckpointError(f"is one of {layout.owner} that cannot be expressed: {obstacle}.")
    layers = _layers(layout, shapes)
    stem, last = _find(_STEMS[layout], shapes), _find(_LAST_LAYERS[layout], shapes)
    for name, shape, rank in ((_STEMS[layout], stem, 4), (_LAST_LAYERS[layout], last, 2)):
        if len(shape) < rank:
            raise CheckpointError(f"is one of {layout.owner}, but has no array {name}.")
    if stem[-1] != 7 and "stem" not in arguments:
        raise CheckpointError(
            f"has a stem of {stem[-1]}x{stem[-1]} pixels instead of 7x7, and does not determine its stride: "
            'pass stem="cifar" (stride 1, no pool) or "tiny_imagenet" (stride 2, no pool).'
        )
    blocks = [
        1 - layout.first + max(layer for other, layer in layers if other == block)
        for block in sorted({block for block, _ in layers})
    ]
    found = {"num_classes": last[0], "blocks": tuple(blocks), "stem": "imagenet", layout.option: True}
    if layout is RESNETV2:
        return create_model("preresnet50", **{**found, "width": stem[0], **arguments})
    # Their transitions halve, as those of densenet121.
    growth = next(iter(layers.values()))[0]
    return create_model("densenet121", **{**found, "growth": growth, **arguments})


def listing(problems: Problems) -> str:
    """List what does not fit, cut if it is long."""
    parts = []
    for kind, items in problems.items():
        if items:
            unique = list(dict.fromkeys(items))
            shown = ", ".join([*unique[:_SHOWN], "..."] if len(unique) > _SHOWN else unique)
            parts.append(f"{len(unique)} {kind} ({shown})")
    return "; ".join(parts)


def remedy(model: nn.Module, shapes: Shapes, given: Collection[str], problems: Problems) -> str:
    """Say what to do about a state dict that does not fit, of which the network knows the ``given`` names."""
    if not any(problems[kind] for kind in ("missing", "unexpected", "of another shape")):
        return "The checkpoint is damaged or of a diverged run; use another one."
    layout, expected = recognize(shapes), layout_of(model)
    if layout is not None and (obstacle := _obstacle(layout, shapes)):
        return f"It is one of {layout.owner} that cannot be expressed: {obstacle}."
    if layout not in (None, expected):
        return f"The checkpoint has the names of {layout.owner}, the model those of {expected.owner}" + (
            f": load_network builds the network, which has {layout.option}=True." if layout.option else "."
        )
    misfits = problems["missing"] + problems["unexpected"]
    # If all misfits are entries in which the variants differ, the checkpoint is of another variant.
    if misfits and all(name.endswith(_ALLOCATION) for name in misfits):
        endings = {name.rpartition(".")[2] for name in (*given, *problems["unexpected"])}
        variant = "selective" if "_ind_ptr" in endings else "gate_only" if "is_open" in endings else "plain"
        return f"The checkpoint is of a {variant} network, the model has variant={model.variant!r}."
    return "Build the model with the arguments that the checkpoint was trained with (blocks, classes, ...)."


def _layers(layout: Layout, shapes: Shapes) -> dict[tuple[int, int], Shape]:
    """Return the shapes of the layout's sign by the numbers of block and layer."""
    layers = {(int(found[1]), int(found[2])): shape for found, shape in _search(layout.sign, shapes)}
    return {numbers: shape for numbers, shape in layers.items() if len(shape) == 4}


def _find(name: str, shapes: Shapes) -> Shape:
    return next((shape for _, shape in _search(re.escape(name), shapes)), ())


def _search(pattern: str, shapes: Shapes) -> Iterator[tuple[re.Match[str], Shape]]:
    for name, shape in shapes.items():
        if match := re.search(rf"(?:^|\.){pattern}$", name):
            yield match, shape
