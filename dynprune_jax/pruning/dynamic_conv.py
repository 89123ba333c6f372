"""The dynamic convolution: a gate in front of a convolution, per input."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from dynprune_jax.pruning import masks as masks_lib
from dynprune_jax.pruning.attention import (
    Criterion,
    Statistic,
    attention,
    channel_attention,
    column_attention,
    magnitude,
    mean,
    of_shape,
)
from dynprune_jax.pruning.handover import Handover, take_over
from dynprune_jax.pruning.masks import Masks

# Of one gate on one axis; traced, it is not known yet.
Ratio = float | Float[Array, ""]


class PruneRatio(nnx.Variable):
    """The prune ratio of one gate on one axis: a float32 scalar in [0, 1), free to be traced."""


class DynamicConv(nnx.Conv):
    """A 2-D convolution that, per input, skips the channels and columns that matter least.

    It takes over an existing convolution: the very same parameters under the very same names,
    so that a checkpoint of the dense model is one of the dynamic model too. The gate ranks the
    convolution's own input (AntiDote, arXiv 2008.06543) and is free of parameters; its ratios
    are `PruneRatio` variables, so a change of ratio never recompiles a step they are passed to.

    What is ranked may be coarser than one channel or one column: groups of neighbouring channels
    and square patches of columns, kept or skipped whole and ranked by their mean attention. A
    grouped convolution keeps or skips whole groups of its own (depthwise: each channel is one).

    With a `feature_ratio` it also decides, before it computes anything, which of its own output
    channels are wanted (Feature Boosting and Suppression, arXiv 1810.05331): a linear layer maps
    the mean magnitude of each channel of the input to a salience of each output channel; those
    with the highest are wanted, and a `GatedNorm` behind scales them by it and sets the others
    to zero. Its parameters, `salience_kernel` and `salience_bias`, are trained with the network.
    They start with what a static pruning would go by: the salience of a channel is the L1 norm
    of its filter, over the layer's mean (Li et al. 2016, arXiv 1608.08710), whatever the input.
    What one convolution has chosen others take up, told by its `Handover`. One that reads such
    outputs finds what was left out by its zeros, and skips it with the same ratio (`channels_of`):
    that is no choice of its own, and loses nothing. With `columns_of` it wants its output at the
    columns that it keeps of its input, and no other; a `GatedNorm` sets those to zero too. With
    `choice_of` a depthwise convolution wants the very channels that were wanted before it: left to
    itself it would make something of nothing, by its bias and its normalization.

    Its mode, `deterministic`, is set with `model.train()` and `model.eval()`, or in an `nnx.view`:
    True (the default, and evaluation) drops every target, False (training) each with
    `drop_probability`.

    Args:
      conv: the convolution to take over; it must be an `nnx.Conv` with a 2-D kernel.
      channel_ratio: prune ratio over channels in [0, 1), or None for no gate on channels.
      column_ratio: prune ratio over columns in [0, 1), or None for no gate on columns.
      feature_ratio: prune ratio over output channels in [0, 1), or None to compute them all.
      channel_group: channels in a group, of the input and of the output; the largest divisor of
        the channels up to that is taken. A grouped convolution has its own.
      column_patch: side of a patch of columns; of a map that it does not divide, the largest
        side up to that which does.
      handover: takes what it wants of its outputs to the normalization behind it; None: a new one
        where it wants any.
      channels_of: the handover of the convolution whose choice the channel gate follows, with its
        ratio; no statistic and no criterion applies to it.
      columns_of: the same of the column gate; its own handover where it chooses for others. The
        kept columns are the wanted ones of the output, which must be of the same size.
      choice_of: of a depthwise convolution, the handover of the one before it, which `goes_on`.
      salience_scales: whether the wanted outputs are multiplied by their salience; if not, it only
        ranks them, and learns as if it did (the straight-through gradient).
      statistic: of a channel or a column that is its attention, a function such as those in
        `dynprune_jax.pruning.attention.STATISTICS`.
      criterion: turns attention into the scores to rank, a function such as those in
        `dynprune_jax.pruning.attention.CRITERIA`.
      drop_probability: in training, the chance of a target to be dropped, in [0, 1]; 0 trains
        the dense network.
      rngs: draws for the criterion `random` and for a `drop_probability` below 1.

    Raises:
      ValueError: for a ratio, a probability, a group or a patch out of its range, a statistic or
        criterion that is no function, or another kind of layer; for a `feature_ratio` of a grouped
        convolution, or `choice_of` of one that is not depthwise; when it is called, for a statistic
        or criterion that gives another shape and, with `columns_of`, for an output of another size
        than the input.
    """

    def __init__(
        self,
        conv: nnx.Conv,
        *,
        channel_ratio: Ratio | None = None,
        column_ratio: Ratio | None = None,
        feature_ratio: Ratio | None = None,
        channel_group: int = 1,
        column_patch: int = 1,
        handover: Handover | None = None,
        channels_of: Handover | None = None,
        columns_of: Handover | None = None,
        choice_of: Handover | None = None,
        salience_scales: bool = True,
        statistic: Statistic = mean,
        criterion: Criterion = attention,
        drop_probability: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if type(conv) not in (nnx.Conv, DynamicConv) or len(conv.kernel_size) != 2:
            raise ValueError(
                f"only an nnx.Conv with a 2-D kernel can be made dynamic, not {type(conv).__name__}"
                f" with kernel size {getattr(conv, 'kernel_size', None)}"
            )
        for name, size in (("channel_group", channel_group), ("column_patch", column_patch)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if not 0.0 <= drop_probability <= 1.0:
            raise ValueError(f"drop_probability is {drop_probability}; it must be in [0, 1]")
        for name, function in (("statistic", statistic), ("criterion", criterion)):
            if not callable(function):
                raise ValueError(
                    f"{name} is {function!r}; it must be a function, such as one of"
                    " dynprune_jax.pruning.attention"
                )
        if choice_of is not None and not is_depthwise(conv):
            raise ValueError("only a depthwise convolution can hand a choice of channels on")
        take_over(self, conv)
        self.channel_ratio = nnx.data(prune_ratio(channel_ratio, "channel_ratio"))
        self.column_ratio = nnx.data(prune_ratio(column_ratio, "column_ratio"))
        self.feature_ratio = nnx.data(prune_ratio(feature_ratio, "feature_ratio"))
        if feature_ratio is not None:
            if self.feature_group_count > 1:
                raise ValueError("a grouped convolution cannot choose its output channels")
            shape = (self.in_features, self.out_features)
            # Not drawn: in a narrow layer filters differ by less than what a draw would add. One
            # number is not 0, though too small to change a sum: where weights are constants of a
            # program, XLA for CPUs (of jax 0.10 to 0.12) multiplies by a matrix whose elements
            # are all alike with what lies behind the one that it keeps.
            start = np.zeros(shape, np.float32)
            start[0, 0] = 1e-30
            self.salience_kernel = nnx.Param(jnp.asarray(start))
            kernel = conv.kernel[...] if conv.mask is None else conv.kernel[...] * conv.mask
            self.salience_bias = nnx.Param(_relative_norms(jnp.asarray(kernel)))
        self.channels_of: Any = nnx.static(channels_of)
        self.columns_of: Any = nnx.static(columns_of)
        self.choice_of: Any = nnx.static(choice_of)
        if handover is None and self.chooses_outputs:
            handover = Handover()
        self.handover: Any = nnx.static(handover)
        self.channel_group = channel_group
        self.column_patch = column_patch
        self.salience_scales = salience_scales
        self.statistic = statistic
        self.criterion = criterion
        self.drop_probability = drop_probability
        self.deterministic = True
        self.rngs = nnx.RngStream(rngs(), tag="gate")

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode in an `nnx.view(model, deterministic=…)`; None leaves it as it is."""
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(
        self, inputs: Float[Array, "*batch height width channels"], out_sharding: Any = None
    ) -> Float[Array, "*batch out_height out_width features"]:
        """Convolves what the gate keeps of the input."""
        return self.convolve(inputs, self.masks(inputs), out_sharding)

    def masks(self, x: Float[Array, "*batch height width channels"]) -> Masks:
        """What this input keeps: of each map `kept_count(ratio, n)` channels and columns.

        Where the gate ranks groups or patches, `n` is their number. With `choice_of` it is
        what was chosen before; that is taken, so ask once for each map.
        """
        masks = self.choose(x.shape, *self.scores(x))
        if self.columns_of is not None:
            masks = dataclasses.replace(masks, out_columns=self._out_columns(x, masks))
        if self.choice_of is not None:
            wanted = self.choice_of.take_choice((*x.shape[:-3], x.shape[-1]))
            return dataclasses.replace(masks, channels=wanted, features=wanted)
        if self.feature_ratio is None:
            return masks
        salience = self.salience(x)
        size = self.feature_group
        scores = self._by_criterion(_of_groups(salience, size))
        wanted = jnp.repeat(self._keep(scores, self.feature_ratio), size, axis=-1)
        if not self.salience_scales:
            salience = 1.0 + (salience - jax.lax.stop_gradient(salience))  # exactly 1
        return dataclasses.replace(masks, features=wanted, salience=salience)

    def _out_columns(self, x: Any, masks: Masks) -> Any:
        """The wanted columns of the output: those of the input that are kept.

        To make up its count a follower may keep columns that are all zero, which a gate before
        it has left out, or not; wanted they are not. Where it keeps all, no gate leaves any out.
        """
        if masks.columns is None or not self.follows_columns:
            return masks.columns
        n = math.prod(x.shape[-3:-1]) // self.patch_side(*x.shape[-3:-1]) ** 2
        nothing_left_out = jnp.asarray(self.kept_count(self.column_ratio, n) == n)
        return masks.columns & (jnp.any(x != 0, axis=-1) | nothing_left_out)

    def salience(
        self, x: Float[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch features"]:
        """What the output channels are expected to matter, at least 0 (arXiv 1810.05331, eq. 8).

        Divided by the square root of the channels, the means change the saliences by their kernel
        in a step of training about as much as by their bias, whatever the number of channels. Sums
        are weighed, and the result is scaled: a gate that follows another takes the same sums.
        """
        sums = channel_attention(x, magnitude)
        height, width, channels = x.shape[-3:]
        bias = self.salience_bias[...].reshape((1,) * (sums.ndim - 1) + (-1,))
        return nnx.relu(self.weigh(sums) / (height * width * channels**0.5) + bias)

    def weigh(self, sums: Float[Array, "*batch channels"]) -> Float[Array, "*batch features"]:
        """The linear layer of the salience, without its bias."""
        return sums @ self.salience_kernel[...]

    def choose(
        self, shape: tuple[int, ...], channel_scores: Any = None, column_scores: Any = None
    ) -> Masks:
        """The masks of maps of a shape, from the scores of what the gate ranks."""
        channels = columns = None
        if channel_scores is not None:
            channels = self._keep(channel_scores, self.channel_ratio, self.follows_features)
            channels = jnp.repeat(channels, self.group_size(shape[-1]), axis=-1)
        if column_scores is not None:
            side = self.patch_side(*shape[-3:-1])
            columns = self._keep(column_scores, self.column_ratio, self.follows_columns)
            columns = columns.reshape(*columns.shape[:-1], *(n // side for n in shape[-3:-1]))
            columns = jnp.repeat(jnp.repeat(columns, side, axis=-2), side, axis=-1)
        return Masks(channels, columns)

    def scores(
        self, x: Float[Array, "*batch height width channels"]
    ) -> tuple[Float[Array, "*batch groups"] | None, Float[Array, "*batch patches"] | None]:
        """What the gate ranks, of channels and of columns, row by row: the highest are kept."""
        *batch, height, width, channels = x.shape
        of_channels = of_columns = None
        if self._ranks_channels:
            size = self.group_size(channels)
            statistic = magnitude if self.follows_features else self.statistic
            of_channels = _of_groups(channel_attention(x, statistic), size)
            if not self.follows_features:
                of_channels = self._by_criterion(of_channels)
        if self.column_ratio is not None:
            side = self.patch_side(height, width)
            statistic = magnitude if self.follows_columns else self.statistic
            of_columns = column_attention(x, statistic)
            if side > 1:
                patches = of_columns.reshape(*batch, height // side, side, width // side, side)
                of_columns = jnp.mean(patches, axis=(-3, -1))
            of_columns = of_columns.reshape(*batch, height * width // side**2)
            if not self.follows_columns:
                of_columns = self._by_criterion(of_columns)
        return of_channels, of_columns

    def _by_criterion(self, scores: Float[Array, "*batch n"]) -> Any:
        return of_shape(scores.shape, self.criterion(scores, self.rngs), "criterion")

    def ranked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many scores of each map of a shape it ranks: of channels, columns and outputs."""
        height, width, channels = shape[-3:]
        counts = (
            (self._ranks_channels, channels // self.group_size(channels)),
            (self.column_ratio is not None, height * width // self.patch_side(height, width) ** 2),
            (self.feature_ratio is not None, self.out_features // self.feature_group),
        )
        return tuple(count for ranks, count in counts if ranks)

    @property
    def follows_features(self) -> bool:
        """Whether the channels it keeps are those that a convolution before it has chosen."""
        return self.channels_of is not None

    @property
    def follows_columns(self) -> bool:
        """Whether the columns it keeps are those that a convolution before it has chosen."""
        return self.columns_of is not None and self.columns_of is not self.handover

    @property
    def _ranks_channels(self) -> bool:
        return self.channel_ratio is not None and self.choice_of is None

    def group_size(self, channels: int) -> int:
        """How many neighbouring channels are kept or skipped together."""
        if self.feature_group_count > 1 and not self.follows_features:
            return channels // self.feature_group_count
        return _divisor(self.channel_group, channels)

    @property
    def feature_group(self) -> int:
        """How many neighbouring output channels are wanted or not wanted together."""
        return _divisor(self.channel_group, self.out_features)

    def patch_side(self, height: int, width: int) -> int:
        """The side of the square of columns that are kept or skipped together."""
        return _divisor(self.column_patch, math.gcd(height, width))

    def convolve(
        self,
        x: Float[Array, "*batch height width channels"],
        masks: Masks,
        out_sharding: Any = None,
    ) -> Float[Array, "*batch out_height out_width features"]:
        """Convolves the kept part of `x`: every way of executing it must equal this one.

        Of outputs that are not wanted anything finite may come.
        """
        return self.hand_over(super().__call__(masks.apply(x), out_sharding), masks)

    def hand_over(self, y: Any, masks: Masks) -> Any:
        """Leaves for the normalization what is wanted of the outputs; returns the outputs."""
        columns = masks.out_columns
        if columns is not None and columns.shape[-2:] != y.shape[-3:-1]:
            raise ValueError(
                f"a convolution wants the columns of its output that it keeps of its input, but"
                f" makes a map of {y.shape[-3]}x{y.shape[-2]} of one of"
                f" {columns.shape[-2]}x{columns.shape[-1]}"
            )
        if self.chooses_outputs:
            self.handover.put(y, masks)
        return y

    @property
    def chooses_outputs(self) -> bool:
        """Whether any of its outputs may not be wanted."""
        return (
            self.feature_ratio is not None
            or self.choice_of is not None
            or (self.columns_of is not None and self.column_ratio is not None)
        )

    def kept_count(self, ratio: Any, n: int) -> int | Int[Array, ""]:
        """How many of `n` a ratio of this gate keeps."""
        return masks_lib.kept_count(ratio[...], n)

    def _keep(self, scores: Any, ratio: Any, follows: bool = False) -> Any:
        count = self.kept_count(ratio, scores.shape[-1])
        mask = masks_lib.keep_highest(scores, count)
        if self.deterministic or self.drop_probability == 1.0:
            return mask
        if follows:  # by chance more than the count has stayed
            return mask | (scores > 0.0)
        return masks_lib.drop_targets(self.rngs(), mask, self.drop_probability)


def is_depthwise(conv: nnx.Conv) -> bool:
    """Whether each output channel of a convolution is made of one channel of the input."""
    return 1 < conv.feature_group_count == conv.in_features == conv.out_features


@jax.jit  # as one program: there is one for each shape, and every operation takes its time
def _relative_norms(
    kernel: Float[Array, "height width channels features"],
) -> Float[Array, " features"]:
    """The L1 norm of each filter over their mean; not below a tenth, so that all can learn."""
    norms = jnp.sum(jnp.abs(kernel), axis=(0, 1, 2), dtype=jnp.float32)
    mean = jnp.mean(norms)
    return jnp.where(mean > 0.0, jnp.maximum(norms / mean, 0.1), 1.0)


def _of_groups(scores: Float[Array, "*batch n"], size: int) -> Float[Array, "*batch groups"]:
    """The mean of each group of neighbours."""
    if size == 1:
        return scores
    return jnp.mean(scores.reshape(*scores.shape[:-1], scores.shape[-1] // size, size), axis=-1)


def _divisor(size: int, n: int) -> int:
    """The largest divisor of `n` that is at most `size`."""
    return max(d for d in range(1, min(size, n) + 1) if n % d == 0)


def prune_ratio(ratio: Ratio | None, name: str) -> PruneRatio | None:
    """Wraps a ratio after checking it, unless it is traced; None stays None.

    Raises:
      ValueError: for a ratio that is not in [0, 1).
    """
    if ratio is None:
        return None
    if not isinstance(ratio, Tracer) and not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} is {ratio}; a prune ratio must be in [0, 1)")
    return PruneRatio(jnp.asarray(ratio, jnp.float32))
