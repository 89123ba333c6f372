import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from dynprune_jax import Plan, compact, make_dynamic, measure, models
from dynprune_jax.pruning.attention import random


class Small(nnx.Module):
    """Convolutions in attributes, in a list and in a Sequential; one product of its own."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.convs = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2)])
        self.tail = nnx.Sequential(nnx.relu, nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs))
        self.mix = nnx.Param(jnp.eye(16))
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = conv(nnx.relu(x))
        return self.head(self.tail(x).mean((1, 2)) @ self.mix[...])


@pytest.fixture
def model():
    return make_dynamic(Small(nnx.Rngs(0)), 0.5, {"convs/*": 0.25})


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def test_totals_by_hand(model, images):
    logits, usage = measure(model, images)
    np.testing.assert_array_equal(logits, model(images))
    dense = {
        "stem": 64 * 27 * 8,
        "convs/0": 64 * 72 * 8,
        "convs/1": 64 * 72 * 8,
        "tail/layers/1": 16 * 72 * 16,
        "head": 160,
    }
    assert {layer.name: layer.dense_macs for layer in usage.layers} == dense
    assert usage.other_macs == 16 * 16  # the product that is no layer
    assert usage.dense_macs == sum(dense.values()) + 256
    kept = dense["stem"] + 2 * dense["convs/0"] * 0.5 * 0.75 + dense["tail/layers/1"] * 0.5 + 416
    np.testing.assert_allclose(usage.macs, [kept] * 4)
    assert usage.mac_reduction == pytest.approx(1 - kept / usage.dense_macs)
    assert usage.executed_macs.shape == (4,)
    assert (usage.executed_macs < usage.dense_executed_macs).all()
    assert usage.gate_operations > 0


def test_nothing_is_left_behind_and_jit_agrees(model, images):
    graph, state = nnx.split(model)
    traces = []

    @jax.jit
    def jitted(state, images):
        traces.append(1)
        return measure(nnx.merge(graph, state), images)

    before = jax.tree.structure(nnx.split(model))
    _, eager = measure(model, images)
    assert jax.tree.structure(nnx.split(model)) == before
    for _ in range(3):
        logits, usage = jitted(state, images)
    assert len(traces) == 1
    np.testing.assert_allclose(logits, model(images), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(usage.executed_macs, eager.executed_macs)
    assert [layer.name for layer in usage.layers] == [layer.name for layer in eager.layers]


def test_what_a_call_writes_is_written_and_nothing_else():
    """In training: statistics, and how often was drawn."""
    made = models.vgg_digits(4, image_size=8, width=0.1, rngs=nnx.Rngs(0))
    model = make_dynamic(made, 0.5, criterion=random)
    model.train()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    called = nnx.clone(model)
    for _ in range(2):  # other draws each time
        expected = called(x)
        logits, _ = nnx.jit(measure)(model, x)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    one, other = (dict(nnx.to_flat_state(nnx.state(m))) for m in (called, model))
    assert one.keys() == other.keys()
    for path, variable in one.items():
        if not jax.dtypes.issubdtype(variable.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(other[path][...], variable[...], rtol=1e-4, atol=1e-4)
    model.eval()
    whole = make_dynamic(made, 0.5)  # a program that holds it writes nothing there
    whole.eval()
    jax.jit(lambda x: measure(whole, x)[0])(x)


@pytest.mark.parametrize("array", [jnp.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1), np.float32)])
def test_a_model_may_hold_arrays_that_are_no_variables(array):
    class Own(nnx.Module):
        def __init__(self):
            self.mean, self.conv = array, nnx.Conv(1, 8, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.conv(x - self.mean)

    _, usage = measure(Own(), jnp.ones((2, 6, 6, 1)))
    assert usage.dense_macs == 6 * 6 * 9 * 8


def test_a_model_that_is_refused_stays_what_it_was():
    class Own(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
            self.conv = nnx.Conv(1, 8, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.conv(self.norm(x)[:1])

    model = Own()
    model.train()
    with pytest.raises(ValueError, match="sees maps of the shape"):
        measure(model, jnp.ones((2, 6, 6, 1)))
    assert model.norm.mean[0] == 0.0


def test_a_plain_model_is_measured_too(images):
    plain = Small(nnx.Rngs(0))
    logits, usage = measure(plain, images)
    np.testing.assert_array_equal(logits, plain(images))
    assert usage.mac_reduction == 0.0
    assert usage.executed_mac_reduction == 0.0
    np.testing.assert_array_equal(usage.macs, [usage.dense_macs] * 4)


def test_a_model_may_return_text_beside_its_answers(model, images):
    class Named(nnx.Module):
        def __init__(self, model):
            self.model = model

        def __call__(self, x):
            return {"logits": self.model(x), "name": "small"}

    answers, usage = measure(Named(model), images)
    logits, expected = measure(model, images)
    np.testing.assert_array_equal(answers["logits"], logits)
    assert answers["name"] == "small"
    assert usage.other_macs == expected.other_macs
    fast = compact(Named(model), images, plan=Plan({}))(images)
    np.testing.assert_allclose(fast["logits"], logits, rtol=1e-4, atol=1e-5)


def test_random_gates_draw_anew_for_each_input(images):
    model = make_dynamic(Small(nnx.Rngs(0)), 0.5, criterion=random)
    _, usage = measure(model, jnp.tile(images[:1], (8, 1, 1, 1)))
    masks = usage.layers[1].masks.channels
    assert masks is not None
    assert len({tuple(row) for row in np.asarray(masks).tolist()}) > 1


def test_a_layer_called_twice_counts_twice(images):
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv(self.conv(x)).mean((1, 2))

    _, usage = measure(Twice(nnx.Rngs(0)), images)
    assert [layer.name for layer in usage.layers] == ["conv", "conv"]
    assert usage.dense_macs == 2 * 64 * 81


def test_rematerialised_blocks_are_measured(images):
    class Remat(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.block = nnx.Conv(8, 8, (3, 3), rngs=rngs)

        def __call__(self, x):
            return nnx.remat(lambda block, x: block(x))(self.block, self.conv(x)).mean((1, 2))

    _, usage = measure(make_dynamic(Remat(nnx.Rngs(0)), 0.5), images)
    assert usage.dense_macs == 64 * 27 * 8 + 64 * 72 * 8
    np.testing.assert_array_equal(usage.macs, [64 * 27 * 8 + 64 * 72 * 4] * 4)


def test_a_model_may_look_at_its_layers_and_take_more_inputs(images):
    class Curious(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])

        def __call__(self, x, scale):
            for layer in self.layers:
                x = nnx.relu(layer(inputs=x)) if isinstance(layer, nnx.Conv) else layer(x)
            return (x * scale).mean((1, 2)), self.layers[0].kernel[...].sum()

    model = Curious(nnx.Rngs(0))
    outputs, usage = measure(model, images, 3.0)
    for output, expected in zip(outputs, model(images, 3.0), strict=True):
        np.testing.assert_array_equal(output, expected)
    assert usage.dense_macs == 64 * 27 * 8 + 64 * 8 * 4
    assert type(model.layers[0]) is nnx.Conv


def test_a_convolution_that_is_not_2d_counts_as_a_product():
    model = nnx.Sequential(
        lambda x: x[:, :, 0],
        nnx.Conv(3, 8, (5,), rngs=nnx.Rngs(0)),
        nnx.Linear(8, 4, rngs=nnx.Rngs(0)),
    )
    _, usage = measure(model, jnp.ones((2, 10, 1, 3)))
    assert [layer.name for layer in usage.layers] == ["layers/2"]
    assert usage.other_macs == 10 * 5 * 3 * 8


def test_what_a_subclass_computes_is_found_in_the_program(images):
    class Bias(nnx.Conv):
        def __call__(self, x):
            return x + self.bias[...].reshape(1, 1, 1, -1)

    class Twice(nnx.Conv):
        def __call__(self, x):
            return super().__call__(x) + super().__call__(x)

    rngs = nnx.Rngs(0)
    _, usage = measure(nnx.Sequential(Bias(3, 3, (3, 3), rngs=rngs)), images)
    assert (usage.layers, usage.dense_macs) == ((), 0)
    _, usage = measure(nnx.Sequential(Twice(3, 8, (3, 3), rngs=rngs)), images)
    assert (usage.layers, usage.dense_macs) == ((), 2 * 64 * 27 * 8)


def test_more_maps_than_images_is_refused(images):
    class Crops(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv(jnp.concatenate([x, x])).mean((1, 2))

    with pytest.raises(ValueError, match="conv sees maps of the shape"):
        measure(Crops(nnx.Rngs(0)), images)


@pytest.mark.parametrize(
    ("factory", "image_size", "classes", "convolutions_only", "millions"),
    [
        ("vgg16", 32, 10, False, 313.2),
        ("resnet56", 32, 10, False, 125.5),
        ("vgg16_imagenet", 224, 100, True, 15_350),
        ("mobilenet_v2", 224, 1000, False, 300.8),
        ("mobilenet_v2_cifar", 32, 10, False, 88.0),  # of our docstring
        ("resnet18", 224, 1000, False, 1_814),
        ("resnet50", 224, 1000, False, 4_089),
    ],
)
def test_the_dense_figures_of_the_literature(
    factory, image_size, classes, convolutions_only, millions
):
    make = getattr(models, factory)
    graph, state = nnx.split(
        nnx.eval_shape(lambda: make(classes, image_size=image_size, rngs=nnx.Rngs(0)))
    )

    def run(state, images):
        model = nnx.merge(graph, state)
        model.eval()
        return measure(model, images)

    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    _, usage = jax.eval_shape(run, state, images)
    layers = [x for x in usage.layers if not (convolutions_only and x.name.startswith("head"))]
    assert sum(layer.dense_macs for layer in layers) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert usage.other_macs == 0


def test_the_products_of_a_gate_are_not_the_networks():
    model = nnx.Sequential(nnx.Conv(256, 8, (1, 1), rngs=nnx.Rngs(0)))
    model = make_dynamic(model, channel_ratio=0.5, column_ratio=0.5)
    _, usage = measure(model, jnp.ones((2, 16, 16, 256)))
    assert usage.dense_macs == 16 * 16 * 256 * 8
    np.testing.assert_array_equal(usage.macs, usage.dense_macs / 4)


class Within(nnx.Module):
    """A convolution that is called as `call` says; the model sows something of its own."""

    def __init__(self, call, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.call = nnx.static(call)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.call(self.conv, x)


def scanned(conv, x):
    axes = (nnx.StateAxes({...: None}), nnx.Carry)
    return nnx.scan(lambda c, x: c(x), length=2, in_axes=axes, out_axes=nnx.Carry)(conv, x)


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_what_nnx_transforms_is_counted(transform):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    plain, within = (
        make_dynamic(Within(call, nnx.Rngs(0)), 0.5, 0.25)
        for call in (lambda conv, x: conv(x), transform(lambda conv, x: conv(x)))
    )
    for one, other in zip(*(measure(m, x)[1].layers for m in (plain, within)), strict=True):
        np.testing.assert_array_equal(one.macs, other.macs)


def again(call):
    return lambda conv, x: call(conv, conv(x))


@pytest.mark.parametrize(
    "call", [scanned, again(scanned), lambda c, x: jax.checkpoint(lambda x: c(x))(x)]
)
def test_counts_that_do_not_leave_the_model_are_told(call):
    model = make_dynamic(Within(call, nnx.Rngs(0)), 0.5)
    with pytest.raises(ValueError, match="conv is called within a transformation"):
        measure(model, jnp.ones((2, 6, 6, 8)))


def test_an_error_of_the_model_s_own_stays_what_it_is(images):
    class Own(nnx.Module):
        def __call__(self, x):
            raise ValueError("no such size")

    with pytest.raises(ValueError, match=r"^no such size$"):
        measure(Own(), images)


def test_stacked_layers_are_told():
    def stacked(conv, x):
        return nnx.scan(lambda c, x: c(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(conv, x)

    model = Within(stacked, nnx.Rngs(0))
    make = nnx.vmap(lambda key: nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(key)))
    model.conv = make(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"conv sees maps of the shape \(3, 2\) .* are stacked"):
        measure(model, jnp.ones((2, 6, 6, 8)))


@pytest.mark.parametrize("make", [lambda model: model, lambda model: make_dynamic(model, 0.5)])
def test_what_nnx_cannot_take_out_is_told(make, monkeypatch):
    """JAX tells of it with pytrees of something else than arrays, which no annotation allows."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def branched(conv, x):
        return nnx.cond(x.sum() > 0, lambda conv, x: conv(x), lambda conv, x: x, conv, x)

    with pytest.raises(ValueError, match=r"a layer is called within a .* nnx\.cond"):
        measure(make(Within(branched, nnx.Rngs(0))), jnp.ones((2, 6, 6, 8)))


def test_a_layer_is_counted_whatever_it_computes_its_products_with():
    def shifted(x, kernel, strides, padding, **_):
        """A depthwise convolution without any product that could be found in the program."""
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [(i, j) for i in range(3) for j in range(3)]
        return sum(
            x[:, i : i + 4, j : j + 4] * kernel[None, i : i + 1, j : j + 1, 0] for i, j in taps
        )

    class Net(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(
                8, 8, (3, 3), feature_group_count=8, conv_general_dilated=shifted, rngs=nnx.Rngs(0)
            )

        def __call__(self, x):
            return jnp.mean(self.conv(x), axis=(1, 2)) @ jnp.ones((8, 5))

    _, usage = measure(Net(), jnp.ones((2, 4, 4, 8)))
    assert usage.other_macs == 8 * 5
    assert usage.dense_macs == 16 * 9 * 8 + 8 * 5


@pytest.mark.parametrize("way", ["clone", "checkpoint", "cond"])
def test_what_a_plain_layer_does_out_of_sight_is_found_in_the_program(way):
    class Net(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
            self.head = nnx.Linear(8, 5, rngs=nnx.Rngs(0))

        def hidden(self, x):
            if way == "clone":
                return nnx.clone(self.conv)(x)
            graph, state = nnx.split(self.conv)

            def call(state, x):
                return nnx.merge(graph, state)(x)

            if way == "checkpoint":
                return jax.checkpoint(call)(state, x)
            return jax.lax.cond(x.sum() > 0, call, lambda state, x: x, state, x)

        def __call__(self, x):
            return self.head(jnp.mean(self.hidden(self.conv(x)), axis=(1, 2)))

    _, usage = measure(Net(), jnp.ones((2, 4, 4, 8)))
    once = 16 * 9 * 8 * 8
    assert [layer.dense_macs for layer in usage.layers] == [once, 8 * 5]
    assert usage.other_macs == once
    assert usage.dense_macs == 2 * once + 8 * 5
