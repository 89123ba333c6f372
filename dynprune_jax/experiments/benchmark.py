"""Skipped work as time: a compact network against the fastest dense one, in one process."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
from flax import nnx

from dynprune_jax import config as config_lib
from dynprune_jax import plots, processes
from dynprune_jax.build import build_dynamic, build_links, build_model, check_channels
from dynprune_jax.config import Config, with_fields
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.other_runtimes import other_runtimes
from dynprune_jax.experiments.static import check_removal, find_removable, l1, shares
from dynprune_jax.experiments.timing import (
    Compiled,
    dense_ways,
    planned,
    setting,
    summary,
    timed,
)
from dynprune_jax.pruning.compact import compact
from dynprune_jax.pruning.folding import fold_batch_norms
from dynprune_jax.pruning.forms import Form
from dynprune_jax.pruning.layers import dynamic_layers
from dynprune_jax.pruning.measure import dense_macs, measure
from dynprune_jax.pruning.plan import Plan
from dynprune_jax.pruning.ratios import Proportions, scaled
from dynprune_jax.pruning.readers import Links
from dynprune_jax.pruning.removal import allot, remove_filters
from dynprune_jax.pruning.time_budget import TimeBudgetError, Trial, fastest_enough
from dynprune_jax.run import Run
from dynprune_jax.workdir import check_workdir, folder_of, make_folder, refuse_study
from dynprune_jax.writers import say, screen, write_json

# (classes, channels) of data sets that need not be at hand where the weights are fresh.
_SETS = {
    "digits": (10, 1),
    "cifar100": (100, 3),
    "imagenet100": (100, 3),
    "imagenet2012": (1000, 3),
}


def benchmark(config: Config, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Times inference: dense in every way at hand, masked, compact, with random masks, and static.

    The weights are those of the finished run in `workdir` or, if there is none, fresh ones: no
    time depends on them. Every batch size is measured at the config's own ratios, and at each of
    `config.benchmark.ratios` on all axes that it gates. All that is compared in a row takes
    turns in one process. Writes `benchmark.json`, the plans, `speedup.png` and, for each batch
    size, `layer_times_batch_N.png`. With `config.benchmark.milliseconds` the config's ratios are
    first scaled, all by one factor, until the compact network takes no more.

    Returns:
      Rows with `timing.setting`, the gates' ratios, groups and patches and their `mac_reduction`,
      medians in milliseconds a batch (`fastest_dense_ms`, `masked_ms`, `compact_ms`, of the
      config's own ratios also `random_masks_ms` and, where filters can go as far, `static_ms`: of
      filters removed by L1 norms as `config.static.allotment` says, with the
      `static_mac_reduction` that came of it), every dense way's (`dense_ms`) and other runtime's
      (`other_runtimes_ms`, and of the static network `static_other_runtimes_ms`), quartiles,
      `images_per_second`, `speedup` over the fastest dense way in JAX, `ideal_speedup`,
      `realised` (the share of the ideal), the largest difference between the logits of compact
      and masked execution, and the memory that XLA plans for, in MB (what the kernels take
      besides is a share of the second level cache for each thread).

    Raises:
      UserError: for a mistake in the config.
    """
    config_lib.check(config)
    if not any((*config.gate.channel_ratio, *config.gate.column_ratio)):
        raise UserError(
            "config.gate.channel_ratio and config.gate.column_ratio prune nothing; there is"
            " nothing to compare"
        )
    processes.check_alone("benchmark")
    folder = folder_of(workdir)
    check_workdir(config, folder)
    refuse_study(folder)
    model, channels = _trained_or_fresh(config, folder)
    model.eval()
    # A mistake shows before the first minute.
    links = build_links(config, model, channels)
    at_ratios = [_at(config, ratio) for ratio in config.benchmark.ratios]
    for each in (config, *at_ratios):
        build_dynamic(each, model, links)
    try:
        removable = find_removable(config, model, channels, links)
    except UserError as error:  # a network of somebody's own
        say(f"static network left out: {error}")
        removable = {}
    if removable:
        shares(config, removable)
    side, dtype = config.data.image_size, config.dtype
    batches = [
        jax.random.normal(jax.random.key(0), (batch_size, side, side, channels)).astype(dtype)
        for batch_size in config.benchmark.batch_sizes
    ]
    if config.benchmark.milliseconds:
        config = _within_budget(config, build_dynamic(config, model, links), batches[0])
    make_folder(folder)
    rows: list[dict[str, Any]] = []
    for images in batches:
        bench = _Bench(config, model, links, removable, images, folder)
        rows += [bench.row(each) for each in at_ratios]
        rows.append(bench.row(config, controls=True))
        write_json(folder / "benchmark.json", rows)
    plots.save(plots.speedup_figure(rows), folder / "speedup.png")
    _print_tables(rows)
    if budget := config.benchmark.milliseconds:
        taken = next(row["compact_ms"] for row in rows if "random_masks_ms" in row)
        say(f"batch {len(batches[0])}: beside the others it takes {taken:.3g} ms, of {budget}")
    return rows


def _at(config: Config, ratio: float) -> Config:
    """The config with one ratio for every block, on the axes that it gates."""
    axes = [axis for axis in ("channel_ratio", "column_ratio") if any(config.gate[axis])]
    return with_fields(config, {f"gate.{axis}": float(ratio) for axis in axes})


def _within_budget(config: Config, model: nnx.Module, images: jax.Array) -> Config:
    """The config with its ratios scaled to `config.benchmark.milliseconds`, found by timing."""
    budget = config.benchmark.milliseconds
    model = _choosing(model)

    def tell(trial: Trial[nnx.Module]) -> None:
        say(f"batch {len(images)}: {trial.milliseconds:.3g} ms at a cut of {trial.cut:.1%}")

    say(f"batch {len(images)}: looking for ratios with which it takes {budget} ms")
    proportions = Proportions(model, images[:1])
    try:
        found = fastest_enough(model, proportions, budget, images, progress=tell)
    except TimeBudgetError as error:
        raise UserError(f"config.benchmark.{error}") from error
    if not found.factor:
        raise UserError(
            f"config.benchmark.milliseconds is {budget}; without pruning the network takes"
            f" {found.milliseconds:.3g}"
        )
    ratios = {
        f"gate.{axis}": tuple(scaled(ratio, found.factor) for ratio in config.gate[axis])
        for axis in ("channel_ratio", "column_ratio")
    }
    flags = " ".join(f'"--config.{field}={value}"' for field, value in ratios.items() if value)
    say(f"{found.milliseconds:.3g} ms with {flags}")
    return with_fields(config, ratios)


class _Bench:
    """One batch size: the dense ways, measured once, and rows against them."""

    def __init__(
        self,
        config: Config,
        model: nnx.Module,
        links: Links,
        removable: Links,
        images: jax.Array,
        folder: Path,
    ):
        self._config, self._model, self._folder = config, model, folder
        self._links, self._removable = links, removable
        self._known: dict[Any, dict[Form, float]] = {}
        self._images = images
        self._dense_plan = self._plan("dense", model)
        ways = dense_ways(model, self._images, self._dense_plan)
        self._dense = {name: self._compile(way) for name, way in ways.items()}

    def row(self, config: Config, controls: bool = False) -> dict[str, Any]:
        """Measures one setting of ratios; with the controls and the other runtimes or without."""
        dynamic = self._dynamic(config)
        dynamic.eval()
        usage = _usage(dynamic, self._images[:1])
        name = f"{usage.mac_reduction:.3f}"
        plan = self._plan(name, dynamic)
        static: nnx.Module | None = None
        ways = {
            "masked": self._compile(fold_batch_norms(dynamic, self._images)),
            "compact": self._compile(compact(dynamic, self._images, plan=plan)),
        }
        extra: dict[str, Any] = {}
        if controls:
            random = self._dynamic(with_fields(config, {"gate.criterion": "random"}))
            ways["random masks"] = self._compile(compact(random, self._images, plan=plan))
            static = self._static(usage.mac_reduction)
            if static is not None:
                left = dense_macs(static, self._images[:1])
                extra["static_mac_reduction"] = float(1.0 - left / usage.dense_macs)
                plan_of_it = self._plan("static", static)
                ways["static"] = self._compile(compact(static, self._images, plan=plan_of_it))
            plots.save(
                plots.layer_times_figure(self._dense_plan.fastest, plan.fastest),
                self._folder / f"layer_times_batch_{len(self._images)}.png",
            )
        repeats = self._config.benchmark.repeats
        seconds = timed(self._dense | ways, repeats, beside=self._dense)
        apart = jnp.max(jnp.abs(ways["compact"]() - ways["masked"]()))
        others = self._others(self._model) if controls else {}
        narrower = {} if static is None or not others else self._others(static)
        # In turns of their own: their threads spin after their work.
        elsewhere = timed(
            others | {f"static, {name}": run for name, run in narrower.items()},
            repeats,
            beside=others,
        )
        row = summary(
            {name: seconds[name] for name in self._dense},
            {name: seconds[name] for name in ways},
            usage.mac_reduction,
            {name: elsewhere[name] for name in others},
        )
        if narrower:
            extra["static_other_runtimes_ms"] = {
                name: 1e3 * statistics.median(elsewhere[f"static, {name}"]) for name in narrower
            }
        return {
            **setting(config, len(self._images)),
            "channel_ratio": list(config.gate.channel_ratio),
            "column_ratio": list(config.gate.column_ratio),
            "channel_group": config.gate.channel_group,
            "column_patch": config.gate.column_patch,
            **row,
            "images_per_second": 1e3 * len(self._images) / row["compact_ms"],
            "largest_difference_of_logits": float(apart),
            **extra,
            "dense_memory_mb": self._dense[row["fastest_dense"]].memory_mb,
            "compact_memory_mb": ways["compact"].memory_mb,
        }

    def _dynamic(self, config: Config) -> nnx.Module:
        return _choosing(build_dynamic(config, self._model, self._links))

    def _plan(self, name: str, model: nnx.Module) -> Plan:
        return planned(name, model, self._images, self._config, self._folder, self._known)

    def _compile(self, model: nnx.Module) -> Compiled:
        return Compiled(model, self._images)

    def _static(self, mac_reduction: float) -> nnx.Module | None:
        """The network with filters removed until as many MACs are gone, where they can be."""
        model, links = self._model, self._removable
        if not links:
            return None
        allotted = shares(self._config, links)
        try:
            ratios = allot(model, links, self._images[:1], mac_reduction, allotted)
            check_removal(self._config, model, links, ratios, self._images[:1])
        except (ValueError, UserError) as error:  # a residual network keeps what its units hand on
            say(f"static network left out: {error}")
            return None
        return remove_filters(model, links, l1(model, links), ratios)

    def _others(self, model: nnx.Module) -> dict[str, Callable[[], Any]]:
        if self._config.dtype != "float32":
            say("other runtimes left out: they are timed in float32 only")
            return {}
        functions, notes = other_runtimes(model, np.asarray(self._images))
        for note in notes:
            say(note)
        return functions


def _trained_or_fresh(config: Config, folder: Path) -> tuple[nnx.Module, int]:
    """The dense model, and how many channels its images have."""
    if (folder / "checkpoints").is_dir():
        run = Run.open(config, folder)
        dense, pruned = run.trained_values()
        values = pruned or dense or {}  # without the parameters of predicted gates
        known = {k: v for k, v in values.items() if k in run.dense.weights}
        return run.dense.bind(known), run.dataset.channels
    classes, channels = _SETS.get(config.data.name, (10, 3))
    if config.data.name in _SETS:
        check_channels(config, channels)
    return build_model(config, classes, channels), channels


def _choosing(model: nnx.Module) -> nnx.Module:
    """Draws the kernels of predicted gates in place: fresh ones are 0 and ignore the input."""
    for i, layer in enumerate(dynamic_layers(model).values()):
        if layer.feature_ratio is not None:
            shape = layer.salience_kernel.shape
            layer.salience_kernel[...] = 0.1 * jax.random.normal(jax.random.key(i), shape)
    return model


def _usage(model: nnx.Module, images: jax.Array) -> Any:
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: measure(nnx.merge(graph, state), x)[1])(state, images)


def _print_tables(rows: list[dict[str, Any]]) -> None:
    first, console = rows[0], screen()
    table = rich.table.Table(
        title=f"{first['network']}, {first['image_size']}² images, {first['dtype']},"
        f" jax {first['versions']['jax']}\n{first['device']};"
        " milliseconds a batch; memory beside dense",
        box=rich.box.SIMPLE_HEAD,
    )
    for column in ("batch", "cut", "dense", "compact", "img/s", "speedup", "ideal", "realised"):
        table.add_column(column, justify="right")
    table.add_column("memory", justify="right")
    for row in rows:
        memory = [row["compact_memory_mb"], row["dense_memory_mb"]]
        table.add_row(
            str(row["batch_size"]),
            f"{row['mac_reduction']:.1%}",
            f"{row['fastest_dense_ms']:.2f}",
            f"{row['compact_ms']:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{row['speedup']:.2f}×",
            f"{row['ideal_speedup']:.2f}×",
            f"{row['realised']:.0%}",
            f"{memory[0] / memory[1]:.2f}×" if all(memory) else "",
        )
    console.print(table)
    own = [row for row in rows if "random_masks_ms" in row]
    table = rich.table.Table(title="Beside them: milliseconds a batch", box=rich.box.SIMPLE_HEAD)
    table.add_column("way")
    for row in own:
        table.add_column(f"batch {row['batch_size']}", justify="right")
    for key in ("dense_ms", "other_runtimes_ms"):
        for name in dict.fromkeys(name for row in own for name in row[key]):
            taken = [row[key].get(name) for row in own]
            table.add_row(f"dense, {name}", *("" if t is None else f"{t:.2f}" for t in taken))
    for name, key in (
        ("masked", "masked_ms"),
        ("compact, random masks", "random_masks_ms"),
        ("static, of equal MACs", "static_ms"),
    ):
        if any(key in row for row in own):
            table.add_row(name, *(f"{row[key]:.2f}" if key in row else "" for row in own))
    static = [row.get("static_other_runtimes_ms", {}) for row in own]
    for name in dict.fromkeys(name for taken in static for name in taken):
        times = (f"{taken[name]:.2f}" if name in taken else "" for taken in static)
        table.add_row(f"static, {name}", *times)
    console.print(table)
