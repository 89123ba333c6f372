"""What a run writes as it goes: metrics.jsonl, TensorBoard events, and lines on the screen.

Of many processes only the leading one writes and prints anything.
"""

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from dynprune_jax import processes

_EVENT: Any = event_pb2  # protobuf makes the classes of these modules as they are imported
_SUMMARY: Any = summary_pb2


class Writers:
    """Writes rows of numbers to metrics.jsonl and to TensorBoard.

    Args:
      folder: the work directory.
      phase: that the rows are of.
      step: the step that the phase goes on from; its rows of later steps, left by a run that was
        stopped after its last checkpoint, are taken out.
    """

    def __init__(self, folder: Path, phase: str, step: int):
        self._phase = phase
        self._file = self._board = None
        if not processes.leads():
            return
        path = folder / "metrics.jsonl"
        rows = read_metrics(folder)
        rows = [row for row in rows if row["step"] <= step or row.get("phase") != phase]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")
        # Not a SummaryWriter: on a full disk its thread ends, and then the run waits for it.
        (folder / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(folder / "tensorboard" / "events"))
        begin = _EVENT.SessionLog(status=_EVENT.SessionLog.START)  # takes later rows out
        self._event(self._board, step + 1, session_log=begin)
        for row in rows:
            if row["step"] > step:  # of another phase
                self._show(self._board, row)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._board is not None:
            with self._file:
                self._board.close()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Appends one row; TensorBoard gets its numbers."""
        if self._file is None or self._board is None:
            return
        row = {"step": step, "phase": self._phase, **row}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._show(self._board, row)

    def _show(self, board: EventsWriter, row: dict[str, Any]) -> None:
        values = [
            _SUMMARY.Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        ]
        self._event(board, row["step"], summary=_SUMMARY.Summary(value=values))

    def _event(self, board: EventsWriter, step: int, **content: Any) -> None:
        # The time is only shown; nothing depends on it.
        board.write_event(_EVENT.Event(step=step, wall_time=time.time(), **content))
        board.flush()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a work directory's metrics.jsonl; a line cut short or damaged is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    if not processes.leads():
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # processes may share a folder
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def resident_memory_mb() -> float | None:
    """What this process holds in memory now, in MiB; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def screen() -> rich.console.Console:
    """The console to print on; of many processes only the leading one's prints."""
    return rich.console.Console(quiet=not processes.leads())


def say(text: str) -> None:
    """Prints a line, or several, as they are: no word of it is a colour, and no line is broken."""
    screen().print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar, rate and time left on a terminal while something is done; elsewhere one line.

    Gives `progress(done, total)`, to be called as it gets on.
    """
    console = screen()
    began = time.perf_counter()
    if not console.is_terminal:
        say(f"{description} ...")
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=None, rate="")

        def progress(done: int, total: int) -> None:
            rate = f"{done / (time.perf_counter() - began):.3g}/s" if done else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield progress


class PhaseBar:
    """A progress bar with rate and time left on a terminal; plain lines elsewhere.

    Args:
      name: of the phase.
      step: steps done already.
      total: steps in all.
    """

    def __init__(self, name: str, step: int, total: int):
        self._name = name
        self._console = screen()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:>5}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]:,.0f} images/s"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("loss {task.fields[loss]:.3f}"),
            console=self._console,
            disable=self._console.quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            name, total=total, completed=step, rate=0.0, loss=float("nan")
        )
        self._last = time.perf_counter()
        self._total = total

    def __enter__(self) -> "PhaseBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, steps: int, batch_size: int, metrics: dict[str, Any]) -> None:
        """Moves the bar on."""
        now = time.perf_counter()
        rate = steps * batch_size / (now - self._last)
        self._last = now
        self._bar.update(self._task, advance=steps, rate=rate, loss=float(metrics["loss"]))

    def say(
        self,
        step: int,
        steps_per_epoch: int,
        accuracy: float,
        ratios: dict[str, float | None],
        steps_per_second: float,
        batch_size: int,
    ) -> None:
        """Prints one line on where the phase stands.

        The rate is this process's, and neither it nor the time left has the first call of the
        compiled step or the evaluations in it.
        """
        speed = ""
        if steps_per_second:  # else nothing was timed yet
            left = datetime.timedelta(seconds=round((self._total - step) / steps_per_second))
            told = f", {left} of training left" if step < self._total else ""
            speed = f" ({steps_per_second * batch_size:,.0f} images/s{told})"
        at = ", ".join(
            f"{ratio:.2f} of the {axis.removesuffix('_ratio')}s"
            for axis, ratio in ratios.items()
            if ratio is not None
        )
        self._console.print(
            f"{self._name:>5}  epoch {step / steps_per_epoch:.0f} of"
            f" {self._total / steps_per_epoch:.0f}: test accuracy {accuracy:.4f}"
            + (f", pruning {at}" if at else "")
            + speed,
            highlight=False,
            soft_wrap=True,
        )
