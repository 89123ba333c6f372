"""Where a result is from: the command, the data, the versions, the commit and the device."""

import functools
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from dynprune_jax.run import Run

_PACKAGES = ("dynprune_jax", "jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets")


def provenance(run: Run) -> dict[str, Any]:
    """What a report says of where its figures are from."""
    return {
        "command": command(),
        "seed": run.config.seed,
        "data": {
            "name": run.config.data.name,
            "classes": run.dataset.num_classes,
            "train_examples": len(run.dataset.train),
            "test_examples": len(run.dataset.test),
            "held_out": run.config.data.held_out,  # not 0: these are no test examples
        },
        # Not 0: batch statistics were made anew before each evaluation of a network with gates.
        "recalibration_images": run.recalibration_images,
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def command() -> str | None:
    """The command line that makes this result; None when it is not this program's."""
    program = Path(sys.argv[0])
    if program.name != "main.py" or program.parent.name != "dynprune_jax":
        return None
    return shlex.join(["python", "-m", "dynprune_jax.main", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """What a result was made with: Python, packages and, in a checkout, the commit."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    ran = commit()
    return found if ran is None else found | {"commit": ran}


@functools.cache
def commit() -> str | None:
    """The commit of this package's checkout when first asked: what comes later does not run."""
    return checkout(Path(__file__).parent.parent)


def checkout(folder: Path) -> str | None:
    """The commit that is checked out in a folder, with a + if files differ; None if none is."""
    if not (folder / ".git").exists():  # git itself would look in the folders around it too
        return None
    words = [
        "git",
        "--no-optional-locks",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--exclude=*",
        "--dirty=+",
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # without git, or it may not read the folder
        return None
    return done.stdout.strip()
