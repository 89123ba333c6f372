import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_removal import build, filters

from dynprune_jax import config as config_lib
from dynprune_jax import load_exported, models
from dynprune_jax.build import build_dynamic, build_links, build_model, training_images
from dynprune_jax.checkpoint import Checkpoints
from dynprune_jax.data.batches import stream_batches
from dynprune_jax.errors import UserError
from dynprune_jax.experiments import static as static_lib
from dynprune_jax.experiments.export import _for_all_platforms, export
from dynprune_jax.experiments.static import CRITERIA, find_removable, shares, static
from dynprune_jax.experiments.study import study
from dynprune_jax.models.links import links
from dynprune_jax.pruning.layers import all_modules, conv_layers, dynamic_layers
from dynprune_jax.run import Run
from dynprune_jax.train import evaluate_workdir, train_and_evaluate


@pytest.mark.parametrize("kind", ["predicted", "attention"])
@pytest.mark.parametrize("name", ["small_vgg", "small_resnet20"])
def test_filters_are_allotted_as_the_gates_that_skip_them(config, kind, name):
    config.static.allotment = "gate"
    config.gate.kind, config.model, config.gate.layers = kind, name, ("*",)
    model, _ = build(name, width=1.0)
    blocks = len(model.blocks)
    config.gate.channel_ratio, config.gate.column_ratio = (0.25, 0.5, 0.75)[-blocks:], ()
    gates = dynamic_layers(build_dynamic(config, model, build_links(config, model, 3)))
    given = shares(config, links(model))
    for name, (_, reader) in links(model).items():
        gate, axis = (
            (gates[name], "feature_ratio")
            if kind == "predicted"
            else (gates.get(reader), "channel_ratio")  # none in front of the head
        )
        ratio = 0.75 if gate is None else float(getattr(gate, axis)[...])
        assert given[name] == ratio


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Halves", "its code counts on all of them: "),
        ("Asserting", "its code counts on all of them: AssertionError$"),
        ("AssertingInTraining", "its code counts on all of them: AssertionError$"),
        ("Depthwise", "static pruning has no place in it: Depthwise has no filters that can"),
        ("OtherHead", "static pruning has no place in it: OtherHead has no filters that can"),
        ("Tied", "static pruning has no place in it: Tied has no filters that can"),
        ("Normed", "static pruning has no place in it: Normed has no filters that can"),
        ("NoNorm", "neither predicted gates nor static pruning have a place in it: NoNorm has no"),
    ],
)
def test_of_a_network_of_ones_own_what_cannot_leave_is_said(config, tmp_path, model, message):
    config.model = f"own:{model}"
    blocks = len(build_model(config, 10, 1).blocks)
    config.gate.channel_ratio, config.gate.column_ratio = (0.0, 0.0, 0.5)[-blocks:], ()
    config.study.methods = ("attention", "l1")
    for mode, folder in ((static, "run"), (study, "study")):
        with pytest.raises(UserError, match=message):
            mode(config, tmp_path / folder)
        assert not (tmp_path / folder).exists()


def test_a_known_architecture_with_another_head_is_tried_as_any_other(config):
    first, last = (f"blocks/{i}/layers/0" for i in range(2))
    known = {f"{first}/conv": (f"{first}/norm", f"{last}/conv")}
    headed = known | {f"{last}/conv": (f"{last}/norm", "head/layers/1")}
    # Of what is laid out with the channels first, other rows of the head belong to a filter.
    for name, expected in (("headed", headed), ("laid_out", known)):
        config.model = f"own:{name}"
        model = build_model(config, 10, 1)
        model.eval()
        assert find_removable(config, model, 1, {}) == expected


def conv_with(rows):
    """A two-layer network whose first convolution has these 1x1 filters."""
    model, _ = build("small_resnet20")
    name = next(iter(links(model)))
    conv = conv_layers(model)[name]
    kernel = np.zeros(conv.kernel.shape, np.float32)
    kernel[0, 0, : rows.shape[1]] = rows.T
    conv.kernel[...] = jnp.asarray(kernel)
    return model, name


@pytest.fixture
def run(config, tmp_path):
    return Run.open(config, tmp_path)


def test_l1_and_the_geometric_median_by_hand(run):
    model, name = conv_with(np.array([[3.0, -4.0], [1.0, 0.0]]))
    np.testing.assert_allclose(static_lib.l1(model, links(model))[name], [7, 1])
    model, name = conv_with(np.array([[0.0, 0.0], [3.0, 4.0]]))
    scores = static_lib.geometric_median(model, links(model), run)
    np.testing.assert_allclose(scores[name], [5, 5])


def test_the_geometric_median_is_the_slow_sum_of_distances(run):
    model, _ = build("small_vgg")
    fast = static_lib.geometric_median(model, links(model), run)
    for name, n in filters(model).items():
        rows = np.asarray(conv_layers(model)[name].kernel[...]).reshape(-1, n).T
        slow = [sum(np.linalg.norm(a - b) for b in rows) for a in rows]
        np.testing.assert_allclose(fast[name], slow, rtol=1e-4)


def test_taylor_is_the_change_of_the_loss_for_a_small_gate(config, run):
    """Against finite differences of the loss of single images."""
    model = models.vgg_digits(10, image_size=8, width=0.125, rngs=nnx.Rngs(0))
    model.eval()
    found = static_lib.taylor(model, links(model), run)
    assert found.keys() == links(model).keys()

    keys = jax.random.split(jax.random.key(config.seed), 8)
    batches = stream_batches(run.dataset.train, config.batch_size, config.seed, threads=0)
    name, (norm_name, _) = list(links(model).items())[2]
    norm = all_modules(model)[norm_name]

    def losses(images, labels):
        chosen = jax.nn.log_softmax(model(images))
        return -np.asarray(jnp.take_along_axis(chosen, labels[:, None], axis=1))[:, 0]

    changes = np.zeros(filters(model)[name])
    scale, bias = norm.scale[...], norm.bias[...]
    for key, batch in zip(keys, batches, strict=False):
        images, labels = (
            training_images(config, key, jnp.asarray(batch["image"])),
            jnp.asarray(batch["label"]),
        )
        for i in range(len(changes)):
            sides = []
            for step in (1e-2, -1e-2):
                gate = jnp.ones_like(scale).at[i].add(step)
                norm.scale[...], norm.bias[...] = scale * gate, bias * gate
                sides.append(losses(images, labels))
            changes[i] += np.mean(np.abs(sides[0] - sides[1])) / 2e-2 / 8
        norm.scale[...], norm.bias[...] = scale, bias
    np.testing.assert_allclose(found[name], changes, rtol=2e-2, atol=1e-5)


@pytest.mark.usefixtures("short_reports")
def test_a_static_run_has_the_macs_of_the_dynamic_one(config, tmp_path, monkeypatch):
    epochs, config.prune.epochs = config.prune.epochs, 0
    dense = train_and_evaluate(config, tmp_path / "dense")
    config.prune.epochs, config.prune.start = epochs, "checkpoint"
    config.prune.checkpoint = str(tmp_path / "dense")
    config.static.criterion = "taylor"
    dynamic = Run.open(config, tmp_path / "dynamic")  # whatever its gates choose costs the same
    gated = dynamic.evaluate(dynamic.dynamic, dynamic.gated(dynamic.start_state().values))
    identity = Run._identity

    def older(run, phase, filters_removed_by=None):  # it did not tell how it was pruned
        told = identity(run, phase, filters_removed_by)
        return {name: value for name, value in told.items() if name != "filters removed by"}

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_identity", older)
        report = static(config, tmp_path / "static")
    assert report == json.loads((tmp_path / "static" / "report.json").read_text())
    assert report["dense"] == dense["dense"]
    assert report["dense_macs_per_image"] == dense["dense_macs_per_image"]
    aim = gated.usage.mac_reduction
    assert aim - 1e-6 <= report["pruned"]["mac_reduction"] < aim + 0.05
    assert report["pruned"]["macs_per_image"]["min"] == report["pruned"]["macs_per_image"]["max"]
    assert report["pruned"]["examples"] == 100
    for row in report["cascade"]:  # all see the network without filters, and a share the dense one
        left = report["pruned"]["mac_reduction"] - row["share"]
        assert row["mac_reduction"] == pytest.approx(left)
    assert len(report["cascade"]) == len(config.cascade.shares)
    # The same command again trains nothing.
    assert static(config, tmp_path / "static")["parameters_digest"] == report["parameters_digest"]


@pytest.mark.usefixtures("short_reports")
def test_the_filters_that_leave_are_tried_before_anything_is_trained(config, tmp_path):
    config.model = "own:Eights"
    config.gate.channel_ratio, config.gate.column_ratio = (0.2,), ()
    with pytest.raises(UserError, match=r"'own:Eights'; Eights cannot lose filters, .* reshape"):
        static(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("short_reports")
def test_the_control_needs_no_filters_that_can_leave(config, tmp_path):
    config.model, config.static.criterion = "own:NoNorm", "none"
    config.gate.channel_ratio, config.gate.column_ratio = (0.5,), ()
    report = static(config, tmp_path)
    assert (report["pruned"]["mac_reduction"], report["filters"]) == (0, {})


def without_words(model, images, **options):
    """Somebody's own code that asserts how many images there are."""
    if not isinstance(images.shape[0], int):
        raise AssertionError
    return b""


def stopped_short(restore):
    """What is read is of a run that had a step more to go."""

    def read(checkpoints, like):
        state, extra = restore(checkpoints, like)
        return state, extra | {"total": extra["total"] + 1}

    return read


@pytest.mark.usefixtures("few_forms", "symbolic_shapes")
def test_a_static_run_of_a_network_of_ones_own(config, tmp_path, capsys, monkeypatch):
    config.model = "own:Own"
    config.static.criterion = "taylor"
    config.dense.epochs, config.prune.epochs = 1, 1
    config.gate.channel_ratio, config.gate.column_ratio = (0.0, 0.0, 0.5), ()
    config.ascent.warmup = 0.5
    report = static(config, tmp_path)
    said = "filters can leave 2 of 4 convolutions: blocks/1, blocks/2\n"
    assert said in capsys.readouterr().out
    # The gates skip 32 of the third layer's 64 channels, each of which has 16 x 9 x 16 MACs; of
    # 16 filters of the second and the third layer 13 are the most that cost no more.
    whole, left, more = (576 * (32 + 16 * n) + 576 * n * n + 160 * n for n in (16, 13, 14))
    assert left < whole - 32 * 16 * 9 * 16 < more
    assert report["dense_macs_per_image"] == whole
    assert report["pruned"]["macs_per_image"]["mean"] == left
    assert [part["kept"] for part in report["filters"].values()] == [13, 13]
    assert report["filters"].keys() == {"blocks/1", "blocks/2"}
    config.benchmark.batch_sizes = (100,)
    files = export(config, tmp_path)
    # Its code asks how many images there are, so there is no file for any number of them.
    assert [file.name for file in files] == ["exported_100.bin", "exported_compact_100.bin"]
    assert "exported.bin is left out: own:Own is for a given number" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("dynprune_jax.experiments.export.export_model", without_words)
        (file,) = _for_all_platforms(Run.open(config, tmp_path), "other", nnx.Module())
    assert file.name == "other_100.bin"
    assert "number of images (AssertionError" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", stopped_short(Checkpoints.restore))
        with pytest.raises(UserError, match="of its prune phase; finish it with --mode=static"):
            export(config, tmp_path)
    images, labels = Run.open(config, tmp_path).dataset.test.read_all()
    for file in files:
        logits = load_exported(file.read_bytes())(images)
        assert np.mean(np.argmax(logits, axis=-1) == labels) == report["pruned"]["accuracy"]


@pytest.mark.usefixtures("short_reports")
def test_the_control_trains_a_whole_dense_network_on(config, tmp_path):
    """As a network with gates is that never drops anything in training."""
    config.static.criterion, config.prune.distillation = "none", 0.5
    report = static(config, tmp_path / "whole")
    assert report["pruned"]["mac_reduction"] == report["pruned"]["executed_mac_reduction"] == 0
    assert report["pruned_without_training"]["accuracy"] == report["dense"]["accuracy"]
    with pytest.raises(UserError, match=r"run of --mode=static \(none\), which has no gates:"):
        evaluate_workdir(config, tmp_path / "whole")
    with pytest.raises(UserError, match="filters removed by: 'none' there, None here"):
        train_and_evaluate(config, tmp_path / "whole")
    config.gate.drop_probability = 0.0
    dynamic = train_and_evaluate(config, tmp_path / "dynamic")
    assert report["parameters_digest"] == dynamic["parameters_digest"]
    with pytest.raises(UserError, match="filters removed by: None there, 'none' here"):
        static(config, tmp_path / "dynamic")  # though it is the same


def test_the_criteria_of_the_config_are_those_here():
    assert set(config_lib.FILTER_CRITERIA) == set(CRITERIA)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prune.epochs", 0, "config.prune.epochs is 0"),
        ("prune.start", "scratch", "config.prune.start is 'scratch'"),
        ("gate.channel_ratio", (), "config.static.allotment is 'gate'"),
    ],
)
def test_what_cannot_be_pruned_statically_is_said(config, tmp_path, field, value, message):
    config.static.allotment = "gate"
    config[field.split(".")[0]][field.split(".")[1]] = value
    with pytest.raises(UserError, match=message):
        static(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reduction_out_of_reach_is_said_before_anything_is_trained(config, tmp_path):
    """Filters of what a block hands on stay, and with them more MACs than these gates leave."""
    config.model = "resnet20"
    config.ascent.warmup = 0.9
    config.gate.channel_ratio = config.gate.column_ratio = (0.9, 0.9, 0.9)
    with pytest.raises(UserError, match=r"config\.static\.allotment is 'uniform', .*: no removal"):
        static(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_random_draw_is_that_of_the_seed(config, tmp_path):
    model, _ = build("small_vgg")
    drawn = []
    for seed in (0, 1, 0):
        config.seed = seed
        scores = static_lib.random(model, links(model), Run.open(config, tmp_path))
        drawn.append(np.concatenate([*scores.values()]))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])
