"""Static baselines: whole filters removed for good, the same ones for every input.

The counterpart of a dynamic network at equal MACs: same data, same dense weights, same schedule
and budget of training, same counter. A *criterion* gives every filter of a convolution a score;
those with the lowest leave the network, and with them the next layer's kernel rows.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.build import Links, all_links, training_images
from dynprune_jax.checkpoint import tree_digest
from dynprune_jax.config import Config
from dynprune_jax.data.batches import stream_batches
from dynprune_jax.errors import UserError
from dynprune_jax.evaluate import cascaded
from dynprune_jax.models.links import LINKED
from dynprune_jax.pruning.calls import intercept
from dynprune_jax.pruning.layers import all_modules, replaceable_layers
from dynprune_jax.pruning.measure import dense_macs, measure
from dynprune_jax.pruning.ratios import least_factor, scaled
from dynprune_jax.pruning.readers import drawn
from dynprune_jax.report import provenance
from dynprune_jax.run import Run
from dynprune_jax.train import run_phase, train_dense
from dynprune_jax.train_step import Network, Values
from dynprune_jax.writers import screen, write_json

_TAYLOR_BATCHES = 8
_TRIALS = 4  # of which filters leave

Scores = dict[str, Float[np.ndarray, " filters"]]


def l1(model: Any, links: Links, run: Run | None = None) -> Scores:
    """L1 norm of a filter's weights (Li et al. 2016, arXiv 1608.08710)."""
    del run
    return {name: np.abs(rows).sum(axis=1) for name, rows in _filters(model, links)}


def geometric_median(model: Any, links: Links, run: Run) -> Scores:
    """Sum of a filter's distances to the layer's others: the most replaceable has the lowest.

    He et al. 2018, arXiv 1811.00250, equation 4.
    """
    del run

    def distances(filters: np.ndarray) -> np.ndarray:
        squares = np.sum(filters**2, axis=1)
        apart = squares[:, None] + squares[None, :] - 2 * filters @ filters.T
        return np.sqrt(np.maximum(apart, 0)).sum(axis=1)

    return {name: distances(rows.astype(np.float64)) for name, rows in _filters(model, links)}


def taylor(model: Any, links: Links, run: Run) -> Scores:
    """First-order change of the loss if a map were zero (Molchanov et al. 2016, arXiv 1611.06440).

    The mean over images of `|sum over the map of dC/dh * h|`, equation 8, on augmented training
    images. It is taken before the relu, where `dC/dh * h` is the same as behind it.
    """
    norms = {norm: name for name, (norm, _) in links.items()}
    filters = {norm: all_modules(model)[name].out_features for norm, name in norms.items()}
    network = Network(model)

    @jax.jit
    def scores(values: Values, images: Any, labels: Any, key: Any) -> dict[str, Array]:
        def loss(gates: dict[str, Array]) -> Array:
            def gated(name: str, _: Any, call: Any, *args: Any, **kwargs: Any) -> Array:
                y = call(*args, **kwargs)
                return y * gates[name][:, None, None, :] if name in gates else y

            bound: Any = intercept(network.bind(values), nnx.BatchNorm, gated)
            bound.eval()
            logits = bound(training_images(run.config, key, images))
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        ones = {norm: jnp.ones((images.shape[0], n)) for norm, n in filters.items()}
        return jax.tree.map(lambda g: jnp.mean(jnp.abs(g), axis=0), jax.grad(loss)(ones))

    keys = jax.random.split(jax.random.key(run.config.seed), _TAYLOR_BATCHES)
    batches = stream_batches(run.dataset.train, run.config.batch_size, run.config.seed, threads=0)
    each = [
        jax.device_get(scores(network.weights, batch["image"], batch["label"], key))
        for key, batch in zip(keys, batches, strict=False)
    ]
    return {norms[name]: np.mean([batch[name] for batch in each], axis=0) for name in norms}


def random(model: Any, links: Links, run: Run) -> Scores:
    """Control: a uniform draw."""
    rng = np.random.default_rng(run.config.seed)
    return {name: rng.random(len(rows)) for name, rows in _filters(model, links)}


def none(model: Any, links: Links, run: Run) -> Scores:
    """Control: nothing is removed, so that a dense network is trained on for as long."""
    del run
    return {name: np.zeros(len(rows)) for name, rows in _filters(model, links)}


CRITERIA: dict[str, Callable[[Any, Links, Run], Scores]] = {
    f.__name__: f for f in (l1, geometric_median, taylor, random, none)
}


def remove_filters(model: Any, links: Links, scores: Scores, ratios: dict[str, float]) -> Any:
    """Returns a smaller model without the lowest-scored filters; the given one stays as it is.

    Args:
      model: any, of these links; its arrays are read, so it cannot be traced.
      links: from `removable`.
      scores: by convolution, one for each of its filters.
      ratios: by convolution, the fraction of its filters to remove, in [0, 1).
    """
    return _narrowed(model, links, _lowest_removed(scores, ratios))


def _lowest_removed(scores: Scores, ratios: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The filters that stay, by convolution, in order; of equal scores the first."""
    return {
        name: np.sort(np.argsort(-of_it, kind="stable")[: _kept(len(of_it), ratios[name])])
        for name, of_it in scores.items()
    }


def _narrowed(model: Any, links: Links, kept: Mapping[str, np.ndarray]) -> Any:
    """The model with these filters alone."""
    small = nnx.clone(model)
    layers = all_modules(small)

    def keep(owner: Any, name: str, rows: np.ndarray, axis: int) -> None:
        # By NumPy, which compiles nothing: each of the many sizes would be a program of its own.
        variable = getattr(owner, name)
        if variable is not None:
            value = np.take(np.asarray(variable.get_value()), rows, axis)
            setattr(owner, name, variable.replace(jnp.asarray(value)))

    for name, (norm_name, reader_name) in links.items():
        conv, norm, reader = layers[name], layers[norm_name], layers[reader_name]
        rows = _rows_of(kept[name], conv, reader)
        for part in ("kernel", "bias"):
            keep(conv, part, kept[name], -1)
        for part in ("scale", "bias", "mean", "var"):
            keep(norm, part, kept[name], -1)
        conv.out_features = norm.num_features = len(kept[name])
        keep(reader, "kernel", rows, -2)
        reader.in_features = len(rows)
    return small


def _silenced(model: Any, links: Links, kept: Mapping[str, np.ndarray]) -> Any:
    """The model that computes all filters, and whose readers pass over all but these."""
    silent = nnx.clone(model)
    layers = all_modules(silent)
    for name, (_, reader_name) in links.items():
        reader = layers[reader_name]
        rows = _rows_of(kept[name], layers[name], reader)
        read = np.isin(np.arange(reader.in_features), rows)[:, None]
        reader.kernel[...] = jnp.where(read, reader.kernel[...], 0)
    return silent


def _rows_of(filters: np.ndarray, conv: Any, reader: Any) -> np.ndarray:
    """Which inputs of a reader come from these filters: what is laid out has its channels last."""
    return np.arange(reader.in_features).reshape(-1, conv.out_features)[:, filters].ravel()


def removable(config: Config, model: Any, links: Links) -> Links:
    """Those links of a model whose filters can be removed.

    Of somebody's own model that is not where the reader has filters for some of the channels alone,
    is none that this package counts, or has weights in common with another layer.

    Args:
      config: a checked config.
      model: from `build_model`.
      links: all that it has, from `all_links`.

    Raises:
      UserError: if there are none.
    """
    if type(model) in LINKED:
        return links
    convs, layers = replaceable_layers(model), all_modules(model)
    owners = Counter(id(part) for layer in layers.values() for part in _variables(layer))

    def plain(name: str) -> bool:
        layer = layers[name]
        if any(owners[id(part)] > 1 for part in _variables(layer)):
            return False
        return type(layer) in (nnx.Linear, nnx.BatchNorm) or (
            name in convs and layer.feature_group_count == 1 and layer.mask is None
        )

    found = {name: link for name, link in links.items() if all(map(plain, (name, *link)))}
    if not found:
        raise UserError(
            f"config.model is {config.model!r}; it has no filters that can leave alone, for static"
            " pruning"
        )
    return found


def try_removal(
    config: Config, model: Any, links: Links, ratios: Mapping[str, float], image: Any
) -> None:
    """Tries whether somebody's own model takes the removal of filters.

    With weights and an image drawn anew it must answer as one that computes them all and whose
    readers pass over them; else its code counts its channels, or knows their places.

    Args:
      config: a checked config.
      model: from `build_model`.
      links: from `removable`.
      ratios: by convolution, as for `remove_filters`.
      image: a batch of one, or its shape and dtype.

    Raises:
      UserError: if it does not.
    """
    if type(model) in LINKED:
        return
    said = (
        f"config.model is {config.model!r}; static pruning can remove none of its filters, for its"
        " code counts on all of them"
    )
    rng = np.random.default_rng(0)
    whole = nnx.clone(model)
    state = nnx.state(whole, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(whole, jax.tree.map(lambda array: drawn(rng, array, weight=True), state))
    whole.eval()
    image = drawn(rng, image, weight=False)
    layers = all_modules(whole)
    call = nnx.jit(lambda model, image: model(image))
    for _ in range(_TRIALS):
        scores = {name: rng.random(layers[name].out_features) for name in links}
        kept = _lowest_removed(scores, ratios)
        small = _narrowed(whole, links, kept)
        try:
            found, expected = call(small, image), call(_silenced(whole, links, kept), image)
            small.train()
            nnx.eval_shape(lambda small, image: small(image), small, image)
        except Exception as error:  # whatever code of somebody else's raises
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{said}: {reason}") from error
        apart = float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
        if not apart < (1e-3 if config.dtype == "float32" else 0.1):
            raise UserError(f"{said}: without them it answers as another model")


def _variables(layer: Any) -> list[Any]:
    return [part for part in vars(layer).values() if isinstance(part, nnx.Variable)]


def allot(
    model: Any, links: Links, image: Any, mac_reduction: float, shares: dict[str, float]
) -> dict[str, float]:
    """The ratio of every convolution with which a model loses that fraction of its MACs.

    Args:
      model: any, of these links.
      links: from `removable`.
      image: a batch of one, or its shape and dtype.
      mac_reduction: of the whole network, conventional.
      shares: by convolution; its ratio is this times a common factor, at most 0.95.

    Returns:
      The ratios, with the smallest factor that reaches the reduction.

    Raises:
      ValueError: if none does.
    """
    if not any(shares.values()):
        raise ValueError("no removal of filters is asked for: all shares are 0")
    usage = nnx.eval_shape(lambda model, image: measure(model, image)[1], model, image)
    layers = all_modules(model)
    filters = {name: layers[name].out_features for name in links}
    whole: Counter[str] = Counter()
    for layer in usage.layers:  # one that is called again is there again
        whole[layer.name] += layer.dense_macs

    def at(factor: float) -> dict[str, float]:
        return {name: scaled(share, factor) for name, share in shares.items()}

    def reaches(factor: float) -> bool:
        macs, ratios = dict(whole), at(factor)
        for name, n in filters.items():
            for layer in (name, links[name][1]):  # one makes n maps, the other reads them
                macs[layer] = macs[layer] * _kept(n, ratios[name]) // n
        left = usage.other_macs + sum(macs.values())
        return 1.0 - left / usage.dense_macs >= mac_reduction - 1e-9

    factor = least_factor(shares.values(), reaches)
    if factor is None:
        raise ValueError(f"no removal of filters takes {mac_reduction:.1%} of the MACs away")
    return at(factor)


def static(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains the static counterpart of a config's dynamic network, and evaluates it.

    The dense network comes from the dense phase, or from `config.prune.checkpoint`. Filters are
    removed until as many MACs are gone as the config's gates skip, all at once; what is left is
    trained as `config.prune` says. With `config.static.criterion` of `none` nothing is removed.
    Otherwise every convolution loses the same fraction of its filters, or with
    `config.static.allotment` of `gate` one in proportion to the channel ratio of the gate that
    skips them: of its own block where gates are predicted, of the block that reads them where
    they go by attention. Writes `report.json`.

    Returns:
      The content of `report.json`.

    Raises:
      UserError: for a mistake in the config, the data or the work directory.
    """
    started = time.perf_counter()
    run = Run.open(config, workdir)
    if run.dynamic is None or config.prune.start == "scratch":
        raise UserError(
            f"config.prune.epochs is {config.prune.epochs} and config.prune.start is"
            f" {config.prune.start!r}; --mode=static prunes a dense network: it needs epochs, and"
            " a start from dense or checkpoint"
        )
    image = run.one_image
    model: Any = run.dense.bind(run.dense.weights)
    model.eval()
    links, ratios = {}, {}
    if config.static.criterion != "none":  # before anything is trained: no weights matter
        found = run.links or all_links(config, model, run.dataset.channels)
        links = removable(config, model, found)
        allotted = shares(config, links)
        try:
            ratios = allot(model, links, image, run.mac_reduction(), allotted)
        except ValueError as error:
            raise UserError(f"config.static.allotment: {error}") from error
        try_removal(config, model, links, ratios, image)
    dense, timings = train_dense(run)
    assert dense is not None  # checked above
    model = run.dense.bind(dense)
    model.eval()
    scores = CRITERIA[config.static.criterion](model, links, run)
    small = remove_filters(model, links, scores, ratios)
    small.train()
    network = Network(small)
    teacher = dense if config.prune.distillation else None
    pruned, timings["prune"] = run_phase(
        run, "prune", network, network.weights, teacher, config.static.criterion
    )
    whole, left_over = run.evaluate(run.dense, dense), run.evaluate(network, pruned)
    cascades = config.cascade.shares if any(ratios.values()) else ()
    report = {
        "dense": whole.summary(),
        "pruned": left_over.summary(),
        "cascade": [cascaded(left_over, whole, share) for share in cascades],
        "pruned_without_training": run.evaluate(network, network.weights).summary(),
        "criterion": config.static.criterion,
        "filters": {
            name: {"kept": len(kept), "ratio": ratios[name]}
            for name, kept in _filters(small, links)
        },
        "dense_macs_per_image": dense_macs(model, image),
        "parameters_digest": tree_digest(pruned),
        **provenance(run),
        "phases": timings,
        "seconds": time.perf_counter() - started,
    }
    for name in ("pruned", "pruned_without_training"):  # counted against the dense network
        for part in ("", "executed_"):
            left = report[name][f"{part}macs_per_image"]["mean"]
            whole = report["dense"][f"{part}macs_per_image"]["mean"]
            report[name][f"{part}mac_reduction"] = 1.0 - left / whole
    write_json(run.workdir / "report.json", report)
    screen().print(
        f"{config.model} on {config.data.name}, filters by {config.static.criterion}: accuracy"
        f" {report['dense']['accuracy']:.4f} dense, {report['pruned']['accuracy']:.4f} with"
        f" {report['pruned']['mac_reduction']:.1%} of the MACs removed"
        f" ({report['pruned_without_training']['accuracy']:.4f} before training)",
        highlight=False,
        soft_wrap=True,
    )
    return report


def shares(config: Config, links: Links) -> dict[str, float]:
    """What each convolution's filters lose, as a config allots it, up to a common factor.

    Where that goes by the gates' ratios, of those that skip the filters: predicted ones are where
    the filters are, others in front of what reads them. What is read outside of the blocks has the
    ratio of its own, and what is in no block loses nothing.

    Raises:
      UserError: where it is to go by ratios and there are none.
    """
    if config.static.allotment != "gate":
        return dict.fromkeys(links, 1.0)
    given = config.gate.channel_ratio
    if not any(given):
        raise UserError(
            "config.static.allotment is 'gate' and config.gate.channel_ratio is"
            f" {given}; give ratios, or choose uniform"
        )
    predicted = config.gate.kind == "predicted"
    found = {}
    for name, (_, reader) in links.items():
        blocks = [block_of(name)] if predicted else [block_of(reader), block_of(name)]
        found[name] = next((given[block] for block in blocks if block is not None), 0.0)
    return found


def block_of(name: str) -> int | None:
    """Which entry of `model.blocks` a layer of that name is in."""
    first, index, *_ = [*name.split("/"), ""]
    return int(index) if first == "blocks" else None


def _kept(n: int, ratio: float) -> int:
    """How many of n filters are left: `kept_count` in Python's numbers, which compile nothing."""
    return max(n - int(ratio * n + 1e-6), 1)


def _filters(model: Any, links: Links) -> Iterator[tuple[str, np.ndarray]]:
    """The convolutions whose filters can leave, and each one's filters as rows."""
    layers = all_modules(model)
    for name in links:
        kernel = np.asarray(layers[name].kernel[...], np.float32)
        yield name, kernel.reshape(-1, kernel.shape[-1]).T
