import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import CONFIGS
from PIL import Image

from dynprune_jax import main as main_module
from dynprune_jax.flags import parse
from dynprune_jax.main import MODES, main
from dynprune_jax.stopping import Stopped

DIGITS = f"--config={CONFIGS / 'digits_vgg.py'}"


def write_folders(root, *, splits=("train", "test"), classes=("cat", "dog"), images=6, size=8):
    random = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def folders_of(tmp_path, spoil=None, **kwargs):
    root = write_folders(tmp_path / "images", **kwargs)
    if spoil is not None:
        spoil(root)
    return [
        f"--config.data.name=class_folders --config.data.path={root}",
        "--config.model=vgg_digits --config.batch_size=4 --config.data.image_size=8",
    ]


def empty_class(root):
    for file in (root / "train" / "dog").iterdir():
        file.unlink()


def corrupt(root):
    (root / "train" / "dog" / "3.png").write_bytes(b"no picture")


def truncated(root):
    file = root / "test" / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:120])


def other_run(tmp_path):
    config = runpy.run_path(str(CONFIGS / "digits_vgg.py"))["get_config"]()
    config.batch_size = 7
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(config.to_json())
    return []


def file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("a file")
    return []


def study_folder(tmp_path):
    (tmp_path / "out" / "runs" / "dense-seed0").mkdir(parents=True)
    return []


def metrics_of_somebody(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("my own notes\n", encoding="utf-8")
    return []


def checkpoints_without_config(tmp_path):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    return []


def folder_for_config(tmp_path):
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    return []


def broken_config(tmp_path, text):
    (tmp_path / "broken.py").write_text(text)
    return [f"--config={tmp_path / 'broken.py'}"]


MISTAKES = {
    # the command line
    "no config": (["--config="], "--config is missing"),
    "no workdir": (["--workdir="], "--workdir is missing"),
    "config not there": (["--config=configs/none.py"], "'configs/none.py'; there is no such file"),
    "unknown mode": (["--mode=prune"], "--mode is 'prune'; choose one of train, evaluate"),
    "unknown flag": (["--wordkir=x"], "Unknown command line flag 'wordkir'.*workdir"),
    "no flag at all": (["extra"], "'extra' is no flag; write --name=value"),
    "config does not parse": (
        lambda tmp_path: broken_config(tmp_path, "def get_config(:"),
        "broken.py: invalid syntax",
    ),
    "config fails": (
        lambda tmp_path: broken_config(tmp_path, "def get_config():\n  return 1 / 0"),
        "broken.py: division by zero",
    ),
    "config is something else": (
        lambda tmp_path: broken_config(tmp_path, "def get_config():\n  return None"),
        "broken.py: .*(ConfigDict|NoneType)",
    ),
    "config ends the program": (
        lambda tmp_path: broken_config(tmp_path, "import sys\nsys.exit('no')"),
        "broken.py: no",
    ),
    "config with an argument it does not take": (
        [f"{DIGITS}:big"],
        r"digits_vgg.py:big: TypeError: get_config\(\) takes 0 positional",
    ),
    "workdir without a value": (["--workdir", "--mode=evaluate"], "--workdir has no value; write"),
    "mode without a value": (["--mode"], "--mode has no value; write --mode=VALUE"),
    "field without dashes": (["config.batch_size=7"], "'config.batch_size=7' is no flag"),
    # fields
    "misspelled field": (["--config.data.nmae=x"], "config.data.nmae .*did you mean .*data.name"),
    "a section as a field": (["--config.data=5"], "config.data is a section"),
    "word for a number": (["--config.batch_size=many"], "batch_size is 'many'; .* type int, such"),
    "tuple without an end": (
        ["--config.gate.channel_ratio=(.1,.1"],
        r"channel_ratio is '\(.1,.1'; it must be of type tuple, such as \(0.2, 0.4, 0.6\)",
    ),
    "tuple given twice": (  # the last counts
        ["--config.study.cuts=(7.,)", "--config.study.cuts=(8.,)"],
        r"config.study.cuts is \(8.0,\)",
    ),
    "deviation that float32 cannot divide by": (
        ["--config.data.std=(1e-300,)"],
        r"data.std .*\[0.001, 1000.0\)",
    ),
    "word in a tuple": (["--config.data.mean=('a',)"], "config.data.mean is .*'a'"),
    "batch of nothing": (["--config.batch_size=0"], "config.batch_size is 0; .*at least 1"),
    "huge image": (["--config.data.image_size=99999999999"], r"image_size is 9+; .*\[1, 16384\)"),
    "no width": (["--config.width=1e-9"], "width is 1e-09; it must be in"),
    "huge width": (["--config.width=1e300"], r"width is 1e\+300; it must be in \[0.01, 1000.0\)"),
    "patch of everything": (
        ["--config.gate.column_patch=16", "--config.gate.column_ratio=(.1,.1,.1)"],
        "column_patch is 16; it must be less than config.data.image_size, 16",
    ),
    "negative seed": (["--config.seed=-1"], "config.seed is -1"),
    "unknown dtype": (["--config.dtype=float16"], "'float16'; choose one of float32, bfloat16"),
    "unknown model": (["--config.model=vgg17"], "config.model is 'vgg17'; choose one of .*vgg16"),
    "unknown criterion": (["--config.gate.criterion=best"], "'best'; choose one of attention"),
    "ratio that is 1 in float32": (
        ["--config.gate.channel_ratio=(.2,.4,.9999999999)"],
        r"channel_ratio.*\[0, 0.999\]",
    ),
    "ratios below one channel": (
        ["--config.gate.channel_ratio=(1e-9,1e-9,1e-9)", "--config.gate.column_ratio=()"],
        "no map has enough channels or columns .* to skip any: give higher ratios",
    ),
    "ratios below one group": (
        [
            "--config.gate.channel_ratio=(.2,.2,.1)",
            "--config.gate.column_ratio=()",
            "--config.gate.channel_group=8",
            "--config.width=.25",
        ],
        r"\(in groups of 8 and patches of 1\) to skip any",
    ),
    "ratios below one patch": (
        [
            "--config.gate.channel_ratio=()",
            "--config.gate.column_ratio=(.2,.2,.2)",
            "--config.gate.column_patch=15",
        ],
        r"\(in groups of 1 and patches of 15\) to skip any",
    ),
    "ratio of 1": (["--config.gate.channel_ratio=(.2,.4,1.)"], r"channel_ratio.*\[0, 0.999\]"),
    "negative ratio": (["--config.gate.column_ratio=(.2,-.1,.3)"], r"column_ratio.*\[0, 0.999\]"),
    "ratio for a tuple": (["--config.gate.channel_ratio=0.5"], "vgg_digits has 3 blocks"),
    "tuple too long": (["--config.gate.channel_ratio=(.1,.1,.1,.1,.1)"], "has 3 blocks: give"),
    "ratio that is no number": (
        ["--config.gate.channel_ratio=(False,.1,.1)"],
        "channel_ratio is .*False",
    ),
    "cutout larger than the image": (["--config.data.cutout=500"], "cutout is 500"),
    "padding larger than the image": (["--config.data.crop_padding=500"], "crop_padding is 500"),
    "a choice of tests that are left alone": (
        ["--config.data.held_out=100", "--config.data.test_examples=50"],
        "config.data.held_out is 100 and config.data.test_examples is 50",
    ),
    "test on what was trained on": (
        ["--config.data.test_split=train"],
        "test_split=train: 1347 of its examples are in config.data.train_split=train; what is",
    ),
    "layers without a ratio": (
        ["--config.gate.layers=('blocks/0/*',)"],
        r"config.gate: channel_ratio for block 1 is 0.\d+, and no convolution chosen for",
    ),
    "infinite learning rate": (["--config.dense.learning_rate=inf"], r"in \(0.0, 1000.0\]"),
    "ratio of a word": (["--config.gate.channel_ratio=(.1,'a',.1)"], "channel_ratio"),
    "nothing to prune": (
        ["--config.gate.channel_ratio=(0.,0.,0.)", "--config.gate.column_ratio=()"],
        "prune nothing",
    ),
    "layers that match nothing": (["--config.gate.layers=('conv9',)"], "'conv9' matches none"),
    "channel group of 0": (["--config.gate.channel_group=0"], r"channel_group is 0; .*at least 1"),
    "batch size of 0": (
        ["--config.benchmark.batch_sizes=(0,)"],
        r"batch_sizes is \(0,\).*\[1, 1048576\)",
    ),
    "half an image": (
        ["--config.benchmark.batch_sizes=(1.5,)"],
        r"for each of its values \(whole numbers\), it must be in \[1, 1048576\)",
    ),
    "no seeds": (["--config.study.seeds=()"], r"study\.seeds is \(\); give at least one"),
    "no batch size": (["--config.benchmark.batch_sizes=()"], r"batch_sizes is \(\); give"),
    "timed ratio of 1": (["--config.benchmark.ratios=(1.0,)"], r"benchmark.ratios.*\[0, 0.999\]"),
    "drop probability of 2": (["--config.gate.drop_probability=2."], r"drop_probability.*\[0, 1\]"),
    "ascent that never arrives": (
        ["--config.ascent.interval_epochs=90"],
        "is only reached at step",
    ),
    "statistics of many ratios": (
        ["--config.ascent.lowest_fraction=0."],
        "config.prune.recalibration_images is 0; the batch statistics of many ratios",
    ),
    "ascent without an end": (["--config.ascent.increment=1e-310"], "increment is 1e-310"),
    "ascent of ages": (["--config.ascent.interval_epochs=1e308"], r"in \(0.0, 100000.0\]"),
    "no epochs": (["--config.dense.epochs=0", "--config.prune.epochs=0"], "nothing to train"),
    "pruning nothing trained": (["--config.dense.epochs=0"], "train a dense network first"),
    "unknown start": (["--config.prune.start=middle"], "'middle'; choose one of dense"),
    "checkpoint not named": (["--config.prune.start=checkpoint"], "prune.checkpoint is ''"),
    "checkpoint not there": (
        ["--config.prune.start=checkpoint", "--config.prune.checkpoint=none"],
        "none holds no trained network",
    ),
    "checkpoint of nobody": (
        ["--config.prune.start=checkpoint", "--config.prune.checkpoint=~nobody-here/x"],
        "checkpoint is '~nobody-here/x'; there is no such user",
    ),
    "warm-up too long": (["--config.dense.warmup_epochs=99"], "config.dense.warmup_epochs is 99"),
    "learning rate of 0": (["--config.dense.learning_rate=0"], "dense.learning_rate is 0"),
    # data
    "unknown data set": (["--config.data.name=cifar11"], "config.data.name=cifar11"),
    "missing folder": (
        ["--config.data.name=class_folders", "--config.data.path=none"],
        "config.data.path",
    ),
    "missing archive": (
        ["--config.data.name=cifar10", "--config.data.archive=none.tar.gz"],
        "config.data.archive=none.tar.gz",
    ),
    "no test folder": (
        lambda p: folders_of(p, splits=("train",)),
        "it has no test or val folder",
    ),
    "one class": (
        lambda p: folders_of(p, classes=("cat",)),
        "images: it has one class, 'cat'; give two",
    ),
    "empty class": (lambda p: folders_of(p, empty_class), "dog"),
    "corrupt image": (lambda p: folders_of(p, corrupt), r"dog/3\.png"),
    "truncated image": (lambda p: folders_of(p, truncated), r"cat/0\.png"),
    "batch larger than the set": (
        ["--config.batch_size=4096"],
        "batch_size is 4096; .* at most .* 1347",
    ),
    "more examples than there are": (
        ["--config.data.train_examples=9999"],
        "config.data.train_examples=9999",
    ),
    "split that ends before it begins": (
        ["--config.data.train_split=train[5:2]"],
        r"train_split=train\[5:2\]: no such split",
    ),
    "tests among what is trained on": (
        ["--config.data.test_split=train[:50%]"],
        r"test_split=train\[:50%\]: 674 of its examples are in config.data.train_split=train",
    ),
    "name of two lines": (["--config.data.name=a\nb"], "config.data.name=a b: no data set"),
    "unknown split": (["--config.data.test_split=holdout"], "config.data.test_split=holdout"),
    "mean of another image": (["--config.data.mean=(.1,.2,.3)"], "config.data.mean has 3 values"),
    "image that pools to nothing": (
        ["--config.data.image_size=4"],
        "image_size 4 pools to nothing",
    ),
    "stored smaller than seen": (
        ["--config.data.stored_size=4"],
        "stored_size is 4; it must be 0 or at least config.data.image_size, ",
    ),
    "folder of a set that has none": (
        ["--config.data.path=/some"],
        "path is '/some' and config.data.name is 'digits'; it is for class_folders alone",
    ),
    "archive of a set that has none": (
        ["--config.data.archive=a.tar.gz"],
        r"archive is 'a.tar.gz' and .* is 'digits'; it is for cifar10 and cifar100 alone",
    ),
    "cascades too alike": (
        ["--config.cascade.shares=(.1,.101)"],
        r"config.cascade.shares is \(0.1, 0.101\); give shares a hundredth apart",
    ),
    "cascade of nothing again": (["--config.cascade.shares=(0.,)"], r"must be in \(0, 1\)"),
    # work directories
    "workdir of another config": (other_run, "is of another config: config.batch_size is 7"),
    "workdir is a file": (file_in_the_way, "is a file; give a folder"),
    "workdir of nobody": (["--workdir=~nobody-here/x"], "--workdir=.*: there is no such user"),
    "benchmark in a file": (
        lambda p: [*file_in_the_way(p), "--mode=benchmark"],
        "is a file; give a folder",
    ),
    "workdir of a study": (study_folder, "is a study's; give a run a folder of its own"),
    "benchmark in a study": (
        lambda p: [*study_folder(p), "--mode=benchmark"],
        "is a study's; give a run a folder of its own",
    ),
    "workdir with stray checkpoints": (checkpoints_without_config, "no config.json"),
    "workdir with somebody's metrics": (metrics_of_somebody, "holds metrics.jsonl and no config"),
    "benchmark in another config's": (
        lambda p: [*other_run(p), "--mode=benchmark"],
        "is of another config: config.batch_size is 7",
    ),
    "config.json is a folder": (folder_for_config, "config.json is not a config"),
    "workdir with an impossible name": ([f"--workdir={'x' * 300}"], "cannot be a folder"),
    "evaluation of nothing": (["--mode=evaluate"], "holds no trained network"),
    "sweep of nothing": (["--mode=sweep"], "holds no trained network"),
    "sensitivity of nothing": (["--mode=sensitivity"], "holds no trained network"),
    "cascade of nothing": (["--mode=cascade"], "holds no trained network"),
    "export of nothing": (["--mode=export"], "holds no trained network"),
    "warm-up of the whole phase": (
        ["--config.prune.epochs=3", "--config.prune.warmup_epochs=3."],
        "config.prune.warmup_epochs is 3.0; it must be less than config.prune.epochs, 3",
    ),
    "distillation of nobody": (
        [
            "--config.dense.epochs=0",
            "--config.prune.start=scratch",
            "--config.prune.distillation=.5",
        ],
        "distillation is 0.5 and there is no dense network to learn from",
    ),
    "distillation of 2": (["--config.prune.distillation=2."], r"distillation is 2.0; .*\[0, 1\]"),
    "temperature of nothing": (
        ["--config.prune.temperature=1e-30"],
        r"temperature is 1e-30; .*\[0.01, ",
    ),
    "ascent in one leap": (["--config.ascent.increment=1e39"], r"increment is 1e\+39; .* 1\]"),
    "checkpoint that is not there": (
        ["--config.prune.start=checkpoint", "--config.prune.checkpoint=none"],
        "config.prune.checkpoint is 'none': none holds no trained network",
    ),
    "checkpoint of an impossible name": (
        ["--config.prune.start=checkpoint", f"--config.prune.checkpoint={'x' * 300}"],
        "config.prune.checkpoint is 'x+': .*File name too long",
    ),
    "data far away": (
        ["--config.data.data_dir=gs://foo"],
        "digits is prepared in a local folder, and not in gs://foo: set config.data.data_dir",
    ),
    "benchmark of another channel's mean": (
        ["--mode=benchmark", "--config.data.mean=(.1,.2,.3)"],
        "config.data.mean has 3 values; digits has 1 channels",
    ),
    "momentum of 1": (["--config.optim.momentum=1."], r"momentum is 1.0; .*\[0.0, 1.0\)"),
}


def snapshot(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(name, tmp_path, data_dir, capfd):
    arguments, message = MISTAKES[name]
    if callable(arguments):
        arguments = " ".join(arguments(tmp_path)).split()
        prepared = tmp_path / "prepared"
        prepared.mkdir()
    else:
        prepared = data_dir
    before = snapshot(tmp_path)
    command = ["dynprune_jax", DIGITS, f"--workdir={tmp_path / 'out'}"]
    command += [f"--config.data.data_dir={prepared}"]
    command = [x for x in command if x.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    assert main([*command, *arguments]) == 2
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error

    assert re.search(message, error), error
    assert snapshot(tmp_path) == before


def interrupt(config, workdir):
    raise KeyboardInterrupt


def terminate(config, workdir):
    signal.raise_signal(signal.SIGTERM)


def stop_in_the_loop(config, workdir):
    raise Stopped(signal.SIGTERM, "step 6 is saved, and the same command goes on")


def fill_the_disk(config, workdir):
    raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl")


def fill_the_device(config, workdir):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to ...\nmore")


def fill_the_memory(config, workdir):
    raise MemoryError("Unable to allocate 1.00 TiB")


def fill_it_in_python(config, workdir):
    raise MemoryError


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (interrupt, 130, "start it again with the same command"),
        (terminate, 143, "start it again with the same command"),
        (stop_in_the_loop, 143, "step 6 is saved, and the same command goes on"),
        (fill_the_disk, 2, "No space left on device: 'out/metrics.jsonl'; mend that"),
        (fill_the_device, 2, "Out of memory while trying to ...); lower config.eval_"),
        (fill_the_memory, 2, "out of memory (Unable to allocate 1.00 TiB); lower"),
        (fill_it_in_python, 2, "out of memory; lower config.eval_batch_size, or in a new workdir"),
    ],
)
def test_what_stops_a_run_is_told_in_a_line(monkeypatch, tmp_path, capfd, end, code, line):
    monkeypatch.setitem(main_module.MODES, "train", end)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["dynprune_jax", DIGITS, f"--workdir={tmp_path}"]) == code
    said = capfd.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("code", "at_once"), [(0, False), (2, False), (130, True), (143, True)])
def test_what_a_signal_has_stopped_ends_at_once(monkeypatch, code, at_once):
    """Around a compilation that goes on Python's own end is a segmentation fault now and then."""
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(f"{code} at once"))
    with pytest.raises(SystemExit) as ended:
        main_module.end(code)
    assert ended.value.code == (f"{code} at once" if at_once else code)


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch, tmp_path):
    def fail(config, workdir):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setitem(main_module.MODES, "train", fail)
    with pytest.raises(FileNotFoundError):
        main(["dynprune_jax", DIGITS, f"--workdir={tmp_path}"])


def test_one_command_line_leaves_nothing_for_the_next(tmp_path, capfd):
    assert main(["dynprune_jax", DIGITS, "--workdir=x", "--mode=none"]) == 2
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1")
    assert main(["dynprune_jax", f"--config={empty}", f"--workdir={tmp_path / 'out'}"]) == 2
    assert "get_config" in capfd.readouterr().err


def test_a_config_in_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves the ~ of --config=~/my.py to the program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text((CONFIGS / "digits_vgg.py").read_text())
    argv = ["main.py", "--config=~/mine.py", "--workdir=out", "--config.seed=7"]
    assert parse(argv, ["train"])[0].seed == 7


def test_help_needs_nothing_and_tells_every_mode(capfd):
    assert main(["dynprune_jax", "--help"]) == 0
    told = capfd.readouterr().out
    assert "--config=configs/NAME.py" in told
    assert not [mode for mode in MODES if f"  {mode:11}  " not in told]


def test_the_entry_point_trains_on_class_folders_in_a_process_of_its_own(tmp_path):
    folders = folders_of(tmp_path, images=20)
    command = [
        sys.executable, "-m", "dynprune_jax.main", DIGITS, f"--workdir={tmp_path / 'out'}",
        f"--config.data.data_dir={tmp_path / 'prepared'}", *" ".join(folders).split(),
        "--config.batch_size=10", "--config.dense.epochs=1", "--config.prune.epochs=1",
        "--config.dense.warmup_epochs=0", "--config.ascent.warmup=0.9",
        "--config.model=networks:small_vgg", "--config.gate.channel_ratio=(.3,.5)",
        "--config.gate.column_ratio=(0.,.3)",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"] == {
        "name": "class_folders",
        "classes": 2,
        "train_examples": 40,
        "test_examples": 40,
        "held_out": 0,
    }
    assert "dynprune_jax.main" in report["command"]
    assert "pruned" in done.stdout


def test_a_disk_that_is_read_only(tmp_path, data_dir, capfd, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    command = ["dynprune_jax", DIGITS, f"--workdir={tmp_path}"]
    assert main([*command, f"--config.data.data_dir={data_dir}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot be written: Read-only file system" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_that_cannot_be_written(tmp_path, data_dir, capfd):
    tmp_path.chmod(0o500)
    command = ["dynprune_jax", DIGITS, f"--workdir={tmp_path / 'out'}"]
    assert main([*command, f"--config.data.data_dir={data_dir}"]) == 2
    assert "cannot be written" in capfd.readouterr().err
    shutil.rmtree(tmp_path, ignore_errors=True)
