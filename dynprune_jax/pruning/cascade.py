"""Cascades: a cheap network for all images, another again for those that it is unsure of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float


def margin(logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
    """How sure a classifier is: its highest probability less the next one, float32 in [0, 1].

    The score margin of Park et al. 2015 ("Big/little deep neural network for ultra low power
    inference", CODES+ISSS). Of what is no number, 0.

    Raises:
      ValueError: for less than two classes.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"logits has the shape {logits.shape}; a margin is between two classes")
    highest, _ = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), 2)
    return jnp.nan_to_num(highest[:, 0] - highest[:, 1])


class Cascade(nnx.Module):
    """Two classifiers as one: the second sees the images that the first is unsure of.

    The unsure images are gathered to the front, and the second network is called on `chunk` of
    them at a time for as long as there are any; what is left over in the last chunk is computed in
    vain. So an image takes as long as the first network, or as both: longer than the second alone.
    Compile a function that takes the cascade as an argument, and it is one program for every
    threshold; `nnx.jit(cascade)` keeps the one it has when it is first called.

    Args:
      first: images to logits, `(batch, classes)`; usually a compact network.
      second: the same; usually the dense network, compact too, for the fastest form of its layers.
        Both in evaluation mode: they must not depend on the rest of a batch, nor the second one
        draw, as the criterion `random` does.
      threshold: images whose `margin` is below it are unsure; at 0 none is. Of images that are like
        those to come, `jnp.quantile(margin(first(images)), share)` has that share of them below.
      chunk: how many images the second network takes at once, at least 1.

    Raises:
      ValueError: for a chunk of less than 1, or a threshold that is NaN, unless it is traced.
    """

    def __init__(
        self,
        first: nnx.Module,
        second: nnx.Module,
        threshold: Float[ArrayLike, ""],
        chunk: int = 1,
    ):
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1")
        if not isinstance(threshold, Tracer) and np.isnan(threshold):
            raise ValueError(f"threshold is {threshold}; it must be a number")
        self.first: Any = first  # nnx.Module declares no call
        self.second: Any = second
        self.threshold = nnx.Variable(jnp.asarray(threshold, jnp.float32))
        self.chunk = chunk

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """The second network's logits of the unsure images, the first one's of the others.

        Raises:
          ValueError: if the networks have other classes, or the number of images is symbolic.
        """
        batch = images.shape[0]
        if not isinstance(batch, int):
            raise ValueError(f"a cascade is for a given number of images, not for {batch}")
        first: Float[Array, "batch classes"] = self.first(images)
        if batch == 0:
            return first
        chunk = min(self.chunk, batch)
        unsure = margin(first) < self.threshold[...]
        count = jnp.sum(unsure, dtype=jnp.int32)
        # The unsure ones first; after the last of them, and in the rest of its chunk, no image.
        order = jnp.argsort(~unsure, stable=True).astype(jnp.int32)
        order = jnp.where(jnp.arange(batch) < count, order, batch)
        order = jnp.pad(order, (0, -batch % chunk), constant_values=batch)

        def again(turn: Array | int, logits: Array) -> Array:
            rows = jax.lax.dynamic_slice(order, (turn * chunk,), (chunk,))
            chosen = jnp.take(images, rows, axis=0, mode="clip")
            second: Array = self.second(chosen)
            if second.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"the second network has logits of the shape {second.shape}, the first one"
                    f" {first.shape}; both must have the same classes"
                )
            return logits.at[rows].set(second.astype(logits.dtype), mode="drop")

        if chunk == batch:
            # A loop whose turns are all alike may be computed before it is known to have any.
            return jax.lax.cond(count > 0, again, lambda _, logits: logits, 0, first)
        return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, again, first)
