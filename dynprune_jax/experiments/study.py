"""A study: one config trained over seeds, cuts, methods and ablations, as files and one table.

Every run is trained from its seed's dense network with the same schedule and budget, at the same
cut. A finished run is one small JSON file and is not run again, so a study goes on where it was
stopped, and several processes may share one over their seeds. Its folder keeps the config, and is
refused to another.
"""

import copy
import functools
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprune_jax import config as config_lib
from dynprune_jax import plots, processes
from dynprune_jax.config import Config, with_fields
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.methods import METHODS, find_method
from dynprune_jax.experiments.static import find_removable, removed, static
from dynprune_jax.experiments.study_tables import figures, read_rows, tables
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

_PATHS = (*PLACES, "data.archive", "data.data_dir")  # of one machine


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
    opened = _opened(config)
    if any(find_method(name).removes for name in (*methods, *ablations)):
        find_removable(config, opened.model, opened.dataset.channels, opened.links)
    make_folder(folder)
    keep_config(config, folder)
    grid = [(name, cut) for name in methods for cut in config.study.cuts]
    grid += [(name, config.study.ablation_cut) for name in ablations]
    grid, seeds = [*dict.fromkeys(grid)], [*dict.fromkeys(config.study.seeds)]
    runs = [
        (seed, name, call)
        for seed in seeds
        for name, call in _runs(config, seed, grid, folder / "runs").items()
    ]
    missing = {name for _, name, _ in runs if not (folder / f"{name}.json").exists()}
    say(f"{len(runs)} runs, of which {len(runs) - len(missing)} are done")
    failed: dict[str, UserError] = {}

    def fails(run: str, error: UserError) -> None:  # of one method, cut or seed
        failed[run] = error
        say(f"{run}: {error}")

    for point, error in _impossible(
        config, (p for p in grid if any(_run_name(p, seed) in missing for seed in seeds))
    ):
        fails(_run_name(point), error)
    if grid and failed.keys() >= {_run_name(point) for point in grid}:
        runs = []  # nothing would start from the dense networks
    for i, (seed, name, call) in enumerate(runs, 1):
        needed = {name.removesuffix(f"-seed{seed}"), f"dense-seed{seed}"}
        if needed & failed.keys() or (folder / f"{name}.json").exists():  # of another process
            continue
        say(f"run {i} of {len(runs)}: {name}")
        try:
            write_json(folder / f"{name}.json", call())
        except UserError as error:  # the others can be had
            fails(name, error)
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
        run = _opened(changed)
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


def _opened(config: Config) -> Run:
    """A run to ask, in no folder that is kept: a mistake leaves nothing behind."""
    with tempfile.TemporaryDirectory() as nobodys:
        return Run.open(config, nobodys)


def _reaches(run: Run, targets: Mapping[str, float], cut: float, factor: float) -> bool:
    return run.mac_reduction({name: scaled(r, factor) for name, r in targets.items()}) >= cut


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
            run = _opened(changed)
            if find_method(name).is_static:
                removed(run)
            else:
                run.check_ratios()
        except UserError as error:
            yield (name, cut), error
        else:
            if changed.gate.layers == gate.layers:
                possible.add(name)


def _at_point(config: Config, name: str, cut: float, start: Mapping[str, Any]) -> Config:
    """The config of a method at a cut; what leaves the network whole makes none."""
    method = find_method(name)
    changed = with_fields(config, {**start, **method.fields})
    return changed if method.is_static and not method.removes else at_cut(changed, cut)


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
    run, kind = train_and_evaluate, "targeted_dropout"
    if method.is_static:
        run, kind = static, "training"
    report = run(changed, workdir)
    untrained = report[f"pruned_without_{kind}"]
    row = _row(name, cut, changed, report, report["pruned"], untrained)
    others = report.get("pruned_by_other_criteria", {})
    row["accuracy_by_other_criteria"] = {k: other["accuracy"] for k, other in others.items()}
    if plain := report.get("pruned_made_static"):
        row["accuracy_made_static"] = plain["accuracy"]
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
    kept = ("accuracy", "mac_reduction", "executed_mac_reduction", "macs_per_image")
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
        f"python -m dynprune_jax.main --mode=study {shlex.quote(file)} --workdir=DIR"
        f" {shlex.join([*data, *others])}"
        f' "--config.study.seeds=({config.seed},)" "--config.study.methods={methods}"'
        f' "--config.study.cuts={cuts}" "--config.study.ablations=()"'
    )
