import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import run, small_vgg

from dynprune_jax import make_dynamic
from dynprune_jax.models.links import links
from dynprune_jax.network import Network
from dynprune_jax.optim import learning_rate, sgd
from dynprune_jax.pruning.attention import random
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.layers import path_name
from dynprune_jax.pruning.surgery import predict_channels
from dynprune_jax.train_step import TrainState, train_step


def model():
    return small_vgg(10, rngs=nnx.Rngs(0))


def batch():
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    return images, jnp.arange(8, dtype=jnp.int32)


def test_a_network_binds_back_to_its_model():
    original = make_dynamic(model(), 0.5)
    network = Network(original)
    images, _ = batch()
    original.eval()
    bound = network.bind(network.weights)
    bound.eval()
    logits = run(original, images)
    np.testing.assert_array_equal(run(bound, images), logits)
    ratios = {name: jnp.float32(0.0) for name in network.values(PruneRatio)}
    bound = network.bind(network.weights, ratios)
    bound.eval()
    assert not np.array_equal(run(bound, images), logits)
    assert network.weights.keys() == Network(model()).weights.keys()


def test_draws_repeat_with_their_number_and_only_then():
    network = Network(make_dynamic(model(), 0.5, criterion=random))
    images, _ = batch()

    def logits(draw):
        bound = network.bind(network.weights, draw=draw)
        bound.eval()
        return np.asarray(run(bound, images))

    np.testing.assert_array_equal(logits(3), logits(3))
    assert not np.array_equal(logits(3), logits(4))


def test_two_draws_of_one_call_are_not_the_first_draws_of_the_next():
    conv = nnx.Conv(64, 8, (3, 3), rngs=nnx.Rngs(0))
    network = Network(make_dynamic(conv, 0.5, 0.5, criterion=random))
    x = jnp.ones((1, 8, 8, 64))  # as many columns as channels
    first = network.bind(network.weights, draw=7).masks(x)
    second = network.bind(network.weights, draw=8).masks(x)
    assert not np.array_equal(first.columns.reshape(-1), second.channels.reshape(-1))
    assert not np.array_equal(first.columns.reshape(-1), first.channels.reshape(-1))


@pytest.mark.usefixtures("rounded_alike")
def test_a_step_equals_the_plain_nnx_way():
    optimizer = sgd(lambda step: 0.1, momentum=0.9, weight_decay=1e-2)
    network = Network(make_dynamic(model(), 0.25, 0.25))
    state = TrainState.create(network.weights, network, optimizer)
    ratios = network.values(PruneRatio)
    step = jax.jit(
        functools.partial(
            train_step,
            network=network,
            optimizer=optimizer,
            ratios=lambda step: ratios,
            label_smoothing=0.1,
        )
    )
    for _ in range(2):
        state, metrics = step(state, batch())

    plain = make_dynamic(model(), 0.25, 0.25)

    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    transform = optax.chain(
        optax.add_decayed_weights(1e-2, mask=kernels),
        optax.trace(0.9, nesterov=True),
        optax.scale(-0.1),
    )
    plain_optimizer = nnx.Optimizer(plain, transform, wrt=nnx.Param)
    images, labels = batch()

    def loss_fn(plain):
        targets = 0.9 * jax.nn.one_hot(labels, 10) + 0.1 / 10
        return jnp.mean(-jnp.sum(targets * jax.nn.log_softmax(plain(images)), axis=-1))

    @nnx.jit
    def plain_step(plain, plain_optimizer):
        loss, gradient = nnx.value_and_grad(loss_fn)(plain)
        plain_optimizer.update(plain, gradient)
        return loss

    for _ in range(2):
        loss = plain_step(plain, plain_optimizer)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for kind, values in ((nnx.Param, state.params), (nnx.BatchStat, state.stats)):
        expected = nnx.to_flat_state(nnx.state(plain, kind))
        assert len(list(expected)) == len(values)
        for path, leaf in expected:
            np.testing.assert_allclose(values[path_name(path)], leaf[...], rtol=1e-4, atol=1e-5)


def test_the_whole_ascent_traces_and_compiles_the_step_once():
    traces = []
    network = Network(make_dynamic(model(), 0.5, 0.3))
    optimizer = sgd(lambda step: 0.1, momentum=0.9, weight_decay=0.0)

    def ratios(step):
        traces.append(1)
        return {
            name: jnp.minimum(target, 0.1 * step.astype(jnp.float32))
            for name, target in network.values(PruneRatio).items()
        }

    @jax.jit
    def step(state, batch):
        return train_step(
            state, batch, network=network, optimizer=optimizer, ratios=ratios, label_smoothing=0.0
        )

    state = TrainState.create(network.weights, network, optimizer)
    state, _ = step(state, batch())
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    losses = []
    try:
        for _ in range(7):
            state, metrics = step(state, batch())
            losses.append(metrics["loss"])
        seen = len(compilations)
        jax.jit(lambda x: x + jnp.int32(1234567))(jnp.zeros((), jnp.int32))
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(traces) == 1
    assert seen == 0
    assert compilations  # the listener does hear of a compilation
    assert np.isfinite(np.asarray(losses)).all()


def test_the_learning_rate_rises_and_falls():
    schedule = learning_rate(0.4, warmup_steps=10, total_steps=110)
    rates = [float(np.asarray(schedule(step))) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.2, 0.0], atol=1e-6)
    assert float(np.asarray(learning_rate(0.4, warmup_steps=0, total_steps=9)(0))) == np.float32(
        0.4
    )


def test_only_kernels_decay():
    optimizer = sgd(lambda step: 1.0, momentum=0.0, weight_decay=0.5)
    params = {"a/kernel": jnp.ones(2), "a/bias": jnp.ones(2), "norm/scale": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    updates = jax.tree.map(lambda update: float(update[0]), updates)
    assert updates == {"a/kernel": -0.5, "a/bias": 0.0, "norm/scale": 0.0}


def test_saliences_learn_at_their_own_rate():
    dense = model()
    reads = links(dense)
    params = Network(predict_channels(dense, 0.5, reads)).values(nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, params)

    def steps(**rate):
        optimizer = sgd(lambda step: 0.5, momentum=0.9, weight_decay=1e-2, **rate)
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    plain, slow = steps(), steps(salience_rate=0.1)
    saliences = {name for name in params if name.endswith(("/salience_kernel", "/salience_bias"))}
    assert len(saliences) == 2 * len(reads)
    for name in params:
        factor = 0.1 if name in saliences else 1.0
        np.testing.assert_allclose(slow[name], factor * plain[name], rtol=1e-6)


def test_distillation_is_hintons_loss():
    network, teacher = Network(make_dynamic(model(), 0.25)), model()
    teacher.eval()
    optimizer = sgd(lambda step: 0.1, momentum=0.9, weight_decay=0.0)
    images, labels = batch()

    def loss(**options):
        step = functools.partial(
            train_step,
            network=network,
            optimizer=optimizer,
            ratios=lambda step: {},
            label_smoothing=0.0,
            **options,
        )
        state = TrainState.create(network.weights, network, optimizer)
        return jax.jit(step)(state, (images, labels))

    def softmax(logits):
        powers = np.exp(np.asarray(logits, np.float64))
        return powers / powers.sum(axis=1, keepdims=True)

    student = network.bind(network.weights)
    student.train()
    own, taught = run(student, images), run(teacher, images)
    entropy = -np.mean(np.log(softmax(own)[np.arange(8), labels]))
    p, q = softmax(taught / 3.0), softmax(own / 3.0)
    divergence = np.mean(np.sum(p * np.log(p / q), axis=1))
    _, metrics = loss(teacher=teacher, distillation=0.3, temperature=3.0)
    np.testing.assert_allclose(metrics["loss"], 0.7 * entropy + 0.3 * 9.0 * divergence, rtol=1e-5)
    # Without a weight the teacher changes nothing, and from itself a network learns nothing.
    np.testing.assert_array_equal(loss(teacher=teacher)[1]["loss"], loss()[1]["loss"])
    state, metrics = loss(teacher=lambda images: own, distillation=1.0, temperature=3.0)
    np.testing.assert_allclose(metrics["loss"], 0.0, atol=1e-6)
    for name, value in state.params.items():
        np.testing.assert_allclose(value, network.weights[name], atol=1e-6)


def test_dropout_with_probability_0_trains_the_dense_network():
    images, _ = batch()
    dense, dynamic = model(), make_dynamic(model(), 0.5, 0.5, drop_probability=0.0)
    dense.train()
    dynamic.train()
    np.testing.assert_array_equal(run(dynamic, images), run(dense, images))
    dense.eval()
    dynamic.eval()
    assert not np.array_equal(run(dynamic, images), run(dense, images))


def test_every_step_draws_anew_what_is_dropped_by_chance():
    dynamic = make_dynamic(model(), 0.5, drop_probability=0.5)
    dynamic.train()
    network, optimizer = Network(dynamic), sgd(lambda step: 0.1, momentum=0.9, weight_decay=0.0)
    options = {"ratios": lambda step: {}, "label_smoothing": 0.0}
    step = jax.jit(functools.partial(train_step, network=network, optimizer=optimizer, **options))
    state = TrainState.create(network.weights, network, optimizer)
    first, second, again = (
        float(step(dataclasses.replace(state, step=jnp.int32(n)), batch())[1]["loss"])
        for n in (0, 1, 0)
    )
    assert first == again != second
