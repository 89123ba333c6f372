"""The command line's flags: a config file, the fields set over it, a workdir and a mode."""

import difflib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dynprune_jax.config import Config, check_type, flatten
from dynprune_jax.errors import UserError

_FLAGS = ("--config", "--workdir", "--mode")  # spelled like this, still without a value


def spelled_out(argv: Sequence[str]) -> list[str]:
    """A command line with each flag as `--name=value`; it may be `-name=value`, `--name value`."""
    spelled: list[str] = []
    for arg in argv:
        if arg.startswith("-"):
            spelled.append(f"--{arg.lstrip('-')}")
        elif spelled and spelled[-1] in _FLAGS:
            spelled[-1] += f"={arg}"
        else:
            spelled.append(arg)
    return spelled


def parse(argv: Sequence[str], modes: Collection[str]) -> tuple[Config, str, str]:
    """Parses a command line; nothing is kept from one call to the next.

    Args:
      argv: the command line, the program's name first.
      modes: what `--mode` may be; the first is the default.

    Returns:
      Config, workdir and mode.

    Raises:
      UserError: for any mistake, of the config file too.
    """
    argv = spelled_out(argv)
    for flag in _FLAGS:
        if flag in argv:  # absl would take the next flag for its value
            raise UserError(f"{flag} has no value; write {flag}=VALUE")
    overrides = [arg for arg in argv if arg.startswith("--config.")]
    values = flags.FlagValues()
    for name in ("config", "workdir"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    flags.DEFINE_string("mode", next(iter(modes)), "", flag_values=values)
    rest = _attempt(lambda: values([arg for arg in argv if arg not in overrides]))
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; write --name=value")
    for name in ("config", "workdir"):
        if not str(values[name].value).strip():
            raise UserError(f"--{name} is missing; see --help")
    if values.mode not in modes:
        raise UserError(f"--mode is {values.mode!r}; choose one of {', '.join(modes)}")
    path = os.path.expanduser(values.config)  # a shell leaves the ~ of --config=~/my.py
    if not Path(path.split(":")[0]).is_file():
        raise UserError(f"--config is {values.config!r}; there is no such file")
    fields = flatten(_load(path, []))
    given: dict[str, str] = {}  # of a field that is set twice the last; a tuple's would add up
    for override in overrides:
        field = _field_of(override)
        _check_field(field, fields)
        given[field] = override
    return _with_fields(path, list(given.values()), fields), values.workdir, values.mode


def _check_field(field: str, fields: Collection[str]) -> None:
    if any(name.startswith(f"{field}.") for name in fields):
        raise UserError(f"config.{field} is a section; set its fields, config.{field}.NAME")
    if field not in fields:
        close = difflib.get_close_matches(field, fields, n=1)
        hint = f"; did you mean config.{close[0]}?" if close else ""
        raise UserError(f"config.{field} is no field of a config{hint}")


def _field_of(override: str) -> str:
    return override.removeprefix("--config.").split("=")[0]


def _with_fields(path: str, overrides: Sequence[str], fields: Mapping[str, Any]) -> Any:
    """A config file's config with flags that override its fields, each field once."""
    try:
        return _load(path, overrides)
    except UserError:
        for override in overrides:
            try:
                _load(path, [override])
            except UserError:  # its words are Python's, and blame the file
                field = _field_of(override)
                check_type(field, override.partition("=")[2], fields[field])
        raise


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

    sys.modules.pop("config_config", None)  # where ml_collections leaves a file it has run
    return _attempt(load, f"--config={path}: ")


def _attempt(parse: Callable[[], Any], where: str = "") -> Any:
    """Parses; a config file is a program, which may fail in any way, each made one line."""
    try:
        return parse()
    except (Exception, SystemExit) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if any(line.startswith("Traceback") for line in lines):
            lines = lines[-1:]
        raise UserError(where + (" ".join(lines) or type(error).__name__)) from error
