"""Data parallelism over the devices at hand: whole arrays on each, batches cut among them."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynprune_jax.errors import UserError

Tree = TypeVar("Tree")


def data_mesh(batch_size: int) -> Mesh:
    """A mesh of all devices along the axis `data`.

    Raises:
      UserError: if the batch cannot be cut evenly.
    """
    devices = np.asarray(jax.devices())
    if batch_size % devices.size:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of the number of devices,"
            f" {devices.size}"
        )
    return Mesh(devices, ("data",))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a whole copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree: Tree, mesh: Mesh) -> Tree:
    """Cuts every array along its first axis, one part for each device; also inside `jit`."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec("data")))
