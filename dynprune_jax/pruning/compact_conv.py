"""The compact convolution: what a gate leaves out is not computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.geometry import Geometry, repeat_map, repeats
from dynprune_jax.pruning import masks as masks_lib
from dynprune_jax.pruning import native
from dynprune_jax.pruning.attention import attention
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.forms import Form, possible
from dynprune_jax.pruning.handover import absent, take_over
from dynprune_jax.pruning.masks import Masks
from dynprune_jax.pruning.native import kernel_panels
from dynprune_jax.pruning.products import execute, layout

# Of up to so many scores, over a batch, `top_k` is the fastest way to choose (on 2 CPU cores).
_FEW = 8192


class CompactConv(DynamicConv):
    """A convolution, dynamic or not, executed in a given form, for inference.

    Its ratios are plain numbers and its kernel is laid out for the form, as `weights`, so neither
    can be trained; the answers are those of the `DynamicConv` it was made from, to rounding.

    Args:
      conv: the convolution; it is left as it is.
      form: how to execute it.

    Raises:
      ValueError: for a form that cannot execute this convolution with its gates.
    """

    def __init__(self, conv: nnx.Conv, form: Form):
        super().__init__(conv, rngs=nnx.Rngs(0))
        if isinstance(conv, DynamicConv):
            take_over(self, conv)
            self.drop_probability = 1.0
            self.channel_ratio = nnx.static(plain_ratio(conv, "channel"))
            self.column_ratio = nnx.static(plain_ratio(conv, "column"))
            self.feature_ratio = nnx.static(
                None if conv.feature_ratio is None else float(conv.feature_ratio[...])
            )
        if self.criterion is attention:  # it draws nothing: a key is one more operand of a call
            self.rngs: Any = nnx.static(None)
        forms = possible(
            self,
            channels=self.channel_ratio is not None,
            columns=self.column_ratio is not None,
            features=self.feature_ratio is not None,
        )
        if dataclasses.replace(form, images=0) not in forms or form.images < 0:
            raise ValueError(
                f"the form {str(form)!r} cannot execute this convolution; choose one of"
                f" {', '.join(map(str, forms))}"
            )
        if form.compiled and (reason := native.why_not()):
            raise ValueError(f"the form {str(form)!r} cannot be executed here: {reason}")
        self.form = form
        if form != Form():
            kernel = conv.kernel[...] if conv.mask is None else conv.kernel[...] * conv.mask
            (kernel,) = conv.promote_dtype((kernel,), dtype=conv.dtype)  # once, not in every call
            self.weights = nnx.Param(layout(form, kernel, self.feature_group_count))
            self.kernel: Any = absent(conv.kernel)
        if self.feature_ratio is not None and native.why_not() is None:
            self.salience_kernel = nnx.Param(kernel_panels(self.salience_kernel[...][None, None]))

    def weigh(self, sums: Float[Array, "*batch channels"]) -> Float[Array, "*batch features"]:
        """The linear layer of the salience; rows for channels of nothing but 0 are not read."""
        if self.salience_kernel[...].ndim == 2:
            return super().weigh(sums)
        maps = sums.reshape(-1, 1, 1, sums.shape[-1])
        y = native.kept_conv(
            maps,
            self.salience_kernel[...],
            Masks(maps[:, 0, 0] != 0.0),  # NaN is something
            Geometry(1, 1, kernel=(1, 1)),
            features=self.out_features,
        )
        return y.reshape(*sums.shape[:-1], self.out_features)

    def kept_count(self, ratio: float | None, n: int) -> int:
        """How many of `n` are kept; all of them without a gate."""
        return n if ratio is None else masks_lib.plain_kept_count(ratio, n)

    def choose(
        self, shape: tuple[int, ...], channel_scores: Any = None, column_scores: Any = None
    ) -> Masks:
        """The masks of maps of a shape; where few channels are ranked, their indices too."""
        if channel_scores is None or not self.form.channels:
            return super().choose(shape, channel_scores, column_scores)
        if self.follows_features and self.form.compiled:
            # Whatever is not zero: no more than the count that is kept, and perhaps less.
            masks = super().choose(shape, None, column_scores)
            present = jnp.repeat(channel_scores != 0.0, self.group_size(shape[-1]), axis=-1)
            return dataclasses.replace(masks, channels=present)
        masks = super().choose(shape, channel_scores, column_scores)
        if self.form.compiled or channel_scores.size > _FEW:
            return masks
        # XLA drops what nobody reads: the indices, or the mask.
        size, ranked = self.group_size(shape[-1]), channel_scores.shape[-1]
        groups = masks_lib.highest(channel_scores, self.kept_count(self.channel_ratio, ranked))
        members = jnp.arange(size, dtype=groups.dtype).reshape((1,) * groups.ndim + (size,))
        kept = groups[..., None] * size + members
        kept = kept.reshape(*shape[:-3], groups.shape[-1] * size)  # no images leave no -1 to infer
        return dataclasses.replace(masks, kept_channels=kept)

    def _keep(self, scores: Any, ratio: Any, follows: bool = False) -> Any:
        del follows  # it matters to stochastic dropout only
        if native.why_not() is None:
            return native.keep_highest(scores, self.kept_count(ratio, scores.shape[-1]))
        if scores.size > _FEW:
            return super()._keep(scores, ratio)
        return masks_lib.keep_highest_of_few(scores, self.kept_count(ratio, scores.shape[-1]))

    def convolve(
        self,
        x: Float[Array, "*batch height width channels"],
        masks: Masks,
        out_sharding: Any = None,
    ) -> Float[Array, "*batch out_height out_width features"]:
        """Convolves the kept part of `x` in this layer's form."""
        if self.form == Form():
            return super().convolve(x, masks, out_sharding)
        *batch, _, _, channels = x.shape
        outputs = masks
        x, masks = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(batch) :]), (x, masks))
        if repeats(self):
            x = repeat_map(self, Masks(None, masks.columns).apply(x))
            masks = dataclasses.replace(masks, columns=None)
        height, width = x.shape[1:3]
        group, patch = self.group_size(channels), self.patch_side(height, width) ** 2
        together = self.feature_group
        bias = None if self.bias is None else self.bias[...]
        x, weights, bias = self.promote_dtype((x, self.weights[...], bias), dtype=self.dtype)
        y = execute(
            self.form,
            Geometry.of(self, height, width),
            weights,
            x,
            masks,
            features=self.out_features,
            kept_channels=group * self.kept_count(self.channel_ratio, channels // group),
            kept_columns=patch * self.kept_count(self.column_ratio, height * width // patch),
            wanted_features=together
            * self.kept_count(self.feature_ratio, self.out_features // together),
            group_size=group,
            precision=self.precision,
        )
        if bias is not None:
            y = y + bias.reshape(1, 1, 1, -1).astype(y.dtype)
        y = y.astype(self.preferred_element_type or x.dtype).reshape(*batch, *y.shape[1:])
        return self.hand_over(y, outputs)


def is_compact(model: nnx.Module) -> bool:
    """Whether any layer of a model is a `CompactConv`."""
    return any(isinstance(layer, CompactConv) for _, layer in nnx.iter_modules(model))


def plain_ratio(conv: DynamicConv, axis: str) -> float | None:
    """A gate's ratio over channels or columns as a plain number; None if it keeps everything.

    Where a criterion may draw, 0 stays a ratio: the axis behind it draws the number after its own.
    """
    ratio = getattr(conv, f"{axis}_ratio")
    if ratio is None:
        return None
    return float(ratio[...]) or (None if conv.criterion is attention else 0.0)
