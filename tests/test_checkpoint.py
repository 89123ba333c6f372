import jax.numpy as jnp
import numpy as np
import pytest

from dynprune_jax.checkpoint import Checkpoints, leaf_digests, tree_digest
from dynprune_jax.errors import UserError


def state(value=1.0):
    return {"a": {"kernel": jnp.full((300,), value)}, "step": jnp.asarray(3, jnp.int32)}


def test_what_is_saved_comes_back(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(1, state(1.0), {"note": 1})
        checkpoints.save(2, state(2.0), {"note": 2})
        checkpoints.save(2, state(9.0), {"note": 9})  # a saved step is left as it is
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() == 2
        restored, extra = checkpoints.restore(state(0.0))
    assert extra == {"note": 2}
    assert restored["step"].dtype == jnp.int32
    np.testing.assert_array_equal(restored["a"]["kernel"], state(2.0)["a"]["kernel"])


def test_a_digest_tells_bytes_dtype_shape_and_path_apart():
    base = {"a": np.zeros(4, np.float32)}
    others = [
        {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.asarray([0, 0, 0, 1], np.float32)},
    ]
    assert tree_digest(base) == tree_digest({"a": jnp.zeros(4)})
    assert len({tree_digest(tree) for tree in (base, *others)}) == 5
    assert set(leaf_digests(state())) == {"a/kernel", "step"}


# Of several leaves that cannot be read Orbax raises for one and drops the tasks of the others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_byte_never_restores(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state(), {})
    files = [p for p in (tmp_path / "c" / "1" / "state").rglob("*") if p.is_file()]
    largest = max((p for p in files if p.parent.name == "d"), key=lambda p: p.stat().st_size)
    original = largest.read_bytes()
    for place in range(0, len(original), max(1, len(original) // 25)):
        damaged = bytearray(original)
        damaged[place] ^= 0x10
        largest.write_bytes(damaged)
        with Checkpoints(tmp_path / "c") as checkpoints:
            outcome = restored_or_error(checkpoints)
        # A byte that carries no value does no harm; any other is found.
        assert outcome == tree_digest(state()) or str(tmp_path / "c" / "1") in outcome


def restored_or_error(checkpoints):
    try:
        return tree_digest(checkpoints.restore(state(0.0))[0])
    except UserError as error:
        return str(error)


def test_mistakes_get_a_line(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(UserError, match="there is no checkpoint in"):
            checkpoints.restore(state())
        checkpoints.save(1, state(), {})
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(UserError, match="of another model: b is in only one"),
    ):
        checkpoints.restore({"b": jnp.zeros(2), **state()})
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(
            UserError,
            match=r"another model: a/kernel is float32\[300\] there and float32\[7\] here",
        ),
    ):
        checkpoints.restore({"a": {"kernel": jnp.zeros(7)}, "step": state()["step"]})
