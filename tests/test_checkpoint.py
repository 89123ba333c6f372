import errno
import gc
import json
import os
import random
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dynprune_jax.checkpoint import Checkpoints, leaf_digests, tree_digest
from dynprune_jax.errors import UserError


def state(value=1.0):
    return {"a": {"kernel": jnp.linspace(0.0, value, 300)}, "step": jnp.asarray(3, jnp.int32)}


def test_what_is_saved_comes_back(tmp_path):
    with Checkpoints(tmp_path / "c", of=RUN) as checkpoints:
        assert checkpoints.steps() == []
        checkpoints.save(1, state(1.0), {"note": 1})
        checkpoints.save(2, state(2.0), {"note": 2})
        checkpoints.save(2, state(9.0), {"note": 9})  # a saved step is left as it is
    with Checkpoints(tmp_path / "c", of=RUN) as checkpoints:
        assert checkpoints.steps() == [2, 1]
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


RUN = {"phase": "dense", "seed": 0}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with the steps 1 and 2, whose values tell them apart."""
    folder = tmp_path_factory.mktemp("sound") / "c"
    with Checkpoints(folder, of=RUN) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"note": step})
    return folder


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "c")


def flip(file, place=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 0x10
    file.write_bytes(content)


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def files(folder, pattern="**/*"):
    return [path for path in sorted(folder.glob(pattern)) if path.is_file()]


def each(harm, pattern):
    """Harm done to all files of a kind."""
    return lambda step: [harm(file) for file in files(step, pattern)]


def only(harm, pattern):
    """Harm done to the largest file of a kind, which holds the numbers."""
    return lambda step: harm(max(files(step, pattern), key=lambda file: file.stat().st_size))


def emptied(step):
    shutil.rmtree(step)
    step.mkdir()


def a_file(step):
    shutil.rmtree(step)
    step.touch()


def half_copied(step):
    for file in files(step)[::2]:
        file.unlink()


RECORD, NUMBERS = "extra/metadata", "state/ocdbt.process_0/d/*"
# What happens to step 2, and whether that is found; what is not found does no harm.
DAMAGES = {
    "a byte of the record": (each(flip, RECORD), True),
    "half of the record": (each(halve, RECORD), True),
    "no record": (each(os.remove, RECORD), True),
    "a byte of the numbers": (each(flip, NUMBERS), True),
    "half of the numbers": (each(halve, NUMBERS), True),
    "no numbers": (each(os.remove, NUMBERS), True),
    "a byte of the directory of numbers": (only(flip, "state/d/*"), True),
    "half of the directory of numbers": (only(halve, "state/d/*"), True),
    "no directory of numbers": (only(os.remove, "state/d/*"), True),
    "a byte of the manifest": (each(flip, "state/manifest.ocdbt"), True),
    "half of the manifest": (each(halve, "state/manifest.ocdbt"), True),
    "no manifest": (each(os.remove, "state/manifest.ocdbt"), True),
    "half of the tree": (each(halve, "state/_METADATA"), True),
    "no tree": (each(os.remove, "state/_METADATA"), False),
    "a byte of Orbax's own notes": (each(flip, "_CHECKPOINT_METADATA"), False),
    "half of Orbax's own notes": (each(halve, "_CHECKPOINT_METADATA"), False),
    "none of Orbax's own notes": (each(os.remove, "_CHECKPOINT_METADATA"), False),
    "no marks of success": (each(os.remove, "**/commit_success.txt"), False),
    "every file empty": (each(lambda file: os.truncate(file, 0), "**/*"), True),
    "no state": (lambda step: shutil.rmtree(step / "state"), True),
    "no extra": (lambda step: shutil.rmtree(step / "extra"), True),
    "an empty folder": (emptied, True),
    "a file for a folder": (a_file, True),
    "half copied": (half_copied, True),
    "another step's folder": (
        lambda step: [shutil.rmtree(step), shutil.copytree(step.with_name("1"), step)],
        True,
    ),
}


def restored(folder):
    """The step whose state and note came back, or the error."""
    with Checkpoints(folder, of=RUN, mend=True) as checkpoints:
        try:
            back, extra = checkpoints.restore(state(0.0))
        except UserError as error:
            return str(error)
    (step,) = [s for s in (1, 2) if tree_digest(back) == tree_digest(state(s))]
    assert extra == {"note": step}
    return step


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in files(folder)}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(name, copy, capfd):
    harm, found = DAMAGES[name]
    harm(copy / "2")
    harmed = content(copy / "2")
    assert restored(copy) == (1 if found else 2)
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("dynprune_jax: ")]
    if found:
        assert len(lines) == 1
        assert f"checkpoint {copy / '2'} is damaged (" in lines[0]
        assert "it is now 2.damaged, and the run goes on from step 1" in lines[0]
        assert content(copy / "2.damaged") == harmed
    assert sorted(path.name for path in copy.iterdir()) == (
        ["1", "2.damaged"] if found else ["1", "2"]
    )
    # The run goes on, saves its step 2 again, and that is good.
    with Checkpoints(copy, of=RUN) as checkpoints:
        checkpoints.save(2, state(2.0), {"note": 2})
    assert restored(copy) == 2


def test_a_byte_flipped_anywhere_is_found_or_harmless(sound, tmp_path):
    offsets = [
        (file.relative_to(sound), i)
        for file in files(sound / "2")
        for i in range(file.stat().st_size)
    ]
    outcomes = []
    for number, (file, offset) in enumerate(random.Random(0).sample(offsets, 20)):
        folder = shutil.copytree(sound, tmp_path / str(number))
        flip(folder / file, offset)
        outcomes.append(restored(folder))
    assert set(outcomes) == {1, 2}


def test_of_many_leaves_that_cannot_be_read_one_line_is_said(tmp_path, monkeypatch, caplog, capfd):
    many = {f"leaf{i}": jnp.linspace(0.0, i + 1.0, 3000) for i in range(40)}
    with Checkpoints(tmp_path, of=RUN) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, many, {})
    DAMAGES["a byte of the directory of numbers"][0](tmp_path / "2")
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with Checkpoints(tmp_path, of=RUN, mend=True) as checkpoints:
        checkpoints.restore(many)
    gc.collect()
    assert not complaints
    assert not [record for record in caplog.records if record.name == "asyncio"]
    (line,) = capfd.readouterr().err.splitlines()
    assert "is damaged (" in line


def test_nothing_is_renamed_where_no_step_is_good(copy):
    for step in (1, 2):
        flip(copy / str(step) / RECORD)
    before = content(copy)
    error = restored(copy)
    assert error.startswith(f"checkpoint {copy / '2'} is damaged (")
    assert "none that is older is good; nothing was changed there" in error
    assert len(error.splitlines()) == 1
    assert content(copy) == before


def test_a_run_is_known_by_its_older_step_if_the_newest_cannot_tell(copy):
    for step, told in ((2, RUN), (1, {})):
        (copy / str(step) / RECORD).write_text("{")
        with Checkpoints(copy, of=RUN) as checkpoints:
            assert checkpoints.told() == told


def test_who_only_reads_renames_nothing(copy):
    flip(copy / "2" / RECORD)
    before = content(copy)
    with (
        Checkpoints(copy, of=RUN) as checkpoints,
        pytest.raises(UserError, match=r"damaged \(.*let the mode that trained it"),
    ):
        checkpoints.restore(state())
    assert content(copy) == before


def test_a_second_bad_step_of_one_number_gets_another_name(copy, capfd):
    for _ in range(2):
        flip(copy / "2" / RECORD)
        with Checkpoints(copy, of=RUN, mend=True) as checkpoints:
            assert checkpoints.restore(state())[1] == {"note": 1}
            checkpoints.save(2, state(2.0), {"note": 2})
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "2.damaged", "2.damaged-2"]


def test_a_bad_step_that_cannot_be_renamed(copy, monkeypatch):
    flip(copy / "2" / RECORD)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    assert "cannot be set aside: Permission denied" in restored(copy)


def test_a_step_of_another_run_is_refused_and_stays(copy):
    for of, difference in (
        ({"phase": "prune", "seed": 0}, "phase: 'dense' there, 'prune' here"),
        ({"phase": "dense", "seed": 1}, "seed: 0 there, 1 here"),
    ):
        with (
            Checkpoints(copy, of=of, mend=True) as checkpoints,
            pytest.raises(UserError, match=difference),
        ):
            checkpoints.restore(state())
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_of_another_run_only_what_is_asked_for_must_be_the_same(copy):
    with Checkpoints(copy, of={"phase": "dense"}) as checkpoints:
        assert checkpoints.restore(state())[1] == {"note": 2}
    for of in ({"phase": "prune"}, {"phase": "dense", "not told there": "x"}):
        with Checkpoints(copy, of=of) as checkpoints, pytest.raises(UserError, match="another run"):
            checkpoints.restore(state())


def test_a_run_that_is_older_than_a_field_is_taken_for_one_of_its_default(copy):
    assumed = {"field": 1, "phase": "what is told counts"}
    with Checkpoints(copy, of={"phase": "dense", "field": 1}, assumed=assumed) as checkpoints:
        assert checkpoints.restore(state())[1] == {"note": 2}
    with (
        Checkpoints(copy, of={"phase": "dense", "field": 2}, assumed=assumed) as checkpoints,
        pytest.raises(UserError, match="field: 1 there, 2 here"),
    ):
        checkpoints.restore(state())


async def full(*_):  # in the background, as the method that it stands for
    raise OSError(errno.ENOSPC, "No space left on device")


# What tensorstore still has under way may find Orbax' event loop closed, in a thread of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["Orbax", "tensorstore"])
def test_a_save_that_fails_is_one_line_and_leaves_the_one_before(copy, monkeypatch, how):
    def save():
        with Checkpoints(copy, of=RUN, mend=True) as checkpoints:
            checkpoints.save(3, state(3.0), {})

    if how == "Orbax":
        monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
    else:
        error = ValueError("RESOURCE_EXHAUSTED: Error ... [os_error_code='28']\n...")
        monkeypatch.setattr(
            ocp.CheckpointManager, "wait_until_finished", lambda _: (_ for _ in ()).throw(error)
        )
    with pytest.raises(UserError, match=r"cannot be saved in .*No space left on device") as caught:
        save()
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.undo()
    assert restored(copy) == 2


def test_only_who_trains_clears_away_what_a_killed_save_left(copy):
    (copy / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(copy, of=RUN) as checkpoints:
        assert checkpoints.steps() == [2, 1]
        assert len(list(copy.iterdir())) == 3
    with Checkpoints(copy, of=RUN, mend=True) as checkpoints:
        checkpoints.save(4, state(4.0), {})
    assert sorted(path.name for path in copy.iterdir()) == ["2", "4"]


def test_a_clock_that_was_set_back_changes_nothing(copy):
    notes = copy / "1" / "_CHECKPOINT_METADATA"
    later = {
        k: v + 10**18 if k.endswith("nsecs") else v
        for k, v in json.loads(notes.read_text()).items()
    }
    notes.write_text(json.dumps(later))
    os.utime(copy / "1", (2**32, 2**32))
    assert restored(copy) == 2
    with Checkpoints(copy, of=RUN, mend=True) as checkpoints:
        checkpoints.save(3, state(3.0), {})
    assert sorted(path.name for path in copy.iterdir()) == ["2", "3"]


def test_a_save_sees_nothing_of_what_comes_after(tmp_path):
    array = np.zeros(1_000_000, np.float32)
    with Checkpoints(tmp_path / "c", of=RUN) as checkpoints:
        checkpoints.save(1, {"a": array}, {})
        array += 1
    with Checkpoints(tmp_path / "c", of=RUN) as checkpoints:
        assert not checkpoints.restore({"a": array})[0]["a"].any()


def test_mistakes_get_a_line(tmp_path):
    with Checkpoints(tmp_path / "c", of=RUN) as checkpoints:
        with pytest.raises(UserError, match="there is no checkpoint in"):
            checkpoints.restore(state())
        checkpoints.save(1, state(), {})
    with (
        Checkpoints(tmp_path / "c", of=RUN) as checkpoints,
        pytest.raises(UserError, match="of another model: b is in only one"),
    ):
        checkpoints.restore({"b": jnp.zeros(2), **state()})
    with (
        Checkpoints(tmp_path / "c", of=RUN) as checkpoints,
        pytest.raises(
            UserError,
            match=r"another model: a/kernel is float32\[300\] there and float32\[7\] here",
        ),
    ):
        checkpoints.restore({"a": {"kernel": jnp.zeros(7)}, "step": state()["step"]})
