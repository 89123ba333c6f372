"""Figures: training curves, MACs by layer and image, columns kept, sweeps, sensitivity, speedups.

Each function draws one figure, or returns None where it has nothing to show; `save` writes it.
"""

import io
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from dynprune_jax.writers import write_bytes

# The colours of Okabe and Ito, told apart under every common colour blindness.
_BLUE = "#0072B2"
_SKY = "#56B4E9"
_ORANGE = "#E69F00"
_VERMILION = "#D55E00"
_GREY = "#BBBBBB"
_SKIPPED_RGB = np.array([30, 70, 150])
_SKIPPED_OF_A_PHOTOGRAPH = np.array([150, 0, 110], np.uint8)  # hardly one has this colour
_STYLES = ((_BLUE, "o"), (_ORANGE, "s"), (_VERMILION, "^"), (_SKY, "v"))  # of lines
_TRAINED = {"dense": "dense weights", "dropout": "weights after targeted dropout"}
_MAX_LAYERS_SHOWN = 6

_ACCURACIES = (
    ("train_accuracy", "train accuracy", _SKY, "-", ""),
    ("test_accuracy", "test accuracy", _BLUE, "-", "o"),
)
_RATIOS = (
    ("channel_ratio", "channel ratio", _VERMILION, "--", ""),
    ("column_ratio", "column ratio", _ORANGE, ":", ""),
)


def save(figure: Figure | None, path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all; nothing where there is none."""
    if figure is not None:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=130)
        write_bytes(path, drawn.getvalue())


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def training_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draws accuracy (left axis) and mean prune ratio (right axis) over the steps.

    Args:
      rows: the rows of metrics.jsonl, each with "step" and any of "train_accuracy" and
        "test_accuracy" (fractions), "channel_ratio" and "column_ratio" (fractions removed, mean
        over the gates) and "phase" ("dense" or "prune").

    Returns:
      The figure; its right axis is left out where no row has a ratio. None if no row holds an
      accuracy or a ratio.
    """
    keys = [key for key, *_ in _ACCURACIES + _RATIOS]
    if not any(row.get(key) is not None for row in rows for key in keys):
        return None
    rows = sorted(rows, key=lambda row: row["step"])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.add_subplot()
    left.set_title("Accuracy and prune ratio during training")
    left.set_xlabel("training step")
    left.set_ylabel("accuracy (%)")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    left.grid(axis="y", color="0.9")
    lines = []
    for key, label, color, style, marker in _ACCURACIES:
        steps, values = _series(rows, key)
        if steps:
            lines += left.plot(
                steps, values, style, color=color, label=label, marker=marker, markersize=4
            )
    if any(row.get(key) is not None for row in rows for key, *_ in _RATIOS):
        right = left.twinx()
        right.set_ylabel("prune ratio, mean over gates (% removed)")
        right.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        right.set_ylim(0, 1)
        for key, label, color, style, _ in _RATIOS:
            steps, values = _series(rows, key)
            if steps:
                lines += right.plot(
                    steps, values, style, color=color, label=label, linewidth=2, clip_on=False
                )

    phases = [(row["step"], row["phase"]) for row in rows if row.get("phase") is not None]
    starts = phases[:1] + [now for last, now in pairwise(phases) if now[1] != last[1]]
    edges = [step for step, _ in starts] + [rows[-1]["step"]]
    for (start, phase), end in zip(starts, edges[1:], strict=True):
        if phase == "prune":
            left.axvspan(start, end, color="0.95", zorder=0)
        if start != rows[0]["step"]:
            left.axvline(start, color="0.5", linewidth=1)
        left.annotate(
            f" {phase}",
            (start, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -3),
            textcoords="offset points",
            va="top",
            color="0.35",
        )
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _gate_note(layer: Mapping[str, Any]) -> str:
    """Says what a layer's gate removes, in a few words."""
    names = {"channels": "channel_ratio", "columns": "column_ratio", "outputs": "feature_ratio"}
    ratios = {name: layer.get(field) for name, field in names.items()}
    parts = [f"{name} −{ratio:.0%}" for name, ratio in ratios.items() if ratio is not None]
    return ", ".join(parts) if parts else "no gate"


def layer_macs_figure(layers: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draws each layer's MACs per image, dense and pruned, as horizontal bars.

    Args:
      layers: the layers of report.json in the order of the network, each with "name",
        "dense_macs", "macs", "executed_macs" (MACs per image) and "channel_ratio" and
        "column_ratio" (fractions removed, None where there is no gate).

    Returns:
      The figure, as high as the number of layers asks for; None if there is none.
    """
    if not layers:
        return None
    names = [layer["name"] for layer in layers]
    dense, macs, executed = (
        np.array([layer[key] for layer in layers], np.float64) / 1e6
        for key in ("dense_macs", "macs", "executed_macs")
    )
    figure = Figure(figsize=(9, 1.8 + 0.21 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    at = np.arange(len(layers))
    wide = axes.barh(at, dense, height=0.8, color=_GREY, label="dense")
    thin = axes.barh(at, macs, height=0.5, color=_BLUE, label="pruned: dense × kept shares")
    ticks = axes.plot(
        executed,
        at,
        linestyle="none",
        marker="|",
        markersize=9,
        markeredgewidth=2,
        color=_ORANGE,
        label="pruned: executed taps",
    )
    for i, layer in enumerate(layers):
        axes.annotate(
            _gate_note(layer),
            (max(dense[i], macs[i], executed[i]), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="0.35",
        )
    axes.set_yticks(at, names, fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    axes.set_xlim(0, 1.35 * max(dense.max(), macs.max(), executed.max(), 1e-6))
    axes.set_xlabel("multiply-accumulates per image (millions)")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    share = f" ({1 - macs.sum() / dense.sum():.1%} removed)" if dense.sum() else ""
    axes.set_title(
        f"MACs by layer: {dense.sum():,.1f} M dense, {macs.sum():,.1f} M pruned{share}",
        fontsize=11,
    )
    handles = [wide, thin, *ticks]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def macs_distribution_figure(
    executed_macs: Int[np.ndarray, "examples"], dense_executed_macs: int | np.integer
) -> Figure | None:
    """Draws the histogram of the executed MACs per image beside the dense network's figure.

    Args:
      executed_macs: executed MACs of each image.
      dense_executed_macs: executed MACs of one image with nothing pruned.

    Returns:
      The figure, with the mean marked; None if there is no image.
    """
    if not len(executed_macs):
        return None
    millions = executed_macs / 1e6
    mean, dense = millions.mean(), int(dense_executed_macs) / 1e6
    low, high = millions.min(), millions.max()
    if low == high:
        # One bar, of a width that can be seen, in the place of a range of no width.
        half = 0.02 * abs(low) or 0.5
        edges, view = np.array([low - half, low + half]), (low - 10 * half, low + 10 * half)
    else:
        edges, view = np.linspace(low, high, 41), None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(millions, bins=edges.tolist(), color=_BLUE)
    if view:
        axes.set_xlim(view)
    axes.axvline(mean, color=_VERMILION, linestyle="--", label=f"mean {mean:,.2f} M")
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.set_xlabel("executed multiply-accumulates per image (millions)")
    axes.set_ylabel("number of images")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    share = f" ({1 - mean / dense:.1%} removed)" if dense else ""
    axes.set_title(
        f"Executed MACs of {len(millions):,} images: "
        f"mean {mean:,.1f} M, dense {dense:,.1f} M{share}",
        fontsize=11,
    )
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _tint_skipped(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Darkens the skipped columns to blue, visible on a black ground; of colours, to purple."""
    height, width, _ = image.shape
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    kept = mask[rows[:, None], columns[None, :], None]
    if np.ptp(image, axis=-1).any():  # coloured: what is skipped must not look like sky or sea
        return np.where(kept, image, _SKIPPED_OF_A_PHOTOGRAPH)
    grey = image.mean(axis=-1, keepdims=True)
    return np.where(kept, image, (0.3 * grey + 0.7 * _SKIPPED_RGB).astype(np.uint8))


def kept_columns_figure(
    images: UInt8[np.ndarray, "batch height width channels"],
    masks: Mapping[str, Bool[np.ndarray, "batch _ _"]],
) -> Figure | None:
    """Draws a grid: per image, the image and then the columns that some layers keep of it.

    Args:
      images: grey (one channel) or RGB images, one row of the grid each.
      masks: per layer, in the order of the network, the kept columns of its map of each image.

    Returns:
      The figure, with at most six layers, evenly spread; None if there is no image or no mask.
    """
    if not masks or not len(images):
        return None
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    names = list(masks)
    shown = np.linspace(0, len(names) - 1, min(len(names), _MAX_LAYERS_SHOWN)).round()
    names = [names[int(i)] for i in shown]
    figure = Figure(figsize=(1.7 * (1 + len(names)), 0.8 + 1.7 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(names), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    grid[0, 0].set_title("image", fontsize=7)
    for row, image in zip(grid, images, strict=True):
        row[0].imshow(image)
    for column, name in enumerate(names, start=1):
        mask = masks[name]
        size = f"{mask.shape[1]}×{mask.shape[2]}"
        grid[0, column].set_title(f"{name}\n{size} columns, {mask.mean():.0%} kept", fontsize=7)
        for i, image in enumerate(images):
            grid[i, column].imshow(_tint_skipped(image, mask[i]))
    figure.suptitle(
        "Columns each layer keeps of each image (skipped: dark blue, or purple)", fontsize=10
    )
    return figure


def sweep_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draws accuracy over MAC reduction, one panel for each set of weights.

    Args:
      rows: of sweep.json, each with "weights", "criterion", "mac_reduction", "accuracy".

    Returns:
      The figure, with one line for each criterion; None if there is no row.
    """
    if not rows:
        return None
    weights = list(dict.fromkeys(row["weights"] for row in rows))
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    figure = Figure(figsize=(4.5 * len(weights), 4), layout="constrained")
    panels = figure.subplots(1, len(weights), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, weights, strict=True):
        for i, criterion in enumerate(criteria):
            points = [r for r in rows if (r["weights"], r["criterion"]) == (name, criterion)]
            points.sort(key=lambda row: row["mac_reduction"])
            colour, marker = _STYLES[i % len(_STYLES)]
            axes.plot(
                [row["mac_reduction"] for row in points],
                [row["accuracy"] for row in points],
                color=colour,
                marker=marker,
                label=f"by {criterion}",
            )
        axes.set_title(_TRAINED.get(name, name), fontsize=11)
        _accuracy_over_macs(axes)
    panels[0].set_ylabel("test accuracy")
    panels[-1].legend(loc="lower left", frameon=False)
    return figure


def sensitivity_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draws accuracy over MAC reduction as one block alone is pruned, a panel for each weights.

    Where more MACs are removed than at the point in which all lines meet, the higher of two lines
    is of the block that loses them at less cost; where fewer are, of the one that they cost more.

    Args:
      rows: of sensitivity.json, each with "weights", "block", "axis", "mac_reduction", "accuracy".

    Returns:
      The figure, with one line for each block and axis; None if there is no row.
    """
    if not rows:
        return None
    weights = list(dict.fromkeys(row["weights"] for row in rows))
    names = list(dict.fromkeys(_block_name(row) for row in rows))
    figure = Figure(figsize=(2.0 + 4.0 * len(weights), 4), layout="constrained")
    panels = figure.subplots(1, len(weights), sharey=True, squeeze=False)[0]
    colours = (_BLUE, _ORANGE, _VERMILION, _SKY, "black")
    handles = {}
    for axes, panel in zip(panels, weights, strict=True):
        for name in names:
            points = [r for r in rows if (r["weights"], _block_name(r)) == (panel, name)]
            points.sort(key=lambda row: row["ratio"])
            block = points[0]["block"] % len(colours)
            channels = points[0]["axis"] == "channel_ratio"
            (handles[name],) = axes.plot(
                [row["mac_reduction"] for row in points],
                [row["accuracy"] for row in points],
                color=colours[block],
                linestyle="-" if channels else ":",
                marker="osv^D"[block],
                markerfacecolor=colours[block] if channels else "white",
                label=name,
            )
        others = "unpruned" if panel == "dense" else "at their targets"
        axes.set_title(f"{_TRAINED.get(panel, panel)}\nother blocks {others}", fontsize=11)
        _accuracy_over_macs(axes)
    panels[0].set_ylabel("test accuracy")
    figure.legend(handles=list(handles.values()), loc="outside right center", frameon=False)
    return figure


def _accuracy_over_macs(axes: Axes) -> None:
    axes.set_xlabel("MACs removed (of the whole network)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="0.9")


def cascade_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draws the accuracy of cascades over their MACs, and over their time for each batch size.

    Args:
      rows: of cascade.json, each with "network", "image_size", "dtype", "batch_size", "share",
        "accuracy", "dense_accuracy", "mac_reduction", "compact_ms" and "fastest_dense_ms".

    Returns:
      The figure; None if there is no row.
    """
    if not rows:
        return None
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    figure = Figure(figsize=(1.0 + 3.5 * (1 + len(sizes)), 4.2), layout="constrained")
    figure.suptitle(_network(rows[0]), fontsize=11)
    panels = figure.subplots(1, 1 + len(sizes), sharey=True, squeeze=False)[0]
    for i, axes in enumerate(panels):
        shown = [row for row in rows if row["batch_size"] == sizes[max(i - 1, 0)]]
        if i == 0:
            places = [row["mac_reduction"] for row in shown]
            whole = 0.0
        else:
            places = [row["compact_ms"] / row["batch_size"] for row in shown]
            whole = shown[0]["fastest_dense_ms"] / shown[0]["batch_size"]
        accuracies = [row["accuracy"] for row in shown]
        axes.margins(y=0.1)
        axes.plot(places, accuracies, color=_BLUE, marker="o", label="cascade")
        axes.plot(whole, shown[0]["dense_accuracy"], "s", color="0.3", label="dense", clip_on=False)
        for row, place in zip(shown, places, strict=True):
            axes.annotate(
                f"{row['share']:.0%} again" if row["share"] else "pruned alone",
                (place, row["accuracy"]),
                xytext=(-6, -4) if i == 0 else (6, -4),
                textcoords="offset points",
                ha="right" if i == 0 else "left",
                va="top",
                fontsize=7,
                color="0.35",
            )
        if i == 0:
            _accuracy_over_macs(axes)
            axes.set_ylabel("test accuracy")
            axes.legend(loc="lower left", frameon=False)
        else:
            axes.set_xlabel("milliseconds an image")
            axes.set_xlim(0, 1.25 * max(whole, *places))
            axes.xaxis.set_major_locator(MaxNLocator(4))  # neighbours' ends would run together
            axes.set_title(f"batches of {sizes[i - 1]}", fontsize=10)
            axes.grid(color="0.9")
    return figure


def labelled_images_figure(
    groups: Mapping[str, tuple[UInt8[np.ndarray, "_ height width channels"], Sequence[str]]],
) -> Figure | None:
    """Draws a row of images for each group, with the name of each image above it.

    Args:
      groups: what the images of a row have in common, to grey or RGB images and their names.

    Returns:
      The figure; None if there is no image.
    """
    longest = max((len(images) for images, _ in groups.values()), default=0)
    if not longest:
        return None
    figure = Figure(figsize=(1.3 * longest, 0.3 + 1.7 * len(groups)), layout="constrained")
    for part, (title, (images, names)) in zip(
        figure.subfigures(len(groups), 1, squeeze=False)[:, 0], groups.items(), strict=True
    ):
        part.suptitle(title, fontsize=10)
        places = part.subplots(1, longest, squeeze=False)[0]
        for axes in places:
            axes.set_axis_off()
        for axes, image, name in zip(places[: len(images)], images, names, strict=True):
            axes.imshow(np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image)
            axes.set_title(name, fontsize=8)
    return figure


def _block_name(row: Mapping[str, Any]) -> str:
    """What a block's gates on an axis are called: "block 2, channels"."""
    return f"block {row['block']}, {row['axis'].removesuffix('_ratio')}s"


def curves_figure(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], title: str
) -> Figure | None:
    """Draws accuracy over MAC reduction for some methods of a study, mean and spread over seeds.

    Args:
      rows: of a study, each with "method", "cut", "mac_reduction", "accuracy".
      labels: of the methods to show, what each is called.
      title: what the study is of.

    Returns:
      The figure; the dense network is a line across. None if there is no method to show.
    """
    curves: dict[str, dict[float, list[Any]]] = {}
    for row in rows:
        if row["method"] in labels and row["method"] != "dense":
            curves.setdefault(row["method"], {}).setdefault(row["cut"], []).append(row)
    shown = [name for name in labels if name in curves]
    if not shown:
        return None
    side_by_side = 2 if all(len(labels[name]) < 60 for name in shown) else 1  # legend entries
    height = 4.5 + 0.2 * (1 + len(shown)) / side_by_side
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    dense = [row["accuracy"] for row in rows if row["method"] == "dense"]
    if dense:
        axes.axhline(statistics.mean(dense), color="0.4", linestyle="--", label="dense")
    styles = (*_STYLES, ("0.5", "x"))
    for i, name in enumerate(shown):
        cuts, (colour, marker) = curves[name], styles[i % len(styles)]
        points = [
            ([r["mac_reduction"] for r in cuts[cut]], [r["accuracy"] for r in cuts[cut]])
            for cut in sorted(cuts)
        ]
        axes.errorbar(
            [statistics.mean(x) for x, _ in points],
            [statistics.mean(y) for _, y in points],
            yerr=[statistics.stdev(y) if len(y) > 1 else 0.0 for _, y in points],
            color=colour,
            marker=marker,
            linestyle=("-", ":", "-.")[i // len(styles) % 3],
            linewidth=2.5 if i == 0 else 1.5,
            capsize=3,
            label=labels[name],
            zorder=4 if i == 0 else 3,
        )
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("test accuracy")
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    _accuracy_over_macs(axes)
    figure.legend(loc="outside lower center", ncols=side_by_side, frameon=False, fontsize="small")
    return figure


def ablations_figure(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], cut: float, title: str
) -> Figure | None:
    """Draws the accuracy of each method of a study at one cut.

    Args:
      rows: of a study, each with "method", "cut", "accuracy".
      labels: what each method is called.
      cut: where they are compared.
      title: what the study is of.

    Returns:
      The figure: a bar for each method, in the order of the labels, a dot for each seed. None if
      there is no method at that cut.
    """
    dense = [row["accuracy"] for row in rows if row["method"] == "dense"]
    shown = {
        labels[name]: [r["accuracy"] for r in rows if (r["method"], r["cut"]) == (name, cut)]
        for name in labels
        if name != "dense"
    }
    shown = {label: values for label, values in shown.items() if values}
    if not shown:
        return None
    # Room for the bars beside the longest label, whose letters take about .085 inches each.
    width = 4.0 + 0.085 * max(map(len, shown))
    figure = Figure(figsize=(width, 1.2 + 0.32 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for i, values in enumerate(shown.values()):
        axes.barh(i, statistics.mean(values), color=_BLUE if i == 0 else _SKY, height=0.7)
        axes.plot(values, [i] * len(values), "o", color="0.2", markersize=3.5)
        axes.annotate(
            f"{100 * statistics.mean(values):.1f} ",
            (0, i),
            xytext=(4, 0),
            va="center",
            color="white",
            textcoords="offset points",
            fontsize=9,
        )
    if dense:
        mean = statistics.mean(dense)
        axes.axvline(mean, color="0.4", linestyle="--")
        where = axes.get_xaxis_transform()
        axes.annotate("dense ", (mean, 0.02), xycoords=where, ha="right", color="0.3")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) + 0.2, -0.7)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"test accuracy with {cut:.0%} of the MACs removed")
    figure.suptitle(title, fontsize=10)
    return figure


def speedup_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draws the measured speedup over the MACs removed, beside the ideal and the break-even.

    Args:
      rows: of benchmark.json, each with "network", "image_size", "dtype", "batch_size",
        "mac_reduction" and "speedup".

    Returns:
      The figure, with one line for each batch size; None if there is no row.
    """
    if not rows:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    highest = max(max(row["mac_reduction"] for row in rows), 0.1)
    cuts = np.linspace(0.0, highest, 100)
    axes.plot(cuts, 1 / (1 - cuts), color="0.4", linestyle="--", label="ideal, 1 / (1 − cut)")
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.annotate("as fast as dense", (highest, 1.0), ha="right", va="top", color="0.4", fontsize=9)
    for i, batch in enumerate(dict.fromkeys(row["batch_size"] for row in rows)):
        points = sorted(
            (row["mac_reduction"], row["speedup"]) for row in rows if row["batch_size"] == batch
        )
        colour, marker = _STYLES[i % len(_STYLES)]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"batch {batch}")
    axes.set_title(_network(rows[0]))
    axes.set_xlabel("MACs removed (of the whole network)")
    axes.set_ylabel("speedup over the fastest dense network")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(color="0.9")
    axes.legend(loc="upper left", frameon=False)
    return figure


def _network(row: Mapping[str, Any]) -> str:
    return f"{row['network']}, {row['image_size']}², {row['dtype']}"


def layer_times_figure(dense: Mapping[str, float], compact: Mapping[str, float]) -> Figure | None:
    """Draws the time of each layer, dense and compact, side by side.

    Args:
      dense: milliseconds by layer name, in the order to show.
      compact: the same of the pruned network.

    Returns:
      The figure, as high as the number of layers asks for; None if there is none.
    """
    if not dense:
        return None
    names = list(dense)
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(names))
    for offset, times, colour, label in (
        (-0.2, dense, _GREY, "dense, fastest form"),
        (0.2, compact, _BLUE, "pruned, fastest form"),
    ):
        values = [times.get(name, 0.0) for name in names]
        axes.barh(places + offset, values, 0.4, color=colour, label=label)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a batch, each convolution apart, its masks given")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
