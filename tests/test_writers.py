import errno
import io
import json
import os
import re
import struct

import pytest
import rich.console
import rich.text
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dynprune_jax import writers
from dynprune_jax.writers import Writers, read_metrics, resident_memory_mb


def events(folder):
    """What TensorBoard reads: records of length, checksum, event, checksum."""
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_rows_go_to_both_files(tmp_path):
    with Writers(tmp_path, "dense", 4) as writers:
        writers.write(6, {"loss": 0.5, "ratio": None})
    assert read_metrics(tmp_path) == [{"step": 6, "phase": "dense", "loss": 0.5, "ratio": None}]
    _, begin, row = events(tmp_path)
    # TensorBoard drops what an earlier process wrote of step 5 and later.
    assert (begin.step, begin.session_log.status) == (5, SessionLog.START)
    assert (row.step, [(v.tag, v.simple_value) for v in row.summary.value]) == (6, [("loss", 0.5)])


def test_rows_after_the_step_to_go_on_from_are_taken_out(tmp_path):
    with Writers(tmp_path, "dense", 0) as writers:
        for step in (1, 2, 3):
            writers.write(step, {})
    with Writers(tmp_path, "prune", 3) as writers:
        writers.write(4, {})
    with Writers(tmp_path, "dense", 2) as writers:
        writers.write(3, {"again": 1})
    # TensorBoard drops what was told of a later step, so that is told again.
    *_, begin, kept, again = events(tmp_path)
    assert begin.session_log.status == SessionLog.START
    assert (kept.step, again.step) == (4, 3)
    rows = [(row["step"], row["phase"], row.get("again")) for row in read_metrics(tmp_path)]
    assert rows == [
        (1, "dense", None), (2, "dense", None), (4, "prune", None), (3, "dense", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"7", b"{}", b'{"step": "2"}', b'{"st\xe5p": 2}', b"\xff\xfe"]
)
def test_a_damaged_row_is_left_out(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]


def test_a_full_disk_is_an_error_at_once(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writers(tmp_path, "dense", 0) as writers:
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left on device"):
                writers.write(1, {"loss": 0.5})
        writers.write(2, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_the_memory_held_is_told():
    before = resident_memory_mb()
    if before is None:
        pytest.skip("this system does not tell")
    held = bytearray(b"x" * 100 * 2**20)
    assert resident_memory_mb() > before + 90
    del held


def test_a_line_of_training_tells_the_rate_and_the_time_that_is_left(capfd):
    bar = writers.PhaseBar("prune", 0, 10)
    ratios = {"channel_ratio": 0.25, "column_ratio": None}
    for step, rate in ((5, 0.0), (5, 2.0), (10, 2.0)):
        bar.say(step, 5, 0.5, ratios, rate, 16)
    first, second, last = capfd.readouterr().out.splitlines()
    assert first == "prune  epoch 1 of 2: test accuracy 0.5000, pruning 0.25 of the channels"
    assert second == f"{first} (32 images/s, 0:00:02 of training left)"
    assert last == f"{first.replace('epoch 1', 'epoch 2')} (32 images/s)"


def test_a_line_is_printed_as_it_is(capfd):
    text = "[/usr/lib/no.so] not found in [a] :warning: " + 100 * "x"
    writers.say(text)
    assert capfd.readouterr().out == f"{text}\n"


def test_where_there_is_no_terminal_a_line_tells_what_is_done(capfd):
    with writers.progress_bar("evaluating") as progress:
        progress(3, 6)
    assert capfd.readouterr().out == "evaluating ...\n"


def test_a_bar_tells_how_many_of_how_many_are_done_and_the_rate(monkeypatch):
    file = io.StringIO()
    console = rich.console.Console(force_terminal=True, width=100, file=file)
    monkeypatch.setattr(writers, "screen", lambda: console)
    with writers.progress_bar("evaluating") as progress:
        progress(0, 6)
        progress(3, 6)
    shown = rich.text.Text.from_ansi(file.getvalue()).plain
    assert re.search(r"evaluating .* 3/6 [\d.e+]+/s", shown)


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    def half(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "report.json"
    writers.write_json(path, {"accuracy": 0.5})
    monkeypatch.setattr(type(path), "write_bytes", half)
    with pytest.raises(OSError, match="No space left on device"):
        writers.write_json(path, {"accuracy": 0.75})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    assert [*tmp_path.iterdir()] == [path]
