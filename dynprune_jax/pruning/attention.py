"""Attention of a feature map over its channels and its columns, and what ranks them.

Attention is parameter-free (AntiDote, arXiv 2008.06543, section III): a channel that is strong
on average over the map, and a column that is strong on average over the channels, matter for
this very input. A *criterion* turns attention into the scores that are ranked: `attention`
itself, or one of the two controls that a result is to be compared with.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Criterion = Callable[[Float[Array, "*batch n"], nnx.RngStream], Float[Array, "*batch n"]]


def channel_attention(
    x: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch channels"]:
    """Mean of each channel over height and width, in float32 whatever the map's dtype."""
    return jnp.mean(x, axis=(-3, -2), dtype=jnp.float32)


def column_attention(
    x: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch height width"]:
    """Mean of each column over its channels, in float32 whatever the map's dtype."""
    return jnp.mean(x, axis=-1, dtype=jnp.float32)


def attention(scores: Float[Array, "*batch n"], rngs: nnx.RngStream) -> Float[Array, "*batch n"]:
    """Ranks by attention: the highest are kept. The method itself."""
    del rngs
    return scores


def inverse(scores: Float[Array, "*batch n"], rngs: nnx.RngStream) -> Float[Array, "*batch n"]:
    """Control: ranks by negated attention, so the lowest are kept."""
    del rngs
    return -scores


def random(scores: Float[Array, "*batch n"], rngs: nnx.RngStream) -> Float[Array, "*batch n"]:
    """Control: ranks by a fresh uniform draw per input, whatever the map holds."""
    return jax.random.uniform(rngs(), scores.shape, scores.dtype)


CRITERIA: dict[str, Criterion] = {f.__name__: f for f in (attention, random, inverse)}
