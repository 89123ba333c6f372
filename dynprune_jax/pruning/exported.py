"""A model as bytes: its program and its weights, to be called where its code is not."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import export

from dynprune_jax.pruning import native
from dynprune_jax.pruning.calls import Images, batch_of
from dynprune_jax.pruning.compact_conv import is_compact

# Calls of which `jax.export` cannot know that they mean the same in another version.
# The last is the Pallas kernel, whose module is not imported for that.
_UNCHECKED = (*native.TARGETS, "__gpu$xla.gpu.triton")


def export_model(
    model: nnx.Module, images: Images, *others: Any, platforms: Sequence[str] | None = None
) -> bytes:
    """Exports a model for inference, compact or not, by `jax.export`.

    Weights, ratios and, of a compact model, the forms of its layers are part of it, and so is the
    state of a criterion that draws: every call draws the same. Who calls it
    needs JAX, and of a compact one for CPUs this package and a C++ compiler, since the kernel is
    compiled there for the processor there is; one with the Pallas form is for this version of JAX.

    Args:
      model: any NNX model, usually from `compact`, or from `make_dynamic` or `predict_channels`
        for platforms without compact forms. It is exported in the mode of evaluation.
      images: an example batch, `(batch, height, width, channels)`, or its shape and dtype, which
        the batches to come must have; or a pytree, as for `measure`. A model that is not compact
        takes any number of images, at least one, with a symbolic shape:
        `jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 32, 32, 3"), "float32")`.
      *others: what else the model is called with; it becomes part of the program.
      platforms: such as `("cpu", "cuda", "tpu")`; by default, and always of a compact model, the
        one at hand.

    Raises:
      ValueError: for no images, for a compact model and platforms or a symbolic shape, or one name
        in place of several.
        What `jax.export` refuses it refuses in its own words, such as a model that calls back to
        Python.
    """
    if is_compact(model) and platforms is not None:
        raise ValueError(
            f"platforms is {platforms!r}; a compact model is exported for the one at hand alone:"
            " for others, export the model that it was made from"
        )
    shape = batch_of(images).shape  # refuses what holds none
    if is_compact(model) and any(map(export.is_symbolic_dim, shape)):
        raise ValueError(
            f"images has the shape {shape}; a compact model is exported for batches of one size"
        )
    if isinstance(platforms, str):
        raise ValueError(f"platforms is {platforms!r}; give several names, such as ('cpu',)")
    model = nnx.clone(model)
    model.eval()
    graph, state = nnx.split(model)

    def call(images: Any) -> Any:
        return nnx.merge(graph, state, copy=True)(images, *others)  # a criterion counts its draws

    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in _UNCHECKED]
    exporter = export.export(jax.jit(call), platforms=platforms, disabled_checks=unchecked)
    return bytes(exporter(jax.eval_shape(lambda images: images, images)).serialize())


def load_exported(data: bytes) -> Callable[[Any], Any]:
    """Loads what `export_model` has made.

    Returns:
      A compiled function of images, of the shape and dtype that it was exported for, with what the
      model returns of them.

    Raises:
      ValueError: for bytes that are no exported model, or one of a JAX too new or too old.
      RuntimeError: for a compact model whose kernel is not to be had here, with the reason.
    """
    try:
        exported = export.deserialize(bytearray(data))
        program = exported.mlir_module_serialized
    except ImportError:
        raise
    except Exception as error:  # whatever reading other bytes as a table of offsets leads to
        raise ValueError(f"this is no exported model that can be read here: {error}") from error
    if any(name.encode() in program for name in native.TARGETS) and (reason := native.why_not()):
        raise RuntimeError(f"this model needs the compiled kernel for CPUs: {reason}")
    return jax.jit(exported.call)
