"""Checkpoints with Orbax, each leaf under its digest."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dynprune_jax.errors import UserError


def leaf_digests(tree: PyTree) -> dict[str, str]:
    """Dtype, shape and SHA-256 of every leaf, by its path: `float32[3,8] 9f86d0...`."""
    return {
        path: f"{_head(leaf)} {hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()}"
        for path, leaf in _leaves(tree).items()
    }


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


class Checkpoints:
    """The checkpoints of one phase of one run: a folder with one folder per step.

    Orbax casts dtypes and reads flipped bytes without a word, so every leaf is saved with a
    digest and compared when it is read.

    Args:
      folder: made on the first save.
      keep: how many of the newest steps stay.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that is saved, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Saves in the background; a step that is saved already is left as it is.

        Args:
          step: of this phase.
          state: arrays.
          extra: what else to keep, as JSON, such as the position of a data stream. (Orbax would
            ask grain's iterator for it in the background, when the iterator may have moved on.)
        """
        if step == self.latest_step():
            return
        # A copy: on CPU a view of the arrays would see what the next step writes into them.
        state = jax.tree.map(np.array, jax.device_get(state))
        items = {
            "state": ocp.args.StandardSave(state),
            "extra": ocp.args.JsonSave({**extra, "digests": leaf_digests(state)}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads the newest step.

        Args:
          like: arrays of the shapes, dtypes and places to restore to.

        Returns:
          The state and what was given as `extra`.

        Raises:
          UserError: if there is no step, it does not fit `like`, or a leaf's digest is wrong.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"there is no checkpoint in {self.folder}")
        where = f"checkpoint {self.folder / str(step)}"
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            extra = self._manager.restore(
                step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())
            )["extra"]
            digests = extra.pop("digests")
            self._check_fit(where, like, digests)
            state = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        except UserError:
            raise
        except Exception as error:  # Orbax, tensorstore and the file system have their own types
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{where} cannot be read ({reason}); delete that folder to go on from an older step"
            ) from error
        for path, digest in leaf_digests(state).items():
            if digest != digests[path]:
                raise UserError(
                    f"{where} is damaged: {path} is not what was saved; delete that folder to go on"
                    " from an older step"
                )
        return state, extra

    def _check_fit(self, where: str, like: PyTree, digests: dict[str, str]) -> None:
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
