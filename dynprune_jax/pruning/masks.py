"""From scores and a prune ratio to masks and indices: exact counts, ties to the lower index."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt32

# Wider than three float32 roundings (of the ratio, of n and of their product: 3 * 2**-24),
# so that a ratio of p / n, or a decimal such as 0.29 with n = 100, prunes p and not p - 1.
_ROUNDING = 2.0**-22


if TYPE_CHECKING:
    Leaf = Array
else:  # a leaf of a pytree is an array on the device, one on the host, or the shape of one
    Leaf = Array | np.ndarray | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """What one convolution keeps of its input: True = kept, None = no gate on that axis.

    Attributes:
      channels: of the shape `(*batch, channels)`.
      columns: of the shape `(*batch, height, width)`.
    """

    channels: Bool[Leaf, "*batch channels"] | None = None
    columns: Bool[Leaf, "*batch height width"] | None = None

    def apply(
        self, x: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height width channels"]:
        """Returns the map with everything that is not kept set to zero."""
        keep = None
        if self.channels is not None:
            keep = self.channels[..., None, None, :]
        if self.columns is not None:
            columns = self.columns[..., None]
            keep = columns if keep is None else keep & columns
        return x if keep is None else jnp.where(keep, x, jnp.zeros((), x.dtype))


def kept_count(ratio: float | Float[ArrayLike, ""], n: int) -> Int[Array, ""]:
    """How many of `n` are kept at a prune ratio: `n - floor(ratio * n)`, at least 1.

    The product is float32 and may be traced; one within a part in four million below a whole
    number counts as that number. There is a single multiplication, so no compiler can contract
    it differently, and every execution gets the same count.

    Args:
      ratio: fraction to prune, in [0, 1).
      n: how many there are.

    Returns:
      The kept count, int32.
    """
    scaled = jnp.asarray(ratio, jnp.float32) * np.float32(n * (1.0 + _ROUNDING))
    return jnp.maximum(n - jnp.floor(scaled).astype(jnp.int32), 1)


def keep_highest(
    scores: Float[Array, "*batch n"], count: int | Int[Array, ""]
) -> Bool[Array, "*batch n"]:
    """Marks the `count` highest scores of each row; of equal scores the lower index.

    `count` may be traced, from 1 to `n`. NaN ranks lowest, so the count holds for a broken map
    too.
    """
    keys = _ordered(jax.lax.stop_gradient(scores))
    threshold = _nth_highest(keys, count)[..., None]
    above = keys > threshold
    equal = keys == threshold  # as many of these as there is still room for, from the left
    room = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))


def _ordered(scores: Float[Array, "*batch n"]) -> UInt32[Array, "*batch n"]:
    """Turns scores into whole numbers of the same order, -0 with 0 and NaN with -inf."""
    scores = scores.astype(jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0.0, 0.0, scores))
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _nth_highest(
    keys: UInt32[Array, "*batch n"], count: int | Int[Array, ""]
) -> UInt32[Array, "*batch"]:
    """The `count`-th highest key of each row: the highest number that so many keys reach.

    It is built two bits at a time from the top, by counting the keys that reach each candidate:
    16 passes over the row, where a sort takes six times as long (64 rows of 512, on a CPU).
    """
    digits = jnp.arange(1, 4, dtype=jnp.uint32)

    def settle_two_bits(i: Any, prefix: Any) -> Any:
        shift = (30 - 2 * i).astype(jnp.uint32)
        candidates = prefix[..., None] | (digits << shift).reshape((1,) * prefix.ndim + (3,))
        reach = jnp.sum(keys[..., None, :] >= candidates[..., None], axis=-1, dtype=jnp.int32)
        digit = jnp.sum(reach >= count, axis=-1, dtype=jnp.uint32)  # fewer reach a higher one
        return prefix | (digit << shift)

    return jax.lax.fori_loop(0, 16, settle_two_bits, jnp.zeros(keys.shape[:-1], jnp.uint32))


def kept_indices(
    mask: Bool[Array, "batch n"], count: int
) -> tuple[Int[Array, "batch {count}"], Int[Array, "batch n"]]:
    """Turns masks that keep `count` of each row into indices, for the executions that gather.

    Returns:
      kept: what each row keeps, ascending.
      place: where each of the `n` stands among the kept, and `count` for what is not kept.
    """
    batch, n = mask.shape
    place = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    place = jnp.where(mask, place, count)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    everything = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
    kept = jnp.zeros((batch, count), jnp.int32)
    return kept.at[rows, place].set(everything, mode="drop", unique_indices=True), place


def drop_targets(
    key: Key[Array, ""], mask: Bool[Array, "*batch n"], drop_probability: float
) -> Bool[Array, "*batch n"]:
    """Targeted dropout: each target is dropped with a probability, the others never.

    The targets are what `mask` does not keep, that is the lowest-attention fraction. A
    probability of 1 gives `mask` back; below 1 the dropout is stochastic, as in Gomez et al.
    2019 (arXiv 1905.13678). Nothing is rescaled.
    """
    return mask | ~jax.random.bernoulli(key, drop_probability, mask.shape)
