"""The rule of a round of re-allocation: its settings."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

from jax.typing import ArrayLike

from selconv_jax._utils.arguments import check_number, check_whole
from selconv_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AllocationRule:
    """Rule by which a round closes and refills channels (method, "De-allocate" and "Re-allocate").

    Attributes:
        threshold: Fraction of the damage that may be lost by closing channels, in [0, 1]. Like
            ``shift_range``, it may be an array ``[]``, traced or not; a new value does not recompile.
        top_k: Number of channels that compete for the closed slots; 0: channels are closed, none refilled.
        max_copies: Sources that more than this many channels read are not copied again, nor are their
            copies; None: no limit.
        shift_range: Shifts of new copies are drawn from ``[-shift_range, shift_range]`` pixels.
        random_sources: Ablation: instead of the top K, all open channels that ``max_copies`` does not
            exclude are equally likely sources, whatever their scores (``top_k=0`` still only closes).

    Raises:
        ConfigError: A value is out of bounds.

    Example:
        >>> from selconv_jax import AllocationRule
        >>> AllocationRule(threshold=0.1, top_k=0).shift_range
        1.5
        >>> AllocationRule(threshold=2.0)
        Traceback (most recent call last):
        ...
        selconv_jax.errors.ConfigError: threshold is 2.0; it must be in [0, 1].
    """

    threshold: ArrayLike = 1e-3
    top_k: int = 3
    max_copies: int | None = None
    shift_range: ArrayLike = 1.5
    random_sources: bool = False

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, lambda share: 0.0 <= share <= 1.0, "in [0, 1]")
        check_whole("top_k", self.top_k, 0, "a whole number, at least 0 (0: only close channels)")
        if self.max_copies is not None:
            check_whole("max_copies", self.max_copies, 0, "a whole number, at least 0, or None")
        check_number(
            "shift_range", self.shift_range, lambda value: 0.0 <= value < math.inf, "finite and at least 0"
        )


# One rule for all layers (None: the published one), or a function from the path of a layer to its own.
Rule: TypeAlias = AllocationRule | Callable[[str], AllocationRule | None] | None


def rules_of_layers(rule: Rule, names: Collection[str]) -> dict[str, AllocationRule]:
    """Return the rule of each layer that takes part in a round, by path; see `reallocate`."""
    if rule is None:
        rule = AllocationRule()
    if not callable(rule) or isinstance(rule, type):
        return {name: _checked(rule, "rule") for name in names}
    rules = {name: _checked(own, f"rule({name!r})") for name in names if (own := rule(name)) is not None}
    if not rules:
        raise ConfigError(
            f"rule returns None for each of the {len(names)} selective layers, the first of which is "
            f"{next(iter(names))!r}: none takes part. Return an AllocationRule for some of these paths."
        )
    return rules


def _checked(rule: Any, name: str) -> AllocationRule:
    if not isinstance(rule, AllocationRule):
        raise ConfigError(
            f"{name} is a {type(rule).__name__}; it must be an AllocationRule, such as "
            "selconv_jax.AllocationRule(threshold=1e-3)."
        )
    return rule
