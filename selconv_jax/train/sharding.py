"""Where arrays lie: one mesh of devices, batches split over it, everything else on each of them."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selconv_jax.errors import ConfigError

__all__ = ["Placement"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices of a run, as a mesh with the one axis ``"batch"``.

    Attributes:
        mesh: The mesh.
    """

    mesh: Mesh

    @classmethod
    def over(cls, devices: int, batch_size: int) -> "Placement":
        """Takes the first ``devices`` devices, or all if it is 0.

        Args:
            devices: Number of devices.
            batch_size: Size of the batch that must divide over the devices.

        Returns:
            The placement.

        Raises:
            ConfigError: There are not as many devices, or they do not divide the batch.
        """
        present = jax.devices()
        if devices > len(present):
            raise ConfigError(f"devices is {devices}; there are {len(present)} ({present[0].device_kind}).")
        chosen = present[: devices or len(present)]
        if batch_size % len(chosen):
            raise ConfigError(
                f"a batch of {batch_size} images does not divide over {len(chosen)} devices. Choose a "
                f"multiple of {len(chosen)} for batch_size, or set devices."
            )
        return cls(Mesh(np.array(chosen), ("batch",)))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """Puts a whole copy of every array on every device."""
        return jax.device_put(tree, self.replicated)

    @property
    def split(self) -> NamedSharding:
        """The sharding of batches: the leading axis over the devices."""
        return NamedSharding(self.mesh, PartitionSpec("batch"))

    def from_processes(self, tree: Any) -> Any:
        """Makes batches of the parts ``[B / processes, ...]`` that each process has in its memory."""
        return jax.tree.map(lambda part: jax.make_array_from_process_local_data(self.split, part), tree)

    def shard_batch(self, x: jax.Array) -> jax.Array:
        """Inside of ``jit``: splits the leading axis over the devices."""
        return jax.lax.with_sharding_constraint(x, self.split)
