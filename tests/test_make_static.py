"""Predicted gates whose choice is made once for all inputs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import own
import pytest
from flax import nnx
from networks import mixed_plan, run, trained

from dynprune_jax import (
    compact,
    find_links,
    load_exported,
    make_dynamic,
    make_static,
    measure,
    predict_channels,
    recalibrate,
)
from dynprune_jax.build import evaluation_images, training_images
from dynprune_jax.experiments.export import export
from dynprune_jax.experiments.static import l1
from dynprune_jax.models.links import links
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.handover import GatedNorm
from dynprune_jax.pruning.layers import all_modules, dynamic_layers
from dynprune_jax.pruning.removal import FixedFiltersError, remove_filters
from dynprune_jax.report import write_report
from dynprune_jax.run import Run

NETWORKS = {
    "small_vgg": (8, 1),
    "small_resnet20": (8, 3),
    "small_resnet50": (16, 3),
    "small_mobilenet": (8, 3),
}
_NUMBERS = nnx.Any(nnx.Param, nnx.BatchStat)


def predicted(name, ratio=0.4, **options):
    side, channels = NETWORKS[name]
    model = trained(name, image_size=side, in_channels=channels, width=0.25)
    model.eval()
    dynamic = predict_channels(model, ratio, links(model), **options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, side, side, channels))
    images += 2 * rng.normal(size=(6, 1, 1, channels))  # so that they differ in their means
    return dynamic, links(model), jnp.asarray(images, jnp.float32)


@pytest.mark.parametrize(
    ("name", "scales"),
    [*((name, True) for name in NETWORKS), ("small_vgg", False), ("small_mobilenet", False)],
)
def test_gates_that_choose_alike_for_all_inputs_are_not_missed(name, scales):
    dynamic, found, images = predicted(name, salience_scales=scales, channel_group=2)
    expected, usage = nnx.jit(measure)(dynamic, images)
    before = jax.tree.map(np.array, nnx.state(dynamic, _NUMBERS))
    static = make_static(dynamic, found, images)
    np.testing.assert_allclose(run(static, images), expected, rtol=1e-4, atol=1e-6)
    modules = [module for _, module in nnx.iter_modules(static)]
    assert not any(isinstance(module, DynamicConv | GatedNorm) for module in modules)
    assert not nnx.state(static, nnx.Not(_NUMBERS))
    _, left = nnx.jit(measure)(static, images)
    macs = {layer.name: layer.dense_macs for layer in left.layers}
    for layer in usage.layers:
        if layer.name != "head":  # which reads all features from behind a gate
            assert macs[layer.name] == layer.macs[0], layer.name
    assert left.dense_macs <= usage.macs[0]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(dynamic, _NUMBERS))


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_that_are_not_trained_yet_make_static_pruning_by_l1_norms(name):
    """Two ways to the same network, and so the one that Python has of static pruning."""
    dynamic, found, images = predicted(name)
    side, channels = NETWORKS[name]
    model = trained(name, image_size=side, in_channels=channels, width=0.25)
    model.eval()
    ratios = {name: float(dynamic_layers(dynamic)[name].feature_ratio[...]) for name in found}
    expected = remove_filters(model, found, l1(model, found), ratios)
    static = make_static(dynamic, found, images)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        nnx.to_pure_dict(nnx.state(static, _NUMBERS)),
        nnx.to_pure_dict(nnx.state(expected, _NUMBERS)),
    )


def test_what_most_images_want_stays_scaled_by_its_mean_salience():
    """Against NumPy, image by image, with gates that choose otherwise for each."""
    dynamic, found, images = predicted("small_vgg", 0.5, drop_probability=0.5)
    rng = np.random.default_rng(1)
    gates = {k: v for k, v in dynamic_layers(dynamic).items() if v.feature_ratio is not None}
    for gate in gates.values():
        drawn = 3.0 * rng.normal(size=gate.salience_kernel.shape)
        gate.salience_kernel[...] = jnp.asarray(drawn, jnp.float32)
    one_by_one = {name: [] for name in gates}
    dynamic.eval()
    for image in images:
        for layer in nnx.jit(measure)(dynamic, image[None])[1].layers:
            if layer.name in gates:
                masks = layer.masks
                one_by_one[layer.name].append(np.where(masks.features, masks.salience, np.nan)[0])
    dynamic.train()  # to find what is wanted there is no chance
    static = make_static(dynamic, found, images)
    before, after = all_modules(dynamic), all_modules(static)
    varied, read = 0, np.arange(1)
    for name, gate in gates.items():
        each = np.stack(one_by_one[name])
        votes = np.sum(~np.isnan(each), axis=0)
        varied += np.sum((votes > 0) & (votes < len(images)))
        salience = np.nansum(each, axis=0) / np.maximum(votes, 1)
        order = sorted(range(len(votes)), key=lambda i: (votes[i], salience[i]), reverse=True)
        kept = np.array(sorted(order[: int(np.sum(~np.isnan(each[0])))]))
        assert len(kept) < gate.out_features
        norm, reader = found[name]
        for part in ("scale", "bias"):
            expected = getattr(before[norm], part)[...][kept] * salience[kept]
            np.testing.assert_allclose(getattr(after[norm], part)[...], expected, rtol=1e-5)
        np.testing.assert_array_equal(after[norm].mean[...], before[norm].mean[...][kept])
        kernel = np.asarray(before[name].kernel[...])[:, :, read][..., kept]
        np.testing.assert_array_equal(after[name].kernel[...], kernel)
        read = kept
        assert after[reader].kernel.shape[-2] == len(kept)
    assert varied > 15  # of 48
    assert not after["blocks/0/layers/0/norm"].use_running_average


def test_what_cannot_be_made_static_is_refused():
    dynamic, found, images = predicted("small_vgg")
    first, second = list(found)[:2]
    with pytest.raises(ValueError, match=f"links is not what the gate of {first} was made with"):
        make_static(dynamic, {k: v for k, v in found.items() if k != first}, images)
    with pytest.raises(ValueError, match=f"links is not what the gate of {first} was made with"):
        make_static(dynamic, found | {first: found[second]}, images)
    with pytest.raises(ValueError, match="give a batch of some"):
        make_static(dynamic, found, images[:0])
    with pytest.raises(ValueError, match="this model is compact"):
        make_static(compact(dynamic, images[:1], plan=None), found, images)
    plain = trained("small_vgg", image_size=8, in_channels=1, width=0.25)
    for other in (
        plain,
        make_dynamic(plain, 0.5),
        predict_channels(plain, 0.5, found, column_ratio=0.5),
    ):
        with pytest.raises(ValueError, match="VGG has no predicted gates, or has gates on columns"):
            make_static(other, found, images)


@pytest.mark.parametrize("kind", [own.Small, own.Jitted, own.Rematerialised])
def test_a_model_of_ones_own_may_have_programs_within(kind):
    model, images = small(kind)
    found = find_links(model, images)
    dynamic = predict_channels(model, 0.5, found)
    static = make_static(dynamic, found, images)
    np.testing.assert_allclose(run(static, images), run(dynamic, images), rtol=1e-4, atol=1e-6)


class Unscaled(own.Small):
    """Its norm has neither scale nor bias."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.norm = nnx.BatchNorm(16, use_scale=False, use_bias=False, rngs=rngs)


@pytest.mark.parametrize("scales", [True, False])
def test_a_norm_may_have_no_scale(scales):
    model, images = small(Unscaled)
    found = find_links(model, images)
    dynamic = predict_channels(model, 0.5, found, salience_scales=scales)
    static = make_static(dynamic, found, images)
    assert (static.norm.scale is not None) == scales
    np.testing.assert_allclose(run(static, images), run(dynamic, images), rtol=1e-4, atol=1e-6)


class Twice(own.Small):
    """One convolution sees two maps of each image."""

    def __call__(self, x):
        maps = [self.norm(self.blocks[0](self.stem(part))) for part in (x, 3.0 * x[:, ::-1] + 1.0)]
        return self.head(sum(nnx.relu(part) for part in maps).mean((1, 2)))


def test_of_a_layer_that_is_called_twice_both_calls_count():
    model, images = small(Twice)
    found = {"blocks/0": ("norm", "head")}
    dynamic = predict_channels(model, 0.5, found)
    gate = dynamic.blocks[0]
    drawn = 3.0 * np.random.default_rng(5).normal(size=gate.salience_kernel.shape)
    gate.salience_kernel[...] = jnp.asarray(drawn, jnp.float32)
    calls = [
        np.where(layer.masks.features, layer.masks.salience, np.nan)
        for layer in nnx.jit(measure)(dynamic, images)[1].layers
        if layer.name == "blocks/0"
    ]
    assert len(calls) == 2
    each = np.concatenate(calls)
    votes = np.sum(~np.isnan(each), axis=0)
    static = make_static(dynamic, found, images)
    kernels = np.asarray(gate.kernel[...]).reshape(-1, 16).T.tolist()
    left = np.asarray(static.blocks[0].kernel[...]).reshape(-1, 8).T.tolist()
    kept = np.array([kernels.index(kernel) for kernel in left])
    assert votes[kept].min() >= np.delete(votes, kept).max()
    expected = dynamic.norm.scale[...][kept] * np.nanmean(each[:, kept], axis=0)
    np.testing.assert_allclose(static.norm.scale[...], expected, rtol=1e-5)


class Counting(own.Small):
    """Its code counts the channels of one map and not those of another."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.blocks.append(nnx.Conv(16, 16, (3, 3), rngs=rngs))
        self.other = nnx.BatchNorm(16, rngs=rngs)

    def between(self, x):
        x = nnx.relu(self.other(self.blocks[1](nnx.relu(x))))
        return x.reshape(*x.shape[:-1], 16)


def test_filters_that_code_counts_on_stay_and_that_is_said():
    model, images = small(Counting)
    found = find_links(model, images)
    assert found == {"blocks/0": ("norm", "blocks/1"), "blocks/1": ("other", "head")}
    dynamic = predict_channels(model, 0.5, found)
    with pytest.raises(ValueError, match="the filters of blocks/1 cannot leave Counting: its code"):
        make_static(dynamic, found, images)
    dynamic = predict_channels(model, 0.5, found, layers="blocks/0")
    static = make_static(dynamic, found, images)  # that one can
    assert static.blocks[0].out_features == static.blocks[1].in_features == 8
    np.testing.assert_allclose(run(static, images), run(dynamic, images), rtol=1e-4, atol=1e-6)


class Masked(own.Small):
    """A part of its kernel is masked."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        kept = jnp.asarray(np.random.default_rng(1).integers(0, 2, (3, 3, 16, 16)), jnp.float32)
        self.blocks = nnx.List([nnx.Conv(16, 16, (3, 3), mask=kept, rngs=rngs)])


def test_a_masked_kernel_keeps_its_filters_and_that_is_said():
    model, images = small(Masked)
    found = find_links(model, images)
    assert found == {"blocks/0": ("norm", "head")}
    with pytest.raises(FixedFiltersError, match="those of blocks/0 stay, for blocks/0 has a mask"):
        make_static(predict_channels(model, 0.5, found), found, images)


def small(kind):
    options = {"in_channels": 1, "image_size": 8, "width": 1.0, "dtype": jnp.float32}
    model = kind(10, **options, rngs=nnx.Rngs(0))
    model.eval()
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1))
    return model, jnp.asarray(images, jnp.float32)


def test_a_run_whose_model_keeps_its_filters_says_so(config, tmp_path, capsys):
    config.model, config.gate.kind = "test_make_static:Counting", "predicted"
    config.gate.channel_ratio, config.gate.column_ratio = (0.5, 0.5), ()
    opened = Run.open(config, tmp_path)
    assert opened.made_static(opened.gated(opened.dense.weights)) is None
    assert "not made static: the filters of blocks/1 cannot leave" in capsys.readouterr().out


def test_a_defect_is_not_told_as_filters_that_stay(config, tmp_path, monkeypatch):
    def defect(*_):
        raise ValueError("a defect")

    config.gate.kind, config.gate.column_ratio = "predicted", ()
    opened = Run.open(config, tmp_path)
    monkeypatch.setattr("dynprune_jax.run.make_static", defect)
    with pytest.raises(ValueError, match="a defect"):
        opened.made_static(opened.gated(opened.dense.weights))


@pytest.mark.usefixtures("symbolic_shapes")
def test_a_run_reports_and_exports_it(config, tmp_path, monkeypatch, capsys):
    config.gate.kind, config.gate.column_ratio = "predicted", ()
    config.benchmark.batch_sizes = (4,)
    opened = Run.open(config, tmp_path)
    dense = opened.dense.weights
    opened.claim()
    report = write_report(opened, dense, opened.gated(dense))
    whole, pruned, static = (report[k] for k in ("dense", "pruned", "pruned_made_static"))
    assert static["accuracy"] == pruned["accuracy"]  # new gates choose alike for all inputs
    assert static["gate_operations_per_image"] == 0
    left = static["macs_per_image"]["mean"]
    assert left <= pruned["macs_per_image"]["mean"]
    assert static["mac_reduction"] == pytest.approx(1 - left / whole["macs_per_image"]["mean"])
    monkeypatch.setattr(Run, "trained_values", lambda run: (dense, run.gated(dense)))
    dynamic = opened.dynamic.bind(opened.gated(dense))
    mixed_plan(dynamic).save(tmp_path / "plan_batch_4.json")
    monkeypatch.setitem(sys.modules, "torch", None)
    files = {file.name: file for file in export(config, tmp_path)}
    assert list(files) == ["exported.bin", "exported_static.bin", "exported_compact_4.bin"]
    told = capsys.readouterr().out
    assert "exported_static.onnx is left out: " in told
    assert "(pip install torch onnx)" in told
    assert "exported.onnx" not in told  # that one has gates
    stored, _ = opened.dataset.test.read(np.arange(3))
    dynamic.eval()
    expected = nnx.jit(dynamic)(evaluation_images(config, jnp.asarray(stored)))
    logits = load_exported(files["exported_static.bin"].read_bytes())(stored)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    config.gate.column_ratio = (0.0, 0.2)
    assert Run.open(config, tmp_path / "columns").made_static(dense) is None


def test_where_statistics_are_made_anew_those_of_what_is_left_are(config, tmp_path):
    config.gate.kind, config.gate.column_ratio = "predicted", ()
    config.prune.recalibration_images = 40
    opened = Run.open(config, tmp_path)
    values = dict(opened.gated(opened.dense.weights))
    rng = np.random.default_rng(0)
    for name, value in values.items():
        if name.endswith("salience_kernel"):  # so that images differ in what they want
            values[name] = jnp.asarray(3.0 * rng.normal(size=value.shape), jnp.float32)
    found = opened.made_static(values)
    (stored,) = opened._recalibration_batches
    model = nnx.clone(found)
    (key,) = jax.random.split(jax.random.key(0), 1)
    recalibrate(model, [training_images(config, key, jnp.asarray(stored))])
    dynamic = opened.recalibrated(opened.dynamic, values)
    expected, made = all_modules(model), all_modules(found)
    norms = [name for name, layer in made.items() if isinstance(layer, nnx.BatchNorm)]
    for name in norms:
        np.testing.assert_allclose(made[name].var[...], expected[name].var[...], rtol=1e-3)
    # Of the gates' own choices they are others, but in front of the first.
    of_gates = set(np.asarray(dynamic[f"{norms[-1]}/var"]).tolist())
    assert not of_gates & set(np.asarray(made[norms[-1]].var[...]).tolist())
