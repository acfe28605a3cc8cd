"""Random but realistic variables of a model, as after some training."""

import jax
import jax.numpy as jnp
import numpy as np


def perturbed_variables(model, input_shape, seed, closed=0.0, copies=0.0):
    """Initial variables with everything that training moves moved.

    Args:
        model: A Flax module.
        input_shape: Shape of its input.
        seed: Of everything random.
        closed: Share of the channels to close.
        copies: Share of the channels of selective layers to make copies.
    """
    shape = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.ones(input_shape, jnp.float32), train=False)
    )
    rng = np.random.default_rng(seed)
    variables = jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf(path[-1].key, leaf, rng), shape)
    if closed or copies:
        _allocate(variables["selectivity"], rng, closed, copies)
    return variables


def _leaf(name, leaf, rng):
    if name == "gate":
        return jnp.asarray(np.ones(leaf.shape, bool))
    if name == "source":
        return jnp.asarray(np.full(leaf.shape, -1, np.int32))
    values = rng.normal(size=leaf.shape)
    if name == "kernel":
        values *= np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
    elif name == "scale":
        # As in trained networks: most scales moderate, some almost 0.
        values = rng.choice([1.0, 0.3, 1e-3], size=leaf.shape, p=[0.5, 0.3, 0.2]) * values
    elif name == "var":
        values = rng.uniform(0.5, 1.5, size=leaf.shape)
    elif name == "mean":
        values *= 0.2
    return jnp.asarray(values, leaf.dtype)


def _allocate(tree, rng, closed, copies):
    if "gate" not in tree:
        for value in tree.values():
            _allocate(value, rng, closed, copies)
        return
    shape = tree["gate"].shape
    gate = rng.uniform(size=shape) >= closed
    gate[..., rng.integers(shape[-1])] = True
    tree["gate"] = jnp.asarray(gate)
    if "source" in tree:
        is_copy = gate & (rng.uniform(size=shape) < copies)
        source = np.where(is_copy, rng.integers(shape[-1], size=shape), -1)
        tree["source"] = jnp.asarray(source, jnp.int32)
