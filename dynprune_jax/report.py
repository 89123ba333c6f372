"""The end of a run: its evaluation as report.json, as pictures and as one table."""

import json
import time
from typing import Any

import jax
import numpy as np
import rich.table
from jaxtyping import UInt8

from dynprune_jax import plots, processes
from dynprune_jax.build import evaluation_images
from dynprune_jax.checkpoint import tree_digest
from dynprune_jax.evaluate import Evaluation, cascaded
from dynprune_jax.network import Network, Values
from dynprune_jax.provenance import provenance
from dynprune_jax.pruning.attention import CRITERIA
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.measure import measure
from dynprune_jax.run import Run
from dynprune_jax.writers import progress_bar, read_metrics, say, screen, write_json

_PICTURED_IMAGES = 6


def write_report(
    run: Run,
    dense: Values | None,
    pruned: Values | None,
    timings: dict[str, dict[str, float]] | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Evaluates a run's networks; writes report.json and the pictures; prints the table.

    Args:
      run: the run.
      dense: parameters and batch statistics after the dense phase, or None without one.
      pruned: the same after targeted dropout, or None without one.
      timings: for each phase trained, where its time went. Without them this is an evaluation of
        a run that was trained before, and what the old report says of its training stays.
      started: `time.perf_counter()` when the run began, or was resumed: the report's `seconds`
        are this process's, its `phases` add up over all.

    Returns:
      The content of report.json.
    """
    final = pruned if pruned is not None else dense
    assert final is not None  # config.check has seen to it
    whole = cheap = untrained = plain = None
    controls: dict[str, Evaluation] = {}
    # A list and no set: all processes must evaluate them in the same order.
    others = [name for name in CRITERIA if name != run.config.gate.criterion]
    with progress_bar("evaluating") as progress:
        if dense is not None:
            whole = run.evaluate(run.dense, dense)
        if run.dynamic is not None and pruned is not None:
            total = 4 + len(others)
            progress(1, total)
            cheap = run.evaluate(run.dynamic, pruned)
            progress(2, total)
            if dense is not None:
                untrained = run.evaluate(run.dynamic, run.gated(dense))
            for done, criterion in enumerate(others, 3):
                progress(done, total)
                controls[criterion] = run.evaluate(run.network_with(criterion), pruned)
            progress(total - 1, total)
            if (model := run.made_static(pruned)) is not None:
                network = Network(model)
                plain = run.evaluate(network, network.weights)
    shown = cheap or whole
    assert shown is not None
    report = {
        "dense": whole and whole.summary(),
        "pruned": cheap and cheap.summary(),
        "pruned_without_targeted_dropout": untrained and untrained.summary(),
        "cascade": [
            cascaded(cheap, whole, share) for share in run.config.cascade.shares if cheap and whole
        ],
        "pruned_by_other_criteria": {k: controls[k].summary() for k in sorted(controls)},
        "pruned_made_static": plain and plain.summary(shown.usage),
        "dense_macs_per_image": shown.usage.dense_macs,
        "dense_executed_macs_per_image": shown.usage.dense_executed_macs,
        "layers": _layers(shown, run.dynamic),
        "parameters_digest": tree_digest(final),
        **provenance(run),
        "phases": timings or {},
    }
    pictured = final
    if run.dynamic is not None:  # by all processes: it is computed on the devices of all
        pictured = run.recalibrated(run.dynamic, final)
    if processes.leads():
        _draw(run, report, shown, pictured)
    report["seconds"] = None if started is None else time.perf_counter() - started
    if timings is None:
        report |= _told_of_training(run)
    write_json(run.workdir / "report.json", report)
    _print_table(report, run)
    return report


def _told_of_training(run: Run) -> dict[str, Any]:
    try:
        old = json.loads((run.workdir / "report.json").read_text(encoding="utf-8"))
        told = {"images_per_second", "share_outside_step"}
        if not all(timing.keys() >= told for timing in old["phases"].values()):
            return {}
        kept = {name: old[name] for name in ("command", "phases", "seconds")}
        trained = {name: old[name] for name in ("versions", "device") if name in old}
        return kept | {"trained_with": old.get("trained_with", trained)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not a report
        return {}


def _layers(result: Evaluation, network: Network | None) -> list[dict[str, Any]]:
    ratios = {} if network is None else network.values(PruneRatio)
    rows = []
    for layer in result.usage.layers:
        row = {
            "name": layer.name,
            "dense_macs": layer.dense_macs,
            "dense_executed_macs": layer.dense_executed_macs,
            "macs": float(np.mean(layer.macs)),
            "executed_macs": float(np.mean(layer.executed_macs)),
            "gate_operations": layer.gate_operations,
        }
        for axis in ("channel_ratio", "column_ratio", "feature_ratio"):
            ratio = ratios.get(f"{layer.name}/{axis}")
            row[axis] = None if ratio is None else round(float(ratio), 6)
        rows.append(row)
    return rows


def _draw(run: Run, report: dict[str, Any], shown: Evaluation, values: Values) -> None:
    folder = run.workdir
    usage = shown.usage
    plots.save(plots.training_figure(read_metrics(folder)), folder / "training.png")
    plots.save(plots.layer_macs_figure(report["layers"]), folder / "layer_macs.png")
    plots.save(
        plots.macs_distribution_figure(usage.executed_macs, usage.dense_executed_macs),
        folder / "macs_distribution.png",
    )
    if run.dynamic is not None:
        last = len(run.dataset.test) - 1  # evenly spread: a set may be in the order of classes
        pictured = np.unique(np.linspace(0, last, _PICTURED_IMAGES).round().astype(int))
        images, _ = run.pictures(pictured)
        masks = _kept_columns(run, run.dynamic, values, images)
        plots.save(plots.kept_columns_figure(images, masks), folder / "kept_columns.png")


def _kept_columns(
    run: Run,
    network: Network,
    values: Values,
    images: UInt8[np.ndarray, "batch side side channels"],
) -> dict[str, np.ndarray]:
    """The columns that each layer with a gate on columns keeps: bool (batch, height, width)."""

    @jax.jit  # as one program: there are hundreds of operations, each to be compiled by itself
    def masks(values: Values, images: Any) -> dict[str, Any]:
        model = network.bind(values)
        model.eval()
        _, usage = measure(model, evaluation_images(run.config, images))
        kept = {layer.name: layer.masks.columns for layer in usage.layers}
        return {name: columns for name, columns in kept.items() if columns is not None}

    return jax.device_get(masks(values, images))


def _print_table(report: dict[str, Any], run: Run) -> None:
    table = rich.table.Table(
        title=f"{run.config.model} on {run.config.data.name}: accuracy, and million MACs per image"
    )
    for name in ("", "accuracy", "MMACs", "cut", "executed", "from", "to"):
        table.add_column(name, justify="left" if not name else "right")
    rows = {
        "dense": report["dense"],
        "pruned": report["pruned"],
        "  dense weights": report["pruned_without_targeted_dropout"],
        **{f"  {row['share']:.0%} dense again": row for row in report["cascade"]},
        **{f"  {k} choice": row for k, row in report["pruned_by_other_criteria"].items()},
        "  made static": report["pruned_made_static"],
    }
    for name, row in rows.items():
        if row is None:
            continue
        executed = row["executed_macs_per_image"]
        table.add_row(
            name,
            f"{row['accuracy']:.4f}",
            f"{row['macs_per_image']['mean'] / 1e6:.2f}",
            f"{row['mac_reduction']:.1%}",
            *(f"{executed[part] / 1e6:.2f}" for part in ("mean", "min", "max")),
        )
    screen().print(table)
    gates = (report["pruned"] or {}).get("gate_operations_per_image")
    if gates:
        say(f"The gates themselves cost {gates / 1e6:.3f} M operations.")
    for name, timing in report["phases"].items():
        say(
            f"{name}: {timing['images_per_second']:,.0f} images/s,"
            f" {timing['share_outside_step']:.1%} of the time outside the compiled step"
        )
    say(f"1 MAC = 2 FLOPs. Report, pictures and checkpoints: {run.workdir}")
