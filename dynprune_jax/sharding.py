"""Data parallelism over the devices at hand: whole arrays on each, batches cut among them."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynprune_jax.errors import UserError

Tree = TypeVar("Tree")


def data_mesh() -> Mesh:
    """A mesh of all devices along the axis `data`."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError if the devices cannot share a training batch evenly."""
    if batch_size % mesh.size:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of the number of devices,"
            f" {mesh.size}"
        )


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a whole copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree: Tree, mesh: Mesh) -> Tree:
    """Cuts every array along its first axis, one part for each device; also inside `jit`."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec("data")))
