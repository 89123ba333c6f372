"""Batches: from device memory, from a stream, and for evaluation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Key, UInt8

from dynprune_jax.data.records import chunks
from dynprune_jax.data.sources import Split

_ALL = slice(None)


def device_batch(
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    images: UInt8[Array, "n height width channels"],
    labels: Int32[Array, " n"],
    batch_size: int,
) -> tuple[UInt8[Array, "batch height width channels"], Int32[Array, " batch"]]:
    """Draws training batch number `step` from arrays in device memory.

    A pure function of key and step, so that resuming needs no state. Each epoch of
    `n // batch_size` steps has its own order; the examples left over at its end are not used
    in that epoch.

    Args:
      key: of the orders; the same for a whole phase.
      step: counted from 0; may be traced.
      images: all training images.
      labels: their labels.
      batch_size: number of examples to draw, at most all.
    """
    count = images.shape[0]
    per_epoch = count // batch_size
    step = jnp.asarray(step, jnp.int32)
    epoch_key = jax.random.fold_in(key, step // per_epoch)
    # One sort of random numbers; `jax.random.permutation` sorts twice to break up the rare ties.
    order = jnp.argsort(jax.random.bits(epoch_key, (count,)))
    first = (step % per_epoch) * batch_size
    chosen = jax.lax.dynamic_slice(order, (first,), (batch_size,))
    return images[chosen], labels[chosen]


def stream_batches(
    split: Split, batch_size: int, seed: int, *, threads: int = 4, rows: slice = _ALL
) -> grain.DatasetIterator:
    """Streams shuffled training batches without end, decoding in threads ahead of the caller.

    Each pass over the split is shuffled anew and holds every example once; batches run across
    the border of two passes. What comes is determined by the seed and the position alone.
    Save the position with `get_state()` and restore it with `set_state(state)`. Call `close()` to
    end the threads.

    Args:
      split: where the examples come from.
      batch_size: number of examples in each batch, at most all.
      seed: of the orders.
      threads: how many batches are decoded at the same time; 0 decodes when asked. As many
        are kept ready.
      rows: which rows of each batch to read: one of many processes reads only its own. The
        position is the same for all rows.

    Returns:
      An iterator of `{"image": uint8 (batch, side, side, channels), "label": int32 (batch,)}`.

    Raises:
      UserError: while iterating, as `Split.read`.
    """

    def read(
        indices: Int[np.ndarray, " batch"],
    ) -> dict[str, np.ndarray]:
        images, labels = split.read(indices[rows])
        return {"image": images, "label": labels}

    order = grain.MapDataset.range(len(split)).seed(seed).shuffle().repeat()
    # Batches of indices, so that a batch is one read of the records. An endless stream has no
    # remainder; asking to drop it keeps grain from rounding its length up past an integer.
    batches = order.batch(batch_size, drop_remainder=True).map(read)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(batches.to_iter_dataset(options))


def eval_batches(
    examples: Split | tuple[UInt8[np.ndarray, "n height width channels"], Int32[np.ndarray, " n"]],
    batch_size: int,
    rows: slice = _ALL,
) -> Iterator[
    tuple[
        UInt8[np.ndarray, "rows height width channels"],
        Int32[np.ndarray, " rows"],
        Bool[np.ndarray, " batch"],
    ]
]:
    """Yields all examples once and in order, in batches of one fixed shape.

    Args:
      examples: a split, which is decoded one batch ahead, or (images, labels) in memory.
      batch_size: number of examples in each batch, padding included.
      rows: which rows of each batch to read: one of many processes reads only its own.

    Yields:
      Images and labels of these rows, and which of the whole batch are valid. The last batch
      is padded with zeros, whose `valid` is False.
    """
    count = len(examples) if isinstance(examples, Split) else len(examples[1])
    own = range(batch_size)[rows]

    def load(
        chunk: range,
    ) -> tuple[UInt8[np.ndarray, "rows height width channels"], Int32[np.ndarray, " rows"]]:
        mine = chunk[rows]
        if isinstance(examples, Split):
            images, labels = examples.read(mine)
        else:
            where = slice(mine.start, mine.stop)
            images, labels = examples[0][where], examples[1][where]
        missing = len(own) - len(labels)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return images, np.pad(labels, (0, missing))

    with ThreadPoolExecutor(1) as pool:
        loading = ((pool.submit(load, c), len(c)) for c in chunks(count, batch_size))
        one_ahead: Iterator[Any] = pairwise(chain(loading, [None]))
        for (loaded, examples_in_it), _ in one_ahead:
            images, labels = loaded.result()
            yield images, labels, np.arange(batch_size) < examples_in_it
