"""The command line: flags to one call, and a user's mistake to one line and exit code 2.

python -m dynprune_jax.main --config=configs/NAME.py[:arg] --workdir=DIR [--mode=MODE]
                            [--config.FIELD=VALUE ...]

MODE: train (the default, ends with the evaluation), evaluate, sweep or benchmark.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from dynprune_jax.config import flatten
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.benchmark import benchmark
from dynprune_jax.experiments.sweep import sweep
from dynprune_jax.train import evaluate_workdir, train_and_evaluate

MODES: dict[str, Callable[..., Any]] = {
    "train": train_and_evaluate,
    "evaluate": evaluate_workdir,
    "sweep": sweep,
    "benchmark": benchmark,
}


def main(argv: Sequence[str]) -> int:
    """Runs the mode that the arguments ask for.

    Args:
      argv: the command line, the program's name first.

    Returns:
      The exit code: 0, or 2 after a mistake of the user's.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    if {"--help", "-h", "-help"} & set(argv):
        print(__doc__)
        return 0
    try:
        config, workdir, mode = _parse(argv)
        MODES[mode](config, workdir)
    except UserError as error:
        print(f"dynprune_jax: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str]) -> tuple[Any, str, str]:
    """Returns config, workdir and mode; nothing is kept from one call to the next."""
    overrides = [arg for arg in argv if arg.lstrip("-").startswith("config.")]
    values = flags.FlagValues()
    for name in ("config", "workdir", "mode"):
        flags.DEFINE_string(name, "train" if name == "mode" else "", "", flag_values=values)
    rest = _attempt(lambda: values([arg for arg in argv if arg not in overrides]))
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; write --name=value")
    for name in ("config", "workdir"):
        if not values[name].value:
            raise UserError(f"--{name} is missing; see --help")
    if values.mode not in MODES:
        raise UserError(f"--mode is {values.mode!r}; choose one of {', '.join(MODES)}")
    if not Path(values.config.split(":")[0]).is_file():
        raise UserError(f"--config is {values.config!r}; there is no such file")
    fields = flatten(_load(values.config, []))
    for override in overrides:
        field = override.lstrip("-").removeprefix("config.").split("=")[0]
        if any(name.startswith(f"{field}.") for name in fields):
            raise UserError(f"config.{field} is a section; set its fields, config.{field}.NAME")
        if field not in fields:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"; did you mean config.{close[0]}?" if close else ""
            raise UserError(f"config.{field} is no field of a config{hint}")
    return _load(values.config, overrides), values.workdir, values.mode


def _load(path: str, overrides: Sequence[str]) -> Any:
    """Runs a config file and the flags that override its fields."""
    argv = ["", f"--config={path}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)

    def load() -> Any:
        values(argv)
        if not isinstance(values.config, ConfigDict):
            raise TypeError("its get_config returns no ConfigDict")
        return values.config

    return _attempt(load, f"--config={path}: ")


def _attempt(parse: Callable[[], Any], where: str = "") -> Any:
    """Parses; a config file is a program, which may fail in any way, each made one line."""
    try:
        return parse()
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(where + message) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv))
