"""What test_processes.py starts, once or several times: a few steps and an evaluation of a config.

python worker.py CONFIG OUT WAY...: reads a pickled config, writes the results as OUT, a .npz file.
A way to have the data is memory or stream.
"""

import pickle
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dynprune_jax.feed import Feed
from dynprune_jax.processes import joined, leads
from dynprune_jax.run import Run
from dynprune_jax.train_step import TrainState

STEPS = 3


def results(config, workdir):
    """Parameters and batch statistics after a few steps; what the fresh network did on the test."""
    run = Run.open(config, workdir)
    network = run.dynamic
    with Feed(run, "prune", network) as feed:
        state = TrainState.create(run.dense.weights, network, run.optimizer("prune"))
        state = feed.place(state)
        for _ in range(STEPS):
            state, metrics = feed.advance(state, 1, feed.next_batch())
        position = feed.position()
    evaluation = run.evaluate(network, run.dense.weights)
    return {
        **jax.device_get(state.values),
        "metrics": np.asarray([metrics["loss"], metrics["accuracy"]]),
        "correct": evaluation.correct,
        "macs": evaluation.usage.macs,
        "executed_macs": evaluation.usage.executed_macs,
        "position": np.asarray(str(position)),
    }


def main(config_file, out, *ways):
    config = ConfigDict(pickle.loads(Path(config_file).read_bytes()))
    found = {}
    with joined():
        for way in ways:
            config.data.memory_limit_mb = {"memory": 4096, "stream": 0}[way]
            for key, value in results(config, Path(out).parent / "none").items():
                found[f"{way}:{key}"] = value
        if leads():
            np.savez(out, **found)
    # In JAX's own code as Python ends, the watch would abort a process that has done its work.
    assert not [thread for thread in threading.enumerate() if "_watch" in thread.name]


if __name__ == "__main__":
    main(*sys.argv[1:])
