"""Batch statistics made anew, for the ratios that a network has now."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynprune_jax.pruning.calls import Images, batch_of, intercept
from dynprune_jax.pruning.compact_conv import is_compact
from dynprune_jax.pruning.folding import FoldedNorm
from dynprune_jax.pruning.layers import all_modules


def recalibrate(model: nnx.Module, batches: Iterable[Images], *others: Any) -> None:
    """Sets the statistics of a model's batch norms to those that images have at its ratios.

    What is skipped changes the mean and the variance of all maps behind it. A network that was
    trained at other ratios, or at many, has the statistics of those: without any training, and
    without labels, this gives it the right ones (Yu and Huang 2019, arXiv 1903.05134). All
    else stays as it is. Before `compact`, which folds the statistics into the kernels.

    Args:
      model: a dynamic model, or any other. It is called in evaluation mode, but with the
        statistics of each batch; its own mode stays.
      batches: of training images, `(batch, height, width, channels)` each, augmented as in
        training, for that is what the model was fitted to; some hundred images of mixed classes in
        a batch, and all of one size. The statistics are the mean of what the batches have.
      *others: what else the model is called with.

    Raises:
      ValueError: for no batches, one of no images, or an array in place of several, and for a
        model that is compact or has no batch norm, or some that are folded.
    """
    if is_compact(model):
        raise ValueError("this model is compact; recalibrate the model that it was made from")
    if hasattr(batches, "shape"):
        raise ValueError("batches is one array; give batches in a list, if only one")
    norms = [m for m in all_modules(model).values() if isinstance(m, nnx.BatchNorm)]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no nnx.BatchNorm, and so no batch statistics")
    if any(isinstance(norm, FoldedNorm) for norm in norms):
        raise ValueError("batch norms of this model are folded; recalibrate what it was made from")
    graph, state = nnx.split(model)

    @jax.jit
    def statistics(state: Any, images: Images) -> Any:
        return batch_statistics(nnx.merge(graph, state), images, *others)

    def made() -> Iterator[Any]:
        for images in batches:
            batch_of(images)  # refuses what holds none
            try:
                yield statistics(state, images)
            except Exception as error:
                if isinstance(images, tuple | list):
                    error.add_note("batches hold what the model is called with: no labels")
                raise

    nnx.update(model, mean_of(made()))


def batch_statistics(model: nnx.Module, images: Images, *others: Any) -> Any:
    """The mean and the variance that each batch norm sees on a batch, in evaluation otherwise.

    Args:
      model: it is left as it is.
      images: what it is called with.
      *others: the same.

    Returns:
      An `nnx.State` of the norms' `nnx.BatchStat`, of the same paths as the model's. Of a norm
      that is called several times it is the mean of what its calls see.
    """
    calls = Counter[str]()

    def of_batch(name: str, norm: Any, call: Any, x: Any, *stored: Any, **options: Any) -> Any:
        del stored  # use_running_average, where the model gives it
        if calls[name]:  # what it has is the mean of so many
            norm.momentum = calls[name] / (calls[name] + 1)
        calls[name] += 1
        return call(x, False, **options)

    copy = intercept(model, nnx.BatchNorm, of_batch)
    copy.eval()
    norms = [norm for norm in all_modules(copy).values() if isinstance(norm, nnx.BatchNorm)]
    for norm in norms:
        norm.momentum = 0.0  # nothing of what was stored before, which may not even be finite
        norm.mean.set_value(jnp.zeros_like(norm.mean[...]))
        norm.var.set_value(jnp.ones_like(norm.var[...]))
    copy(images, *others)
    own = {id(variable) for norm in norms for variable in (norm.mean, norm.var)}
    return nnx.state(copy, lambda _, variable: id(variable) in own)


def mean_of(trees: Iterable[Any]) -> Any:
    """The mean of several pytrees of arrays, leaf by leaf.

    Raises:
      ValueError: for none.
    """
    mean = None
    for n, tree in enumerate(trees, 1):
        mean = tree if mean is None else jax.tree.map(lambda m, x, n=n: m + (x - m) / n, mean, tree)
    if mean is None:
        raise ValueError("batches has none; statistics are of some")
    return mean
