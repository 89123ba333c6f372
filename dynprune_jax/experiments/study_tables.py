"""The rows of a study as tables and pictures."""

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dynprune_jax import plots
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.methods import METHODS, find_method

# What every result must have.
_NEEDED = {"method", "cut", "seed", "accuracy", "mac_reduction", "config", "data"}
_NOT_MEASURED = "not measured"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The results in a study's folder, one for each run.

    Raises:
      UserError: for a file that is none.
    """
    rows = []
    for path in sorted(folder.glob("*-seed*.json")):
        try:
            row = json.loads(path.read_text("utf-8"))
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= _NEEDED:
            raise UserError(f"{path} is no result of a study; delete it or move it away")
        rows.append(row)
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A study as Markdown: accuracy by method and cut; all at one cut; controls; cascades.

    The one cut is that of most methods that were run at a single one; all that were run elsewhere
    are in the first table. The controls are the same weights with others chosen than the gates
    would choose: of what the first table has, or if there is none the second, but for what was
    distilled. Of the same methods, what the dense network adds to them where they are not sure,
    with the cut that is left in brackets.

    A cell is the mean over seeds, with the standard deviation where there are several, and the
    reduction that was reached where that is another than the cut, by half a percent or more: a
    column less, or a filter, is the least that a network can lose. A row may lack all that
    `read_rows` does without.
    """
    names, (curves, one) = labels(rows), _arranged(rows)
    own = curves or [*names]
    return [
        *_over_cuts(rows, {name: names[name] for name in curves}),
        *(() if one is None else _at_one_cut(rows, names, curves, one)),
        *_controls(rows, {name: names[name] for name in own}),
        *_cascades(rows, {name: names[name] for name in own}),
    ]


def _over_cuts(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """A table of accuracy by method and cut."""
    cuts = sorted({row["cut"] for row in rows if row["method"] != "dense"})
    dense = _cell(_accuracies(rows, "dense", 0.0))
    lines = []
    for name, label in names.items():
        cells = [_cell(_accuracies(rows, name, cut)) + _reached(rows, name, cut) for cut in cuts]
        lines.append([label, dense, *cells])
    return _markdown(["method", "dense", *(f"{cut:.0%} cut" for cut in cuts)], lines)


def _at_one_cut(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], curves: Sequence[str], cut: float
) -> list[str]:
    """A table of all methods at one cut, those with curves first, else the dense network."""
    shown = [name for name in curves if _accuracies(rows, name, cut)] if curves else ["dense"]
    shown += [name for name in names if name not in (*curves, "dense")]
    lines = []
    for name in shown:
        at = 0.0 if name == "dense" else cut
        chosen = [row for row in rows if _is(row, name, at)]
        told = [row for row in chosen if "executed_mac_reduction" in row]
        executed = [row["executed_mac_reduction"] for row in told]
        untrained = [row["accuracy_untrained"] for row in chosen if "accuracy_untrained" in row]
        lines.append(
            [
                names[name],
                _cell(_accuracies(rows, name, at)) + _reached(rows, name, at),
                "" if name == "dense" else _cell(untrained),
                f"{statistics.mean(executed):.1%}" if executed else _NOT_MEASURED,
            ]
        )
    header = [f"at a cut of {cut:.0%}", "accuracy", "without training for it", "executed cut"]
    return _markdown(header, lines)


def _controls(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """A table of what the same weights do with other choices than their gates'."""
    lines = []
    made_static = any("accuracy_made_static" in row for row in rows)
    for name, label in names.items():
        if {"dense", "distillation"} & {*name.split("+")} or find_method(name).is_static:
            continue
        for cut in sorted({row["cut"] for row in rows if row["method"] == name}):
            others = [
                row.get("accuracy_by_other_criteria", {}) for row in rows if _is(row, name, cut)
            ]
            cells = [
                _cell([other[control] for other in others if control in other])
                for control in ("shared", "random", "inverse")
            ]
            if made_static:
                key = "accuracy_made_static"
                cells.append(_cell([r[key] for r in rows if key in r and _is(r, name, cut)]))
            lines.append([label, f"{cut:.0%}", _cell(_accuracies(rows, name, cut)), *cells])
    header = [
        "weights trained for",
        "cut",
        "its own choice",
        "one for a batch",
        "random",
        "inverse",
    ]
    return _markdown([*header, *(["made static"] if made_static else [])], lines)


def _cascades(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """A table of what methods do if the dense network sees what they are least sure of again."""
    having = [(row, row.get("cascade", ())) for row in rows if row["method"] in names]
    # Two digits: a share is in whole images, so it may be a little less than was asked for.
    shares = sorted({round(found["share"], 2) for _, cascade in having for found in cascade})
    lines = []
    for name, label in names.items():
        cuts = {row["cut"] for row, cascade in having if cascade and row["method"] == name}
        for cut in sorted(cuts):
            alone = [row["accuracy"] for row, found in having if found and _is(row, name, cut)]
            cells = [_cell(alone)]
            for share in shares:
                chosen = [
                    found
                    for row, cascade in having
                    for found in cascade
                    if _is(row, name, cut) and round(found["share"], 2) == share
                ]
                reached = [found["mac_reduction"] for found in chosen]
                told = f" ({statistics.mean(reached):.1%})" if chosen else ""
                cells.append(_cell([found["accuracy"] for found in chosen]) + told)
            lines.append([label, f"{cut:.0%}", *cells])
    told = [f"the least sure {share:.0%}" for share in shares]
    return _markdown(["the dense network sees again", "cut", "none", *told], lines)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table; none where it would have no line."""
    if not lines:
        return []
    rows = [f"| {' | '.join(cells)} |" for cells in (header, *lines)]
    return ["\n".join([rows[0], "|" + "---|" * len(header), *rows[1:]])]


def _is(row: Mapping[str, Any], name: str, cut: float) -> bool:
    return (row["method"], row["cut"]) == (name, cut)


def _accuracies(rows: Sequence[Mapping[str, Any]], name: str, cut: float) -> list[float]:
    return [row["accuracy"] for row in rows if _is(row, name, cut)]


def _reached(rows: Sequence[Mapping[str, Any]], name: str, cut: float) -> str:
    """The reduction that a method's rows have at a cut, in brackets, where it is another."""
    found = [row["mac_reduction"] for row in rows if _is(row, name, cut)]
    mean = statistics.mean(found) if found else cut
    return f" ({mean:.1%})" if abs(mean - cut) >= 0.005 else ""


def _cell(values: Sequence[float]) -> str:
    if not values:
        return _NOT_MEASURED
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure | None]:
    """A study as pictures: `curves` of the first table of `tables`, `ablations` of the second."""
    names, (curves, one), title = labels(rows), _arranged(rows), _title(rows)
    shown = {name: names[name] for name in ("dense", *curves)}
    return {
        "curves": plots.curves_figure(rows, shown, title),
        "ablations": None if one is None else plots.ablations_figure(rows, names, one, title),
    }


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a study is of, in a line."""
    if not rows:
        return ""
    config, data = rows[0]["config"], rows[0]["data"]
    size, seeds = config["data.image_size"], len({row["seed"] for row in rows})
    return (
        f"{config['model']}, {size}², {data['classes']} classes,"
        f" {data['train_examples']:,} training images, {seeds} seed{'s' * (seeds > 1)}"
    )


def _arranged(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], float | None]:
    """Which methods are shown over their cuts, and the one cut at which all are compared."""
    names = [name for name in labels(rows) if name != "dense"]
    cuts_of = {name: {r["cut"] for r in rows if r["method"] == name} for name in names}
    ones = [min(cuts) for cuts in cuts_of.values() if len(cuts) == 1]
    one = statistics.mode(ones) if ones else None
    return [name for name in names if cuts_of[name] - {one}], one


def labels(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each method of some rows is called in tables and figures, in the order of `METHODS`.

    Rows of a method that is not there any more have no label, and are shown nowhere.
    """
    order = {name: i for i, name in enumerate(METHODS)}
    names = {row["method"] for row in rows} - {"dense"}
    found = {"dense": "dense"}
    for name in sorted(names, key=lambda name: [order.get(part, -1) for part in name.split("+")]):
        with contextlib.suppress(KeyError, UserError):
            found[name] = find_method(name).label
    return found
