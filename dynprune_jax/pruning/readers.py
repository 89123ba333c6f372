"""Which layer reads what a convolution makes: found by trying, for any model."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool

from dynprune_jax.pruning.folding import traced_pairs
from dynprune_jax.pruning.layers import Images, call_and_capture, conv_layers, intercept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Seen:
    """A call of a layer: what it got and what it returned; its name, and its place in the order."""

    x: Any
    y: Any
    name: str = dataclasses.field(metadata={"static": True})
    order: int = dataclasses.field(metadata={"static": True})


def find_links(model: nnx.Module, images: Images, *others: Any) -> dict[str, tuple[str, str]]:
    """Finds where `predict_channels` can put gates: the `links` of any model.

    A link is a convolution, the batch normalization that alone reads its outputs, and the one
    convolution or linear layer that reads the result: wherever the normalization's output has a
    channel of zeros, what that layer gets has one too, and else is the same. So relu, pooling,
    dropout and laying a map out may stand between; a sum with anything else may not.

    It is tried and not read from the program: with weights and images drawn anew, so that none is
    zero by chance, half of the channels behind a normalization are set to zero. The first layer
    that notices must get zeros there; and if it answers as before, nothing else may have noticed.
    The model runs twice for each normalization, in evaluation.

    Args:
      model: any NNX model without gates; it is left as it is.
      images: a batch, or its shape and dtype; a small one will do.
      *others: what else the model is called with.

    Returns:
      For each convolution found, in the order of execution, the names of its normalization and
      of the layer that reads the result.

    Raises:
      ValueError: where there is none, or layers are called within a transformation that what they
        see does not leave.
    """
    model = nnx.clone(model)
    model.eval()
    convs = conv_layers(model)
    pairs, _ = traced_pairs(model, images, *others)
    norms = {n: c for c, n in pairs if convs[c].feature_group_count == 1}  # others cannot choose
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    state, images = jax.tree.map(lambda leaf: _drawn(rng, leaf), (state, images))

    @jax.jit
    def run(
        state: Any, images: Any, kept: dict[str, Any], answers: dict[int, Any], held: dict[int, Any]
    ) -> tuple[Any, list[_Seen]]:
        """The outputs, and the calls: of norms with what is kept; with given answers if held."""
        clock = itertools.count().__next__

        def call(name: str, layer: Any, own: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            y = own(x, *args, **kwargs)
            if isinstance(layer, nnx.BatchNorm):
                return jnp.where(kept[name], y, jnp.zeros((), y.dtype)) if name in kept else y
            order = clock()
            if order in answers:
                y = jnp.where(held[order], answers[order], y)
            layer.sow(nnx.Intermediate, "seen", _Seen(x, y, name, order))
            return y

        watched = intercept(nnx.merge(graph, state), (nnx.BatchNorm, nnx.Conv, nnx.Linear), call)
        outputs, sown = call_and_capture(watched, images, *others)
        leaves = jax.tree.leaves(sown, is_leaf=lambda leaf: isinstance(leaf, _Seen))
        leaves = [leaf for leaf in leaves if isinstance(leaf, _Seen)]  # a model may sow too
        return outputs, sorted(leaves, key=lambda leaf: leaf.order)

    whole = {name: np.ones(convs[conv].out_features, bool) for name, conv in norms.items()}
    try:
        outputs, before = run(state, images, whole, {}, {})
    except TypeError as error:
        of_sown = isinstance(error, jax.errors.UnexpectedTracerError) or "__captures__" in str(
            error
        )
        if not of_sown:
            raise
        raise ValueError(
            f"layers of {type(model).__name__} are called within a transformation (such as"
            " jax.lax.scan or nnx.cond) that what they see does not leave: give links by hand"
        ) from error
    answers = {one.order: one.y for one in before}
    free = dict.fromkeys(answers, np.bool_(False))
    calls = Counter(one.name for one in before)
    found: dict[str, tuple[str, str]] = {}
    for norm, conv in norms.items():
        half = np.arange(convs[conv].out_features) % 2 == 0
        _, after = run(state, images, whole | {norm: half}, answers, free)
        notices = [not _same(old.x, new.x) for old, new in zip(before, after, strict=True)]
        if True not in notices:
            continue
        place = notices.index(True)
        reader = after[place]
        if calls[reader.name] > 1 or not _left(before[place].x, reader.x, half):
            continue
        held = free | {reader.order: np.bool_(True)}
        ends, after = run(state, images, whole | {norm: half}, answers, held)
        others_notice = (not _same(old.x, new.x) for old, new in zip(before, after, strict=True))
        if sum(others_notice) == 1 and all(jax.tree.leaves(jax.tree.map(_same, outputs, ends))):
            found[conv] = (norm, reader.name)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no convolution with a batch normalization behind it whose"
            " channels another layer reads one by one"
        )
    return found


def _same(old: Any, new: Any) -> bool:
    return np.array_equal(old, new)


def _left(old: Any, new: Any, kept: Bool[np.ndarray, " channels"]) -> bool:
    """Whether of a map, or one laid out with its channels last, these channels alone were left."""
    if new.shape[-1] % len(kept):
        return False
    expected = np.where(kept, np.asarray(old).reshape(-1, len(kept)), 0)
    return _same(np.asarray(new).reshape(-1, len(kept)), expected)


def _drawn(rng: np.random.Generator, leaf: Any) -> Any:
    """Something like a trained value in place of a float array, or of its shape and dtype."""
    if not jnp.issubdtype(getattr(leaf, "dtype", np.int32), jnp.floating):
        return leaf
    if len(leaf.shape) < 2:  # biases, scales, statistics
        value = rng.uniform(0.5, 1.5, leaf.shape)
    else:
        value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
    return jnp.asarray(value, leaf.dtype)
