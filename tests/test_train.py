import dataclasses
import errno
import functools
import itertools
import json
import re
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from networks import mixed_plan
from PIL import Image

from dynprune_jax import build, plots, processes
from dynprune_jax import report as report_lib
from dynprune_jax import train as train_lib
from dynprune_jax.checkpoint import Checkpoints, tree_digest
from dynprune_jax.data import sources
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.cascade import cascade
from dynprune_jax.experiments.export import export
from dynprune_jax.experiments.sensitivity import sensitivity
from dynprune_jax.experiments.static import static
from dynprune_jax.experiments.step_cost import step_cost
from dynprune_jax.experiments.sweep import sweep
from dynprune_jax.feed import Feed, ratio_schedule
from dynprune_jax.network import Network
from dynprune_jax.provenance import provenance
from dynprune_jax.pruning.attention import CRITERIA
from dynprune_jax.pruning.compact import compact
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.exported import load_exported
from dynprune_jax.pruning.plan import interleaved
from dynprune_jax.pruning.recalibrate import recalibrate
from dynprune_jax.report import write_report
from dynprune_jax.run import Run
from dynprune_jax.sharding import check_batch, data_mesh
from dynprune_jax.stopping import Stopped
from dynprune_jax.train import evaluate_workdir, run_phase, train_and_evaluate
from dynprune_jax.train_step import TrainState
from dynprune_jax.workdir import check_workdir, keep_config, make_folder, trains_alone
from dynprune_jax.writers import read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work directory for one whole run, made by the first test that needs it."""
    return tmp_path_factory.mktemp("runs") / "finished"


@pytest.fixture
def workdir(config, finished):
    if not (finished / "report.json").exists():
        train_and_evaluate(config, finished)
    return finished


def test_the_compact_network_of_a_run_has_its_answers(config, workdir):
    trained = Run.open(config, workdir)
    _, values = trained.trained_values()
    model = trained.dynamic.bind(values)
    model.eval()
    stored, labels = trained.dataset.test.read_all()
    images = build.evaluation_images(config, jnp.asarray(stored))
    fast = compact(model, images, plan=mixed_plan(model))
    logits = nnx.jit(lambda model, x: model(x))(fast, images)
    np.testing.assert_allclose(
        logits, nnx.jit(lambda model, x: model(x))(model, images), rtol=1e-4, atol=1e-4
    )
    report = json.loads((workdir / "report.json").read_text())
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == labels))
    assert accuracy == pytest.approx(report["pruned"]["accuracy"])


def test_what_a_run_leaves(config, workdir):
    report = json.loads((workdir / "report.json").read_text())
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert report["dense_macs_per_image"] == sum(layer["dense_macs"] for layer in layers.values())
    pruned = report["pruned"]
    assert pruned["macs_per_image"]["mean"] == pytest.approx(
        sum(layer["macs"] for layer in layers.values())
    )
    assert pruned["executed_macs_per_image"]["mean"] == pytest.approx(
        sum(layer["executed_macs"] for layer in layers.values())
    )
    assert 0.2 < pruned["mac_reduction"] < 0.8
    assert 0.2 < pruned["executed_mac_reduction"] < 0.8
    executed = sum(layer["dense_executed_macs"] for layer in layers.values())
    assert report["dense_executed_macs_per_image"] == executed
    left = pruned["executed_macs_per_image"]["mean"] / executed
    assert pruned["executed_mac_reduction"] == pytest.approx(1 - left)
    low, mean, high = (pruned["executed_macs_per_image"][part] for part in ("min", "mean", "max"))
    assert low < mean < high  # the columns differ from input to input
    assert pruned["macs_per_image"]["min"] == pruned["macs_per_image"]["max"]  # the counts do not
    for row in (report["dense"], pruned, report["pruned_without_targeted_dropout"]):
        assert 0.0 <= row["accuracy"] <= 1.0
        assert row["examples"] == 100
    assert set(report["pruned_by_other_criteria"]) == {"random", "inverse", "shared"}
    assert layers["blocks/0/layers/0/conv"]["channel_ratio"] is None  # it sees the image
    assert layers["blocks/0/layers/1/conv"]["channel_ratio"] == 0.3
    assert layers["blocks/0/layers/1/conv"]["column_ratio"] is None  # its ratio is 0
    assert layers["blocks/1/layers/1/conv"]["channel_ratio"] == 0.5
    assert layers["blocks/1/layers/1/conv"]["column_ratio"] == 0.3
    assert len(report["parameters_digest"]) == 64
    assert report["seed"] == config.seed
    assert report["seconds"] > 0
    for phase in ("dense", "prune"):
        assert 0 <= report["phases"][phase]["share_outside_step"] < 1
        assert (workdir / "checkpoints" / phase).is_dir()
    for name in ("training", "layer_macs", "macs_distribution", "kept_columns"):
        with Image.open(workdir / f"{name}.png") as picture:
            assert min(picture.size) > 300
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 16


def test_the_metrics_tell_of_the_ascent(workdir):
    rows = read_metrics(workdir)
    pruning = [row for row in rows if row["phase"] == "prune" and "train_loss" in row]
    assert [row["step"] for row in pruning] == [12, 16, 20, 24]
    # Gates at .3 and .5, of 1 convolution and of 2; warm-up .2, then .1 every 4 steps.
    means = [0.2, 0.3, (0.3 + 2 * 0.4) / 3, (0.3 + 2 * 0.5) / 3]
    np.testing.assert_allclose([row["channel_ratio"] for row in pruning], means, rtol=1e-5)
    assert all(row.get("channel_ratio") is None for row in rows if row["phase"] == "dense")
    assert [row["step"] for row in rows if "test_accuracy" in row] == [8, 16, 24]


def test_all_processes_evaluate_the_controls_in_one_order(config, workdir, monkeypatch):
    asked = []

    def network_with(run, criterion):
        asked.append(criterion)
        return run.dynamic

    monkeypatch.setattr(Run, "network_with", network_with)
    monkeypatch.setattr("dynprune_jax.report.write_json", lambda path, report: None)
    monkeypatch.setattr("dynprune_jax.report._draw", lambda *_: None)
    evaluate_workdir(config, workdir)
    # A set of strings has another order in each process, and there two wait without end.
    assert asked == [name for name in CRITERIA if name != "attention"]


def test_a_report_is_of_the_weights_that_it_names(config, workdir, monkeypatch):
    run = Run.open(config, workdir)
    dense, pruned = run.trained_values()
    whole, cheap = run.evaluate(run.dense, dense), run.evaluate(run.dynamic, pruned)
    evaluated, cascades, pictured = [], [], []
    cascaded = report_lib.cascaded

    def evaluating(run, network, values):
        evaluated.append(tree_digest(values))
        return whole if network is run.dense else cheap

    def cascading(*found):
        cascades.append(found)
        return cascaded(*found)

    monkeypatch.setattr(Run, "evaluate", evaluating)
    monkeypatch.setattr(Run, "recalibrated", lambda run, network, values: {"again": values})
    monkeypatch.setattr(report_lib, "CRITERIA", {config.gate.criterion: None})
    monkeypatch.setattr(report_lib, "cascaded", cascading)
    monkeypatch.setattr(report_lib, "_draw", lambda *args: pictured.append(args[-1]))
    monkeypatch.setattr(report_lib, "write_json", lambda *_: None)
    write_report(run, dense, pruned)
    assert evaluated == [tree_digest(values) for values in (dense, pruned, run.gated(dense))]
    assert cascades == [(cheap, whole, share) for share in config.cascade.shares]
    assert pictured == [{"again": pruned}]


def test_the_same_command_again_changes_nothing(config, workdir):
    before = json.loads((workdir / "report.json").read_text())
    metrics = read_metrics(workdir)
    trained, evaluated = train_and_evaluate(config, workdir), evaluate_workdir(config, workdir)
    assert "trained_with" in evaluated.keys() - trained.keys()
    for again in (trained, evaluated):
        for part in ("dense", "pruned", "parameters_digest", "layers", "pruned_by_other_criteria"):
            assert again[part] == before[part]
    # Evaluating again keeps what was told of the training.
    after = json.loads((workdir / "report.json").read_text())
    assert after["seconds"] > 0
    assert after["phases"]["prune"]["in_step"] == before["phases"]["prune"]["in_step"]
    assert read_metrics(workdir) == metrics


def test_a_row_that_is_lost_is_made_again_and_takes_no_other_with_it(config, workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    lost = next(line for line in lines if '"phase": "dense", "test_accuracy"' in line)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if line != lost))
    train_and_evaluate(config, copy)
    assert sorted(map(str, rows(copy))) == sorted(map(str, rows(workdir)))


def test_an_evaluation_that_one_process_owes_is_done_by_all(config, workdir, monkeypatch):
    run = Run.open(config, workdir)
    with run.checkpoints("dense") as checkpoints, Feed(run, "dense", run.dense, None) as feed:
        given = run, "dense", run.dense, run.dense.weights, feed, checkpoints
        assert train_lib._Phase(*given).done
        monkeypatch.setattr(processes, "agree", lambda number: max(number, 1))
        assert not train_lib._Phase(*given).done


def rows(workdir):
    """The metrics without what only this machine knows."""
    return [
        {name: value for name, value in row.items() if name != "resident_memory_mb"}
        for row in read_metrics(workdir)
    ]


def raising(number):
    def stop():
        signal.raise_signal(number)

    return stop


def failing():
    raise RuntimeError("cut off")


# How a run is cut off: what of it is called, how often before since it was started or went on, what
# comes then, what it ends with, and the step of the second phase that is saved, if one is.
AT_THE_LAST_SAVE = (Checkpoints, "save"), 0, raising(signal.SIGTERM), "8 of 8 of the dense", None
IN_THE_LAST_SAVE = (Checkpoints, "wait"), 1, raising(signal.SIGTERM), "8 of 8 of the dense", None
BY_AN_ERROR_BEFORE_A_SAVE = (Feed, "advance"), 5, failing, "cut off", None
AT_STEP_3 = (Feed, "advance"), 2, raising(signal.SIGINT), "SIGINT; step 3 of 16", 3
BY_AN_ERROR_BEHIND_ONE = (Feed, "advance"), 7, failing, "cut off", 8
BY_AN_ERROR_IN_AN_EVALUATION = (Run, "evaluate"), 0, failing, "cut off", 8
AT_STEP_6 = (Feed, "advance"), 5, raising(signal.SIGTERM), "SIGTERM; step 6 of 16", 6
IN_AN_EVALUATION = (Run, "evaluate"), 0, raising(signal.SIGTERM), "SIGTERM; step 8 of 16", 8


@pytest.mark.usefixtures("short_reports")
@pytest.mark.parametrize(
    ("memory_limit_mb", "cuts"),
    [
        (
            4096,
            [
                AT_THE_LAST_SAVE,
                BY_AN_ERROR_BEFORE_A_SAVE,
                AT_STEP_3,
                BY_AN_ERROR_IN_AN_EVALUATION,
                BY_AN_ERROR_BEHIND_ONE,
            ],
        ),
        (0, [IN_THE_LAST_SAVE, AT_STEP_6, IN_AN_EVALUATION]),
    ],
    ids=["memory", "stream"],
)
def test_a_run_cut_off_again_and_again_ends_as_if_it_had_not_been(
    config, tmp_path, monkeypatch, memory_limit_mb, cuts
):
    config.data.memory_limit_mb = memory_limit_mb
    config.data.crop_padding = 1
    config.gate.drop_probability = 0.8
    config.checkpoint_every_epochs = 1
    config.log_every_steps = 5  # not where the run is cut off
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train_and_evaluate(config, whole)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for method, before, end, outcome, saved in cuts:
        calls, original = itertools.count(), getattr(*method)

        def cut_off(*args, calls=calls, original=original, before=before, end=end):
            if next(calls) == before:
                end()
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(*method, cut_off)
            with pytest.raises((RuntimeError, Stopped), match=outcome):
                train_and_evaluate(config, cut)
        assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert not (cut / "report.json").exists()
        if saved is not None:
            assert (cut / "checkpoints" / "prune" / str(saved)).is_dir()
            unfinished = f"stands at step {saved} of 16 of its prune phase; finish it with"
            with pytest.raises(UserError, match=unfinished):
                evaluate_workdir(config, cut)
    resumed = train_and_evaluate(config, cut)
    assert resumed["parameters_digest"] == expected["parameters_digest"]
    assert resumed["pruned"] == expected["pruned"]
    assert rows(cut) == rows(whole)


def test_pruning_can_start_from_a_checkpoint_or_from_scratch(
    config, workdir, short_reports, tmp_path
):
    first = json.loads((workdir / "report.json").read_text())
    config.prune.start = "checkpoint"
    config.prune.checkpoint = str(workdir)
    from_checkpoint = train_and_evaluate(config, tmp_path / "from_checkpoint")
    assert from_checkpoint["dense"] == first["dense"]
    assert from_checkpoint["parameters_digest"] == first["parameters_digest"]
    # Killed while it copied the dense weights, it copies them again.
    begun = tmp_path / "begun"
    (begun / "checkpoints" / "dense" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    shutil.copy(tmp_path / "from_checkpoint" / "config.json", begun)
    assert int(Run.open(config, begun).start_state().step) == 8
    # Damaged, the copy can be made again.
    damaged = shutil.copytree(tmp_path / "from_checkpoint", tmp_path / "damaged")
    record = damaged / "checkpoints" / "dense" / "8" / "extra" / "metadata"
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged .* if you delete .*/checkpoints/dense, it"):
        train_and_evaluate(config, damaged)
    shutil.rmtree(damaged / "checkpoints" / "dense")
    assert train_and_evaluate(config, damaged)["parameters_digest"] == first["parameters_digest"]
    # From here on the run needs its source no more.
    config.prune.checkpoint = str(tmp_path / "moved")
    again = json.loads((tmp_path / "from_checkpoint" / "config.json").read_text())
    again["prune"]["checkpoint"] = config.prune.checkpoint
    (tmp_path / "from_checkpoint" / "config.json").write_text(json.dumps(again))
    evaluated = evaluate_workdir(config, tmp_path / "from_checkpoint")
    assert evaluated["dense"] == first["dense"]
    # A network that was trained on what is held out now cannot tell what the choice is worth.
    config.data.test_examples, config.data.held_out = 0, 16
    config.prune.checkpoint = str(workdir)
    with pytest.raises(UserError, match=r"config\.data\.held_out: 0 there, 16 here"):
        train_and_evaluate(config, tmp_path / "held_out")
    assert not (tmp_path / "held_out").exists()
    config.data.test_examples, config.data.held_out = 100, 0
    config.prune.start, config.prune.checkpoint, config.dense.epochs = "scratch", "", 0
    scratch = train_and_evaluate(config, tmp_path / "scratch")
    assert scratch["dense"] is None
    assert scratch["pruned_without_targeted_dropout"] is None
    assert scratch["parameters_digest"] != first["parameters_digest"]
    config.sensitivity.ratios = ()
    rows = sensitivity(config, tmp_path / "scratch")
    assert {row["weights"] for row in rows} == {"dropout"}
    assert {row["accuracy"] for row in rows} == {scratch["pruned"]["accuracy"]}


def advanced(run, devices, counts):
    run = dataclasses.replace(run, mesh=Mesh(np.asarray(devices), ("data",)))
    with Feed(run, "prune", run.dynamic) as feed:
        state = feed.place(
            TrainState.create(run.dense.weights, run.dynamic, run.optimizer("prune"))
        )
        for count in counts:
            state, metrics = feed.advance(state, count, feed.next_batch())
        assert feed._step._cache_size() == 1  # however the ratios rise
    return jax.device_get((state, metrics))


def test_runs_of_other_seeds_and_ratios_have_the_same_program(config, tmp_path):
    config.gate.drop_probability = 0.5  # it is drawn what is dropped

    def program(seed, ratios):
        config.seed, config.gate.channel_ratio = seed, ratios
        run = Run.open(config, tmp_path)
        with Feed(run, "prune", run.dynamic) as feed:
            state = TrainState.create(run.dense.weights, run.dynamic, run.optimizer("prune"))
            given = feed.place(state), feed._data, feed._given
            return feed._step.lower(*given, count=1).as_text()

    assert program(0, (0.3, 0.5)) == program(1, (0.2, 0.4))


@pytest.mark.usefixtures("rounded_alike")
def test_four_devices_train_as_one_does(config, tmp_path):
    run = Run.open(config, tmp_path)
    one, _ = advanced(run, jax.devices()[:1], [1, 1, 1])
    four, _ = advanced(run, jax.devices(), [1, 1, 1])
    # Sums over the batch are taken in another order: float32 rounding, grown over three steps.
    for name, value in one.values.items():
        np.testing.assert_allclose(four.values[name], value, rtol=1e-3, atol=1e-4)


def test_a_row_of_metrics_weighs_every_step_alike(config, tmp_path):
    """However many steps a dispatch does: here one and three, up to the row of step four."""
    config.prune.epochs = 0
    config.steps_per_dispatch = 3
    losses = {}
    for every in (1, 4):
        config.log_every_steps = every
        train_and_evaluate(config, tmp_path / str(every))
        rows = read_metrics(tmp_path / str(every))
        losses[every] = [row["train_loss"] for row in rows if "train_loss" in row]
    expected = np.reshape(losses[1], (2, 4)).mean(axis=1)
    np.testing.assert_allclose(losses[4], expected, rtol=0.05)  # unweighted: 0.3 apart
    assert np.std(losses[1]) > 0.1


def test_a_folder_that_changed_under_a_run_is_refused(config, workdir, tmp_path, monkeypatch):
    """Labels may mean other classes then, and steps and schedules other images."""
    shutil.copytree(workdir, tmp_path / "run")
    before = Run.open(config, tmp_path / "run").dataset
    other = dataclasses.replace(before, class_names=("ten", *before.class_names[1:]))
    fewer = dataclasses.replace(before, train=before.train.reordered(np.arange(127)))
    for data, named in ((other, "classes of the data"), (fewer, "number of training images")):
        monkeypatch.setattr(build, "load_dataset", lambda *_, data=data, **__: data)
        for call in (train_and_evaluate, evaluate_workdir):
            with pytest.raises(UserError, match=f"of another run: {named}: "):
                call(config, tmp_path / "run")
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: other)
    config.prune.start, config.prune.checkpoint = "checkpoint", str(workdir)
    with pytest.raises(UserError, match="of another run: classes of the data: "):
        train_and_evaluate(config, tmp_path / "started")
    assert not (tmp_path / "started").exists()


def test_a_run_that_is_older_than_a_field_goes_on_with_its_default(config, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["ascent"]["lowest_fraction"]
    path.write_text(json.dumps(stored))
    assert Run.open(config, tmp_path / "run").trained_values()[1] is not None
    config.ascent.lowest_fraction, config.prune.recalibration_images = 0.5, 40
    with pytest.raises(UserError, match=r"lowest_fraction is 1\.0 there and 0\.5 here"):
        Run.open(config, tmp_path / "run")


@pytest.mark.usefixtures("rounded_alike")
def test_several_steps_in_one_dispatch_are_the_same_steps(config, tmp_path):
    run = Run.open(config, tmp_path)
    single, _ = advanced(run, jax.devices()[:1], [1, 1, 1])
    together, _ = advanced(run, jax.devices()[:1], [3])
    assert single.step == together.step == 3
    for name, value in single.values.items():
        np.testing.assert_allclose(together.values[name], value, rtol=1e-3, atol=1e-4)


def test_what_a_config_says_reaches_the_step(config, tmp_path):
    def metrics(**fields):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(fields)
        run = Run.open(changed, tmp_path)
        return advanced(run, jax.devices()[:1], [1])[1]

    base = metrics()
    assert metrics() == base
    for fields in (
        {"optim.label_smoothing": 0.5},
        {"gate.criterion": "inverse"},
        {"data.crop_padding": 4},
        {"data.cutout": 4},
        {"data.stored_size": 12},
        {"gate.layers": ("blocks/1/layers/1/*", "blocks/1/layers/0/*"),
         "gate.channel_ratio": (0.0, 0.5), "gate.column_ratio": ()},
        {"seed": 1},
    ):  # fmt: skip
        assert metrics(**fields)["loss"] != base["loss"], fields


@pytest.mark.usefixtures("short_reports")
def test_waiting_for_a_stream_is_not_time_in_the_step(config, tmp_path, monkeypatch):
    config.data.memory_limit_mb = 0
    next_batch = Feed.next_batch

    def slow(self):
        time.sleep(0.2)
        return next_batch(self)

    monkeypatch.setattr(Feed, "next_batch", slow)
    report = train_and_evaluate(config, tmp_path)
    for phase, steps in (("dense", 8), ("prune", 16)):
        assert report["phases"][phase]["outside_step"] > 0.2 * (steps - 1)


def test_pictures_show_what_the_network_sees(config, tmp_path, monkeypatch):
    config.data.image_size = 8
    config.data.stored_size = 12
    config.gate.column_ratio = (0.3, 0.0)
    shown = []
    monkeypatch.setattr(
        plots, "kept_columns_figure", lambda images, masks: shown.append((images, masks))
    )
    monkeypatch.setattr("dynprune_jax.report.CRITERIA", {})  # no controls
    run = Run.open(config, tmp_path)
    write_report(run, None, run.dynamic.weights)
    images, masks = shown[0]
    assert images.shape == (6, 8, 8, 1)
    assert masks["blocks/0/layers/1/conv"].shape == (6, 8, 8)


def test_a_schedule_that_never_arrives_is_told(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "ascent", lambda self, target: lambda step: jnp.float32(0.9 * target))
    with pytest.raises(UserError, match=r"16 steps; the ratio 0\.5 is never reached: change the"):
        Run.open(config, tmp_path).check_ratios()


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    config.dense.learning_rate = 1000.0  # the highest that is allowed
    with pytest.raises(UserError, match=r"not finite|the loss is (nan|inf)"):
        train_and_evaluate(config, tmp_path)


def spoil_loss(patch):
    advance, calls = Feed.advance, itertools.count(1)

    def spoiled(*args):
        state, metrics = advance(*args)
        return state, {**metrics, "loss": jnp.asarray(jnp.nan)} if next(calls) == 14 else metrics

    patch.setattr(Feed, "advance", spoiled)


def spoil_image(patch):
    fetch, batches = sources.fetch, itertools.count(1)

    def spoiled(source, keys, split):
        records = [dict(record) for record in fetch(source, keys, split)]
        if split == "train" and next(batches) == 14:
            records[3]["image"] = records[3]["image"][:40]
        return records

    patch.setattr(sources, "fetch", spoiled)


@pytest.mark.parametrize(
    ("memory_limit_mb", "spoil", "line"),
    [
        (4096, spoil_loss, "the loss is nan at step 6 of the prune phase"),
        (0, spoil_image, r"split 'train', index \d+: the image cannot be decoded \(unknown"),
    ],
    ids=["a loss that is not finite", "an image that cannot be decoded"],
)
def test_on_a_bad_day_the_last_good_checkpoint_stays(
    config, tmp_path, monkeypatch, memory_limit_mb, spoil, line
):
    config.data.memory_limit_mb = memory_limit_mb
    config.data.threads = 0  # no batch is read before it is asked for
    with monkeypatch.context() as patch:
        spoil(patch)
        with pytest.raises(UserError, match=line) as caught:
            train_and_evaluate(config, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert int(Run.open(config, tmp_path).start_state().step) == 8  # of the first phase, and whole
    assert not any((tmp_path / "checkpoints" / "prune").iterdir())


def test_a_damaged_checkpoint_is_set_aside_by_training_alone(config, workdir, tmp_path, capfd):
    before = json.loads((workdir / "report.json").read_text())["parameters_digest"]
    copy = shutil.copytree(workdir, tmp_path / "copy")
    record = copy / "checkpoints" / "prune" / "16" / "extra" / "metadata"
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"prune/16 is damaged \(.*let the mode that trained it"):
        evaluate_workdir(config, copy)
    assert train_and_evaluate(config, copy)["parameters_digest"] == before
    assert "it is now 16.damaged, and the run goes on from step 8" in capfd.readouterr().err
    assert rows(copy) == rows(workdir)
    # A checkpoint of another phase has the same arrays, and is no damage but a mistake.
    step = copy / "checkpoints" / "prune" / "16"
    shutil.rmtree(step)
    shutil.copytree(copy / "checkpoints" / "dense" / "8", step.with_name("8"), dirs_exist_ok=True)
    with pytest.raises(UserError, match="of another run: phase: 'dense' there, 'prune' here"):
        train_and_evaluate(config, copy)


def test_a_batch_that_the_devices_cannot_share_is_refused(config):
    with pytest.raises(UserError, match="multiple of the number of devices, 4"):
        check_batch(10, data_mesh())


def test_sweep_scales_the_ratios(config, workdir, capsys):
    rows = sweep(config, workdir)
    printed = capsys.readouterr().out
    assert f"{rows[-1]['accuracy']:.4f}" in printed
    assert "…" not in printed  # 80 columns hold it
    report = json.loads((workdir / "report.json").read_text())
    points = {(row["weights"], row["criterion"], row["fraction"]): row for row in rows}
    assert len(points) == 2 * 4 * 2
    for criterion in ("attention", "random", "inverse", "shared"):
        dense = points["dense", criterion, 0.0]
        assert dense["accuracy"] == report["dense"]["accuracy"]
        assert dense["mac_reduction"] == 0.0
    full = points["dropout", "attention", 1.0]
    assert full["accuracy"] == report["pruned"]["accuracy"]
    assert full["mac_reduction"] == report["pruned"]["mac_reduction"]
    untrained = report["pruned_without_targeted_dropout"]["accuracy"]
    assert points["dense", "attention", 1.0]["accuracy"] == untrained != full["accuracy"]
    assert json.loads((workdir / "sweep.json").read_text()) == rows
    assert (workdir / "sweep.png").stat().st_size > 10_000


@pytest.mark.usefixtures("plain_plans")
def test_the_cascades_of_a_run_are_timed(config, workdir):
    config.benchmark.batch_sizes, config.cascade.shares = (128,), (0.3,)
    rows = cascade(config, workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert [(row["batch_size"], row["share"]) for row in rows] == [
        (128, share) for share in (0.0, 0.3)
    ]
    for row in rows:
        if row["share"]:
            told = next(x for x in report["cascade"] if x["share"] == row["share"])
            assert {key: row[key] for key in told} == told
        else:
            assert row["accuracy"] == report["pruned"]["accuracy"]
            assert row["mac_reduction"] == pytest.approx(report["pruned"]["mac_reduction"])
        assert row["dense_accuracy"] == report["dense"]["accuracy"]
        assert row["timed_images"] == 128
        # Of 128, of which 28 are there twice.
        assert abs(row["timed_share"] - row["share"]) < 2 / 128
        assert row["fastest_dense_ms"] == min(row["dense_ms"].values())
        assert row["speedup"] == row["fastest_dense_ms"] / row["compact_ms"]
    assert json.loads((workdir / "cascade.json").read_text()) == rows
    for name in ("cascade.png", "surest_and_least_sure.png"):
        assert (workdir / name).stat().st_size > 10_000


def test_a_network_is_evaluated_with_statistics_of_its_ratios(config, workdir):
    config.prune.recalibration_images = 100  # two batches of 40: what is left is not used
    run = Run.open(config, workdir)
    assert run.recalibration_images == 80
    values = run.trained_values()[1]
    ratios = {n: 0.5 * target for n, target in run.dynamic.values(PruneRatio).items()}
    found = run.evaluate(run.dynamic, values, ratios)
    made = run.recalibrated(run.dynamic, values, ratios)
    # The same by the function for any model, on one device.
    model = run.dynamic.bind(values, ratios)
    stored = [jnp.asarray(images) for images in run._recalibration_batches]
    assert [len(images) for images in stored] == [40, 40]
    keys = jax.random.split(jax.random.key(0), 2)
    recalibrate(model, map(functools.partial(build.training_images, config), keys, stored))
    expected = Network(model)
    for name, value in expected.values(nnx.BatchStat).items():
        np.testing.assert_allclose(made[name], value, rtol=1e-3, atol=1e-4)
        assert not np.allclose(made[name], values[name], rtol=1e-3, atol=1e-4)
    for name, value in {**run.dynamic.settings, **values, **ratios}.items():
        if name not in expected.values(nnx.BatchStat):
            assert made[name] is value
    # As they are made they are used.
    config.prune.recalibration_images = 0
    again = run.evaluate(run.dynamic, made)
    np.testing.assert_array_equal(found.correct, again.correct)
    np.testing.assert_array_equal(found.usage.executed_macs, again.usage.executed_macs)
    assert not np.array_equal(
        found.usage.executed_macs, run.evaluate(run.dynamic, values, ratios).usage.executed_macs
    )


def test_the_steps_of_an_elastic_run_draw_a_fraction_of_their_ratios(config, tmp_path, monkeypatch):
    config.ascent.lowest_fraction, config.prune.recalibration_images = 0.5, 40
    run = Run.open(config, tmp_path)

    def only_ratios(state, batch, *, ratios, **options):
        return dataclasses.replace(state, step=state.step + 1), ratios(state.step)

    monkeypatch.setattr("dynprune_jax.feed.train_step", only_ratios)
    highest = ratio_schedule(run, run.dynamic.values(PruneRatio))
    state = TrainState.create(run.dynamic.weights, run.dynamic, run.optimizer("prune"))
    fractions = []
    with Feed(run, "prune", run.dynamic) as feed:
        state = feed.place(state)
        for step in range(8):
            state, drawn = feed.advance(state, 1, None)
            of_gates = [drawn[name] / ratio for name, ratio in highest(jnp.int32(step)).items()]
            np.testing.assert_allclose(of_gates, of_gates[0], rtol=1e-6)  # of all the same
            fractions.append(float(of_gates[0]))
    assert len(set(fractions)) > 4
    assert 0.5 <= min(fractions) < max(fractions) <= 1.0


def test_sensitivity_changes_one_ratio_alone(config, workdir):
    rows = sensitivity(config, workdir)
    report = json.loads((workdir / "report.json").read_text())
    points = {tuple(row[key] for key in ("weights", "axis", "block", "ratio")): row for row in rows}
    # The first block's column ratio is 0.
    gates = {("channel_ratio", 0), ("channel_ratio", 1), ("column_ratio", 1)}
    for axis, block in gates:
        untouched = points["dense", axis, block, 0.0]
        assert untouched["accuracy"] == report["dense"]["accuracy"]
        assert untouched["mac_reduction"] == 0.0
        target = points["dropout", axis, block, config.gate[axis][block]]
        assert target["accuracy"] == report["pruned"]["accuracy"]
        assert target["mac_reduction"] == report["pruned"]["mac_reduction"]
    assert {point[1:3] for point in points} == gates
    # Two weights, three gates, the ratios 0, .2, .4, .6, .8; .3 and .5 are besides, .3 twice.
    assert len(points) == len(rows) == 2 * (3 * 5 + 3)
    # The same point of a network that has no other gates.
    trained = Run.open(config, workdir)
    dense, pruned = trained.trained_values()
    config.gate.channel_ratio, config.gate.column_ratio = (0.0, 0.6), ()
    alone = Network(build.build_dynamic(config, trained.model, {}))
    expected = trained.evaluate(alone, dense)
    found = points["dense", "channel_ratio", 1, 0.6]
    assert found["accuracy"] == expected.accuracy
    assert found["executed_mac_reduction"] == expected.usage.executed_mac_reduction
    # And one of the trained network with all its gates, one of them another.
    config.gate.channel_ratio, config.gate.column_ratio = (0.3, 0.5), (0.0, 0.8)
    changed = Network(build.build_dynamic(config, trained.model, {}))
    expected = trained.evaluate(changed, pruned)
    found = points["dropout", "column_ratio", 1, 0.8]
    assert found["accuracy"] == expected.accuracy
    assert found["executed_mac_reduction"] == expected.usage.executed_mac_reduction
    assert json.loads((workdir / "sensitivity.json").read_text()) == rows
    assert (workdir / "sensitivity.png").stat().st_size > 10_000


@pytest.mark.usefixtures("symbolic_shapes")
def test_the_network_of_a_run_is_exported(config, workdir):
    config.benchmark.batch_sizes = (4,)
    config.prune.recalibration_images = 40
    run = Run.open(config, workdir)
    stored, _ = run.dataset.test.read(np.arange(4))
    model = run.dynamic.bind(run.recalibrated(run.dynamic, run.trained_values()[1]))
    model.eval()
    plan = workdir / "plan_batch_4.json"
    plan.write_text("{}")
    with pytest.raises(UserError, match=r"plan_batch_4\.json"):
        export(config, workdir)
    assert not list(workdir.glob("exported*"))
    mixed_plan(model).save(plan)  # to measure one takes half a minute
    files = export(config, workdir)
    assert [file.name for file in files] == ["exported.bin", "exported_compact_4.bin"]
    expected = nnx.jit(model)(build.evaluation_images(config, jnp.asarray(stored)))
    for file, images in ((files[0], stored), (files[0], stored[:1]), (files[1], stored)):
        logits = load_exported(file.read_bytes())(images)
        np.testing.assert_allclose(logits, expected[: len(images)], rtol=1e-4, atol=1e-5)


def test_step_cost_times_both_steps(config, tmp_path, monkeypatch):
    phases = []

    def feed(run, phase, network):
        phases.append(phase)
        return Feed(run, phase, network)

    def turns(steps, repeats):
        times = interleaved(steps, repeats)
        assert all(min(taken) > 0 and len(taken) == 3 for taken in times.values())
        assert [int(step()[0].step) for step in steps.values()] == [6, 6]  # each on from the last
        return {"dense": [1.0, 2.0, 4.0], "dynamic": [2.0, 3.0, 4.0]}

    monkeypatch.setattr("dynprune_jax.experiments.step_cost.Feed", feed)
    monkeypatch.setattr("dynprune_jax.experiments.step_cost.interleaved", turns)
    rows = step_cost(config, tmp_path / "b")
    assert phases == ["dense", "prune"]
    assert [row["step"] for row in rows] == ["dense", "dynamic"]
    assert [row["cost"] for row in rows] == [1.0, 1.5]  # of 2, 1.5 and 1
    assert [row["median_ms"] for row in rows] == [2000.0, 3000.0]
    assert [row["quartiles_ms"] for row in rows] == [[1000.0, 4000.0], [2000.0, 4000.0]]
    assert [row["images_per_second"] for row in rows] == [8.0, 16 / 3]
    assert json.loads((tmp_path / "b" / "step_cost.json").read_text()) == rows


def test_an_optimizer_is_that_of_its_phase_in_the_config(config, tmp_path):
    config.dense.epochs, config.dense.learning_rate, config.dense.warmup_epochs = 4, 0.4, 2.0
    config.prune.learning_rate, config.gate.salience_rate = 0.2, 0.25
    config.optim.momentum, config.optim.weight_decay = 0.5, 0.125
    run = Run.open(config, tmp_path)
    assert run.steps_per_epoch == 8
    rates = [float(run.learning_rate("dense")(step)) for step in (0, 8, 16, 24, 32)]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.2, 0.0], atol=1e-6)
    params = {name: jnp.float32(2.0) for name in ("kernel", "bias", "salience_bias")}
    optimizer = run.optimizer("prune")
    updates, _ = optimizer.update(
        dict.fromkeys(params, jnp.float32(1.0)), optimizer.init(params), params
    )
    # The first step of Nesterov's: 1 + momentum times the gradient, of kernels with the decay.
    expected = {"kernel": -0.2 * 1.5 * 1.25, "bias": -0.2 * 1.5, "salience_bias": -0.05 * 1.5}
    assert {name: float(u) for name, u in updates.items()} == pytest.approx(expected)


def test_the_teacher_answers_as_at_test_time_and_weighs_as_the_config_says(
    config, tmp_path, monkeypatch
):
    config.prune.distillation, config.prune.temperature = 0.5, 3.0
    run, told = Run.open(config, tmp_path), {}

    def only_taught(state, batch, *, teacher, **options):
        told.update(options)
        return state, {"among": teacher(batch[0])[:1], "alone": teacher(batch[0][:1])}

    monkeypatch.setattr("dynprune_jax.feed.train_step", only_taught)
    state = TrainState.create(run.dense.weights, run.dynamic, run.optimizer("prune"))
    with Feed(run, "prune", run.dynamic, teacher=run.dense.weights) as feed:
        _, taught = feed.advance(feed.place(state), 1, None)
    assert (told["distillation"], told["temperature"]) == (0.5, 3.0)
    np.testing.assert_allclose(taught["among"], taught["alone"], rtol=1e-4, atol=1e-5)


def test_each_step_of_each_phase_is_augmented_in_its_own_way(config, tmp_path, monkeypatch):
    run = Run.open(config, tmp_path)

    def no_step(state, batch, **options):
        return dataclasses.replace(state, step=state.step + 1), {"key": batch[0]}

    monkeypatch.setattr("dynprune_jax.feed.train_step", no_step)
    monkeypatch.setattr(
        "dynprune_jax.feed.training_images", lambda config, key, images: jax.random.key_data(key)
    )
    keys = set()
    for name, network in (("dense", run.dense), ("prune", run.dynamic)):
        state = TrainState.create(run.dense.weights, network, run.optimizer(name))
        with Feed(run, name, network) as feed:
            state = feed.place(state)
            for _ in range(3):
                state, drawn = feed.advance(state, 1, None)
                keys.add(tuple(np.asarray(drawn["key"]).tolist()))
    assert len(keys) == 2 * 3


def test_numbers_that_are_not_finite_are_not_saved(config, tmp_path, monkeypatch):
    """With a loss that still is: it was computed before them."""
    config.prune.epochs = 0
    run = Run.open(config, tmp_path)
    run.claim()

    def spoiled(feed, state, count, batch):
        stats = {name: jnp.full_like(value, jnp.inf) for name, value in state.stats.items()}
        changed = dataclasses.replace(state, step=jnp.int32(state.step + count), stats=stats)
        return changed, {"loss": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(Feed, "advance", spoiled)
    monkeypatch.setattr(Run, "evaluate", lambda *_: SimpleNamespace(accuracy=0.5))
    with pytest.raises(UserError, match=r"(mean|var) is not finite at step 8 of the dense phase"):
        run_phase(run, "dense", run.dense, run.dense.weights)
    assert not any((tmp_path / "checkpoints" / "dense").iterdir())


def test_of_two_runs_in_one_folder_the_second_is_refused(config, tmp_path):
    Run.open(config, tmp_path).claim()
    before = sorted(tmp_path.rglob("*"))
    for mode in (train_and_evaluate, static):
        refused = pytest.raises(UserError, match="another run trains there; wait")
        with trains_alone(tmp_path), refused:
            mode(config, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    with trains_alone(tmp_path):  # which has ended
        pass


def test_a_run_keeps_its_folder_until_its_report_is_written(config, tmp_path, monkeypatch):
    seen = []

    def write_report(run, *_):
        with pytest.raises(UserError, match="another run trains there"), trains_alone(run.workdir):
            seen.append("a second run")
        seen.append("the report")
        return {}

    monkeypatch.setattr(train_lib, "run_phase", lambda run, *_: (run.dense.weights, {}))
    monkeypatch.setattr(train_lib, "write_report", write_report)
    train_and_evaluate(config, tmp_path)
    assert seen == ["the report"]
    with trains_alone(tmp_path):
        pass


def test_where_folders_have_no_locks_runs_train_all_the_same(tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS says

    monkeypatch.setattr("fcntl.flock", no_lock)
    with trains_alone(tmp_path), trains_alone(tmp_path):
        pass


def test_a_phase_tells_its_rates_and_the_ratios_of_its_last_step(
    config, tmp_path, monkeypatch, capfd
):
    config.dense.epochs, config.prune.start, config.steps_per_dispatch = 0, "scratch", 2
    run, seen = Run.open(config, tmp_path), []
    run.claim()

    def advance(feed, state, count, batch):  # without a program
        step = jnp.int32(state.step + count)
        return dataclasses.replace(state, step=step), {"loss": 1.0, "accuracy": 0.5}

    def evaluate(run, network, values, ratios):
        seen.append({name: float(ratio) for name, ratio in ratios.items()})
        return SimpleNamespace(accuracy=0.5)

    monkeypatch.setattr(Feed, "advance", advance)
    monkeypatch.setattr(Run, "evaluate", evaluate)
    _, timing = run_phase(run, "prune", run.dynamic, run.dense.weights)
    assert timing["images"] == (16 - 2) * 16  # without those of the first call, which compiles
    schedule, rate = ratio_schedule(run, run.dynamic.values(PruneRatio)), run.learning_rate("prune")
    assert seen == [{k: float(r) for k, r in schedule(step).items()} for step in (7, 15)]
    lines = [line for line in capfd.readouterr().out.splitlines() if "test accuracy" in line]
    for line, told in zip(lines, ("0.30", "0.43"), strict=True):
        assert re.search(rf"pruning {told} of the channels, .* \([\d,]+ images/s", line)
    rows = [row for row in read_metrics(tmp_path) if "learning_rate" in row]
    assert [row["learning_rate"] for row in rows] == [float(rate(step)) for step in (3, 7, 11, 15)]


def test_the_mean_of_predicted_gates_is_that_of_what_they_choose():
    read = {"b/channel_ratio": 0.25, "b/column_ratio": 0.75}
    assert train_lib._mean(read) == {"channel_ratio": 0.25, "column_ratio": 0.75}
    chosen = {"a/feature_ratio": 0.5, "b/channel_ratio": 0.25}
    assert train_lib._mean(chosen) == {"channel_ratio": 0.5, "column_ratio": None}


def test_of_a_lone_gate_the_weights_are_told_apart(config, tmp_path, monkeypatch):
    """Then nothing else is pruned on either, and a point of both has the same ratios."""
    config.gate.channel_ratio, config.gate.column_ratio = (0.0, 0.5), ()
    weights = {"dense": {"accuracy": 0.25}, "dropout": {"accuracy": 0.75}}
    monkeypatch.setattr(Run, "finished_weights", lambda run: weights)
    usage = SimpleNamespace(mac_reduction=0.5, executed_mac_reduction=0.5)
    monkeypatch.setattr(
        Run, "evaluate", lambda run, network, values, ratios: SimpleNamespace(**values, usage=usage)
    )
    for row in sensitivity(config, tmp_path):
        assert row["accuracy"] == weights[row["weights"]]["accuracy"]


def test_images_are_held_in_memory_up_to_the_limit(config, tmp_path):
    config.data.memory_limit_mb = 1
    for side, fits in ((67, True), (68, False)):  # of 128 + 100 images, of a byte a pixel
        config.data.stored_size = side
        assert (228 * side**2 <= 2**20) == fits
        assert Run.open(config, tmp_path).in_memory == fits


def test_evaluating_again_keeps_what_was_told_of_the_training(config, tmp_path):
    run = Run.open(config, tmp_path)
    phases = {"dense": {"images_per_second": 1.0, "share_outside_step": 0.5}}
    told = {"command": "python -m ... --mode=train", "phases": phases, "seconds": 3.0}
    there = {"device": "1 x a GPU", "versions": {"jax": "0.9"}}
    (tmp_path / "report.json").write_text(json.dumps({**told, **there, "seed": 1}))
    kept = {**told, "trained_with": there}
    assert report_lib._told_of_training(run) == kept
    here = {"device": "1 x cpu", "versions": {"jax": "0.11"}}  # evaluated twice
    (tmp_path / "report.json").write_text(json.dumps({**kept, **here}))
    assert report_lib._told_of_training(run) == kept
    (tmp_path / "report.json").write_text(json.dumps(told))  # an older one tells less
    assert report_lib._told_of_training(run) == {**told, "trained_with": {}}
    for other in ("{", json.dumps({**kept, **here, "phases": {"dense": {}}})):
        (tmp_path / "report.json").write_text(other)
        assert report_lib._told_of_training(run) == {}


def test_a_report_says_what_it_was_measured_on(config, tmp_path):
    config.data.test_examples, config.data.held_out = 0, 28
    config.prune.recalibration_images = 40
    found = provenance(Run.open(config, tmp_path))
    sizes = {"train_examples": 100, "test_examples": 28, "held_out": 28}
    assert found["data"] == {"name": "digits", "classes": 10, **sizes}
    assert found["recalibration_images"] == 40
    config.prune.recalibration_images = 2000  # of the 100 that there are, in batches of 40
    assert provenance(Run.open(config, tmp_path))["recalibration_images"] == 80
    config.eval_batch_size = 250
    assert provenance(Run.open(config, tmp_path))["recalibration_images"] == 100


def test_a_work_directory_is_made_empty(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "b")
    assert not [*(tmp_path / "a" / "b").iterdir()]
    monkeypatch.setattr(processes, "leads", lambda: False)
    make_folder(tmp_path / "c")  # by another
    assert not (tmp_path / "c").exists()


def test_what_is_done_with_a_finished_run_may_change(config, tmp_path):
    keep_config(config, tmp_path)
    config.sweep.fractions, config.sensitivity.ratios = (0.5,), (0.1,)
    config.cascade.shares = (0.4,)
    config.benchmark.repeats, config.study.seeds, config.eval_batch_size = 9, (7,), 20
    config.prune.recalibration_images, config.checkpoint_every_epochs = 40, 3
    check_workdir(config, tmp_path)
    stored = (tmp_path / "config.json").read_text()
    keep_config(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == stored
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(stored), "later": 1}))
    with pytest.raises(UserError, match=r"config\.later is 1 there and None here"):
        check_workdir(config, tmp_path)
    (tmp_path / "config.json").write_text(stored)
    config.prune.epochs = 3
    with pytest.raises(UserError, match=r"config\.prune\.epochs is 2 there and 3 here"):
        check_workdir(config, tmp_path)


def test_a_place_is_the_same_by_any_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config.data.path = "images"
    keep_config(config, tmp_path)
    (tmp_path / "link").symlink_to("images")
    for config.data.path in (str(tmp_path / "images"), "./images/", "link", "~/images"):
        check_workdir(config, tmp_path)
    for config.data.path in ("other", ""):
        with pytest.raises(UserError, match=r"config\.data\.path is 'images' there and '"):
            check_workdir(config, tmp_path)
    (tmp_path / "config.json").unlink()
    keep_config(config, tmp_path)
    config.data.path = "."  # which is a place, and none is not
    with pytest.raises(UserError, match=r"config\.data\.path is '' there and '\.' here"):
        check_workdir(config, tmp_path)
