"""The scripts in launch/: what they print, refuse and start, with stand-ins for gcloud and srun."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_processes import ROOT, SMALL, environment

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TPU = {"RUN": "a-run", "ZONE": "a-zone", "TYPE": "v5litepod-16", "SHARE": "10.0.0.2:/runs"}
SHORT = [*SMALL, "--config.dense.epochs=1"]

SRUN = """
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2 SLURM_PROCID=$i \\
    SLURM_LOCALID=$i "$@" &
done
wait -n && wait -n
"""

# Two workers, which share one folder of runs; the first run of the program is preempted.
GCLOUD = """
shift 3
echo "$1" >> "$POD/calls"
case "$*" in
  create*) echo READY > "$POD/state" ;;
  delete*) rm "$POD/state" ;;
  describe*ipAddress*) echo 127.0.0.1 ;;
  describe*) cat "$POD/state" ;;
  scp*) for i in 0 1; do cp "$2" "$POD/worker$i/code.tar.gz"; done ;;
  ssh*)
    [[ $3 == --worker=all && $4 == --command=* ]]
    if [[ $4 == *dynprune_jax.main* && ! -e $POD/preempted ]]; then
      echo PREEMPTED | tee "$POD/state" "$POD/preempted"
      exit 1
    fi
    for i in 0 1; do
      HOME=$POD/worker$i JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=$i bash -c "${4#--command=}" &
    done
    wait -n && wait -n ;;
esac
"""

UV = """
if [[ $1 == venv ]]; then
  mkdir -p ~/venv/bin
  printf '#!/bin/sh\\nexec "%s" "$@"\\n' "$PYTHON" > ~/venv/bin/python
  chmod +x ~/venv/bin/python
fi
"""


def executable(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}")
    path.chmod(0o755)


def launch(script, *arguments, **variables):
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        env=environment(JAX_DISABLE_MOST_OPTIMIZATIONS=1, **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_finished(done, workdir):
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert report["device"] == "2 x cpu"
    assert report["dense"]["examples"] == 40


def test_shellcheck_finds_nothing():
    shellcheck = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    subprocess.run([shellcheck, *SCRIPTS], check=True)


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_bad_input_gets_the_usage_line(script):
    done = launch(script)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: ")
    assert done.stderr.count("\n") == 1


def test_dry_runs_start_nothing():
    flags = ["--config=c.py", "--workdir=w", "--config.gate.channel_ratio=(.5, .2)"]
    local = launch("local.sh", "--dry-run", "3", *flags)
    assert local.stdout.count("'JAX_NUM_PROCESSES=3'") == 3
    assert "'JAX_PROCESS_ID=2' 'JAX_LOCAL_DEVICE_IDS=2'" in local.stdout.splitlines()[2]
    slurm = launch("slurm.sh", "--dry-run", *flags, SLURM_JOB_ID=4097, SLURMD_NODENAME="n1")
    assert slurm.stdout.startswith("JAX_COORDINATOR_ADDRESS=n1:61441 'srun' '--kill-on-bad")
    tpu = launch("tpu_pod.sh", "--dry-run", "all", flags[0], flags[2], **TPU)
    verbs = [line.split("'")[9] for line in tpu.stdout.splitlines() if line.startswith("'gcloud'")]
    assert verbs == ["create", "scp", "ssh", "describe", "ssh", "delete"]
    assert "--workdir=$HOME/runs/a-run" in tpu.stdout
    assert tpu.stdout.splitlines()[0].endswith(" '--preemptible' '--zone=a-zone'")
    assert "JAX_COORDINATOR_ADDRESS=ADDRESS:8476" in tpu.stdout
    demand = launch("tpu_pod.sh", "--dry-run", "create", **TPU, PREEMPTIBLE="no")
    assert demand.stdout.endswith(" '--version=tpu-ubuntu2204-base' '--zone=a-zone'\n")
    for done in (local, slurm, tpu):
        assert done.returncode == 0, done.stderr
        assert "(.5, .2)" in done.stdout  # an argument stays one


@pytest.mark.parametrize(("given", "ids"), [("1", "0"), ("h100:2", "0,1")])
def test_a_slurm_task_asks_for_the_gpus_that_it_sees(given, ids):
    """With GPUs of its own each task sees these, counted from 0, and no others."""
    flags = ["--dry-run", "--config=c.py", "--workdir=w"]
    done = launch("slurm.sh", *flags, SLURM_JOB_ID=1, SLURM_GPUS_PER_TASK=given)
    assert f" JAX_LOCAL_DEVICE_IDS={ids} 'srun'" in done.stdout
    done = launch("slurm.sh", *flags, SLURM_JOB_ID=1)
    assert "JAX_LOCAL_DEVICE_IDS" not in done.stdout


@pytest.mark.parametrize("verb", ["all", "run"])
def test_a_pod_runs_a_config(verb):
    done = launch("tpu_pod.sh", "--dry-run", verb, **TPU)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


def test_local_ends_with_the_status_of_the_first_that_failed(tmp_path):
    executable(tmp_path / "python", "[[ $1 == -c ]] || exit $((2 * JAX_PROCESS_ID))")
    done = launch("local.sh", "3", "--config=c.py", "--workdir=w", PYTHON=tmp_path / "python")
    assert done.returncode == 2
    assert re.findall(r"process (\d) of 3 ended with status (\d)", done.stderr) == [
        ("1", "2"),
        ("2", "4"),
    ]


def test_a_pod_needs_a_checkout_to_install(tmp_path):
    script = tmp_path / "launch" / "tpu_pod.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "launch" / "tpu_pod.sh").read_bytes())
    script.chmod(0o755)
    done = launch(script, "--dry-run", "all", "--config=c.py", **TPU)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"launch/tpu_pod\.sh: .* is no git checkout, .*\n", done.stderr)


def test_local_waits_for_what_is_still_saving(tmp_path):
    """A stand-in for the program, which takes its time to end after a signal."""
    executable(
        tmp_path / "python",
        """
if [[ $1 == -c ]]; then echo 1234; exit; fi
trap 'sleep $((1 - JAX_PROCESS_ID)); touch "$SAVED$JAX_PROCESS_ID"; exit 143' TERM
touch "$SAVED.begun$JAX_PROCESS_ID"
while true; do sleep .05; done
""",
    )
    saved = tmp_path / "saved"
    script = subprocess.Popen(
        [ROOT / "launch" / "local.sh", "2", "--config=c.py", "--workdir=w"],
        env=environment(PYTHON=tmp_path / "python", SAVED=saved),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while len(list(tmp_path.glob("saved.begun*"))) < 2:
            assert script.poll() is None
            time.sleep(0.05)
        script.terminate()
        script.wait(timeout=60)
        left = sorted(path.name for path in tmp_path.glob("saved[01]"))
        _, said = script.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 143
    assert left == ["saved0", "saved1"]  # the first takes longer
    assert said.count("ended with status 143") == 2


def test_slurm_outside_of_a_job_says_so():
    done = launch("slurm.sh", "--config=c.py", "--workdir=w")
    assert done.returncode == 2
    assert "start it with sbatch" in done.stderr


def test_a_slurm_job_trains(tmp_path, data_dir):
    executable(tmp_path / "bin" / "srun", SRUN)
    workdir = tmp_path / "workdir"
    flags = [*SHORT, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = launch(
        "slurm.sh", *flags, PATH=path, SLURM_JOB_ID=os.getpid(), SLURMD_NODENAME="localhost"
    )
    check_finished(done, workdir)


# The first slice is preempted; for the attempts named in FULL there is no capacity.
SHORT_OF_SLICES = """
shift 3
echo "$1" >> "$POD/calls"
attempt=$(grep -c create "$POD/calls")
case "$*" in
  create*) [[ " $FULL " != *" $attempt "* ]] && echo READY > "$POD/state" ;;
  delete*) rm "$POD/state" ;;
  describe*ipAddress*) echo 127.0.0.1 ;;
  describe*) cat "$POD/state" ;;
  ssh*dynprune_jax.main*) [[ $attempt != 1 ]] || { echo PREEMPTED > "$POD/state" && false; } ;;
esac
"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the pod gets what git has")
@pytest.mark.parametrize("full", ["2 3", "1"])
def test_a_pod_waits_for_another_slice_but_not_for_the_first(tmp_path, full):
    executable(tmp_path / "bin" / "gcloud", SHORT_OF_SLICES)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = launch(
        "tpu_pod.sh", "all", "--config=c.py", **TPU, PATH=path, POD=tmp_path, FULL=full, WAIT=0
    )
    calls = (tmp_path / "calls").read_text().split()
    if full == "1":
        assert (done.returncode, calls) == (1, ["create", "describe"])
        return
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no slice to be had; it is asked for again") == 2
    used, none = ["create", "scp", "ssh", "describe", "ssh"], ["create", "describe"]
    assert calls == [*used, "describe", "delete", *none, *none, *used, "delete"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the pod gets what git has")
def test_a_pod_trains_on_after_a_preemption(tmp_path, data_dir):
    pod = tmp_path / "pod"
    (pod / "share").mkdir(parents=True)
    for worker in ("worker0", "worker1"):
        executable(pod / worker / ".local" / "bin" / "uv", UV)
        (pod / worker / "runs").symlink_to(pod / "share")
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    executable(tmp_path / "bin" / "sudo")
    executable(tmp_path / "bin" / "pip")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    flags = [*SHORT, f"--config.data.data_dir={data_dir}"]
    done = launch("tpu_pod.sh", "all", *flags, **TPU, PATH=path, POD=pod)
    check_finished(done, pod / "share" / "a-run")
    assert "a-run was preempted" in done.stderr
    attempt = ["create", "scp", "ssh", "describe", "ssh"]
    calls = (pod / "calls").read_text().split()
    assert calls == [*attempt, "describe", "delete", *attempt, "delete"]
    assert "Report, pictures and checkpoints" in (pod / "worker0" / "a-run.log").read_text()
