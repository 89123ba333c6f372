"""Data parallelism over the devices of all processes: whole arrays on each, batches cut up."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynprune_jax.errors import UserError

Tree = TypeVar("Tree")


def data_mesh() -> Mesh:
    """A mesh of all devices along the axis `data`; those of one process lie side by side."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), ("data",))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError if the devices cannot share a training batch evenly."""
    if batch_size % mesh.size:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of the number of devices,"
            f" {mesh.size}"
        )


def whole(mesh: Mesh) -> NamedSharding:
    """Of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parts(mesh: Mesh) -> NamedSharding:
    """Of an array that is cut along its first axis, one part for each device."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(batch_size: int, mesh: Mesh) -> slice:
    """Which rows of a batch are on the devices of this process."""
    indices = parts(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(row[0] for row in rows), max(row[1] for row in rows))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a whole copy of every array on every device; all processes give the same arrays."""

    def place(leaf):
        # Equal, not equivalent: a step traces again for an array of one device placed otherwise.
        if isinstance(leaf, jax.Array) and leaf.sharding == whole(mesh):
            return leaf
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(whole(mesh), np.asarray(leaf))

    return jax.tree.map(place, tree)


def place_batch(tree: Tree, batch_size: int, mesh: Mesh) -> Tree:
    """Makes batches of their `local_rows`, which each process gives of its own."""

    def place(leaf):
        return jax.make_array_from_process_local_data(
            parts(mesh), leaf, (batch_size, *leaf.shape[1:])
        )

    return jax.tree.map(place, tree)


def split_batch(tree: Tree, mesh: Mesh) -> Tree:
    """Inside `jit`: cuts every array along its first axis, one part for each device."""
    return jax.lax.with_sharding_constraint(tree, parts(mesh))
