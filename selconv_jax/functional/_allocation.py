"""De-allocation and re-allocation of the input channels of one layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax._utils.arguments import check_dtype, check_shape, check_whole
from selconv_jax.functional._groups import kernel_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerState:
    """State of one layer, with ``C`` input and ``O`` output channels, that re-allocation reads or rewrites.

    A slot is everything that belongs to one input channel: its row of the kernel, its batch norm, gate,
    source and shift. ``source`` and ``shift`` are None in a gate-only layer, whose closed slots are never
    filled.

    Layers with ``G`` groups are an extension of the method, which has none. Gates, sources and scores
    ignore the groups and index all ``C`` channels: a slot may copy a channel of any group. Only the kernel
    is grouped: the row of channel ``d`` is ``kernel[..., d % (C / G), o]`` for the outputs ``o`` of its
    group ``d // (C / G)``.

    Attributes:
        kernel: ``[*K, C / G, O]`` floating, ``[*K, C, O]`` without groups.
        scale: ``[C]`` batch norm scale.
        bias: ``[C]`` batch norm bias.
        mean: ``[C]`` batch norm running mean.
        var: ``[C]`` batch norm running variance.
        gate: ``[C]`` bool, false where the channel is closed.
        source: ``[C]`` int32, the channel that the slot reads; -1: its own, unshifted. None in a gate-only
            layer.
        shift: ``[C, len(S)]`` floating, in pixels. None in a gate-only layer.
    """

    kernel: jax.Array
    scale: jax.Array
    bias: jax.Array
    mean: jax.Array
    var: jax.Array
    gate: jax.Array
    source: jax.Array | None = None
    shift: jax.Array | None = None


def deallocate(
    normalized: jax.Array,
    gate: jax.Array,
    source: jax.Array | None,
    threshold: jax.typing.ArrayLike,
    groups: int = 1,
) -> tuple[jax.Array, jax.Array | None]:
    r"""Close the channels whose total damage stays within a threshold (method, "De-allocate").

    Channels are sorted by their largest damage to any output, in ascending order :math:`\pi`. Closed is the
    longest prefix of :math:`n` channels whose summed damage does not exceed ``threshold`` for any output,

    .. math:: \max_o \sum_{j \le n} \hat{D}_{o, \pi(j)} \le t .

    If even all channels together do not exceed it (all damage is 0, or the threshold is at least 1),
    nothing is closed.

    With groups, an extension of the method, the channels of all groups are sorted together, with one sum
    per output. In addition, each group that had an open channel keeps the last of its open channels in
    that order: without one the outputs of the group would be constant, and no gradient would reach its
    kernel. In a depthwise convolution (one channel per group) nothing is ever closed.

    Args:
        normalized: ``[O, C]`` normalized damage of the layer before the call.
        gate: ``[C]`` bool.
        source: ``[C]`` int32, or None for a gate-only layer.
        threshold: Fraction of the damage that may be lost; 0 closes channels without damage.
        groups: Number of groups of the convolution.

    Returns:
        The new gate and source: closed channels have gate false and source -1. Channels that were
        closed before stay closed. A layer that had an open channel keeps one, and so does each of its groups.

    Raises:
        ValueError: The shapes do not match, ``gate`` is not boolean or ``source`` not integer, or ``groups``
            does not divide the number of channels.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.functional import deallocate
        >>> normalized = jnp.array([[0.70, 0.02, 0.28], [0.90, 0.03, 0.07]])
        >>> gate, source = deallocate(
        ...     normalized, jnp.ones(3, bool), jnp.array([-1, 0, -1]), threshold=0.1)
        >>> gate.tolist(), source.tolist()
        ([True, False, True], [-1, -1, -1])
    """
    _check_gate(gate)
    check_shape("normalized", normalized, (*normalized.shape[:1], *gate.shape), "[O, C], as gate is [C]")
    if source is not None:
        _check_channels("source", source, gate)
    if groups < 1 or gate.shape[0] % groups:
        raise ValueError(f"groups is {groups}, which does not divide {gate.shape[0]} channels.")
    # A stable sort: of channels with equal damage the one with the lower index is closed first.
    order = jnp.argsort(jnp.max(normalized, axis=0), stable=True)
    largest = jnp.max(jnp.cumsum(normalized[:, order], axis=1), axis=0)
    # Damage is not negative, so the sums never fall, except for the rounding of a parallel cumsum.
    threshold = jnp.asarray(threshold, largest.dtype)
    exceeded = jax.lax.cummax(largest) > threshold
    # Rows sum to less than 1, but rounding may exceed it.
    closes_some = exceeded[-1] & (threshold < 1)
    # If the n-th sum is the first to exceed the threshold, the n - 1 channels before it are closed.
    closed = jnp.zeros_like(gate).at[order].set(~exceeded & closes_some)
    new_gate = gate & ~closed
    if groups > 1:
        new_gate = new_gate | _kept_by_groups(order, gate, new_gate, groups)
    if source is None:
        return new_gate, None
    return new_gate, jnp.where(new_gate, source, -1)


def _kept_by_groups(order: jax.Array, gate: jax.Array, new_gate: jax.Array, groups: int) -> jax.Array:
    """Find, in each group that would lose all its channels, the last open one in ``order``: ``[C]`` bool."""
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))
    places = jnp.where(gate, place, -1).reshape(groups, -1)
    lost = jnp.any(gate.reshape(places.shape), axis=1) & ~jnp.any(new_gate.reshape(places.shape), axis=1)
    last = jnp.arange(places.shape[1])[None, :] == jnp.argmax(places, axis=1)[:, None]
    return (last & lost[:, None]).reshape(-1)


def draw_sources(key: jax.Array, scores: jax.Array, gate: jax.Array, top_k: int) -> jax.Array:
    """Draw the open channel that each closed channel will copy (method, "Re-allocate", steps 3 and 4).

    Each closed channel independently draws one of the ``top_k`` open channels with the highest scores, all
    equally likely. Only channels with a score above 0 are candidates; there may be fewer than ``top_k``.
    (The authors' code draws from the ``top_k`` highest scores even where some of them are 0.)

    Args:
        key: A PRNG key.
        scores: ``[C]`` from `channel_scores`.
        gate: ``[C]`` bool.
        top_k: Number of candidates, at least 1.

    Returns:
        ``[C]`` int32: index of the drawn channel, or -1 if the channel is open or there is no candidate.

    Raises:
        ConfigError: ``top_k`` is not a whole number of at least 1.
        ValueError: The shapes do not match, or ``gate`` is not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.functional import draw_sources
        >>> draw_sources(jax.random.key(0), jnp.array([0.1, 0.0, 0.9]),
        ...              jnp.array([True, False, True]), top_k=1).tolist()
        [-1, 2, -1]
    """
    return sources_from_uniform(jax.random.uniform(key, scores.shape), scores, gate, top_k)


def sources_from_uniform(uniform: jax.Array, scores: jax.Array, gate: jax.Array, top_k: int) -> jax.Array:
    """Draw sources as `draw_sources` does, from given random numbers.

    Args:
        uniform: ``[C]`` floating in [0, 1).
        scores: ``[C]`` from `channel_scores`.
        gate: ``[C]`` bool.
        top_k: Number of candidates, at least 1.

    Returns:
        ``[C]`` int32.

    Raises:
        ConfigError: ``top_k`` is not a whole number of at least 1.
        ValueError: See `draw_sources`.
    """
    check_whole("top_k", top_k, 1)
    _check_gate(gate)
    check_shape("scores", scores, gate.shape, "[C], as gate is")
    # Of equal scores lax.top_k puts the lower index first. A channel with a NaN score is no candidate.
    best, candidates = jax.lax.top_k(jnp.where(gate & (scores > 0), scores, 0), min(top_k, scores.shape[0]))
    number = jnp.sum(best > 0, dtype=jnp.int32)
    # Rounding may raise the product to `number` itself.
    pick = jnp.minimum(jnp.floor(uniform * number.astype(uniform.dtype)).astype(jnp.int32), number - 1)
    return jnp.where(gate | (number == 0), -1, candidates[pick]).astype(jnp.int32)


def fill_slots(state: LayerState, drawn: jax.Array, shift: jax.Array) -> LayerState:
    """Fill closed channels with shifted copies of the drawn ones (method, "Re-allocate", step 4).

    A filled slot is opened with an all-zero kernel row, so that the layer's output does not change, and
    with the batch norm of the channel it copies. A copy of a copy reads the original. All slots are
    filled from the state before the call.

    In a layer with groups a slot may copy a channel of another group; its kernel row stays in its own group.

    Args:
        state: The layer after de-allocation, with ``source`` and ``shift``.
        drawn: ``[C]`` int32 from `draw_sources`; -1 leaves the channel as it is.
        shift: ``[C, len(S)]`` floating, initial shifts of the filled slots, in pixels.

    Returns:
        The state with the slots filled; the shapes and dtypes are unchanged.

    Raises:
        ValueError: The layer is gate-only, or ``drawn`` or ``shift`` does not fit it.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.functional import LayerState, fill_slots
        >>> ones = jnp.ones(2)
        >>> state = LayerState(kernel=jnp.ones((1, 2, 1)), scale=jnp.array([3.0, 1.0]), bias=ones,
        ...     mean=ones, var=ones, gate=jnp.array([True, False]),
        ...     source=jnp.array([-1, -1]), shift=jnp.zeros((2, 1)))
        >>> new = fill_slots(state, jnp.array([-1, 0]), jnp.array([[0.0], [1.5]]))
        >>> new.gate.tolist(), new.source.tolist(), new.scale.tolist(), new.kernel.ravel().tolist()
        ([True, True], [-1, 0], [3.0, 3.0], [1.0, 0.0])
    """
    state = jax.tree.map(jnp.asarray, state)  # a traced index cannot read arrays of NumPy
    if state.source is None or state.shift is None:
        raise ValueError(
            "the layer is gate-only (source or shift is None): its closed channels cannot be filled."
        )
    _check_gate(state.gate)
    _check_channels("drawn", drawn, state.gate)
    check_shape("shift", shift, state.shift.shape, "as the layer's shift is")
    filled = drawn >= 0
    read = jnp.maximum(drawn, 0)

    def copy(values: jax.Array) -> jax.Array:
        return jnp.where(filled, values[read], values)

    original = state.source[read]
    return LayerState(
        kernel=jnp.where(kernel_rows(filled, state.kernel.shape), 0, state.kernel),
        scale=copy(state.scale),
        bias=copy(state.bias),
        mean=copy(state.mean),
        var=copy(state.var),
        gate=state.gate | filled,
        source=jnp.where(filled, jnp.where(original >= 0, original, read), state.source),
        shift=jnp.where(filled[:, None], shift.astype(state.shift.dtype), state.shift),
    )


def _check_gate(gate: jax.Array) -> None:
    """Raise a ValueError unless ``gate`` is ``[C]`` bool: the complement of other numbers is none."""
    check_dtype("gate", gate, np.bool_, "bool; convert it (gate != 0)")
    if gate.ndim != 1:
        raise ValueError(
            f"gate has shape {gate.shape}; it must be [C], of one layer (use jax.vmap for more)."
        )


def _check_channels(name: str, index: jax.Array, gate: jax.Array) -> None:
    """Raise a ValueError unless ``index`` is ``[C]`` integer."""
    check_dtype(name, index, np.integer, "integer")
    check_shape(name, index, gate.shape, "[C], as gate is")
