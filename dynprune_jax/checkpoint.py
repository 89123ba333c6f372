"""Checkpoints with Orbax, each leaf under its digest; a damaged one is found and set aside."""

import asyncio
import contextlib
import gc
import hashlib
import inspect
import json
import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dynprune_jax import processes
from dynprune_jax.errors import UserError

_KEPT = 2  # of the newest steps


def leaf_digests(tree: PyTree) -> dict[str, str]:
    """Dtype, shape and SHA-256 of every leaf, by its path: `float32[3,8] 9f86d0...`."""

    def digest(leaf: Any) -> str:
        content = np.ascontiguousarray(leaf).view(np.uint8).data
        return f"{_head(leaf)} {hashlib.sha256(content).hexdigest()}"

    leaves = _leaves(tree)
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        return dict(zip(leaves, pool.map(digest, leaves.values()), strict=True))


def tree_digest(tree: PyTree) -> str:
    """One SHA-256 over the paths and digests of all leaves, whatever their order."""
    lines = [f"{path} {digest}" for path, digest in sorted(leaf_digests(tree).items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _head(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _DamageError(Exception):
    """A step that cannot be read, or is not what was saved; the message says why."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _pass_on(error)
        raise _DamageError(_reason(error)) from error


class Checkpoints:
    """The checkpoints of one phase of one run: a folder with one folder per step.

    Orbax casts dtypes and reads flipped bytes without a word, so every leaf is saved with a
    digest and compared when it is read, and so is all else that a step holds.

    Args:
      folder: made if need be.
      of: what tells this run from others, as JSON; saved with every step, and a step is refused
        if any of this is different there.
      assumed: what such a step is taken to have told where it is older than an entry of `of`.
      mend: for the process that trains here, and only for that: it deletes what a killed save
        left unfinished, and renames damaged steps.
    """

    def __init__(
        self,
        folder: Path,
        *,
        of: Mapping[str, Any],
        assumed: Mapping[str, Any] = MappingProxyType({}),
        mend: bool = False,
    ):
        self.folder = folder.absolute()
        self._of = json.loads(json.dumps(of))  # as it will be read
        self._assumed = assumed
        self._mend = mend
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT, create=True, cleanup_tmp_directories=mend
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with self._saving():
            self._manager.close()  # waits

    def steps(self) -> list[int]:
        """The steps that have a folder here, whole or not, the newest first."""
        # Orbax does not list a folder that lacks its mark, and would then not write there.
        names = (entry.name for entry in self.folder.iterdir())
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def told(self) -> dict[str, Any]:
        """What the newest step that can be read tells of its run, see `of`; nothing if none can."""
        for step in self.steps():
            with contextlib.suppress(_DamageError), _reading():
                return self._restore(step, extra=ocp.args.JsonRestore())["content"]["of"] or {}
        return {}

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Saves in the background; a step that is saved already is left as it is.

        Args:
          step: of this phase, and no lower than the last.
          state: arrays.
          extra: what else to keep, as JSON, such as the position of a data stream. (Orbax would
            ask grain's iterator for it in the background, when the iterator may have moved on.)

        Raises:
          UserError: if this save, or the one before it in the background, has failed.
        """
        if step == self._manager.latest_step():
            return
        self.wait()
        # A copy: on CPU a view of the arrays would see what the next step writes into them.
        state = jax.tree.map(np.array, jax.device_get(state))
        content = {"step": step, "of": self._of, "extra": extra, "digests": leaf_digests(state)}
        content = json.loads(json.dumps(content))
        items = {
            "state": ocp.args.StandardSave(state),
            "extra": ocp.args.JsonSave({"content": content, "digest": _json_digest(content)}),
        }
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when what is being saved is on the disk.

        Raises:
          UserError: if it could not be saved.
        """
        with self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax, tensorstore and the file system have their own types
            _pass_on(error)
            raise UserError(
                f"a checkpoint cannot be saved in {self.folder} ({_reason(error)}); the ones"
                " before it stay: mend that, and the same command goes on from the newest"
            ) from error

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads the newest step.

        With `mend` it reads the newest that is not damaged, and renames the damaged ones that
        are newer, with a line on stderr that names each. If none is good, nothing is renamed.

        Args:
          like: arrays of the shapes, dtypes and places to restore to.

        Returns:
          The state and what was given as `extra`.

        Raises:
          UserError: if there is no step, or it is damaged, of another run, or does not fit `like`.
        """
        damaged: dict[int, str] = {}
        for step in self.steps():
            with _unheard():
                try:
                    found = self._read(step, like)
                except _DamageError as error:
                    damaged[step] = str(error)
                else:
                    self._set_all_aside(damaged, step)
                    return found
                _free_dropped_tasks()  # here, where no error holds them any more
            if not self._mend:
                break
        if not damaged:
            raise UserError(f"there is no checkpoint in {self.folder}")
        step, reason = next(iter(damaged.items()))
        where = f"checkpoint {self.folder / str(step)} is damaged ({reason})"
        if self._mend:
            raise UserError(
                f"{where} and none that is older is good; nothing was changed there: put back a"
                " copy, or start again in a new workdir"
            )
        raise UserError(
            f"{where}; put back a copy, let the mode that trained it (train or static) go on from"
            " an older step in its workdir, or start again in a new one"
        )

    def _set_all_aside(self, damaged: Mapping[int, str], older: int) -> None:
        if not damaged:
            return
        processes.wait_for_all("damage found")  # before anything moves
        for step, reason in damaged.items():
            if processes.leads():
                self._set_aside(step, reason, older)
        processes.wait_for_all("damage set aside")
        self._manager.reload()

    def _set_aside(self, step: int, reason: str, older: int) -> None:
        place, count = self.folder / f"{step}.damaged", 1
        while place.exists():
            count += 1
            place = self.folder / f"{step}.damaged-{count}"
        try:
            os.rename(self.folder / str(step), place)
        except OSError as error:
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged ({reason}) and cannot be set"
                f" aside: {error.strerror}"
            ) from error
        print(
            f"dynprune_jax: checkpoint {self.folder / str(step)} is damaged ({reason}); it is now"
            f" {place.name}, and the run goes on from step {older}",
            file=sys.stderr,
        )

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        with _reading():
            record = self._restore(step, extra=ocp.args.JsonRestore())
            content = record["content"]
            sound = record["digest"] == _json_digest(content) and content["step"] == step
        if not sound:
            raise _DamageError("its record is not what was saved")
        digests = content["digests"]
        self._check_fit(f"checkpoint {self.folder / str(step)}", like, content["of"], digests)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with _reading():
            state = self._restore(step, state=ocp.args.StandardRestore(abstract))
            found = leaf_digests(state)
        for path, digest in found.items():
            if digest != digests[path]:
                raise _DamageError(f"{path} is not what was saved")
        return state, content["extra"]

    def _restore(self, step: int, **item: Any) -> Any:
        (name,) = item
        return self._manager.restore(step, args=ocp.args.Composite(**item))[name]

    def _check_fit(
        self, where: str, like: PyTree, of: Mapping[str, Any] | None, digests: dict[str, str]
    ) -> None:
        here, there = self._of, {**self._assumed, **(of or {})}
        for name in sorted(here):
            if here[name] != there.get(name):
                raise UserError(
                    f"{where} is of another run: {name}: {there.get(name)!r} there,"
                    f" {here[name]!r} here"
                )
        wanted = _leaves(like)
        odd = sorted(wanted.keys() ^ digests.keys())
        if odd:
            raise UserError(f"{where} is of another model: {odd[0]} is in only one of the two")
        for path, leaf in wanted.items():
            saved = digests[path].split()[0]
            if saved != _head(leaf):
                raise UserError(
                    f"{where} is of another model: {path} is {saved} there and {_head(leaf)} here"
                )


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keeps asyncio's complaints of tasks that nobody awaits any more from stderr.

    Orbax raises for the first leaf that it cannot read, and closes the event loop under the
    others. Each of them would be told at length, now or at some later garbage collection.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    disabled = logger.disabled

    def others(complaint: Any) -> None:
        closed = str(complaint.exc_value) == "Event loop is closed"
        if not closed and not inspect.iscoroutine(complaint.object):
            hook(complaint)

    sys.unraisablehook, logger.disabled = others, True
    try:
        yield
    finally:
        sys.unraisablehook, logger.disabled = hook, disabled


def _free_dropped_tasks() -> None:
    """Waits, ten seconds at most, until the reads that Orbax left running end; frees them."""
    end = time.monotonic() + 10.0
    while True:
        gc.collect()
        tasks = [x for x in gc.get_objects() if type(x) is asyncio.Task and not x.done()]
        if not any(task.get_loop().is_closed() for task in tasks) or time.monotonic() > end:
            return
        del tasks
        time.sleep(0.01)


def _pass_on(error: Exception) -> None:
    """Raises an error of many processes' own sums: one of them is gone, and no file is at fault."""
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        raise error


def _reason(error: Exception) -> str:
    code = re.search(r"os_error_code='(\d+)'", str(error))  # how tensorstore tells of it
    if code:
        return os.strerror(int(code[1]))
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return textwrap.shorten(line, 120, placeholder=" ...")  # some list all of their settings
