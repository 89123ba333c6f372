"""Batches: each example once, the same again after a restore."""

import json
import threading
from contextlib import closing
from itertools import chain

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynprune_jax.data.batches import device_batch, eval_batches, stream_batches
from dynprune_jax.data.images import encode_png
from dynprune_jax.data.sources import Split
from dynprune_jax.errors import UserError


class Records(list):
    """A list of records, read as TFDS's data sources are."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def numbered_split(count):
    """A split whose example `i` has the label `i` and an image full of `i`."""
    records = Records(
        {"image": encode_png(Image.new("L", (2, 2), i)), "label": i} for i in range(count)
    )
    return Split("train", records, side=2, channels=1)


def numbered_arrays(count):
    labels = np.arange(count, dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (count, 2, 2, 1))
    return np.ascontiguousarray(images), labels


# ---------------------------------------------------------------- device_batch


@settings(deadline=None, max_examples=10)
@given(count=st.sampled_from([1, 13, 40]), size=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_a_device_epoch_draws_no_example_twice(count, size, seed):
    size = min(size, count)
    images, labels = map(jnp.asarray, numbered_arrays(count))
    key = jax.random.key(seed)
    drawn = []
    for step in range(count // size):
        batch, batch_labels = jax.jit(device_batch, static_argnums=4)(
            key, step, images, labels, size
        )
        np.testing.assert_array_equal(batch[:, 0, 0, 0], batch_labels)
        drawn.extend(batch_labels.tolist())
    assert len(drawn) == count // size * size
    assert len(set(drawn)) == len(drawn)


def test_device_epochs_differ_and_steps_are_pure_and_traced_once():
    images, labels = map(jnp.asarray, numbered_arrays(63))  # three are left over
    key = jax.random.key(0)
    traces = []

    @jax.jit
    def draw(step):
        traces.append(step)
        return device_batch(key, step, images, labels, 20)[1]

    epochs = [[draw(jnp.int32(3 * epoch + i)).tolist() for i in range(3)] for epoch in range(4)]
    assert len(traces) == 1
    flat = [list(chain(*epoch)) for epoch in epochs]
    assert all(len(epoch) == len({*epoch}) == 60 for epoch in flat)
    assert len({tuple(epoch) for epoch in flat}) == 4
    assert draw(jnp.int32(7)).tolist() == epochs[2][1]
    other = device_batch(jax.random.key(1), 7, images, labels, 20)[1]
    assert other.tolist() != epochs[2][1]


def test_device_order_is_unbiased():
    images, labels = map(jnp.asarray, numbered_arrays(5))
    firsts = jax.vmap(lambda step: device_batch(jax.random.key(0), step, images, labels, 5)[1][0])(
        jnp.arange(2000)
    )
    counts = np.bincount(firsts, minlength=5)
    assert counts.min() > 330
    assert counts.max() < 470


# ---------------------------------------------------------------- stream_batches


def take(stream, count):
    batches = [next(stream) for _ in range(count)]
    for batch in batches:
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    return [batch["label"].tolist() for batch in batches]


@settings(deadline=None, max_examples=8)
@given(count=st.integers(2, 12), size=st.integers(1, 5), threads=st.integers(0, 3))
def test_a_streamed_epoch_holds_each_example_once(count, size, threads):
    size = min(size, count)
    stream = stream_batches(numbered_split(count), size, seed=3, threads=threads)
    labels = list(chain(*take(stream, 3 * count)))  # `3 * size` epochs
    stream.close()
    epochs = [labels[i : i + count] for i in range(0, len(labels), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 6:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_streams_depend_on_the_seed_alone():
    split = numbered_split(30)
    first = take(stream_batches(split, 7, seed=1, threads=0), 6)
    assert take(stream_batches(split, 7, seed=1, threads=3), 6) == first
    assert take(stream_batches(split, 7, seed=2, threads=3), 6) != first
    rows = stream_batches(split, 7, seed=1, rows=slice(2, 5))  # those of one of many processes
    assert take(rows, 6) == [batch[2:5] for batch in first]


def test_a_restored_stream_goes_on_where_it_was():
    split = numbered_split(20)
    stream = stream_batches(split, 6, seed=5)
    take(stream, 9)
    state = json.loads(json.dumps(stream.get_state()))
    expected = take(stream, 8)
    fresh = stream_batches(split, 6, seed=5)
    fresh.set_state(state)
    assert take(fresh, 8) == expected
    stream.set_state(state)  # back in time
    assert take(stream, 8) == expected


def test_a_stream_is_saved_and_restored_by_orbax(tmp_path):
    split = numbered_split(20)
    stream = stream_batches(split, 6, seed=5)
    take(stream, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = grain.checkpoint.CheckpointSave(stream)
        manager.save(4, args=ocp.args.Composite(data=save))
        manager.wait_until_finished()
        expected = take(stream, 5)
        fresh = stream_batches(split, 6, seed=5)
        restore = grain.checkpoint.CheckpointRestore(fresh)
        restored = manager.restore(4, args=ocp.args.Composite(data=restore))
    assert take(restored["data"], 5) == expected


def test_a_stream_names_an_image_that_cannot_be_decoded():
    split = numbered_split(6)
    split._records[3]["image"] = b"junk"
    stream = stream_batches(split, 6, seed=0)
    with pytest.raises(UserError, match="split 'train', index 3"):
        next(stream)
    stream.close()


# ---------------------------------------------------------------- eval_batches


@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 20), size=st.integers(1, 8), as_split=st.booleans())
def test_evaluation_counts_each_example_once(count, size, as_split):
    examples = numbered_split(count) if as_split else numbered_arrays(count)
    batches = list(eval_batches(examples, size))
    assert len(batches) == -(-count // size)
    seen = []
    for images, labels, valid in batches:
        assert images.shape == (size, 2, 2, 1)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        assert valid.dtype == bool
        np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
        assert not labels[~valid].any()
        seen.extend(labels[valid].tolist())
    assert seen == list(range(count))
    assert all(valid.all() for _, _, valid in batches[:-1])
    own = slice(size // 2, None)  # the rows of one of many processes
    for (images, labels, valid), of_all in zip(
        eval_batches(examples, size, own), batches, strict=True
    ):
        np.testing.assert_array_equal(images, of_all[0][own])
        np.testing.assert_array_equal(labels, of_all[1][own])
        np.testing.assert_array_equal(valid, of_all[2])


def test_the_next_batch_is_decoded_while_one_is_evaluated(monkeypatch):
    begun, read = threading.Event(), Split.read

    def reading(split, indices):
        if 2 in indices:
            begun.set()
        return read(split, indices)

    monkeypatch.setattr(Split, "read", reading)
    with closing(eval_batches(numbered_split(6), 2)) as batches:
        next(batches)
        assert begun.wait(5.0)
