"""Accuracy where one block alone is pruned more or less: which blocks can lose how much."""

import os
from typing import Any

import rich.table

from dynprune_jax import plots
from dynprune_jax.config import Config
from dynprune_jax.evaluate import Evaluation
from dynprune_jax.network import Network
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.ratios import set_ratios
from dynprune_jax.run import Run
from dynprune_jax.writers import progress_bar, screen, write_json

_AXES = ("channel_ratio", "column_ratio")


def sensitivity(config: Config, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Evaluates a finished run with the ratio of one block changed, without any training.

    Each ratio of the config that is not 0 takes the values of `config.sensitivity.ratios` and its
    own in turn: on the weights of the dense phase with nothing else pruned, as Li et al. 2017
    (arXiv 1608.08710) do for filters, and on those after targeted dropout with the others at their
    targets. The ratios are traced: all that compiles one program. Writes `sensitivity.json` and
    `sensitivity.png`.

    It is measured on what the run is evaluated on. Ratios that are chosen by it are chosen by those
    images: `config.data.held_out` takes them from the training split.

    Returns:
      A row for each point: `weights`, `block`, `axis`, `ratio`, `accuracy`, `mac_reduction`,
      `executed_mac_reduction`, `recalibration_images`.

    Raises:
      UserError: for a mistake in the config, or if the run is not finished or prunes nothing.
    """
    run = Run.open(config, workdir)
    dynamic = run.gates("this run has no ratios to change")
    trained = run.finished_weights()
    # A block without a gate on an axis has no ratio there: None.
    targets = {
        axis: [ratio or None for ratio in config.gate[axis]]
        for axis in _AXES
        if any(config.gate[axis])
    }
    nothing = {axis: [ratio and 0.0 for ratio in ratios] for axis, ratios in targets.items()}
    points = [
        (weights, axis, block, ratio)
        for weights in trained
        for axis, ratios in targets.items()
        for block, target in enumerate(ratios)
        if target is not None
        for ratio in sorted({*config.sensitivity.ratios, target})
    ]
    known: dict[Any, Evaluation] = {}  # all lines of some weights meet in one point
    rows = []
    with progress_bar("evaluating") as progress:
        for done, (weights, axis, block, ratio) in enumerate(points):
            progress(done, len(points))
            others = nothing if weights == "dense" else targets
            ratios = {name: [*of] for name, of in others.items()}
            ratios[axis][block] = ratio
            point = (weights, *map(tuple, ratios.values()))
            if point not in known:
                model = dynamic.bind()
                set_ratios(model, **ratios)
                given = Network(model).values(PruneRatio)
                known[point] = run.evaluate(dynamic, trained[weights], given)
            result = known[point]
            rows.append(
                {
                    "weights": weights,
                    "block": block,
                    "axis": axis,
                    "ratio": ratio,
                    "accuracy": result.accuracy,
                    "mac_reduction": result.usage.mac_reduction,
                    "executed_mac_reduction": result.usage.executed_mac_reduction,
                    "recalibration_images": run.recalibration_images,
                }
            )
    write_json(run.workdir / "sensitivity.json", rows)
    plots.save(plots.sensitivity_figure(rows), run.workdir / "sensitivity.png")
    _print_table(rows, config)
    return rows


def _print_table(rows: list[dict[str, Any]], config: Config) -> None:
    for weights, axis in dict.fromkeys((row["weights"], row["axis"]) for row in rows):
        curves: dict[int, dict[float, float]] = {}
        for row in rows:
            if (row["weights"], row["axis"]) == (weights, axis):
                curves.setdefault(row["block"], {})[row["ratio"]] = row["accuracy"]
        title = f"Accuracy of {config.model} on {config.data.name}, {weights} weights"
        table = rich.table.Table(title=title)
        table.add_column(axis.replace("_", " "), justify="right")
        for block in curves:
            table.add_column(f"block {block}", justify="right")
        for ratio in sorted({ratio for curve in curves.values() for ratio in curve}):
            found = [curve.get(ratio) for curve in curves.values()]
            table.add_row(f"{ratio:g}", *("" if x is None else f"{x:.4f}" for x in found))
        screen().print(table)
