"""From scores and a prune ratio to masks and indices: exact counts, ties to the lower index."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt32

# Wider than three float32 roundings (of the ratio, of n and of their product: 3 * 2**-24),
# so that a ratio of p / n, or a decimal such as 0.29 with n = 100, prunes p and not p - 1.
_ROUNDING = 2.0**-22
_BLOCK = 64  # of a running count


if TYPE_CHECKING:
    Leaf = Array
else:  # a leaf of a pytree is an array on the device, one on the host, or the shape of one
    Leaf = Array | np.ndarray | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """What one convolution keeps of its input, and what is wanted of its output.

    True = kept or wanted, None = no gate on that axis.

    Attributes:
      channels: of the shape `(*batch, channels)`.
      columns: of the shape `(*batch, height, width)`.
      kept_channels: the indices of the kept channels in any order, where they are known; an
        execution that gathers may use them in place of `channels`.
      features: which output channels are wanted, of the shape `(*batch, features)`. An execution
        may return anything finite for the others: the layer behind sets them to zero.
      out_columns: the same of output columns, `(*batch, out_height, out_width)`.
      salience: what the wanted ones are multiplied by there, `(*batch, features)`.
    """

    channels: Bool[Leaf, "*batch channels"] | None = None
    columns: Bool[Leaf, "*batch height width"] | None = None
    kept_channels: Int[Leaf, "*batch kept"] | None = None
    features: Bool[Leaf, "*batch features"] | None = None
    out_columns: Bool[Leaf, "*batch out_height out_width"] | None = None
    salience: Float[Leaf, "*batch features"] | None = None

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

    def apply_to_output(
        self, y: Float[Array, "*batch out_height out_width features"]
    ) -> Float[Array, "*batch out_height out_width features"]:
        """Returns the output with what is wanted scaled by its salience and all else set to 0."""
        scaled = y
        if self.salience is not None:
            scaled = y * jnp.asarray(self.salience)[..., None, None, :].astype(y.dtype)
        wanted = Masks(self.features, self.out_columns)
        return wanted.apply(scaled)


def kept_count(ratio: float | Float[ArrayLike, ""], n: int) -> Int[Array, ""]:
    """How many of `n` are kept at a prune ratio: `n - floor(ratio * n)`, at least 1.

    The product is float32 and may be traced; one that rounding may have put below a whole number
    counts as that number (of more than a million, one too many may be pruned). There is a single
    multiplication, so no compiler can contract it differently, and every execution gets the same
    count.

    Args:
      ratio: fraction to prune, in [0, 1).
      n: how many there are.

    Returns:
      The kept count, int32.
    """
    scaled = jnp.asarray(ratio, jnp.float32) * np.float32(n * (1.0 + _ROUNDING))
    return jnp.maximum(n - jnp.floor(scaled).astype(jnp.int32), 1)


def plain_kept_count(ratio: float, n: int) -> int:
    """`kept_count` of a plain number: the same float32 product, and nothing is compiled.

    Args:
      ratio: fraction to prune, in [0, 1).
      n: how many there are.
    """
    scaled = np.float32(ratio) * np.float32(n * (1.0 + _ROUNDING))
    return max(n - int(np.floor(scaled)), 1)


@functools.partial(jax.jit, inline=True)  # one program where it is called alone, and not dozens
def keep_highest(
    scores: Float[Array, "*batch n"], count: int | Int[Array, ""]
) -> Bool[Array, "*batch n"]:
    """Marks the `count` highest scores of each row; of equal scores the lower index.

    `count` may be traced, from 1 to `n`. NaN ranks lowest, so the count holds for a broken map
    too.
    """
    keys = _ordered(jax.lax.stop_gradient(scores))
    threshold = _threshold(keys, jnp.asarray(count, jnp.int32))[..., None]
    above = keys > threshold
    equal = keys == threshold  # as many of these as there is still room for, from the left
    room = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (_running_count(equal) <= room))


def highest(scores: Float[Array, "*batch n"], count: int) -> Int[Array, "*batch {count}"]:
    """The indices, in any order, of what `keep_highest` marks.

    Of few scores XLA's `top_k` finds them faster than a mask can be made and turned to indices.
    """
    return jax.lax.top_k(_clean(scores), count)[1]


def keep_highest_of_few(scores: Float[Array, "*batch n"], count: int) -> Bool[Array, "*batch n"]:
    """The mask of `keep_highest`, by finding the fewer: those to keep, or those to drop."""
    n = scores.shape[-1]
    if count > n // 2:  # from the right and negated, so that of equal scores the last is dropped
        dropped = n - 1 - jax.lax.top_k(-_clean(scores)[..., ::-1], n - count)[1]
        return ~jnp.any(jax.nn.one_hot(dropped, n, dtype=bool), axis=-2)
    return jnp.any(jax.nn.one_hot(highest(scores, count), n, dtype=bool), axis=-2)


def _clean(scores: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Scores in float32 that compare alike everywhere: -0 as 0, NaN as -inf."""
    scores = scores.astype(jnp.float32)
    return jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0.0, 0.0, scores))


def _ordered(scores: Float[Array, "*batch n"]) -> UInt32[Array, "*batch n"]:
    """Turns scores into whole numbers of the same order."""
    bits = jax.lax.bitcast_convert_type(_clean(scores), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _threshold(keys: UInt32[Array, "*batch n"], count: Int[Array, ""]) -> UInt32[Array, "*batch"]:
    """The highest number that at least `count` keys of a row reach."""
    return jax.lax.platform_dependent(
        keys, count, cpu=_threshold_by_search, default=_threshold_by_sort
    )


def _threshold_by_search(
    keys: UInt32[Array, "*batch n"], count: Int[Array, ""]
) -> UInt32[Array, "*batch"]:
    """Bit by bit from the top, by counting the keys that reach it.

    On a CPU a sort takes eight times as long (64 rows of 512). To stop once all rows are settled,
    after a dozen bits, would save a fifth, and cost devices that share a batch a message a bit.
    """

    def settle_one_bit(i: Any, threshold: Any) -> Any:
        higher = threshold | (jnp.uint32(1) << jnp.asarray(31 - i, jnp.uint32))
        reach_higher = jnp.sum(keys >= higher[..., None], axis=-1, dtype=jnp.int32)
        return jnp.where(reach_higher >= count, higher, threshold)

    return jax.lax.fori_loop(0, 32, settle_one_bit, jnp.zeros_like(keys[..., 0]))  # sharded alike


def _threshold_by_sort(
    keys: UInt32[Array, "*batch n"], count: Int[Array, ""]
) -> UInt32[Array, "*batch"]:
    """By a sort: on a GPU it is few kernels, and the search 32 one after the other."""
    last = keys.shape[-1] - count
    return jax.lax.dynamic_index_in_dim(jnp.sort(keys, axis=-1), last, axis=-1, keepdims=False)


def _running_count(mask: Bool[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """`cumsum` along the last axis, exact. On a CPU a matrix product is faster at it."""
    *batch, n = mask.shape
    blocks = jnp.pad(mask, (*[(0, 0)] * len(batch), (0, -n % _BLOCK)))
    blocks = blocks.astype(jnp.float32).reshape(*batch, -(-n // _BLOCK), _BLOCK)
    within = (blocks @ np.triu(np.ones((_BLOCK, _BLOCK), np.float32))).astype(jnp.int32)
    before = jnp.cumsum(within[..., -1], axis=-1) - within[..., -1]
    counts = within + before[..., None]
    return counts.reshape(*batch, blocks.shape[-2] * _BLOCK)[..., :n]


@functools.partial(jax.jit, static_argnames="count", inline=True)
def kept_indices(
    mask: Bool[Array, "batch n"], count: int
) -> tuple[Int[Array, "batch {count}"], Int[Array, "batch n"]]:
    """Turns masks that keep `count` of each row into indices, for the executions that gather.

    Returns:
      kept: what each row keeps, ascending.
      place: where each of the `n` stands among the kept, and `count` for what is not kept.
    """
    batch, n = mask.shape
    place = jnp.where(mask, _running_count(mask) - 1, count)
    first = count * jnp.arange(batch, dtype=jnp.int32)[:, None]
    flat = jnp.where(mask, place + first, batch * count).ravel()  # out of bounds: dropped
    everything = jnp.tile(jnp.arange(n, dtype=jnp.int32), batch)
    kept = jnp.zeros(batch * count, jnp.int32)
    kept = kept.at[flat].set(everything, mode="drop", unique_indices=True)
    return kept.reshape(batch, count), place


def drop_targets(
    key: Key[Array, ""], mask: Bool[Array, "*batch n"], drop_probability: float
) -> Bool[Array, "*batch n"]:
    """Targeted dropout: each target is dropped with a probability, the others never.

    The targets are what `mask` does not keep, that is the lowest-attention fraction. A
    probability of 1 gives `mask` back; below 1 the dropout is stochastic, as in Gomez et al.
    2019 (arXiv 1905.13678). Nothing is rescaled.
    """
    return mask | ~jax.random.bernoulli(key, drop_probability, mask.shape)
