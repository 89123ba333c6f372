"""The command line: flags to one call, and a user's mistake to one line and exit code 2.

python -m dynprune_jax.main --config=configs/NAME.py[:arg] --workdir=DIR [--mode=MODE]
                            [--config.FIELD=VALUE ...]

MODE: train (the default, ends with the evaluation), evaluate, sweep, static, study, benchmark
or step_cost.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from dynprune_jax.errors import UserError
from dynprune_jax.experiments.benchmark import benchmark
from dynprune_jax.experiments.static import static
from dynprune_jax.experiments.step_cost import step_cost
from dynprune_jax.experiments.study import study
from dynprune_jax.experiments.sweep import sweep
from dynprune_jax.flags import parse
from dynprune_jax.train import evaluate_workdir, train_and_evaluate

MODES: dict[str, Callable[..., Any]] = {
    "train": train_and_evaluate,
    "evaluate": evaluate_workdir,
    "static": static,
    "study": study,
    "sweep": sweep,
    "benchmark": benchmark,
    "step_cost": step_cost,
}


def main(argv: Sequence[str]) -> int:
    """Runs the mode that the arguments ask for.

    Args:
      argv: the command line, the program's name first.

    Returns:
      The exit code: 0, 2 after a mistake of the user's, or 130 if the user stopped it.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    if {"--help", "-h", "-help"} & set(argv):
        print(__doc__)
        return 0
    try:
        config, workdir, mode = parse(argv, MODES)
        MODES[mode](config, workdir)
    except UserError as error:
        print(f"dynprune_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dynprune_jax: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
