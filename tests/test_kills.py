"""A run killed with SIGKILL at random moments ends as if it had not been.

Twenty kills for each path, with a line on each: KILLS=20 python -m pytest -s tests/test_kills.py
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile

import pytest
from conftest import CONFIGS

from dynprune_jax.writers import read_metrics

KILLS = int(os.environ.get("KILLS", "2"))
EPOCHS = 2 + KILLS  # of each phase: more than are trained up to the last kill
STEPS_PER_EPOCH = 4
MOMENTS = ("step", "evaluation", "saving")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and what one process has compiled the next does not compile again."""
    return {
        **os.environ,
        "PYTHONPATH": os.path.dirname(__file__),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture
def command(data_dir):
    fields = {
        "model": "networks:small_vgg",
        "data.data_dir": data_dir,
        "data.image_size": 8,
        "data.crop_padding": 1,
        "data.train_examples": 16 * STEPS_PER_EPOCH,
        "data.test_examples": 60,
        "batch_size": 16,
        "eval_batch_size": 5,
        "log_every_steps": 3,
        "evaluate_every_epochs": 1,
        "dense.epochs": EPOCHS,
        "dense.warmup_epochs": 0,
        "dense.learning_rate": 0.01,
        "prune.epochs": EPOCHS,
        "prune.learning_rate": 0.01,
        "ascent.warmup": 0.4,
        "ascent.increment": 0.2,
        "gate.channel_ratio": (0.4, 0.5),
        "gate.column_ratio": (0.0, 0.5),
        "gate.drop_probability": 0.8,
    }
    return [
        sys.executable, "-m", "dynprune_jax.main", f"--config={CONFIGS / 'digits_vgg.py'}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip


def rows(workdir):
    """The metrics without what only this machine knows."""
    return [
        {name: value for name, value in row.items() if name != "resident_memory_mb"}
        for row in read_metrics(workdir)
    ]


def unfinished(workdir):
    return list(workdir.glob("checkpoints/*/*.orbax-checkpoint-tmp"))


def run_until(command, environment, workdir, moment, delay):
    """Runs the command and kills it a moment later; gives its exit code and what it said.

    The moment comes when this process has gone past the last one: in one of the next steps, when
    the last row tells of the end of an epoch, which is evaluated now, or while a checkpoint is
    written.
    """
    begun = len(read_metrics(workdir))

    def come():
        new = read_metrics(workdir)[begun + 2 :]
        if moment == "saving":
            return new and unfinished(workdir)
        if moment == "evaluation":
            return new and new[-1]["step"] % STEPS_PER_EPOCH == 0 and "train_loss" in new[-1]
        return new

    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            while process.poll() is None and not come():
                ended(process, 0.001)
            ended(process, delay)
        finally:
            process.kill()
        code = process.wait()
        said.seek(0)
        return code, said.read()


def ended(process, seconds):
    """Waits that long at most."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


@pytest.mark.parametrize("path", ["memory", "stream"] if "KILLS" in os.environ else ["stream"])
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    path, command, environment, tmp_path
):
    command += [f"--config.data.memory_limit_mb={4096 if path == 'memory' else 0}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, f"--workdir={whole}"], env=environment, check=True)
    command += [f"--workdir={cut}"]
    chance = random.Random(path)
    for kill in range(KILLS):
        moment, delay = MOMENTS[kill % len(MOMENTS)], chance.uniform(0, 0.05)
        code, said = run_until(command, environment, cut, moment, delay)
        assert code == -signal.SIGKILL, said
        assert not (cut / "report.json").exists()
        print(f"{path}, kill {kill + 1}, {moment} + {1000 * delay:.0f} ms: {standing(cut)}")
    subprocess.run(command, env=environment, check=True)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, cut)]
    print(f"{path}, parameters of both:", *(report["parameters_digest"] for report in reports))
    assert reports[0]["parameters_digest"] == reports[1]["parameters_digest"]
    assert reports[0]["pruned"] == reports[1]["pruned"]
    assert rows(whole) == rows(cut)
    assert not list(cut.glob("checkpoints/*/*.damaged*"))
    assert not unfinished(cut)


def standing(workdir):
    row = read_metrics(workdir)[-1]
    kind = "training" if "train_loss" in row else "evaluation"
    steps = sorted(int(p.name) for p in workdir.glob(f"checkpoints/{row['phase']}/*[0-9]"))
    half = [path.name.split(".")[0] for path in unfinished(workdir)]
    return f"last row {row['phase']} {kind} at {row['step']}, saved {steps}" + (
        f", half saved {half}" if half else ""
    )
