"""Work directories: whose one is, and which fields of a config may differ in it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dynprune_jax import config as config_lib
from dynprune_jax import processes
from dynprune_jax.config import Config
from dynprune_jax.errors import UserError
from dynprune_jax.writers import write_json

# What may differ between a run and the command that goes on with it: it changes nothing trained,
# but for rounding where it changes how many steps are one program.
FREE_FIELDS = (
    "data.archive",
    "data.data_dir",
    "data.threads",
    "eval_batch_size",
    "evaluate_every_epochs",
    "checkpoint_every_epochs",
    "log_every_steps",
    "prune.recalibration_images",
    *(
        field
        for field in config_lib.flatten(config_lib.base_config())
        if field.startswith(("study.", "cascade.", "sweep.", "sensitivity.", "benchmark."))
    ),
)
# Files may be moved: a run whose config.json is changed to say so is still the same.
PLACES = ("data.path", "prune.checkpoint")


def folder_of(workdir: str | os.PathLike) -> Path:
    """The folder that is meant, which need not be there.

    Raises:
      UserError: for one in the home of a user who does not exist.
    """
    try:
        return Path(workdir).expanduser()
    except RuntimeError as error:
        raise UserError(f"--workdir={workdir}: there is no such user") from error


def refuse_study(workdir: Path) -> None:
    """Raises UserError where a work directory is a study's, whose runs have folders in it."""
    if any(workdir.glob("runs/dense-seed*")):
        raise UserError(f"--workdir={workdir} is a study's; give a run a folder of its own")


def make_folder(workdir: Path) -> None:
    """Makes a work directory; of many processes one does.

    Raises:
      UserError: if it cannot be written.
    """
    if not processes.leads():
        return
    try:
        if workdir.is_file():
            raise UserError(f"--workdir={workdir} is a file; give a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".writable").touch()
        (workdir / ".writable").unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


def json_fields(config: Config) -> dict[str, Any]:
    """Every field of a config by its dotted name, as JSON holds it."""
    return config_lib.flatten(ConfigDict(json.loads(config.to_json())))


def defaults() -> dict[str, Any]:
    """Every field's default by its dotted name, as JSON holds it."""
    return json_fields(config_lib.base_config())


def keep_config(config: Config, workdir: Path) -> None:
    """Writes what `check_workdir` compares with, config.json, if it is not there."""
    if not (workdir / "config.json").exists():
        write_json(workdir / "config.json", json.loads(config.to_json()))


@contextlib.contextmanager
def trains_alone(workdir: Path) -> Iterator[None]:
    """Keeps other runs from training in a work directory; all processes of a run enter together.

    By a lock on the folder, which the system takes back when the process ends, however it does.
    NFS locks no folder: there nothing is kept, for a lock could outlive its machine and hold up the
    run that resumes.

    Raises:
      UserError: if another run trains there.
    """
    taken, folder = False, None
    try:
        if processes.leads():
            try:
                folder = os.open(workdir, os.O_RDONLY)
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
            except OSError:  # no locks here
                pass
        if processes.agree(int(taken)):
            raise UserError(
                f"--workdir={workdir}: another run trains there; wait for its end, or give another"
            )
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _same(name: str, one: Any, other: Any) -> bool:
    if name in PLACES and one and other:  # by whatever name
        one, other = (os.path.realpath(os.path.expanduser(str(place))) for place in (one, other))
    return one == other


def check_workdir(config: Config, workdir: Path, free: Collection[str] = FREE_FIELDS) -> None:
    """Raises UserError where a work directory cannot be this config's; free fields may differ."""
    path = workdir / "config.json"
    try:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is a file; give a folder")
        if not path.exists():
            for name in ("checkpoints", "metrics.jsonl"):
                if (workdir / name).exists():
                    raise UserError(
                        f"--workdir={workdir} holds {name} and no config.json; give another"
                    )
            return
    except (OSError, ValueError) as error:  # a name too long, or one that no file can have
        raise UserError(f"--workdir={str(workdir)!r} cannot be a folder: {error}") from error
    try:
        stored = config_lib.flatten(ConfigDict(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a config; give another --workdir") from error
    stored = defaults() | stored  # it may be older than a field
    asked = json_fields(config)
    for name in sorted(asked.keys() | stored.keys()):
        if name not in free and not _same(name, asked.get(name), stored.get(name)):
            raise UserError(
                f"--workdir={workdir} is of another config: config.{name} is {stored.get(name)!r}"
                f" there and {asked.get(name)!r} here; give another workdir"
            )
