"""The method once more, slowly: float64 NumPy and plain loops, written from its description alone.

Nothing here imports the package. Axis order is that of the package: ``x [N, *S, C]``,
``kernel [*K, C / groups, O]``, per-channel vectors ``[C]``, ``shift [C, len(S)]`` in pixels. The
number of groups follows from the shapes; output ``o`` reads the channels of group ``o // (O / groups)``.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

EPSILON = 1e-5  # of batch norm
MOMENTUM = 0.1  # what a training step moves the running statistics by


class Layer(NamedTuple):
    """One selective layer; gate-only layers have every ``source`` at -1."""

    kernel: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    gate: np.ndarray
    source: np.ndarray
    shift: np.ndarray


def groups_of(channels, kernel):
    """Number of groups of a layer."""
    return channels // kernel.shape[-2]


def entries_of(channel, channels, kernel):
    """The kernel row that reads a channel, and the outputs that it reaches."""
    row, outputs = kernel.shape[-2], kernel.shape[-1] // groups_of(channels, kernel)
    group = channel // row
    return channel - group * row, range(group * outputs, (group + 1) * outputs)


def shift(x, offset):
    """Multilinear interpolation of channel ``c`` at (position + offset[c]), clamped per axis."""
    x = np.asarray(x, np.float64)
    sizes = x.shape[1:-1]
    y = np.zeros_like(x)
    for channel in range(x.shape[-1]):
        for position in np.ndindex(*sizes):
            lows, fractions = [], []
            for axis, size in enumerate(sizes):
                coordinate = position[axis] + float(offset[channel][axis])
                coordinate = min(max(coordinate, 0.0), size - 1.0)
                lows.append(math.floor(coordinate))
                fractions.append(coordinate - math.floor(coordinate))
            for corner in itertools.product((0, 1), repeat=len(sizes)):
                weight = 1.0
                index = []
                for axis, size in enumerate(sizes):
                    weight *= fractions[axis] if corner[axis] else 1.0 - fractions[axis]
                    index.append(min(lows[axis] + corner[axis], size - 1))
                y[(slice(None), *position, channel)] += weight * x[(slice(None), *index, channel)]
    return y


def select(x, source, offset):
    """Forward pass, step 1: own channel where the source is -1, else the shifted source."""
    x = np.asarray(x, np.float64)
    y = x.copy()
    for channel, origin in enumerate(source):
        if origin != -1:
            y[..., channel : channel + 1] = shift(x[..., origin : origin + 1], offset[channel : channel + 1])
    return y


def convolve(x, kernel, strides, padding):
    """Cross-correlation with symmetric zero padding, summed channel by channel."""
    window, channels = kernel.shape[:-2], x.shape[-1]
    x = np.pad(x, [(0, 0), *[(size, size) for size in padding], (0, 0)])
    sizes = [
        (size - width) // stride + 1
        for size, width, stride in zip(x.shape[1:-1], window, strides, strict=True)
    ]
    y = np.zeros((x.shape[0], *sizes, kernel.shape[-1]))
    for tap in np.ndindex(*window):
        region = tuple(
            slice(start, start + stride * (size - 1) + 1, stride)
            for start, stride, size in zip(tap, strides, sizes, strict=True)
        )
        for channel in range(channels):
            row, outputs = entries_of(channel, channels, kernel)
            reached = slice(outputs.start, outputs.stop)
            y[..., reached] += x[(slice(None), *region, channel, None)] * kernel[(*tap, row, reached)]
    return y


def forward(x, layer, strides=None, padding=None, train=False):
    """The whole layer without dropout.

    Returns:
        The output, the new running mean and the new running variance.
    """
    rank = x.ndim - 2
    strides = [1] * rank if strides is None else strides
    padding = [0] * rank if padding is None else padding
    selected = select(x, layer.source, layer.shift)
    mean, var = layer.mean, layer.var
    if train:
        axes = tuple(range(rank + 1))
        count = math.prod(x.shape[:-1])
        batch_mean, batch_var = selected.mean(axes), selected.var(axes)
        mean = (1 - MOMENTUM) * layer.mean + MOMENTUM * batch_mean
        var = (1 - MOMENTUM) * layer.var + MOMENTUM * batch_var * count / (count - 1)
        normalized = (selected - batch_mean) / np.sqrt(batch_var + EPSILON)
    else:
        normalized = (selected - mean) / np.sqrt(var + EPSILON)
    active = np.maximum(normalized * layer.scale + layer.bias, 0.0)
    return convolve(active * layer.gate, layer.kernel, strides, padding), mean, var


def expected_activation(scale, bias):
    """E[max(0, z)] of z ~ N(bias, scale^2), one number."""
    deviation = abs(float(scale))
    if deviation == 0.0:
        return max(float(bias), 0.0)
    z = float(bias) / deviation
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    distribution = math.erfc(-z / math.sqrt(2)) / 2
    return deviation * density + float(bias) * distribution


def damage(kernel, scale, bias, gate):
    """ECDM [O, C]."""
    window, channels = kernel.shape[:-2], len(gate)
    result = np.zeros((kernel.shape[-1], channels))
    for channel in range(channels):
        if not gate[channel]:
            continue
        expected = expected_activation(scale[channel], bias[channel])
        row, outputs = entries_of(channel, channels, kernel)
        for output in outputs:
            total = 0.0
            for tap in np.ndindex(*window):
                total += float(kernel[(*tap, row, output)])
            result[output, channel] = expected * total
    return result


def normalize(matrix):
    """NECDM [O, C] of an ECDM."""
    result = np.zeros(matrix.shape)
    for output, row in enumerate(matrix):
        total = 1e-8
        for entry in row:
            total += abs(float(entry))
        for channel, entry in enumerate(row):
            result[output, channel] = abs(float(entry)) / total
    return result


def scores(normalized, source, max_copies=None):
    """2-norm of each column; 0 for a source that too many channels point to, and its copies."""
    channels = normalized.shape[1]
    result = np.zeros(channels)
    for channel in range(channels):
        result[channel] = math.hypot(*normalized[:, channel])
    if max_copies is not None:
        for origin in range(channels):
            copies = [channel for channel in range(channels) if source[channel] == origin]
            if len(copies) > max_copies:
                for channel in [origin, *copies]:
                    result[channel] = 0.0
    return result


def closing_order(normalized):
    """Channels by largest entry of their column, ascending, equal ones by index."""
    return sorted(range(normalized.shape[1]), key=lambda channel: (normalized[:, channel].max(), channel))


def sums_of_first(normalized):
    """For n = 0 ... C the largest sum, over outputs, of the first n channels in closing order."""
    order = closing_order(normalized)
    sums = [0.0]
    for n in range(1, len(order) + 1):
        sums.append(max(math.fsum(row[channel] for channel in order[:n]) for row in normalized))
    return sums


def closing_counts(normalized, threshold, slack=0.0):
    """How many channels may be closed if every sum and the threshold were off by up to ``slack``.

    Without slack this is the one number of the method, so more than one number means that a
    sum lies within ``slack`` of the threshold: no float arithmetic can be held to one of them.
    """
    if threshold >= 1:
        return [0]
    sums = sums_of_first(normalized)
    channels = normalized.shape[1]
    counts = [
        n - 1
        for n in range(1, channels + 1)
        if sums[n] > threshold - slack and sums[n - 1] <= threshold + slack
    ]
    if slack == 0.0:
        counts = counts[:1]
    if sums[channels] <= threshold + slack:  # nothing exceeds the threshold: close nothing
        counts.append(0)
    return sorted(set(counts))


def margin(normalized, threshold):
    """By how much the least certain comparison behind the closed set was decided.

    Exactly equal maxima of columns are certain (by index), and so are sums of nothing but zeros.
    """
    if threshold >= 1:
        return math.inf
    (count,) = closing_counts(normalized, threshold)
    sums = sums_of_first(normalized)
    largest = [normalized[:, channel].max() for channel in closing_order(normalized)]
    if sums[-1] <= threshold:
        return threshold - sums[-1] if sums[-1] > 0 else math.inf
    doubts = [sums[count + 1] - threshold]
    if sums[count] > 0:
        doubts.append(threshold - sums[count])
    for n in (count - 1, count):  # last closed | first open | the next one
        if n >= 0 and n + 1 < len(largest) and largest[n + 1] != largest[n]:
            doubt = largest[n + 1] - largest[n]
            # Whichever of two open channels comes first, it ends the run if it alone exceeds the threshold.
            doubts.append(max(doubt, largest[n + 1] - threshold) if n == count else doubt)
    return min(doubts)


def close(normalized, gate, source, count, groups=1):
    """Gate and source after the first ``count`` channels in closing order are closed.

    Of each group that would lose all its open channels, the last of them in that order stays open.
    """
    new_gate, source = gate.copy(), source.copy()
    order = closing_order(normalized)
    for channel in order[:count]:
        new_gate[channel] = False
    size = len(gate) // groups
    for group in range(groups if groups > 1 else 0):
        members = range(group * size, (group + 1) * size)
        if not any(new_gate[channel] for channel in members):
            for channel in [channel for channel in order if channel in members and gate[channel]][-1:]:
                new_gate[channel] = True
    source[[channel for channel in order[:count] if not new_gate[channel]]] = -1
    return new_gate, source


def deallocate(normalized, gate, source, threshold, groups=1):
    """Gate and source after de-allocation."""
    (count,) = closing_counts(normalized, threshold)
    return close(normalized, gate, source, count, groups)


def candidates(score, gate, top_k):
    """At most ``top_k`` open channels of positive score, best first, equal scores by index."""
    ranked = sorted(range(len(score)), key=lambda channel: (-float(score[channel]), channel))
    return [channel for channel in ranked if gate[channel] and score[channel] > 0][:top_k]


def reallocate(layer, drawn, drawn_shift):
    """Fill every slot that has a drawn source (others: -1), all from the state before."""
    new = Layer(*[array.copy() for array in layer])
    for slot, origin in enumerate(drawn):
        if origin == -1:
            continue
        new.gate[slot] = True
        row, outputs = entries_of(slot, len(drawn), new.kernel)
        new.kernel[..., row, outputs.start : outputs.stop] = 0.0
        for name in ("scale", "bias", "mean", "var"):
            getattr(new, name)[slot] = getattr(layer, name)[origin]
        new.shift[slot] = drawn_shift[slot]
        new.source[slot] = origin if layer.source[origin] == -1 else layer.source[origin]
    return new
