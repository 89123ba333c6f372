"""Several processes train as one does, and the death of one is told and survived."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import CONFIGS

from dynprune_jax import processes
from dynprune_jax.errors import UserError
from dynprune_jax.stopping import Stopped
from dynprune_jax.writers import read_metrics

ROOT = Path(__file__).parent.parent
SMALL = [
    f"--config={CONFIGS / 'digits_vgg.py'}",
    "--config.model=networks:small_vgg",
    "--config.batch_size=16",
    "--config.eval_batch_size=40",
    "--config.log_every_steps=2",
    "--config.evaluate_every_epochs=99",
    "--config.data.image_size=8",
    "--config.data.train_examples=32",
    "--config.data.test_examples=40",
    "--config.dense.epochs=12",
    "--config.dense.warmup_epochs=0.",
    "--config.prune.epochs=0",
]


def environment(**more):
    """Of a process that knows nothing of others, with the compilations of earlier ones."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    return {
        **kept,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **{name: str(value) for name, value in more.items()},
    }


def start(command, count, devices):
    """Starts a command as `count` processes of `devices` CPU devices."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    many = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": count}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(
                JAX_NUM_CPU_DEVICES=devices, **({**many, "JAX_PROCESS_ID": i} if count > 1 else {})
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(started, timeout=240):
    """Waits for processes to succeed."""
    outputs = [process.communicate(timeout=timeout)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    return outputs


def test_any_topology_trains_as_one_device_does(config, tmp_path):
    config.data.crop_padding = 1
    config.data.flip = True
    config.gate.drop_probability = 0.8
    (tmp_path / "config").write_bytes(pickle.dumps(config.to_dict()))
    worker = [str(ROOT / "tests" / "worker.py"), str(tmp_path / "config")]
    found = {}
    both = ("memory", "stream")
    for count, devices, ways in ((1, 1, both), (1, 8, both[:1]), (2, 2, both)):
        out = tmp_path / f"{count}x{devices}.npz"
        finish(start([*worker, str(out), *ways], count, devices))
        found[count, devices] = np.load(out)
    one = found.pop((1, 1))
    assert set(found[2, 2]) == set(one)
    for many in found.values():
        for name in many:
            value = one[name]
            if name.split(":")[1] in ("correct", "macs", "executed_macs", "position"):
                # Of each example and nothing else: no sum depends on who computes it.
                np.testing.assert_array_equal(many[name], value)
            else:
                # Sums over the batch are taken in another order: a few roundings of float32, of
                # 6e-8 each, that three steps through four batch normalizations make a thousand
                # times larger.
                np.testing.assert_allclose(many[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_dead_process_is_told_of_and_its_checkpoint_goes_on_elsewhere(tmp_path, data_dir):
    def flags(workdir):
        return [*SMALL, f"--workdir={tmp_path / workdir}", f"--config.data.data_dir={data_dir}"]

    def start_main(workdir, count, devices):
        return start(["-m", "dynprune_jax.main", *flags(workdir)], count, devices)

    survivor, victim = start_main("many", 2, 2)
    patience = time.monotonic() + 240
    while not list((tmp_path / "many" / "checkpoints" / "dense").glob("[1-9]*")):
        assert survivor.poll() is None, survivor.communicate()[0]
        assert time.monotonic() < patience
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    output, _ = survivor.communicate(timeout=30)
    victim.communicate()
    assert survivor.returncode == 1, output
    lines = [line for line in output.splitlines() if line.startswith("dynprune_jax:")]
    assert lines == [
        "dynprune_jax: process 0 of 2 ends because process 1 is gone; the same command goes on"
        " from the last checkpoint"
    ]
    assert "Traceback" not in output
    assert not (tmp_path / "many" / "report.json").exists()

    shutil.copytree(tmp_path / "many", tmp_path / "eight")
    finish(start_main("eight", 1, 8))
    output = subprocess.run(
        [ROOT / "launch" / "local.sh", "2", *flags("many")],
        env=environment(JAX_NUM_CPU_DEVICES=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert output.returncode == 0, output.stdout
    assert output.stdout.count("Report, pictures and checkpoints") == 1  # one process prints
    losses = {}
    for workdir in ("many", "eight"):
        assert (tmp_path / workdir / "training.png").exists()
        report = json.loads((tmp_path / workdir / "report.json").read_text())
        assert report["dense"]["examples"] == 40
        rows = [row for row in read_metrics(tmp_path / workdir) if "train_loss" in row]
        assert [row["step"] for row in rows] == list(range(2, 25, 2))
        losses[workdir] = [row["train_loss"] for row in rows]
    # From the same state on: the same steps, but for rounding that grows.
    np.testing.assert_allclose(losses["eight"][:3], losses["many"][:3], rtol=1e-2)


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, data_dir):
    folder = tmp_path / "run" / "checkpoints" / "dense"
    flags = [*SMALL, f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={data_dir}"]
    flags.append("--config.dense.epochs=400")  # it is not to end before
    both = start(["-m", "dynprune_jax.main", *flags], 2, 1)
    patience = time.monotonic() + 240
    while not list(folder.glob("[1-9]*")):
        assert both[0].poll() is None, both[0].communicate()[0]
        assert time.monotonic() < patience
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [143, 143], "\n".join(outputs)
    steps = [int(path.name) for path in folder.glob("[1-9]*") if path.name.isdecimal()]
    for output in outputs:
        assert f"stopped by SIGTERM; step {max(steps)} of 800" in output
        assert "Traceback" not in output


def test_a_file_of_process_0_may_be_seen_late(tmp_path, monkeypatch):
    """A network file system may remember for a while that it was not there."""
    path, waited = tmp_path / "config.json", []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            path.touch()

    patched = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(processes, "time", patched)
    assert not processes.sees(path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes.sees(path)
    assert len(waited) == 3
    monkeypatch.setattr(processes, "_REMEMBERED_SECONDS", 0.0)
    assert not processes.sees(tmp_path / "other")


@pytest.mark.parametrize(
    ("index", "over", "looks", "ends"),
    [
        (0, False, [({0, 1}, set()), ({0}, set())], None),  # the others have left
        (0, False, [(set(), {2, 1})], "process 0 of 3 ends because process 1, 2 is gone;"),
        (0, True, [(set(), {1}), ({0}, set())], None),  # it ended as all do
        (0, True, [(set(), {0})], None),
        (1, False, [(set(), {0})], "process 1 of 3 ends because process 0 is gone;"),
        (1, True, [], None),
    ],
)
def test_the_death_of_another_is_told_from_the_end(monkeypatch, capsys, index, over, looks, ends):
    def leave(code):
        raise SystemExit(code)

    for name in ("_LOOK_SECONDS", "_ENDING_SECONDS"):
        monkeypatch.setattr(processes, name, 0.0)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes, "_look", lambda: looks.pop(0))
    monkeypatch.setattr(os, "_exit", leave)
    ended = threading.Event()
    if over:
        ended.set()
    with pytest.raises(SystemExit, match="1") if ends else nullcontext():
        processes._watch(ended)
    assert not looks
    assert (ends or "") in capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("a mistake"), OSError("full"), Stopped(15, "by hand")])
def test_the_watch_ends_before_an_error_is_told(monkeypatch, error):
    """In JAX's own code when Python ends, its thread would take the process down with it."""
    gone = []

    def watch(ended):
        ended.wait()
        time.sleep(0.2)  # its last look
        gone.append(True)

    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(processes, "_watch", watch)
    with pytest.raises(type(error)), processes.joined():
        raise error
    assert gone


def test_a_mode_for_one_process_is_refused_to_two(monkeypatch):
    processes.check_alone("study")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--mode=study is for one process, not 2"):
        processes.check_alone("study")


def test_half_an_environment_gets_a_line(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two'"), processes.joined():
        pass
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere")
    with pytest.raises(UserError, match="'nowhere'; it must be host:port"), processes.joined():
        pass
