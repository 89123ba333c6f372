"""Compact execution: from a dynamic model to one that skips what its gates leave out."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dynprune_jax.pruning.calls import Images, all_handed_over, as_function, batch_of
from dynprune_jax.pruning.compact_conv import CompactConv
from dynprune_jax.pruning.folding import fold
from dynprune_jax.pruning.layers import Model, replaceable_layers, replaced
from dynprune_jax.pruning.plan import Plan, kept_plan, measure_plan


def compact(
    model: Model,
    images: Images,
    *others: Any,
    plan: Plan | str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Returns the model for inference: the same answers, to rounding, as fast as it goes here.

    Batch norms are folded into convolutions, and every convolution is executed in the form that
    is the fastest on this device: compact where that pays, masked where it does not. One with a
    `conv_general_dilated` (`convolve` is none) or a `promote_dtype` of its own, or within
    `nnx.WeightNorm` or `nnx.SpectralNorm`, stays as it is, and so does one whose parameters are
    read by more than its calls. A model without gates becomes the fastest dense one. Ratios are
    fixed, but those of layers that stay or that a plan does not name: to change them, set them on
    the dynamic model and make it compact again. It has no gradients. Compile it:
    `nnx.jit(fast)(images)`, or if it has an `nnx.remat` or `nnx.scan` within or sows something, as
    an argument: `nnx.jit(lambda model, images: model(images))(fast, images)`.

    Roundings of bfloat16 decide which of two columns or channels of nearly the same attention is
    kept: folding alone changes some, and with them the answers by more than rounding.

    Args:
      model: any NNX model, usually from `make_dynamic`. It is left as it is.
      images: an example batch, or its shape and dtype. The result takes any other batch too;
        only the plan is made for this one.
      *others: what else the model is called with.
      plan: from `measure_plan`, or changed or made by hand; or a file: the plan is read from
        there, or if there is none, measured and kept there; a warning tells of one that was
        measured on another device, for other images, layers or ratios, or with `native` forms or
        without where it is now the other way. None: measured.
      progress: called after each layer is measured, see `measure_plan`.

    Raises:
      ValueError: for no images; if what is wanted of a convolution's outputs does not reach its
        normalization; if the plan names a layer that the model does not have, or a form that a
        layer cannot be executed in; if the file is not a plan, or a folder.
      OSError: if there is no folder for the file; before anything is measured.
    """
    batch_of(images)  # refuses what holds none
    folded, read = fold(model, images, *others)
    function, arrays = as_function(folded, images, *others)
    with all_handed_over(folded):
        jax.eval_shape(function, *arrays)
    cure = ""
    if plan is None:
        plan = measure_plan(folded, images, *others, progress=progress)
    elif not isinstance(plan, Plan):
        cure = f" (to have a plan measured anew, delete {os.fspath(plan)})"
        plan = kept_plan(Path(plan), folded, images, *others, progress=progress)
    convs = replaceable_layers(folded)
    for name in plan.forms:
        if name not in convs:
            raise ValueError(
                f"the plan names {name!r}, which is none of the model's {len(convs)} convolutions"
                f" that a form can execute{cure}"
            )

    new: dict[str, nnx.Module] = {}
    for name, form in plan.forms.items():
        if name not in read:
            try:
                new[name] = CompactConv(convs[name], form)
            except ValueError as error:
                raise ValueError(f"{name}: {error}{cure}") from error
    return replaced(folded, new)
