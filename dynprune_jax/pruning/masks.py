"""From scores and a prune ratio to masks: exact counts, ties to the lower index."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

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

    `count` may be traced: one sort gives the threshold, and the equals that still fit are
    counted off from the left. NaN ranks lowest, so the count holds for a broken map too.
    """
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jax.lax.stop_gradient(scores))
    n = scores.shape[-1]
    threshold = jnp.take(jnp.sort(scores, axis=-1), n - count, axis=-1)[..., None]
    above = scores > threshold
    equal = scores == threshold
    room = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))


def drop_targets(
    key: Key[Array, ""], mask: Bool[Array, "*batch n"], drop_probability: float
) -> Bool[Array, "*batch n"]:
    """Targeted dropout: each target is dropped with a probability, the others never.

    The targets are what `mask` does not keep, that is the lowest-attention fraction. A
    probability of 1 gives `mask` back; below 1 the dropout is stochastic, as in Gomez et al.
    2019 (arXiv 1905.13678). Nothing is rescaled.
    """
    return mask | ~jax.random.bernoulli(key, drop_probability, mask.shape)
