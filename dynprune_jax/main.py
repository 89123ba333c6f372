"""The command line: flags to one call, and a user's mistake to one line."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

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

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arg]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, report, pictures.")
_MODE = flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")


def main(argv: Sequence[str]) -> None:
    """Runs the mode that the flags ask for."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    try:
        if len(argv) > 1:
            raise UserError(f"{argv[1]} is no flag; write --name=value")
        if _MODE.value not in MODES:
            raise UserError(f"--mode={_MODE.value}: choose one of {', '.join(MODES)}")
        for flag in (_CONFIG, _WORKDIR):
            if not flag.value:
                raise UserError(f"--{flag.name} is missing")
        MODES[_MODE.value](_CONFIG.value, _WORKDIR.value)
    except UserError as error:
        _fail(str(error))


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags; whatever is wrong with them ends in one line."""
    try:
        return flags.FLAGS(argv)
    # A config file is a program: it and the flags that override it can fail in any way.
    except Exception as error:
        _fail(" ".join(str(error).split()) or type(error).__name__)


def _fail(message: str) -> NoReturn:
    print(f"dynprune_jax: {message}", file=sys.stderr)
    sys.exit(2)


def run() -> None:
    """Entry point."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
