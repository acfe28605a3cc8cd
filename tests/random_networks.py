"""Random small networks of layers, norms, attention, joins, reshapes, shared weights, code tied to widths."""

import random

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax import BatchNormReLUConv, SelectiveConv

SHAPE = (2, 4, 4, 3)
_WIDTHS = (2, 4, 6)

# Operations on one array that keep its width, and on two of equal widths.
_SAME = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "shift": lambda x: x + 0.5,
    "pool": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
    "average": lambda x: nn.pooling.pool(x, 0.0, jax.lax.add, (2, 2), (1, 1), "SAME") / 4.0,
    "reshape": lambda x: jnp.sin(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape),
    "transpose": lambda x: x.swapaxes(1, 2),
    "centre": lambda x: x - x.mean(axis=(1, 2), keepdims=True),
    "shuffle": lambda x: x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape),
    "halves": lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=-1),
    "reverse": lambda x: x[..., ::-1],
    "running sum": lambda x: jnp.cumsum(x, axis=-1),
    "softmax": lambda x: nn.softmax(x, axis=-1),
    "norm": lambda x: x / jnp.sqrt(1 + jnp.square(x).sum(axis=-1, keepdims=True)),
    "attention": lambda x: jnp.einsum(
        "npq,nqc->npc",
        nn.softmax(jnp.einsum("npc,nqc->npq", *(2 * [x.reshape(x.shape[0], -1, x.shape[-1])]))),
        x.reshape(x.shape[0], -1, x.shape[-1]),
    ).reshape(x.shape),
    "width": lambda x: x / float(x.shape[-1]),
    "width by ones": lambda x: x / jnp.ones(x.shape[-1]).sum(),
    "width by ones alike": lambda x: x / jnp.ones_like(x).sum(axis=-1, keepdims=True),
    "width by indices": lambda x: x / (1.0 + jnp.arange(x.shape[-1], dtype=jnp.float32).max()),
    "width by a loop": lambda x: jax.lax.fori_loop(0, x.shape[-1], lambda _, y: 0.9 * y, x),
    "checkpoint": jax.checkpoint(lambda x: jnp.tanh(x) * x),
    "loop": lambda x: jax.lax.scan(lambda y, _: (jnp.sin(y), None), x, length=2)[0],
}
_JOINS = {
    "sum": jnp.add,
    "product": jnp.multiply,
    "largest": jnp.maximum,
    "choice": lambda x, y: jnp.where(x > 0, x, y),
}
_MODULES = (
    "batch norm",
    "layer norm",
    "group norm",
    "dropout",
    "spatial mask",
    "layer mask",
    "excite",
    "offset",
)
_LAYERS = ("selective", "selective", "selective", "gate-only", "groups", "plain", "convolution", "normalized")


def random_network(seed):
    """A network of a few operations, each on earlier arrays; what they are depends on the seed alone."""
    rng = random.Random(seed)
    widths, steps, layers = [SHAPE[-1]], [], []

    def pick(kinds):
        return rng.choice(list(kinds))

    def add(step, width):
        steps.append(step)
        widths.append(width)

    def add_layer(kind, source):
        width = rng.choice(_WIDTHS)
        if kind == "groups" and widths[source] % 2:
            kind = "selective"
        layers.append((len(steps), kind, widths[source], width))
        add((kind, source, width, rng.choice((1, 3))), width)

    add_layer(pick(("selective", "convolution")), 0)
    for _ in range(rng.randint(2, 5)):
        source = rng.randrange(max(1, len(widths) - 3), len(widths))
        choice = rng.random()
        pairs = [(a, b) for b in range(1, len(widths)) for a in range(1, b) if widths[a] == widths[b]]
        if choice < 0.3:
            add_layer(pick(_LAYERS), source)
        elif choice < 0.5:
            kind = pick(_SAME)
            if widths[source] % 2 and kind in ("shuffle", "halves"):
                kind = "reverse"
            add((kind, source), widths[source])
        elif choice < 0.65:
            kind = pick(_MODULES)
            add((kind, source, widths[source]), widths[source])
        elif choice < 0.8 and pairs:
            a, b = rng.choice(pairs)
            add((pick(_JOINS), a, b), widths[a])
        elif choice < 0.9:
            other = rng.randrange(1, len(widths))
            kind = pick(("concatenate", "grow"))
            least, most = sorted((source, other), key=lambda index: widths[index])
            width = widths[source] + widths[other] if kind == "concatenate" else widths[most]
            add((kind, least, most), width)
        else:
            shared = [(n, w, o) for n, kind, w, o in layers if kind != "normalized" and widths[source] == w]
            if shared and rng.random() < 0.6:
                number, _, width = rng.choice(shared)
                add(("again", source, number), width)
            else:
                number, _, _, _ = rng.choice(layers)
                add(("reads weights", source, number), widths[source])
    add_layer(pick(("selective", "gate-only")), len(widths) - 1)
    if rng.random() < 0.5:
        add_layer("selective", len(widths) - 1)
    return RandomNetwork(tuple(steps), pick(("last", "mean", "several")))


class RandomNetwork(nn.Module):
    """Executes the steps of `random_network`."""

    steps: tuple
    end: str

    @nn.compact
    def __call__(self, x, train):
        arrays, layers = [x], {}
        for number, (kind, source, *options) in enumerate(self.steps):
            y = arrays[source]
            if kind in _SAME:
                y = _SAME[kind](y)
            elif kind in _JOINS:
                y = _JOINS[kind](y, arrays[options[0]])
            elif kind == "concatenate":
                y = jnp.concatenate([y, arrays[options[0]]], axis=-1)
            elif kind == "grow":
                other = arrays[options[0]]
                y = other + jnp.pad(y, ((0, 0), (0, 0), (0, 0), (0, other.shape[-1] - y.shape[-1])))
            elif kind == "again":
                y = layers[options[0]](y)
            elif kind == "reads weights":
                y = y * (1 + self._weight(options[0]))
            elif kind in _MODULES:
                y = self._module(kind, y, options[0], train, f"step{number}")
            else:
                layers[number] = self._layer(kind, train, *options, f"step{number}")
                y = layers[number](y)
            arrays.append(y)
        if self.end == "last":
            return y
        y = nn.Dense(3, name="head")(y.mean(axis=(1, 2)))
        return y if self.end == "mean" else {"head": y, "inner": arrays[len(arrays) // 2]}

    def _weight(self, number):
        if self.is_initializing():
            return 0.0
        leaves = jax.tree.leaves(self.variables["params"][f"step{number}"])
        return sum(jnp.tanh(jnp.square(leaf).mean()) for leaf in leaves)

    def _layer(self, kind, train, width, size, name):
        window = (size, size)
        if kind == "convolution":
            return nn.Conv(width, window, name=name)
        if kind == "normalized":
            layer = nn.WeightNorm(SelectiveConv(width, window), name=name)
            return lambda x: layer(x, False)  # no statistics move within
        if kind == "plain":
            layer = BatchNormReLUConv(width, window, name=name)
        else:
            groups = 2 if kind == "groups" else 1
            layer = SelectiveConv(
                width, window, feature_group_count=groups, gate_only=kind == "gate-only", name=name
            )
        return lambda x: layer(x, train)

    def _module(self, kind, x, width, train, name):
        if kind == "batch norm":
            return nn.BatchNorm(use_running_average=not train, name=name)(x)
        if kind == "layer norm":
            return nn.LayerNorm(name=name)(x)
        if kind == "group norm":
            return nn.GroupNorm(num_groups=1, name=name)(x)
        if kind == "dropout":
            return nn.Dropout(0.5, deterministic=not train, name=name)(x)
        if kind == "spatial mask":
            return nn.sigmoid(nn.Conv(1, (3, 3), name=name)(x)) * x
        if kind == "layer mask":
            return x * nn.sigmoid(SelectiveConv(1, (3, 3), name=name)(x, train))
        if kind == "excite":
            return x * nn.sigmoid(nn.Dense(width, name=name)(x.mean(axis=(1, 2))))[:, None, None]
        return x + self.param(name, nn.initializers.normal(), (1, 1, 1, width))
