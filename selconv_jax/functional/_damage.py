"""Expected channel damage: how much a layer's output changes when an input channel is removed."""

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from selconv_jax._utils.arguments import check_shape, check_whole
from selconv_jax._xla.batch_norm import statistics_dtype
from selconv_jax.functional._groups import group_count


def expected_channel_damage(
    kernel: jax.Array, scale: jax.Array, bias: jax.Array, gate: jax.Array
) -> jax.Array:
    r"""Compute the expected channel damage matrix (ECDM) of a batch norm, ReLU, convolution layer.

    After batch norm, channel :math:`i` is approximately normal with mean :math:`\beta_i` and standard
    deviation :math:`|\gamma_i|`, so its mean after the ReLU is

    .. math:: E_i = |\gamma_i| \phi(\beta_i / |\gamma_i|) + \beta_i \Phi(\beta_i / |\gamma_i|)

    with :math:`E_i = \max(\beta_i, 0)` in the limit :math:`\gamma_i \to 0`. Removing the channel changes
    the expected output :math:`o` by :math:`g_i E_i \sum_k W_{k, i, o}` (method, "Measure").

    The published method has no grouped selective layer. Here the matrix of a layer with ``G`` groups
    is still ``[O, C]``. Only channels of its own group damage an output, so all other entries are 0, and
    `normalize_damage` normalizes a row over the channels of one group.

    Args:
        kernel: ``[*K, C / G, O]`` floating, any number of spatial dimensions ``K``; the number of groups
            ``G`` is inferred from the shapes.
        scale: ``[C]`` batch norm scale :math:`\gamma`, of any sign.
        bias: ``[C]`` batch norm bias :math:`\beta`.
        gate: ``[C]`` bool, false where the channel is closed.

    Returns:
        ``[O, C]`` in the dtype of ``kernel``, at least float32. Columns of closed channels are 0; columns of
        open channels with a NaN parameter are NaN.

    Raises:
        ValueError: The shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.functional import expected_channel_damage
        >>> kernel = jnp.array([[2.0], [3.0]])[None]  # [1, C=2, O=1]
        >>> damage = expected_channel_damage(
        ...     kernel, jnp.zeros(2), jnp.array([1.0, -1.0]), jnp.array([True, True]))
        >>> damage.tolist()
        [[2.0, 0.0]]
        >>> kernel = jnp.array([[2.0, 3.0]])[None]  # [1, C/G=1, O=2]: two groups
        >>> expected_channel_damage(kernel, jnp.zeros(2), jnp.ones(2), jnp.array([True, True])).tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    channels, outputs = gate.shape[0], kernel.shape[-1]
    groups = group_count(channels, kernel.shape)
    check_shape("scale", scale, gate.shape, "[C], as gate is")
    check_shape("bias", bias, gate.shape, "[C], as gate is")
    dtype = statistics_dtype(kernel.dtype)
    scale, bias = scale.astype(dtype), bias.astype(dtype)
    activation = _expected_activation(jnp.abs(scale), bias)
    taps = jnp.sum(kernel.astype(dtype), axis=tuple(range(kernel.ndim - 2)))
    if groups > 1:
        group_of_channel = jnp.arange(channels) // (channels // groups)
        group_of_output = jnp.arange(outputs) // (outputs // groups)
        same_group = group_of_channel[:, None] == group_of_output[None, :]
        taps = jnp.where(same_group, jnp.tile(taps, (groups, 1)), 0)  # [C, O]
    return jnp.where(gate[:, None], activation[:, None] * taps, 0).T


@jax.custom_jvp
def _expected_activation(deviation: jax.Array, bias: jax.Array) -> jax.Array:
    """Compute the mean of a normal variable after the ReLU."""
    is_constant, ratio = _ratio(deviation, bias)
    return jnp.where(is_constant, jnp.maximum(bias, 0), deviation * norm.pdf(ratio) + bias * norm.cdf(ratio))


@_expected_activation.defjvp
def _expected_activation_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # That of the formula divides by the square of the deviation, which is 0 long before the deviation is.
    deviation, bias = primals
    is_constant, ratio = _ratio(deviation, bias)
    by_deviation = jnp.where(is_constant, 0, norm.pdf(ratio))
    by_bias = jnp.where(is_constant, jnp.heaviside(bias, jnp.asarray(0.5, bias.dtype)), norm.cdf(ratio))
    return _expected_activation(deviation, bias), by_deviation * tangents[0] + by_bias * tangents[1]


def _ratio(deviation: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where the deviation is 0, and the bias relative to it, or the bias itself there."""
    is_constant = deviation == 0  # false for NaN, which propagates
    # The divisor 1 keeps the branch that is not taken finite.
    return is_constant, bias / jnp.where(is_constant, 1, deviation)


def normalize_damage(damage: jax.Array) -> jax.Array:
    """Normalize the damage to each output (nECDM): absolute values, rows sum to about 1.

    Args:
        damage: ``[O, C]`` floating, from `expected_channel_damage`.

    Returns:
        ``[O, C]``, not negative. A row without any damage stays 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.functional import normalize_damage
        >>> normalize_damage(jnp.array([[3.0, -1.0]])).tolist()
        [[0.75, 0.25]]
    """
    magnitude = jnp.abs(damage)
    return magnitude / (jnp.sum(magnitude, axis=-1, keepdims=True) + 1e-8)


def channel_scores(
    normalized: jax.Array, source: jax.Array | None, max_copies: int | None = None
) -> jax.Array:
    """Score each channel for copies: the 2-norm of its column (method, "Re-allocate", steps 1 and 2).

    Args:
        normalized: ``[O, C]`` normalized damage, taken after de-allocation.
        source: ``[C]`` int32, -1 where a channel reads itself. May be None without ``max_copies``.
        max_copies: Sources that more than this many channels read are not copied again, nor are their
            copies: all of them score 0. None: no limit.

    Returns:
        ``[C]``, not negative; 0 for closed channels, whose damage is 0.

    Raises:
        ConfigError: ``max_copies`` is not a whole number of at least 0.
        ValueError: ``max_copies`` is given without ``source``, or the shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.functional import channel_scores
        >>> normalized = jnp.array([[0.6, 0.4], [0.8, 0.2]])
        >>> channel_scores(normalized, jnp.array([-1, 0]), max_copies=0).tolist()
        [0.0, 0.0]
    """
    total = jnp.sum(jnp.square(normalized), axis=0)
    # The derivative of a root at 0 is infinite, that of the score of a channel without damage 0.
    is_zero = total == 0
    scores = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, total)))
    if max_copies is None:
        return scores
    check_whole("max_copies", max_copies, 0, "a whole number, at least 0, or None for no limit")
    if source is None:
        raise ValueError("max_copies counts the copies in source, which is None. Pass the layer's source.")
    check_shape("source", source, normalized.shape[1:], "[C], as normalized is [O, C]")
    channels = jnp.arange(source.shape[0], dtype=source.dtype)
    reads = source[:, None] == channels[None, :]  # reads[j, s]: channel j is a copy of s
    exhausted = jnp.sum(reads, axis=0) > max_copies
    copies_exhausted = jnp.any(reads & exhausted[None, :], axis=1)
    return jnp.where(exhausted | copies_exhausted, 0, scores)
