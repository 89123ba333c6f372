import copy
import errno
import functools
import gc
import json
import os
import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from networks import fill, mixed_plan, run, trained

import dynprune_jax
from dynprune_jax.convolution import convolve
from dynprune_jax.models.links import links
from dynprune_jax.pruning import native, pallas_conv
from dynprune_jax.pruning import plan as plan_lib
from dynprune_jax.pruning.attention import random
from dynprune_jax.pruning.compact_conv import CompactConv
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.folding import FoldedNorm
from dynprune_jax.pruning.forms import Form, possible
from dynprune_jax.pruning.handover import Handover
from dynprune_jax.pruning.layers import conv_layers
from dynprune_jax.pruning.plan import Plan, kept_plan, measure_plan


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("vgg16", {"channel_ratio": (0.2, 0.2, 0.6, 0.9, 0.9)}),
        ("resnet20", {"channel_ratio": (0.3, 0.3, 0.6), "column_ratio": 0.3}),
    ],
)
def test_a_compact_network_gives_the_answers_of_the_masked_one(name, ratios):
    layers = "*/conv2" if name == "resnet20" else "*"
    model = trained(name)
    dynamic = dynprune_jax.make_dynamic(model, **ratios, layers=layers)
    dynamic.eval()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 32, 32, 3)), jnp.float32)
    fast = dynprune_jax.compact(dynamic, x, plan=mixed_plan(dynamic))
    assert len({layer.form.product for layer in conv_layers_of(fast)}) >= 3
    slow, quick = np.asarray(run(dynamic, x)), np.asarray(run(fast, x))
    assert np.abs(slow).max() > 0.1
    np.testing.assert_array_equal(quick.argmax(1), slow.argmax(1))
    np.testing.assert_allclose(quick, slow, atol=1e-4)


def conv_layers_of(model):
    return [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, CompactConv)]


class Branches(nnx.Module):
    """A normalization that may be folded, and four that may not."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(8, rngs=rngs)  # its convolution's output is read twice
        self.conv3 = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.norm3 = nnx.BatchNorm(8, rngs=rngs)  # called twice
        self.norm4 = nnx.BatchNorm(8, rngs=rngs)  # after a relu
        self.conv5 = nnx.Conv(8, 8, (3, 3), rngs=rngs)  # called twice
        self.norm5 = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        y = self.conv2(x)
        x = y + self.norm2(y)
        x = self.norm3(self.norm3(self.conv3(x)))
        x = self.norm4(nnx.relu(x))
        return self.norm5(self.conv5(x)) + self.conv5(2 * x)


def test_only_a_norm_that_alone_reads_a_convolution_is_folded():
    model = Branches(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, nnx.BatchNorm):
            fill(norm.mean, rng.normal(size=8))
            fill(norm.var, rng.uniform(0.5, 2, size=8))
            fill(norm.scale, rng.normal(size=8))
            fill(norm.bias, rng.normal(size=8))
    before = nnx.state(nnx.clone(model))
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 3)), jnp.float32)
    folded = dynprune_jax.fold_batch_norms(model, x)
    kinds = [type(getattr(folded, f"norm{i}")) for i in range(1, 6)]
    assert [kind is FoldedNorm for kind in kinds] == [True, False, False, False, False]
    assert not model.norm1.use_running_average  # the model is as it was
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    model.eval()
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_norm_of_another_axis_is_not_folded():
    rng = np.random.default_rng(0)
    model = nnx.Sequential(
        nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0)),  # as many channels as rows
        nnx.BatchNorm(6, axis=1, use_running_average=True, rngs=nnx.Rngs(0)),
    )
    fill(model.layers[1].scale, rng.normal(size=6))
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 3)), jnp.float32)
    folded = dynprune_jax.fold_batch_norms(model, x)
    assert type(folded.layers[1]) is nnx.BatchNorm
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_folding_by_hand():
    model = nnx.Sequential(
        nnx.Conv(1, 1, (1, 1), kernel_init=nnx.initializers.constant(3.0), rngs=nnx.Rngs(0)),
        nnx.BatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0)),
    )
    norm = model.layers[1]
    for variable, value in ((norm.mean, 1.0), (norm.var, 4.0), (norm.scale, 5.0), (norm.bias, 7.0)):
        fill(variable, [value])
    fill(model.layers[0].bias, [9.0])
    for eagerly in (False, True):
        with jax.disable_jit(eagerly):
            folded = dynprune_jax.fold_batch_norms(model, jnp.ones((1, 2, 2, 1)))
        np.testing.assert_allclose(folded.layers[0].kernel, 3.0 * 5.0 / 2.0)
        np.testing.assert_allclose(folded.layers[0].bias, 7.0 + (9.0 - 1.0) * 5.0 / 2.0)
    found = folded(jnp.full((1, 2, 2, 1), 2.0))
    np.testing.assert_allclose(found, (6.0 + 9.0 - 1.0) * 2.5 + 7.0)


@pytest.fixture(scope="module")
def small():
    model = trained("vgg_digits", image_size=8, width=0.25)
    dynamic = dynprune_jax.make_dynamic(model, channel_ratio=0.5, column_ratio=0.3)
    dynamic.eval()
    return dynamic, jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)


def test_a_plan_takes_the_fastest_form_and_measures_equal_layers_once(small):
    dynamic, x = small
    known = {}
    calls = []
    plan = measure_plan(
        dynamic, x, repeats=2, known=known, progress=lambda *counts: calls.append(counts)
    )
    assert list(plan.forms) == list(conv_layers(dynamic))
    assert calls == [(i + 1, 7) for i in range(7)]
    assert len(known) == 6  # the last two of the 7 layers are equal
    for name, form in plan.forms.items():
        assert plan.milliseconds[name][form] == min(plan.milliseconds[name].values())
    again = measure_plan(dynamic, x, known=known)
    assert again == plan
    name, equal = list(plan.forms)[-2:]
    plan.milliseconds[name].clear()  # a plan is data, to be changed
    assert plan.milliseconds[equal]
    assert measure_plan(dynamic, x, known=known) == again


def test_a_layer_is_timed_as_several_in_a_row_and_told_as_one(small, monkeypatch):
    gate = dynprune_jax.dynamic_layers(small[0])["blocks/1/layers/1/conv"]
    rows = []

    def second_per_layer(functions, *args, **options):
        rows.extend(function() for function in functions.values())
        return {form: [1.0 * len(rows[-len(functions) + i])] for i, form in enumerate(functions)}

    monkeypatch.setattr(plan_lib, "interleaved", second_per_layer)
    plan = measure_plan(nnx.Sequential(gate), jnp.ones((2, 4, 4, gate.in_features)))
    assert {taken for times in plan.milliseconds.values() for taken in times.values()} == {1e3}
    assert {len(row) for row in rows} == {1, 4}
    for row in rows:  # maps that differ have different answers: none was left out
        assert len({float(y.sum()) for y in row}) == len(row)


def test_the_batch_of_a_plan_is_all_that_is_in_front_of_a_map():
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    shapes = plan_lib._input_shapes(model, jnp.ones((2, 3, 5, 6, 3)))
    assert shapes["layers/0"].shape == (6, 5, 6, 3)


def test_a_kernel_that_fails_on_a_device_is_left_out(small, monkeypatch):
    gate = dynprune_jax.dynamic_layers(small[0])["blocks/1/layers/1/conv"]
    forms = [Form(), Form("pallas", channels=True)]
    monkeypatch.setattr(plan_lib, "candidates", lambda *args, **options: forms)

    def fails(*args, **options):
        raise NotImplementedError("no such GPU")

    monkeypatch.setattr(pallas_conv, "kept_groups_conv", fails)
    with pytest.warns(UserWarning, match="'pallas channels' is left out: no such GPU"):
        plan = measure_plan(nnx.Sequential(gate), jnp.ones((2, 4, 4, gate.in_features)), repeats=1)
    assert list(plan.forms.values()) == [Form()]


def test_a_plan_is_kept_read_and_changed(small, tmp_path):
    dynamic, x = small
    name = "blocks/1/layers/1/conv"
    times = {Form(): 2.5, Form("rows", images=2): 1.5}
    plan = Plan({name: Form("rows", images=2)}, {name: times}, {"jax": "1"})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    stored = json.loads((tmp_path / "plan.json").read_text())["layers"][name]["milliseconds"]
    assert [entry["milliseconds"] for entry in stored] == [1.5, 2.5]
    fast = dynprune_jax.compact(dynamic, x, plan=tmp_path / "plan.json")
    (layer,) = conv_layers_of(fast)
    assert layer.form == Form("rows", images=2)
    plan.forms[name] = Form("taps", channels=True, columns=True)
    fast = dynprune_jax.compact(dynamic, x, plan=plan)
    np.testing.assert_allclose(run(fast, x), run(dynamic, x), atol=1e-5)


def test_a_plan_for_something_else_is_told(small, tmp_path):
    dynamic, x = small
    path = tmp_path / "plan.json"
    plan = Plan({}, measured_on=plan_lib.circumstances(dynamic, x))
    plan.save(path)
    dynprune_jax.compact(dynamic, x, plan=path)  # a warning would be an error
    with pytest.warns(UserWarning, match=r"measured for other images \(3x8x8x1 float32, here 4x8"):
        dynprune_jax.compact(dynamic, jnp.ones((4, *x.shape[1:])), plan=path)
    changed = nnx.clone(dynamic)
    dynprune_jax.set_ratios(changed, 0.125)
    with pytest.warns(UserWarning, match=r"for other ratios \(.*here channel_ratio 0.125, column"):
        dynprune_jax.compact(changed, x, plan=path)
    model = trained("vgg_digits", image_size=8, width=0.25)
    one, elsewhere, none_there = (
        dynprune_jax.make_dynamic(model, ratios)
        for ratios in ((0.25, 0.5, 0.5), (0.5, 0.25, 0.25), {"blocks/1/*": 0.5})
    )
    Plan({}, measured_on=plan_lib.circumstances(one, x)).save(path)
    dynprune_jax.compact(one, x, plan=path)
    with pytest.warns(UserWarning, match=r"for other layers \(7 of [0-9,]* weights, "):
        dynprune_jax.compact(elsewhere, x, plan=path)
    Plan({}, measured_on=plan_lib.circumstances(none_there, x)).save(path)
    with pytest.warns(UserWarning, match="for other layers"):
        dynprune_jax.compact(dynprune_jax.make_dynamic(model, {"blocks/2/*": 0.5}), x, plan=path)
    wider = trained("vgg_digits", image_size=8, width=0.5)
    Plan({}, measured_on=plan_lib.circumstances(wider, x)).save(path)
    with pytest.warns(UserWarning, match="for other layers"):
        dynprune_jax.compact(model, x, plan=path)
    here = plan_lib.circumstances(dynamic, x)
    Plan({}, measured_on=here | {"jax": "0", "native": "it failed"}).save(path)
    with pytest.warns(UserWarning, match=r"for other native \(it failed, here "):
        dynprune_jax.compact(dynamic, x, plan=path)
    Plan({}, measured_on=here | {"processor": "another, 8 cores"}).save(path)
    with pytest.warns(
        UserWarning, match=r"for other processor \(another, 8 cores, here .* cores\)"
    ):
        dynprune_jax.compact(dynamic, x, plan=path)
    del here["processor"]  # as older plans
    Plan({}, measured_on=here).save(path)
    dynprune_jax.compact(dynamic, x, plan=path)
    Plan({}).save(path)  # as one that was made by hand
    dynprune_jax.compact(dynamic, x, plan=path)


def test_a_processor_is_known_by_its_name_and_model(tmp_path, monkeypatch):
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(plan_lib, "Path", lambda _: told)
    assert plan_lib.processor() == "cpu"
    core = (
        "processor\t: {}\nmodel name\t: AMD EPYC: a\n\nflags\t:\ncpu family\t: 26\nmodel\t\t: 2\n"
    )
    told.write_text(core.format(0) + core.format(1))
    assert plan_lib.processor() == "AMD EPYC: a (family 26, model 2)"
    told.write_text("processor\t: 0\nCPU part\t: 0xd40\n")  # as Arm's
    assert plan_lib.processor() == "cpu"
    told.write_text(core)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="a GPU")])
    assert plan_lib.processor() == "a GPU"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    assert plan_lib.available_cores() == 3


def test_networks_that_are_gone_leave_no_weights_behind():
    """Whatever was watched: Flax keeps each class of layers that it has seen."""
    x = jnp.ones((1, 8, 8, 1))

    def work():
        model = trained("vgg_digits", image_size=8, width=0.25)
        dynprune_jax.find_links(model, x)
        dynamic = dynprune_jax.make_dynamic(model, 0.5)
        dynamic.eval()
        plan_lib._input_shapes(dynamic, x)
        dynprune_jax.measure(dynamic, x)
        dynprune_jax.compact(dynamic, x, plan=mixed_plan(dynamic))

    def held():
        jax.clear_caches()
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    work()
    before = held()
    work()
    assert held() == before


def test_a_compact_network_takes_other_batches_and_shows_no_ratios(small):
    dynamic, x = small
    fast = dynprune_jax.compact(dynamic, x, plan=mixed_plan(dynamic))
    more = jnp.concatenate([x, -x, x[:1]])
    np.testing.assert_allclose(run(fast, more), run(dynamic, more), atol=1e-5)
    with pytest.raises(ValueError, match="this model is compact"):
        dynprune_jax.measure(fast, x)


class Called(nnx.Module):
    """Called in an unusual way: with what is no array, and maps by their names."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x, double=False, how="norm", dtype=jnp.float32):
        x = self.conv(inputs=x)
        x = self.norm(use_running_average=None, x=x) if how == "norm" else x
        return 2 * x.astype(dtype) if double else x


def test_a_model_may_be_called_with_more_than_arrays_and_by_names():
    model = dynprune_jax.make_dynamic(Called(nnx.Rngs(0)), 0.5)
    model.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 8)), jnp.float32)
    for others in ((True, "norm", jnp.float32), (False, "none")):
        logits, usage = dynprune_jax.measure(model, x, *others)
        assert usage.mac_reduction == 0.5
        fast = dynprune_jax.compact(model, x, *others, plan=mixed_plan(model))
        np.testing.assert_allclose(logits, model(x, *others), atol=1e-6)
        np.testing.assert_allclose(fast(x, *others), logits, atol=1e-5)
    plan = measure_plan(model, x, True, "norm", repeats=1)
    assert list(plan.forms) == ["conv"]


def test_gates_that_draw_are_measured_and_draw_no_number():
    model = nnx.Sequential(nnx.Conv(8, 8, (1, 1), rngs=nnx.Rngs(0)))
    dynamic = dynprune_jax.make_dynamic(model, 0.5, criterion=random)
    before = jax.tree.map(jnp.copy, nnx.state(dynamic, nnx.RngState))
    assert len(measure_plan(dynamic, jnp.ones((2, 4, 4, 8)), repeats=1).forms) == 1
    after = nnx.state(dynamic, nnx.RngState)
    for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert one == other


@pytest.mark.parametrize("ratios", [(None, 0.5), (0.0, 0.5), (0.25, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("form", [Form(), Form("taps", columns=True)])
def test_an_axis_that_keeps_all_draws_its_numbers_too(ratios, form):
    """Or the axis behind it would get them, and choose otherwise than in masked execution."""
    model = nnx.Sequential(nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)))
    dynamic = dynprune_jax.make_dynamic(model, *ratios, criterion=random, rngs=nnx.Rngs(3))
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 8))
    fast = dynprune_jax.compact(dynamic, x, plan=Plan({"layers/0": form}))
    np.testing.assert_allclose(nnx.clone(fast)(x), nnx.clone(dynamic)(x), atol=1e-5)


def test_outputs_behind_columns_that_are_all_kept_draw_their_own_numbers():
    model = trained("small_vgg", image_size=8, in_channels=1, width=0.25)
    dynamic = dynprune_jax.predict_channels(model, 0.5, links(model), 0.0, criterion=random)
    dynamic.eval()
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    fast = dynprune_jax.compact(dynamic, x, plan=mixed_plan(dynamic))
    np.testing.assert_allclose(nnx.clone(fast)(x), nnx.clone(dynamic)(x), rtol=1e-4, atol=1e-5)


def test_padding_that_crops_has_one_form():
    conv = nnx.Conv(5, 8, (3, 3), padding=((-1, 0), (2, 0)), rngs=nnx.Rngs(0))
    model = dynprune_jax.make_dynamic(nnx.Sequential(conv), 0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 5)), jnp.float32)
    fast = dynprune_jax.compact(model, x)
    assert [layer.form for layer in conv_layers_of(fast)] == [Form()]
    np.testing.assert_allclose(fast(x), model(x), atol=1e-6)


def test_a_plan_that_is_measured_is_kept_in_its_file(tmp_path, monkeypatch):
    model, x = nnx.Sequential(nnx.Conv(1, 2, (1, 1), rngs=nnx.Rngs(0))), jnp.ones((1, 2, 2, 1))
    monkeypatch.setattr(plan_lib, "candidates", lambda *_, **__: [Form("patches")])
    seen = []
    found = kept_plan(tmp_path / "plan.json", model, x, progress=lambda *of: seen.append(of))
    assert found.forms == {"layers/0": Form("patches")}
    assert seen == [(1, 1)]
    monkeypatch.setattr(plan_lib, "measure_plan", None)  # it is not measured again
    assert kept_plan(tmp_path / "plan.json", model, x) == found


def test_mistakes_in_plans_are_told(small, tmp_path):
    dynamic, x = small
    with pytest.raises(ValueError, match="names 'nowhere', which is none of the model's 7"):
        dynprune_jax.compact(dynamic, x, plan=Plan({"nowhere": Form()}))
    dense = trained("vgg_digits", image_size=8, width=0.25)
    for form in (Form("taps", columns=True), Form("faster"), Form("rows", images=-1)):
        with pytest.raises(ValueError, match=f"conv: the form '{form}' cannot execute"):
            dynprune_jax.compact(dense, x, plan=Plan({"blocks/1/layers/1/conv": form}))
    forms = ('{"speed": 1}', '{"images": "2"}', '{"channels": 1}')
    layers = [f'{{"layers": {{"a": {{"form": {form}}}}}}}' for form in forms]
    for content in ("{", "[]", *layers, json.dumps({})):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(ValueError, match="is not a plan"):
            dynprune_jax.compact(dynamic, x, plan=tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan is .*, which is a folder; give a file in it"):
        dynprune_jax.compact(dynamic, x, plan=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to keep the plan in"):
        dynprune_jax.compact(dynamic, x, plan=tmp_path / "nowhere" / "plan.json")


def test_a_plan_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    plan, path = Plan({"layers/0": Form("rows")}), tmp_path / "plan.json"
    plan.save(path)

    def half(path, text, **_):
        with open(path, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(OSError, match="No space left on device"):
        Plan({"layers/0": Form("patches")}).save(path)
    assert Plan.load(path).forms == plan.forms
    assert [*tmp_path.iterdir()] == [path]
    monkeypatch.undo()
    link = tmp_path / "link.json"
    link.symlink_to(path)
    Plan({"layers/0": Form("patches")}).save(link)
    assert link.is_symlink()
    assert Plan.load(path).forms == {"layers/0": Form("patches")}


def signed(maps, kernel, *args, **kwargs):
    """A convolution with the signs of its kernel, as one that is quantised."""
    return jax.lax.conv_general_dilated(maps, jnp.sign(kernel), *args, **kwargs)


def standardised(arrays, **options):
    """What `nnx.Conv` promotes, its kernel with a mean of 0 and a deviation of 1."""
    x, kernel, *rest = promote_dtype(arrays, **options)
    axes = (0, 1, 2)
    kernel = (kernel - kernel.mean(axes, keepdims=True)) / kernel.std(axes, keepdims=True)
    return x, kernel, *rest


@pytest.mark.parametrize(
    "conv",
    [
        lambda rngs: nnx.Conv(8, 8, (3, 3), padding=[1, (2, 0)], rngs=rngs),
        lambda rngs: nnx.Conv(8, 8, (3, 3), promote_dtype=standardised, rngs=rngs),
        lambda rngs: nnx.Conv(8, 8, (3, 3), conv_general_dilated=signed, rngs=rngs),
        lambda rngs: nnx.WeightNorm(nnx.Conv(8, 8, (3, 3), rngs=rngs), rngs=rngs),
    ],
    ids=[
        "padding in a list",
        "a kernel of its own",
        "a function of its own",
        "a kernel that a module around it rewrites",
    ],
)
def test_unusual_convolutions_answer_as_before(conv):
    model = nnx.Sequential(conv(nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    fill(model.layers[1].var, rng.uniform(0.2, 3.0, size=8))
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 8)), jnp.float32)
    for network in (model, dynprune_jax.make_dynamic(model, 0.5, 0.25)):
        network.eval()
        expected = network(x)
        for plan in (None, Plan({})):  # measured; every convolution as it is
            fast = dynprune_jax.compact(network, x, plan=plan)
            np.testing.assert_allclose(fast(x), expected, atol=2e-5)


def test_a_plan_that_no_longer_fits_names_its_file(tmp_path):
    model = nnx.Sequential(nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)))
    Plan({"layers/0": Form("rows", channels=True)}).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"layers/0: the form .* delete .*plan\.json\)"):
        dynprune_jax.compact(model, jnp.ones((1, 6, 6, 8)), plan=tmp_path / "plan.json")


class Conv(nnx.Module):
    """One convolution and its norm, with statistics that are not those it starts with."""

    def __init__(self):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=nnx.Rngs(0))
        self.seen = nnx.Cache(jnp.zeros((2, 6, 6, 8)))
        fill(self.norm.var, np.full(8, 4.0))

    def __call__(self, x):
        return self.norm(self.conv(x))


class Penalized(Conv):
    def __call__(self, x):
        return super().__call__(x), jnp.sum(self.conv.kernel[...] ** 2)


class Returned(Conv):
    def __call__(self, x):
        return super().__call__(x), self.conv.kernel[...]


class Normalized(Conv):
    """Its kernel is the map of another norm too."""

    def __init__(self):
        super().__init__()
        self.other = nnx.BatchNorm(8, use_running_average=True, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return super().__call__(x), self.other(self.conv.kernel[...])


class Slimmed(Conv):
    def __call__(self, x):
        return super().__call__(x), jnp.sum(jnp.abs(self.norm.scale[...]))


class Watched(Conv):
    def __call__(self, x):
        return super().__call__(x), jnp.sum(self.norm.mean[...])


class Tied(Conv):
    def __call__(self, x):
        y = nnx.remat(Conv.__call__)(self, x)
        return nnx.jit(lambda model, y: y @ model.conv.kernel[...][0, 0].T)(self, y)


class Cloned(Conv):
    """A clone has variables of its own, which hold the same arrays."""

    def __init__(self):
        super().__init__()
        self.other = nnx.clone(self.conv)

    def __call__(self, x):
        return super().__call__(x) + self.other(x), jnp.sum(self.conv.kernel[...] ** 2)


class Scanned(Conv):
    """The kernel goes through a loop, and what is done with it there is anyone's guess."""

    def __call__(self, x):
        kernel = self.conv.kernel[...]

        def step(total, _):
            return total + kernel.sum(), None

        return super().__call__(x) + jax.lax.scan(step, 0.0, None, length=2)[0]


class Stacked(Conv):
    """A loop stacks the kernel, and the model keeps the stack."""

    def __init__(self):
        super().__init__()
        self.stack = nnx.Cache(jnp.zeros((2, 3, 3, 8, 8)))

    def __call__(self, x):
        kernel = self.conv.kernel[...]
        _, self.stack[...] = jax.lax.scan(lambda *_: (None, kernel), None, None, length=2)
        return super().__call__(x)


class Rotated(Conv):
    """The second turn of a loop reads the kernel where the first had something else."""

    def __call__(self, x):
        def step(carry, _):
            first, kernel, total = carry
            return (kernel, kernel, total + jnp.sum(first**2)), None

        kernel = self.conv.kernel[...]
        (_, _, total), _ = jax.lax.scan(step, (jnp.zeros_like(kernel), kernel, 0.0), None, length=2)
        return super().__call__(x) + total


class Carried(Conv):
    """The same, of a kernel that is no part of what is carried at first."""

    def __call__(self, x):
        kernel = self.conv.kernel[...]

        def step(carry, _):
            return (kernel, carry[1] + jnp.sum(carry[0] ** 2)), None

        (_, total), _ = jax.lax.scan(step, (jnp.zeros_like(kernel), 0.0), None, length=2)
        return super().__call__(x) + total


class Repeated(Conv):
    """The condition of a loop of unknown length gets other values than its body."""

    def __call__(self, x):
        once = 1 + jnp.argmax(x.ravel()[:1])
        return jax.lax.fori_loop(0, once, lambda _, x: super(Repeated, self).__call__(x), x)


@pytest.mark.parametrize(
    "kind",
    [Penalized, Returned, Normalized, Tied, Cloned, Scanned, Stacked, Rotated, Carried, Repeated],
)
def test_a_convolution_whose_kernel_is_read_elsewhere_stays_as_it_is(kind):
    model, x = kind(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)), jnp.float32)
    assert type(dynprune_jax.fold_batch_norms(model, x).norm) is nnx.BatchNorm
    fast = dynprune_jax.compact(model, x, plan=Plan({"conv": Form("patches")}))
    assert type(fast.conv) is nnx.Conv
    jax.tree.map(np.testing.assert_array_equal, fast(x), model(x))


@pytest.mark.parametrize("kind", [Slimmed, Watched])
def test_a_norm_that_is_read_elsewhere_is_not_folded(kind):
    model, x = kind(), jnp.ones((2, 6, 6, 8))
    fast = dynprune_jax.compact(model, x, plan=Plan({"conv": Form("patches")}))
    assert type(fast.norm) is nnx.BatchNorm
    assert isinstance(fast.conv, CompactConv)
    for got, expected in zip(fast(x), model(x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "given", [{"use_running_average": True}, {"use_running_average": None}, {"mask": None}]
)
def test_a_norm_that_is_told_to_take_what_is_stored_is_folded(given):
    class Told(Conv):
        def __call__(self, x):
            return self.norm(self.conv(x), **given)

    model, x = Told(), jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    folded = dynprune_jax.fold_batch_norms(model, x)
    assert isinstance(folded.norm, FoldedNorm)
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-4, atol=1e-5)


def doubled(arrays, **options):
    x, *rest = promote_dtype(arrays, **options)
    return 2.0 * x, *rest


def test_a_norm_that_promotes_by_a_function_of_its_own_is_not_folded():
    model, x = Conv(), jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    model.norm.promote_dtype = doubled
    folded = dynprune_jax.fold_batch_norms(model, x)
    assert type(folded.norm) is nnx.BatchNorm
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_folded_norm_has_no_statistics_of_a_batch():
    class Told(Conv):
        def __call__(self, x, train):
            return self.norm(self.conv(x), use_running_average=not train)

    x = jnp.ones((2, 6, 6, 8))
    folded = dynprune_jax.fold_batch_norms(Told(), x, False)
    assert folded(x, False).shape == x.shape
    with pytest.raises(ValueError, match="is folded, with its stored statistics: for those of"):
        folded(x, True)
    plain = dynprune_jax.fold_batch_norms(Conv(), x)
    before = plain(x)
    plain.train()
    with pytest.raises(ValueError, match="is folded, with its stored statistics: for those of"):
        plain(x)
    plain.eval()
    np.testing.assert_array_equal(plain(x), before)


@pytest.mark.parametrize(
    "given", [{"use_running_average": False}, {"mask": jnp.ones((2, 6, 6, 8))}]
)
def test_a_norm_that_is_told_to_take_the_batch_is_not_folded(given):
    class Told(Conv):
        def __call__(self, x):
            return self.norm(self.conv(x), **given)

    folded = dynprune_jax.fold_batch_norms(Told(), jnp.ones((2, 6, 6, 8)))
    assert type(folded.norm) is nnx.BatchNorm


def test_a_transformation_that_hands_a_kernel_on_does_not_read_it():
    class Within(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([Conv() for _ in range(4)])

        def __call__(self, x):
            one, two, three, four = self.parts
            x = nnx.remat(Conv.__call__)(one, x)
            x = nnx.jit(Conv.__call__)(two, x)
            x = jax.lax.cond(x.sum() > 0, lambda x: three(x), lambda x: x + 0, x)
            return jax.lax.fori_loop(0, 2, lambda _, x: four(x), x)

    model, x = Within(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)))
    x = x.astype(jnp.float32)
    plan = Plan({f"parts/{i}/conv": Form("patches") for i in range(4)})
    fast = dynprune_jax.compact(model, x, plan=plan)
    for part in fast.parts:
        assert isinstance(part.norm, FoldedNorm)
        assert isinstance(part.conv, CompactConv)
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_convolutions_that_share_a_kernel_are_folded_apart():
    class Shared(Conv):
        def __init__(self):
            super().__init__()
            self.other = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(1))
            self.other.kernel = self.conv.kernel

        def __call__(self, x):
            return super().__call__(x) + self.other(x)

    model, x = Shared(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)))
    x = x.astype(jnp.float32)
    fast = dynprune_jax.compact(model, x, plan=Plan({"conv": Form("patches")}))
    assert isinstance(fast.norm, FoldedNorm)
    assert isinstance(fast.conv, CompactConv)
    np.testing.assert_allclose(run(fast, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_map_that_the_model_writes_is_left_as_it_was():
    class Writing(Conv):
        def __call__(self, x):
            y = self.conv(x)
            self.seen[...] = y
            return self.norm(y)

    model, x = Writing(), jnp.ones((2, 6, 6, 8))
    fast = dynprune_jax.compact(model, x, plan=Plan({}))
    np.testing.assert_allclose(fast(x), model(x), atol=1e-6)
    np.testing.assert_allclose(fast.seen, model.seen, atol=1e-6)


def test_a_model_that_looks_at_its_layers_finds_a_folded_norm():
    class Looking(nnx.Module):
        def __init__(self):
            inner = Conv()
            self.layers = nnx.List([inner.conv, inner.norm])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
                if isinstance(layer, nnx.BatchNorm) and layer.use_running_average:
                    x = nnx.relu(x)
            return x

    model, x = Looking(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)))
    x = x.astype(jnp.float32)
    fast = dynprune_jax.compact(model, x, plan=Plan({}))
    assert isinstance(fast.layers[1], FoldedNorm)
    assert not jax.tree.leaves(nnx.state(fast.layers[1]))
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_that_looks_at_shapes_and_dtypes_finds_them():
    class Equalized(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(8, 40, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(40, rngs=rngs)

        def __call__(self, x):
            kernel, n = self.conv.kernel, self.norm.mean.shape[0]
            x = x.astype(kernel[...].dtype).astype(kernel.get_value().dtype)
            fan_in = np.sqrt(np.prod(kernel.shape[:-1]))
            y = self.norm(self.conv(x)).astype(kernel.dtype) / fan_in
            return y.reshape(len(x), -1, n) + jnp.zeros((), self.norm.scale[...].dtype)

    model = dynprune_jax.make_dynamic(Equalized(nnx.Rngs(0)), 0.5)
    model.eval()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 8))
    for form in possible(model.conv, channels=True, columns=False, features=False):
        if form.product != "pallas" and not (form.compiled and native.why_not()):
            fast = dynprune_jax.compact(model, x, plan=Plan({"conv": form}))
            assert isinstance(fast.norm, FoldedNorm)
            np.testing.assert_allclose(run(fast, x), run(model, x), atol=1e-5)
    with pytest.raises(TypeError, match="part of a parameter that is not there any more"):
        _ = fast.norm.scale[0]


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_folded_norm_returns_the_dtype_of_the_norm(param_dtype):
    norm = nnx.BatchNorm(8, param_dtype=param_dtype, use_running_average=True, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):
        x = jnp.ones((1, 2, 2, 8), jnp.bfloat16)
        folded = FoldedNorm(norm)(x)
        assert folded.dtype == norm(x).dtype == jnp.float32


def test_folding_keeps_the_precision_of_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model = nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        )
        model.layers[1].var[...] = jnp.asarray([0.3, 0.7, 1.1, 2.3], model.layers[1].var.dtype)
        model.eval()
        x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3), jnp.float64)
        fast = dynprune_jax.compact(model, x, plan=Plan({}))
        np.testing.assert_allclose(fast(x), model(x), rtol=1e-12, atol=1e-14)


def test_images_may_come_in_a_pytree():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)

        def __call__(self, views):
            return {"logits": self.conv(views["left"]) + self.conv(views["right"])}

    model = Pair(nnx.Rngs(0))
    key = jax.random.key(0)
    views = {name: jax.random.normal(key, (2, 6, 6, 3)) for name in ("left", "right")}
    fast = dynprune_jax.compact(model, views)
    logits, usage = dynprune_jax.measure(model, views)
    for answer in (fast(views), logits):
        np.testing.assert_allclose(answer["logits"], model(views)["logits"], atol=1e-5)
    assert usage.dense_macs == 2 * 36 * 27 * 8
    with pytest.raises(ValueError, match="images is a dict that holds no array"):
        dynprune_jax.measure(model, {})


@pytest.mark.parametrize("name", ["measure", "compact", "export_model", "find_links"])
def test_a_shape_alone_is_no_batch(name):
    model = trained("small_vgg")
    with pytest.raises(ValueError, match="images is a tuple that holds no array; give a batch"):
        getattr(dynprune_jax, name)(model, (1, 8, 8, 1))


def test_a_map_smaller_than_its_kernel_gives_an_empty_one():
    conv = nnx.Conv(8, 8, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    model = dynprune_jax.make_dynamic(nnx.Sequential(conv), 0.5)
    x = jnp.ones((2, 2, 5, 8))
    fast = dynprune_jax.compact(model, x)
    assert fast(x).shape == model(x).shape == (2, 0, 3, 8)


def test_a_model_can_be_copied_after_it_was_made_compact():
    model = trained("vgg_digits", image_size=8, width=0.25)
    names = links(model)
    model = dynprune_jax.predict_channels(model, 0.5, names)
    model.eval()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    fast = dynprune_jax.compact(model, x, plan=mixed_plan(model))
    expected = run(model, x)
    for network in (model, fast):
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            np.testing.assert_allclose(run(copied, x), expected, atol=1e-5)


def test_no_images_are_answered_and_not_measured(small):
    dynamic, images = small
    none = images[:0]
    assert dynprune_jax.compact(dynamic, images, plan=Plan({}))(none).shape == (0, 10)
    dense = trained("vgg_digits", image_size=8, width=0.25)
    for function, model in (
        (dynprune_jax.compact, dynamic),
        (functools.partial(dynprune_jax.compact, plan=Plan({})), dynamic),
        (dynprune_jax.measure, dynamic),
        (dynprune_jax.measure_plan, dynamic),
        (dynprune_jax.export_model, dynamic),
        (dynprune_jax.find_links, dense),
    ):
        with pytest.raises(ValueError, match=r"images has the shape \(0, 8, 8, 1\); give a"):
            function(model, none)


def test_a_map_that_the_model_sows_is_left_as_it_was():
    class Sowing(Conv):
        def __call__(self, x):
            x = self.conv(x)
            self.sow(nnx.Intermediate, "map", x)
            return self.norm(x)

    model, x = Sowing(), jnp.ones((2, 6, 6, 8))
    fast = dynprune_jax.compact(model, x, plan=Plan({}))
    run = nnx.capture(lambda model, x: model(x), nnx.Intermediate)
    for one, other in zip(*(jax.tree.leaves(run(m, x)) for m in (model, fast)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_compact_layer_drops_nothing_by_chance(monkeypatch):
    """In training mode neither, where XLA chooses among many columns."""
    monkeypatch.setattr(native, "why_not", lambda: "there is no compiler")
    rngs = nnx.Rngs(0)
    gate = DynamicConv(
        nnx.Conv(8, 4, (3, 3), rngs=rngs), column_ratio=0.5, drop_probability=0.5, rngs=rngs
    )
    layer = CompactConv(gate, Form("taps", columns=True))
    x = jax.random.normal(jax.random.key(0), (64, 16, 16, 8))
    layer.train()
    np.testing.assert_array_equal(layer.masks(x).columns, gate.masks(x).columns)


@pytest.mark.parametrize(("dtype", "wide"), [("float32", False), ("float64", True)])
def test_a_plan_measures_our_own_kernels_for_what_they_compute_in(dtype, wide, monkeypatch):
    asked = []

    def candidates(*_, wide, **__):
        asked.append(wide)
        return [Form()]

    monkeypatch.setattr(plan_lib, "candidates", candidates)
    with jax.enable_x64(wide):
        conv = nnx.Conv(8, 4, (3, 3), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        measure_plan(nnx.Sequential(conv), jnp.ones((1, 4, 4, 8), dtype), repeats=1)
    assert asked == [wide]


def test_a_form_is_judged_by_its_best_turn(monkeypatch):
    """What else runs on the machine only ever adds to a turn."""

    def turns(functions, *args, **options):
        return {form: [1.0, 9.0] if form == Form() else [2.0, 3.0] for form in functions}

    monkeypatch.setattr(plan_lib, "interleaved", turns)
    plan = measure_plan(
        nnx.Sequential(nnx.Conv(64, 4, (3, 3), rngs=nnx.Rngs(0))), jnp.ones((64, 32, 32, 64))
    )
    assert plan.forms == {"layers/0": Form()}
    assert plan.fastest == {"layers/0": 1e3}


def test_layers_that_differ_are_measured_apart():
    """Each of one of these things alone: the time of the one would be told of the other."""
    x = jax.ShapeDtypeStruct((1, 8, 8, 8), jnp.float32)
    options = [{}, {"strides": 2}, {"padding": "VALID"}, {"kernel_dilation": 2}]
    options += [{"input_dilation": 2}, {"feature_group_count": 2}, {"precision": "highest"}]
    options += [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}]
    options += [{"conv_general_dilated": convolve}]
    convs = [nnx.Conv(8, 8, (3, 3), **given, rngs=nnx.Rngs(0)) for given in options]
    gates = [{}, {"channel_ratio": 0.5}, {"column_ratio": 0.5}]
    gates += [{"channel_ratio": 0.5, "channel_group": 2}, {"column_ratio": 0.5, "column_patch": 2}]
    gates += [{"column_ratio": 0.5, "columns_of": Handover()}, {"feature_ratio": 0.5}]
    convs += [
        DynamicConv(convs[0], **{"channel_ratio": 0.25, **given}, rngs=nnx.Rngs(0))
        for given in gates
    ]
    cases = {plan_lib._case(conv, x) for conv in convs}
    assert len(cases) == len(convs)
    # Older plans do not tell of our own convolution.
    plain, ours = convs[0], convs[len(options) - 1]
    told = [plan_lib.circumstances(nnx.Sequential(conv), x)["layers"] for conv in (plain, ours)]
    assert told[0] == told[1]
