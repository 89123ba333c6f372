"""A model as bytes: its program and its weights, to be called where its code is not."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import export

from dynprune_jax.pruning import native
from dynprune_jax.pruning.layers import Images


def export_model(
    model: nnx.Module, images: Images, *others: Any, platforms: Sequence[str] | None = None
) -> bytes:
    """Exports a model for inference, compact or not, by `jax.export`.

    Weights, ratios and, of a compact model, the forms of its layers are part of it. Who calls it
    needs JAX, and of a compact one for CPUs this package and a C++ compiler, since the kernel is
    compiled there for the processor there is.

    Args:
      model: any NNX model, usually from `compact`, or from `make_dynamic` or `predict_channels`
        for platforms without compact forms. It is exported in the mode of evaluation.
      images: an example batch, or its shape and dtype, which the batches to come must have. A
        model that is not compact takes any number of them, with a symbolic shape:
        `jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 32, 32, 3"), "float32")`.
      *others: what else the model is called with; it becomes part of the program.
      platforms: such as `("cpu", "cuda", "tpu")`; by default the one at hand, and of a compact
        model no other.

    Raises:
      ValueError: where `jax.export` refuses the model, with its reason.
    """
    model = nnx.clone(model)
    model.eval()
    graph, state = nnx.split(model)

    def call(images: Any) -> Any:
        return nnx.merge(graph, state)(images, *others)

    ours = [export.DisabledSafetyCheck.custom_call(name) for name in native.TARGETS]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), images)
    exporter = export.export(jax.jit(call), platforms=platforms, disabled_checks=ours)
    return bytes(exporter(shapes).serialize())


def load_exported(data: bytes) -> Callable[[Any], Any]:
    """Loads what `export_model` has made: a compiled function of images.

    Raises:
      ValueError: for bytes that are no exported model.
      RuntimeError: for a compact model whose kernel is not to be had here, with the reason.
    """
    try:
        exported = export.deserialize(bytearray(data))
        program = exported.mlir_module_serialized
    except Exception as error:  # whatever reading other bytes as a table of offsets leads to
        raise ValueError("this is no exported model") from error
    if any(name.encode() in program for name in native.TARGETS) and (reason := native.why_not()):
        raise RuntimeError(f"this model needs the compiled kernel for CPUs: {reason}")
    return jax.jit(exported.call)
