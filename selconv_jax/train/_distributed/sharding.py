"""Sharding: one mesh of all devices of all processes, over which batches are split."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from selconv_jax.errors import ConfigError

# Batches are split over both axes; large kernels, if requested, over the second.
BATCH_AXES = ("batch", "parameters")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices of a run, and what each of them holds.

    Attributes:
        mesh: The devices, as a mesh with the axes ``batch`` and ``parameters``. Batches are split over both;
            large kernels, if requested, over the second.
    """

    mesh: Mesh

    @classmethod
    def over(
        cls, devices: int, batch_size: int, *, parameter_shards: int = 1, micro_batches: int = 1
    ) -> "Placement":
        """Place a run on a number of devices, the same from every process; 0 takes all.

        Kernels are split over devices of one process. Each micro-batch must divide over the devices.

        Raises:
            ConfigError: There are not as many devices, or they do not divide the batch.
        """
        chosen = _chosen_devices(devices)
        if batch_size % (len(chosen) * micro_batches):
            parts = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
            raise ConfigError(
                f"a batch of {batch_size} images{parts} does not divide over {len(chosen)} devices. Choose a "
                f"multiple of {len(chosen) * micro_batches} for batch_size, or set devices."
            )
        per_process = len(chosen) // jax.process_count()
        if per_process % parameter_shards:
            raise ConfigError(
                f"parameter_shards is {parameter_shards}, which does not divide the {per_process} devices of "
                "a process."
            )
        return cls.of(chosen, parameter_shards, whole=len(chosen) == jax.device_count())

    @classmethod
    def of(cls, devices: Sequence[Any], parameter_shards: int = 1, *, whole: bool = True) -> "Placement":
        """Place a run on exactly these devices, grouped by process.

        If they are the ``whole`` of a machine or a pod, the mesh orders them by their interconnect. With
        sharded kernels, whose shards stay within a process, and with several slices, the given order is kept.
        """
        shape = (len(devices) // parameter_shards, parameter_shards)
        slices = {getattr(device, "slice_index", 0) for device in devices}
        if whole and parameter_shards == 1 and len(slices) == 1:
            kinds = (AxisType.Auto, AxisType.Auto)
            return cls(jax.make_mesh(shape, BATCH_AXES, axis_types=kinds, devices=list(devices)))
        return cls(Mesh(np.asarray(devices).reshape(shape), BATCH_AXES))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that are replicated on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> NamedSharding:
        """The sharding of batches: the leading axis over the devices."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def replicate(self, tree: Any) -> Any:
        """Replicate arrays, which must be equal on all processes, on every device."""
        return jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                np.shape(leaf), self.replicated, lambda index: np.asarray(leaf)[index]
            ),
            tree,
        )

    def state_sharding(self, state: Any) -> Any:
        """Return the sharding of every array of a training state, or of its shape.

        Kernels and their optimizer state are split along the last dimension that the shards divide;
        everything else is replicated.
        """
        shards = self.mesh.shape[BATCH_AXES[1]]

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            divisible = [axis for axis, size in enumerate(leaf.shape) if size % shards == 0]
            if shards == 1 or getattr(path[-1], "key", None) != "kernel" or not divisible:
                return self.replicated
            return NamedSharding(self.mesh, PartitionSpec(*[None] * divisible[-1], BATCH_AXES[1]))

        return jax.tree_util.tree_map_with_path(sharding, state)

    def rows_of_process(self, size: int) -> NDArray[np.int64]:
        """Return the indices of a batch's rows on the devices of this process, in ascending order."""
        slices = self.split.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[index] for index in slices if index is not None]))

    def from_processes(self, tree: Any) -> Any:
        """Make global batches from the `rows_of_process` that each process has in host memory."""
        return jax.tree.map(lambda part: jax.make_array_from_process_local_data(self.split, part), tree)

    def shard_batch(self, x: jax.Array) -> jax.Array:
        """Split the leading axis over the devices; for use inside ``jit``."""
        return jax.lax.with_sharding_constraint(x, self.split)


def _chosen_devices(devices: int) -> list[Any]:
    """Choose the devices of the run, grouped by process."""
    present = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    processes = jax.process_count()
    if devices > len(present):
        raise ConfigError(
            f"devices is {devices}; there are {len(present)} ({present[0].device_kind}). Add "
            f"devices={len(present)}, or 0 for all."
        )
    if devices % processes:
        raise ConfigError(
            f"devices is {devices}, which is not a multiple of the {processes} processes; each uses as many."
        )
    if not devices:
        return present
    by_process = ([each for each in present if each.process_index == process] for process in range(processes))
    return [device for own in by_process for device in own[: devices // processes]]
