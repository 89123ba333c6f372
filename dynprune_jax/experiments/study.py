"""A study: one config trained over seeds, cuts, methods and ablations, as files and one table.

Every run is trained from its seed's dense network with the same schedule and budget, at the same
cut. A finished run is one small JSON file and is not run again, so a study goes on where it was
stopped, and several processes may share one over their seeds. Its folder keeps the config, and is
refused to another.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dynprune_jax import config as config_lib
from dynprune_jax import plots, processes
from dynprune_jax.config import Config, with_fields
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.static import find_removable, removed, static
from dynprune_jax.flags import spelled_out
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.ratios import least_factor, scaled
from dynprune_jax.run import Run
from dynprune_jax.train import train_and_evaluate
from dynprune_jax.workdir import (
    FREE_FIELDS,
    PLACES,
    check_workdir,
    folder_of,
    keep_config,
    make_folder,
)
from dynprune_jax.writers import say, write_json, write_text


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a study.

    Attributes:
      label: in tables and figures.
      fields: of the config that differ. A single number for a tuple of ratios is one for each
        block.
      run: what trains and evaluates it.
    """

    label: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run: Callable[[Config, Any], dict[str, Any]] = train_and_evaluate

    @property
    def removes(self) -> bool:
        """Whether it removes filters."""
        return self.run is static and self.fields.get("static.criterion") != "none"


# A study names any of these, or several joined by a plus: "predicted+distillation".
METHODS = {
    "attention": Method("dynamic, by attention"),
    # The patterns of a config are those of the convolutions with a gate in front.
    "predicted": Method("dynamic, predicted", {"gate.kind": "predicted", "gate.layers": ("*",)}),
    "unscaled": Method("whose salience only ranks", {"gate.salience_scales": False}),
    "groups": Method("channels in groups of 8", {"gate.channel_group": 8}),
    "l1": Method("static, L1 norm", {"static.criterion": "l1"}, static),
    "geometric_median": Method(
        "static, geometric median", {"static.criterion": "geometric_median"}, static
    ),
    "taylor": Method("static, Taylor", {"static.criterion": "taylor"}, static),
    # With a criterion: "l1+as_predicted". Gates by attention need higher ratios for a cut, up to
    # the highest there are, so that filters allotted as these are more alike in all blocks.
    "as_gates": Method("allotted as gates by attention", {"static.allotment": "gate"}),
    "as_predicted": Method(
        "allotted as predicted gates",
        {"static.allotment": "gate", "gate.kind": "predicted", "gate.layers": ("*",)},
    ),
    "random_filters": Method("static, random", {"static.criterion": "random"}, static),
    # Whatever the cut: what more training, or a teacher, does without any pruning.
    "trained_on": Method("dense, trained on", {"static.criterion": "none"}, static),
    "random": Method("random selection", {"gate.criterion": "random"}),
    "inverse": Method("inverse selection", {"gate.criterion": "inverse"}),
    "shared": Method("one choice for all inputs of a batch", {"gate.criterion": "shared"}),
    "max": Method("attention by maximum", {"gate.statistic": "max"}),
    "l2": Method("attention by L2 norm", {"gate.statistic": "l2"}),
    "channels": Method("channels only", {"gate.column_ratio": ()}),
    "columns": Method("columns only", {"gate.channel_ratio": (), "gate.column_ratio": 0.5}),
    "both": Method("channels and columns", {"gate.column_ratio": 0.5}),
    "block_columns": Method(
        "columns chosen once a block",
        {"gate.column_ratio": 0.3, "gate.block_columns": True},
    ),
    "all_layers": Method("gates on every convolution", {"gate.layers": ("*",)}),
    "no_dropout": Method("trained as long without dropout", {"gate.drop_probability": 0.0}),
    "stochastic": Method("targets dropped with probability .5", {"gate.drop_probability": 0.5}),
    "no_ascent": Method("no ascent of the ratios", {"ascent.warmup": 0.99}),
    # At the cut; --mode=sweep in the run's folder has the other ratios.
    "elastic": Method(
        "one network for all ratios up to it, batch statistics made anew",
        {"ascent.lowest_fraction": 0.0, "prune.recalibration_images": 2000},
    ),
    "distillation": Method("distilled from the dense network", {"prune.distillation": 0.7}),
}
# Of a result.
_NEEDED = {"method", "cut", "seed", "accuracy", "mac_reduction", "config", "data"}
_NOT_MEASURED = "not measured"
_EXECUTED = "executed_mac_reduction"
# Of gates, what tells how many filters of each block they would leave.
_ALLOTTING = tuple(
    f"gate.{field}"
    for field in ("kind", "layers", "channel_ratio", "column_ratio", "block_columns")
)
_PATHS = (*PLACES, "data.archive", "data.data_dir")  # of one machine


def find_method(name: str) -> Method:
    """One of `METHODS`, or what several of them joined by a plus make together.

    Raises:
      KeyError: for a name that is none of them.
      UserError: for methods that contradict each other, allot filters and remove none, or change
        gates that are not there because filters are removed.
    """
    parts = [METHODS[part] for part in name.split("+")]
    fields: dict[str, Any] = {}
    for part in parts:
        for field in fields.keys() & part.fields.keys():
            if fields[field] != part.fields[field]:
                raise UserError(f"the methods {name} contradict each other in config.{field}")
        fields.update(part.fields)
    run = next((part.run for part in parts if part.run is static), train_and_evaluate)
    if "static.allotment" in fields and fields.get("static.criterion", "none") == "none":
        raise UserError(f"the method {name} needs one that removes filters, such as l1+{name}")
    allotting = _ALLOTTING if "static.allotment" in fields else ()
    of_gates = [field for field in fields if field.startswith(("gate.", "ascent."))]
    of_gates = [field for field in of_gates if field not in allotting]
    if run is static and of_gates:
        raise UserError(
            f"the method {name} removes filters and has no gates; config.{of_gates[0]} is theirs"
        )
    return Method(", ".join(part.label for part in parts), fields, run)


def study(config: Config, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Runs what is missing of a study, then writes its table and its figures.

    For each of `config.study.seeds`: the dense network; each of `config.study.methods` at each of
    `config.study.cuts`; each of `config.study.ablations` at `config.study.ablation_cut`. A
    method's gates get the config's ratios times the factor that makes the cut, at most 0.95;
    where `config.gate.layers` cannot make it, every convolution gets a gate.

    Writes, in the work directory, `METHOD-CUT-seedSEED.json` for each run, `table.md`,
    `curves.png`, `ablations.png` and `config.json`; the runs themselves are under `runs`.

    Returns:
      The rows: the content of all the JSON files in the work directory.

    Raises:
      UserError: for a mistake in the config, the data or the work directory, before anything is
        trained; at the end, with all else done, for runs that failed, and for cuts that a method
        cannot make, or whose ratios would not be reached by the end of the training: a line
        tells of these before it begins.
    """
    config_lib.check(config)
    methods, ablations = config.study.methods, config.study.ablations
    for field in ("methods", "ablations"):
        for name in config.study[field]:
            if not METHODS.keys() >= {*name.split("+")}:
                raise UserError(
                    f"config.study.{field} has {name!r}; choose of {', '.join(METHODS)},"
                    " or join several by a plus"
                )
            find_method(name)
    processes.check_alone("study")
    folder = folder_of(workdir)
    if not config.prune.epochs:
        raise UserError("config.prune.epochs is 0; a study trains pruned networks: it needs epochs")
    free = {*FREE_FIELDS, *PLACES, "seed"}
    free -= {"eval_batch_size", "prune.recalibration_images"}  # rows are compared
    check_workdir(config, folder, free=free)
    if (folder / "checkpoints").exists():
        raise UserError(f"--workdir={folder} is a run's; give a study a folder of its own")
    read_rows(folder)
    with tempfile.TemporaryDirectory() as nobodys:
        opened = Run.open(config, nobodys)  # a mistake leaves nothing behind
    if any(find_method(name).removes for name in (*methods, *ablations)):
        find_removable(config, opened.model, opened.dataset.channels, opened.links)
    make_folder(folder)
    keep_config(config, folder)
    grid = [(name, cut) for name in methods for cut in config.study.cuts]
    grid += [(name, config.study.ablation_cut) for name in ablations]
    grid = [*dict.fromkeys(grid)]
    runs_of = {seed: _runs(config, seed, grid, folder / "runs") for seed in config.study.seeds}
    names = [name for runs in runs_of.values() for name in runs]
    missing = {name for name in names if not (folder / f"{name}.json").exists()}
    told = f"{len(names)} runs, of which {len(names) - len(missing)} are done"
    say(told)
    failed: dict[str, UserError] = {}

    def fails(run: str, error: UserError) -> None:  # of one method, cut or seed
        failed[run] = error
        say(f"{run}: {error}")

    for point, error in _impossible(
        config, (p for p in grid if any(_run_name(p, seed) in missing for seed in runs_of))
    ):
        fails(_run_name(point), error)
    for seed, runs in runs_of.items():
        for run, call in runs.items():
            if run.removesuffix(f"-seed{seed}") in failed:
                continue
            try:
                if not (folder / f"{run}.json").exists():  # another process may have done it
                    say(f"run {names.index(run) + 1} of {len(names)}: {run}")
                    write_json(folder / f"{run}.json", call())
            except UserError as error:  # the others can be had
                fails(run, error)
                if run == next(iter(runs)):  # the dense network that all others start from
                    break
    rows = read_rows(folder)
    text = "\n\n".join(tables(rows)) + "\n"
    write_text(folder / "table.md", text)
    for name, figure in figures(rows).items():
        plots.save(figure, folder / f"{name}.png")
    say(text)
    if failed:
        run, error = next(iter(failed.items()))
        raise UserError(f"not done: {', '.join(failed)}; {run}: {error}")
    return rows


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


def at_cut(config: Config, cut: float) -> Config:
    """The config with its gates' ratios scaled to a conventional MAC reduction.

    Args:
      config: with a gate on anything.
      cut: of the whole network, in (0, 1).

    Raises:
      UserError: if no factor makes that cut.
    """
    most = 0.0
    for layers in dict.fromkeys((tuple(config.gate.layers), ("*",))):
        changed = copy.deepcopy(config)
        changed.gate.layers = layers
        with tempfile.TemporaryDirectory() as nobodys:
            run = Run.open(changed, nobodys)
        if run.dynamic is None:
            break
        targets = {name: float(ratio) for name, ratio in run.dynamic.values(PruneRatio).items()}
        reaches = functools.partial(_reaches, run, targets, cut)
        factor = least_factor(targets.values(), reaches)
        if factor is not None:
            for axis in ("channel_ratio", "column_ratio"):
                changed.gate[axis] = tuple(scaled(r, factor) for r in changed.gate[axis])
            return changed
        most = run.mac_reduction({name: scaled(r, 1e9) for name, r in targets.items()})
    raise UserError(
        f"config.study: no factor on the ratios {config.gate.channel_ratio} and"
        f" {config.gate.column_ratio} cuts {cut:.0%} of the MACs; the highest cut {most:.1%}"
    )


def _reaches(run: Run, targets: Mapping[str, float], cut: float, factor: float) -> bool:
    return run.mac_reduction({name: scaled(r, factor) for name, r in targets.items()}) >= cut


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A study as Markdown: accuracy by method and cut; all at one cut; controls; cascades.

    The one cut is that of most methods that were run at a single one; all that were run elsewhere
    are in the first table. The controls are the same weights with others chosen than the gates
    would choose: of what the first table has, or if there is none the second, but for what was
    distilled. Of the same methods, what the dense network adds to them where they are not sure,
    with the cut that is left in brackets.

    A cell is the mean over seeds, with the standard deviation where there are several, and the
    reduction that was reached where that is another than the cut, by half a percent or more: a
    column less, or a filter, is the least that a network can lose. A row may
    lack all but its accuracy and MAC reduction, as of a run that was cut off before its report.
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
        executed = [row[_EXECUTED] for row in chosen if _EXECUTED in row]
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
    for name, label in names.items():
        if {"dense", "distillation"} & {*name.split("+")} or find_method(name).run is static:
            continue
        for cut in sorted({row["cut"] for row in rows if row["method"] == name}):
            others = [
                row.get("accuracy_by_other_criteria", {}) for row in rows if _is(row, name, cut)
            ]
            cells = [
                _cell([other[control] for other in others if control in other])
                for control in ("shared", "random", "inverse")
            ]
            lines.append([label, f"{cut:.0%}", _cell(_accuracies(rows, name, cut)), *cells])
    header = [
        "weights trained for",
        "cut",
        "its own choice",
        "one for a batch",
        "random",
        "inverse",
    ]
    return _markdown(header, lines)


def _cascades(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """A table of what methods do if the dense network sees what they are least sure of again."""
    having = [(row, row.get("cascade", ())) for row in rows if row["method"] in names]
    # Two digits: what came out is the share that was asked for but for a part of an image.
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


def _runs(
    config: Config, seed: int, grid: Sequence[tuple[str, float]], folder: Path
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The runs of one seed by name, the dense network's first."""
    dense = folder / f"dense-seed{seed}"
    runs = {dense.name: functools.partial(_dense, config, seed, dense)}
    for name, cut in grid:
        run = _run_name((name, cut), seed)
        runs[run] = functools.partial(_pruned, config, name, cut, seed, dense, folder / run)
    return runs


def _run_name(point: tuple[str, float], seed: int | None = None) -> str:
    """What the run of a method at a cut is called; without a seed, what those of all are."""
    name, cut = point
    return f"{name}-{cut * 100:g}" + ("" if seed is None else f"-seed{seed}")


def _impossible(
    config: Config, points: Iterable[tuple[str, float]]
) -> Iterator[tuple[tuple[str, float], UserError]]:
    """Which methods cannot make which cuts, as far as weights that are not trained tell.

    Of each method the highest cuts are looked at, until one can be made by the convolutions of
    `config.gate.layers`: so can the lower ones. What columns leave that a block shares depends on
    the weights.
    """
    possible = set()
    for name, cut in sorted(points, key=lambda point: -point[1]):
        gate = with_fields(config, find_method(name).fields).gate
        if name in possible or gate.block_columns:
            continue
        try:
            changed = _at_point(config, name, cut, {})
            with tempfile.TemporaryDirectory() as nobodys:
                run = Run.open(changed, nobodys)
            if find_method(name).run is static:
                removed(run)
            else:
                run.check_ascent()
        except UserError as error:
            yield (name, cut), error
        else:
            if changed.gate.layers == gate.layers:
                possible.add(name)


def _at_point(config: Config, name: str, cut: float, start: Mapping[str, Any]) -> Config:
    """The config of a method at a cut; what leaves the network whole makes none."""
    method = find_method(name)
    changed = with_fields(config, {**start, **method.fields})
    return changed if method.run is static and not method.removes else at_cut(changed, cut)


def _dense(config: Config, seed: int, workdir: Path) -> dict[str, Any]:
    changed = with_fields(config, {"seed": seed, "prune.epochs": 0})
    report = train_and_evaluate(changed, workdir)
    return _row("dense", 0.0, changed, report, report["dense"], report["dense"])


def _pruned(
    config: Config, name: str, cut: float, seed: int, dense: Path, workdir: Path
) -> dict[str, Any]:
    method = find_method(name)
    start = {"seed": seed, "prune.start": "checkpoint", "prune.checkpoint": str(dense)}
    changed = _at_point(config, name, cut, start)
    report = method.run(changed, workdir)
    kind = "training" if method.run is static else "targeted_dropout"
    untrained = report[f"pruned_without_{kind}"]
    row = _row(name, cut, changed, report, report["pruned"], untrained)
    others = report.get("pruned_by_other_criteria", {})
    row["accuracy_by_other_criteria"] = {k: other["accuracy"] for k, other in others.items()}
    told = ("share", "threshold", "accuracy", "mac_reduction", "executed_mac_reduction")
    row["cascade"] = [{key: found[key] for key in told} for found in report["cascade"]]
    return row


def _row(
    name: str,
    cut: float,
    config: Config,
    report: Mapping[str, Any],
    result: Mapping[str, Any],
    untrained: Mapping[str, Any],
) -> dict[str, Any]:
    kept = ("accuracy", "mac_reduction", _EXECUTED, "macs_per_image")
    kept += ("gate_operations_per_image", "executed_macs_per_image")
    told = ("dense_macs_per_image", "device", "versions", "data", "seconds")
    fields = config_lib.flatten(config)
    for path in _PATHS:
        fields.pop(path)
    return {
        "method": name,
        "cut": cut,
        "seed": config.seed,
        **{key: result[key] for key in kept},
        "accuracy_untrained": untrained["accuracy"],
        **{key: report[key] for key in told},
        "command": command(name, cut, config),
        "config": {key: value for key, value in fields.items() if not key.startswith("study.")},
    }


def command(name: str, cut: float, config: Config) -> str | None:
    """What repeats one run of a study and its dense network; None for no config file's."""
    given = spelled_out(sys.argv)
    file = next((arg for arg in given if arg.startswith("--config=")), None)
    if file is None:
        return None
    data = [f"--config.data.name={config.data.name}"]
    if config.data.path:
        data.append("--config.data.path=FOLDER")
    if config.data.archive:
        data.append("--config.data.archive=FILE")
    told = tuple(f"--config.{x}" for x in ("data.name=", "study.", *(f"{x}=" for x in _PATHS)))
    others = [a for a in given if a.startswith("--config.") and not a.startswith(told)]
    methods, cuts = ("()", "()") if name == "dense" else (f"('{name}',)", f"({cut},)")
    return (
        f"python -m dynprune_jax.main --mode=study {file} --workdir=DIR"
        f" {shlex.join([*data, *others])}"
        f' "--config.study.seeds=({config.seed},)" "--config.study.methods={methods}"'
        f' "--config.study.cuts={cuts}" "--config.study.ablations=()"'
    )
