"""Arrays on meshes of explicit axes, where every operation would have to name the sharding of its result."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def replicated(x: jax.Array) -> jax.Array:
    """Replicate an array over its mesh of explicit axes; return any other array unchanged."""
    sharding = _explicit_sharding(x)
    return x if sharding is None else jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """Shard an array as another one on a mesh of explicit axes; return it unchanged if that is on none."""
    sharding = _explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def plain_shapes(tree: Any) -> Any:
    """Return the shapes of a tree of arrays, without shardings."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type),
        jax.eval_shape(lambda tree: tree, tree),
    )


def _explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """Return the sharding of an array on a mesh of explicit axes; None: the compiler decides it."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
