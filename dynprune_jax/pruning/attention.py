"""Attention of a feature map over its channels and its columns, and what ranks them.

Attention is parameter-free (AntiDote, arXiv 2008.06543, section III): a channel that is strong
on average over the map, and a column that is strong on average over the channels, matter for
this very input. A *statistic* says what strong means: the mean, which is the method's, or the
maximum or the root mean square. A *criterion* turns attention into the scores that are ranked:
`attention` itself, or one of the controls that a result is to be compared with.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Statistic = Callable[[Float[Array, "..."], tuple[int, ...]], Float[Array, "..."]]
Criterion = Callable[[Float[Array, "*batch n"], nnx.RngStream], Float[Array, "*batch n"]]


def mean(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Averages over some axes, in float32 whatever the map's dtype. The method's statistic."""
    return jnp.mean(x, axis=axes, dtype=jnp.float32)


def maximum(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Takes the highest value over some axes, in float32."""
    return jnp.max(x, axis=axes).astype(jnp.float32)


def l2(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Takes the root mean square over some axes, in float32: it ranks as the L2 norm does."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axes))


def magnitude(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Sums the absolute values over some axes, in float32: 0 only where there is nothing.

    A gate that ranks by it finds the channels that a gate before it has left, without fail.
    """
    return jnp.sum(jnp.abs(x), axis=axes, dtype=jnp.float32)


STATISTICS: dict[str, Statistic] = {"mean": mean, "max": maximum, "l2": l2}


def channel_attention(
    x: Float[Array, "*batch height width channels"], statistic: Statistic = mean
) -> Float[Array, "*batch channels"]:
    """Statistic of each channel over height and width, float32."""
    return of_shape((*x.shape[:-3], x.shape[-1]), statistic(x, (-3, -2)), "statistic")


def column_attention(
    x: Float[Array, "*batch height width channels"], statistic: Statistic = mean
) -> Float[Array, "*batch height width"]:
    """Statistic of each column over its channels, float32."""
    return of_shape(x.shape[:-1], statistic(x, (-1,)), "statistic")


def of_shape(shape: tuple[int, ...], given: Any, whose: str) -> Any:
    """What a statistic or a criterion has given, if it has that shape.

    Raises:
      ValueError: for anything else: a mask of another shape may well fit the map.
    """
    if getattr(given, "shape", None) != shape:
        found = getattr(given, "shape", type(given).__name__)
        raise ValueError(
            f"the {whose} of a gate gave {found}; it must give the shape {shape}, as by"
            " jnp.broadcast_to"
        )
    return given


def attention(
    scores: Float[Array, "*batch n"], rngs: nnx.RngStream | None
) -> Float[Array, "*batch n"]:
    """Ranks by attention: the highest are kept. The method itself."""
    del rngs
    return scores


def inverse(scores: Float[Array, "*batch n"], rngs: nnx.RngStream) -> Float[Array, "*batch n"]:
    """Control: ranks by negated attention, so the lowest are kept."""
    del rngs
    return -scores


def random(scores: Float[Array, "*batch n"], rngs: nnx.RngStream) -> Float[Array, "*batch n"]:
    """Control: ranks by a fresh uniform draw per input, whatever the map holds.

    Under `jax.vmap` all inputs have one draw.
    """
    return jax.random.uniform(rngs(), scores.shape, scores.dtype)


def shared(scores: Float[Array, "batch *n"], rngs: nnx.RngStream) -> Float[Array, "batch *n"]:
    """Control: ranks by the batch's mean attention, so all its inputs keep the same.

    What is lost by it is the share that deciding per input has in a result. The first axis is the
    batch; what it was filled up with counts too.

    Raises:
      ValueError: for the scores of one input alone, as under `jax.vmap`.
    """
    del rngs
    if scores.ndim < 2:
        raise ValueError("one choice for a batch needs a batch: call the model with one")
    return jnp.broadcast_to(jnp.mean(scores, axis=0, keepdims=True), scores.shape)


CRITERIA: dict[str, Criterion] = {f.__name__: f for f in (attention, random, inverse, shared)}
