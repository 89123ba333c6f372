"""Several processes as one run: how they join, which of them writes, what the death of one does."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from dynprune_jax.errors import UserError
from dynprune_jax.stopping import Stopped

# A process that is not heard of for so long is dead.
_HEARTBEAT_SECONDS = 12
# Between two looks at the others; what a process may need to end after the others have; and how
# long process 0 waits at the end of a run for the others to leave.
_LOOK_SECONDS = 1.0
_ENDING_SECONDS = 2.0
_LEAVING_SECONDS = 60.0
# How long a network file system may remember that a file was not there.
_REMEMBERED_SECONDS = 60.0


def leads() -> bool:
    """Whether this is the process that writes and prints: number 0, or the only one."""
    return jax.process_index() == 0


def check_alone(mode: str) -> None:
    """Raises UserError where there are several processes, for a mode that is for one."""
    if jax.process_count() > 1:
        raise UserError(f"--mode={mode} is for one process, not {jax.process_count()}")


def wait_for_all(where: str) -> None:
    """Waits until every process has come to this place; `where` names it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def sees(path: Path) -> bool:
    """Whether a file is there which process 0 has written, and all have waited for."""
    end = time.monotonic() + (_REMEMBERED_SECONDS if jax.process_count() > 1 else 0.0)
    while not path.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(0.5)
    return True


def agree(number: int) -> int:
    """The highest of the numbers that all processes give here: what one knows, all know."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Runs its body as one of many processes where the environment tells of them.

    It does where JAX_COORDINATOR_ADDRESS is set: to the same `host:port` for all, at which
    process 0 will listen. JAX_NUM_PROCESSES and JAX_PROCESS_ID say how many there are and which
    is this one; under Slurm and on a TPU pod JAX finds out by itself.

    If another process dies, this one ends at once with exit code 1 and a line that names it, for
    it may be stuck for good in a sum with the dead one. If process 0 dies, JAX itself ends all
    others: its message is that the leader is gone.

    Raises:
      UserError: if the environment tells of processes and not how many or which.
    """
    if not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        yield
        return
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be host:port")
    # Else JAX aborts when any process dies, with no word on which one, ...
    jax.config.update("jax_enable_recoverability", True)
    # ... and takes no SIGTERM as an order to end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0 on)"
            f" must be too, except under Slurm and on a TPU pod: {error}"
        ) from error
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), daemon=True)
    watch.start()

    def end_the_watch(seconds_of_process_0: float) -> None:
        ended.set()
        # A thread that is in JAX's own code when Python ends takes the process down with it.
        watch.join(seconds_of_process_0 if leads() else _ENDING_SECONDS)

    try:
        yield
        wait_for_all("end of the run")
        end_the_watch(_LEAVING_SECONDS)  # with process 0 JAX ends all that are not gone yet
    except (UserError, OSError):
        # The others may be about to find the same mistake, or be stuck for good.
        end_the_watch(_ENDING_SECONDS)
        raise
    except Stopped:
        end_the_watch(_HEARTBEAT_SECONDS)  # all stop at the same step, and process 0 leaves last
        raise
    except jax.errors.JaxRuntimeError:
        # Most likely a sum with a process that is gone; who that is, the watch is about to know.
        watch.join(2 * _HEARTBEAT_SECONDS)
        raise
    finally:
        ended.set()
    jax.distributed.shutdown()


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{name} is {value!r}; it must be a whole number") from error


def _watch(ended: threading.Event) -> None:
    """Ends this process when another is gone; returns after the run, in process 0 as the last."""
    while True:
        if leads():
            time.sleep(_LOOK_SECONDS)
        elif ended.wait(_LOOK_SECONDS):
            return
        live, gone = _look()
        if live == {jax.process_index()}:
            return
        if gone and not ended.wait(_ENDING_SECONDS):
            print(
                f"dynprune_jax: process {jax.process_index()} of {jax.process_count()} ends because"
                f" process {', '.join(map(str, sorted(gone)))} is gone; the same command goes on"
                " from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        if 0 in gone:
            return


def _look() -> tuple[set[int], set[int]]:
    """The processes that live, if no others are gone; else those that are."""
    try:
        with multihost_utils.live_devices(jax.devices()) as live:
            return {device.process_index for device in live}, set()
    except multihost_utils.ProcessFailureError as failure:
        return set(), {device.process_index for device in failure.failed_devices}
    except RuntimeError:
        return set(), {0}  # which answers these calls, or this process itself has left
