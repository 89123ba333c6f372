"""The command line: flags to one call, and a user's mistake to one line and exit code 2.

python -m dynprune_jax.main --config=configs/NAME.py[:arg] --workdir=DIR [--mode=MODE]
                            [--config.FIELD=VALUE ...]

MODE  train        the dense network, then targeted dropout, then the evaluation (the default)
      evaluate     a finished run again
      sweep        a finished run over a curve of prune ratios, beside the controls
      sensitivity  a finished run, with the ratio of one block changed at a time
      cascade      a finished run's two networks together: the dense one again for unsure images
      export       a finished run's network as files for inference, compact too
      static       the dense network, then filters removed for good, at the dynamic one's MACs
      study        methods, ablations and controls over seeds and cuts, as files, a table, figures
      benchmark    inference, compact and dense, over batch sizes and prune ratios
      step_cost    a training step, dynamic and dense

FIELD  such as seed or gate.channel_ratio: dynprune_jax/config.py has them all, with what they
       mean and their defaults.

Exit codes: 0; 2 after a mistake, or where the machine fails; 143 after SIGTERM and 130 after
Ctrl-C, when the step is ended and saved: the same command goes on from there.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import logging

from dynprune_jax.errors import UserError
from dynprune_jax.experiments.benchmark import benchmark
from dynprune_jax.experiments.cascade import cascade
from dynprune_jax.experiments.export import export
from dynprune_jax.experiments.sensitivity import sensitivity
from dynprune_jax.experiments.static import static
from dynprune_jax.experiments.step_cost import step_cost
from dynprune_jax.experiments.study import study
from dynprune_jax.experiments.sweep import sweep
from dynprune_jax.flags import parse
from dynprune_jax.processes import joined
from dynprune_jax.provenance import commit
from dynprune_jax.stopping import Stopped, send_again, stop
from dynprune_jax.train import evaluate_workdir, train_and_evaluate

MODES: dict[str, Callable[..., Any]] = {
    "train": train_and_evaluate,
    "evaluate": evaluate_workdir,
    "static": static,
    "study": study,
    "sweep": sweep,
    "cascade": cascade,
    "export": export,
    "sensitivity": sensitivity,
    "benchmark": benchmark,
    "step_cost": step_cost,
}

# What is wrong with the disk, or with what lies there, and not with this program.
_MACHINE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # what XLA's messages say


def main(argv: Sequence[str]) -> int:
    """Runs the mode that the arguments ask for.

    Args:
      argv: the command line, the program's name first.

    Returns:
      The exit code: 0, 2 after a mistake of the user's, a failure of the disk or where there is
      not enough memory, or 143 or 130 if the run was stopped by SIGTERM or by Ctrl-C.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file, and of errors it raises too
    if {"--help", "-h", "-help"} & set(argv):
        print(__doc__)
        return 0
    before = signal.signal(signal.SIGTERM, stop)
    try:
        config, workdir, mode = parse(argv, MODES)
        commit()  # before hours pass, in which the checkout may change
        with joined():
            MODES[mode](config, workdir)
    except UserError as error:
        return _say(error, 2)
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        return _say(f"{error}; mend that, and the same command goes on", 2)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(x in str(error) for x in _NO_MEMORY):
            raise
        said = f" ({str(error).splitlines()[0]:.200})" if str(error) else ""
        return _say(
            f"out of memory{said}; lower config.eval_batch_size, or in a new workdir"
            " config.batch_size, config.data.memory_limit_mb, config.data.image_size or"
            " config.width, and of what is timed config.benchmark.batch_sizes",
            2,
        )
    except Stopped as stopped:
        return _say(stopped, stopped.exit_code)
    except KeyboardInterrupt:
        return _say(Stopped(signal.SIGINT), 130)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def end(exit_code: int) -> NoReturn:
    """Ends the process; at once where a signal has stopped what was under way.

    Python's own end would pull JAX down around a compilation or a computation that still goes on,
    and that as often as not is a segmentation fault, with an exit code of its own. Of many
    processes each has to take leave of the others, and none is stopped in an evaluation.
    """
    if exit_code > 128 and not jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody may listen any more
                stream.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _say(message: object, exit_code: int) -> int:
    print("dynprune_jax:", " ".join(str(message).splitlines()), file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    # Where the disk is full or a file is damaged, an error is raised once and told in one line;
    # the same errors in the threads and dropped tasks of Orbax and TensorBoard add nothing.
    threading.excepthook = lambda _: None
    sys.unraisablehook = send_again
    end(main(sys.argv))
