"""What devices that share a batch say to each other in a step of training."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dynprune_jax
from dynprune_jax import models
from dynprune_jax.feed import Feed
from dynprune_jax.run import Run
from dynprune_jax.sharding import data_mesh, local_rows, place_batch, replicate
from dynprune_jax.train_step import TrainState

SCALING = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def collectives(program):
    """Kind and shapes of each collective in the text of a compiled program."""
    found = re.findall(rf" = (\(.*?\)|\S+) ({KINDS})(?:-start)?\(", program)
    return [(kind, re.findall(r"(\w+)\[([\d,]*)\]", shapes)) for shapes, kind in found]


def numbers(network):
    """The parameters of a network, and the channels of all its batch norms."""
    of_params = sum(math.prod(value.shape) for value in network.values(nnx.Param).values())
    of_stats = sum(math.prod(value.shape) for value in network.values(nnx.BatchStat).values())
    return of_params, of_stats // 2  # a mean and a variance


@pytest.mark.parametrize("way", ["memory", "stream"])
def test_a_step_sends_gradients_statistics_and_metrics_and_nothing_else(config, tmp_path, way):
    config.gate.drop_probability = 0.8
    config.data.flip = True
    if way == "memory":
        config.data.crop_padding = 2
    else:
        config.data.memory_limit_mb = 0
        config.data.resized_crop = True
        config.gate.criterion = "random"
    run = Run.open(config, tmp_path)
    with Feed(run, "prune", run.dynamic) as feed:
        state = TrainState.create(run.dense.weights, run.dynamic, run.optimizer("prune"))
        state = feed.place(state)
        if way == "memory":
            lowered = feed._step.lower(state, feed._data, feed._given, count=1)
        else:
            batch = feed.next_batch()
            lowered = feed._step.lower(state, batch["image"], batch["label"], feed._given)
    program = lowered.compile().as_text()
    assert "opt-barrier" in program  # the compiler options of convolution.py reach the step
    found = collectives(program)
    assert {kind for kind, _ in found} == {"all-reduce"}
    sent = [(dtype, shape) for _, shapes in found for dtype, shape in shapes]
    assert {dtype for dtype, _ in sent} == {"f32"}  # no flag of a loop, no index
    total = sum(math.prod(int(n) for n in shape.split(",") if n) for _, shape in sent)
    params, channels = numbers(run.dynamic)
    # Of the two sums a channel on a batch norm's way back, one is its bias's gradient.
    assert total == params + 3 * channels + 2
    # No message inside a loop: each is there once a step.
    loops = re.findall(r"(?:body|condition)=%?([\w.-]+)", program)
    for name in loops:
        body = program.split(f"%{name} ", 1)[1].split("\n}", 1)[0]
        assert not collectives(body)


def test_the_page_on_scaling_counts_what_the_networks_have():
    for label, model, classes, side in (
        ("VGG16, 32²", "vgg16", 10, 32),
        ("ResNet-56, 32²", "resnet56", 10, 32),
        ("ResNet-50, 224²", "resnet50", 1000, 224),
    ):
        make = getattr(models, model)
        built = nnx.eval_shape(
            lambda make=make, classes=classes, side=side: make(
                classes, image_size=side, rngs=nnx.Rngs(0)
            )
        )
        state = nnx.state(built)
        params = sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param)))
        stats = sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.BatchStat)))
        sent = 4 * (params + 3 * stats // 2 + 2)
        row = f"| {label} | {params / 1e6:.2f} M | {stats // 2:,} | {sent / 1e6:.1f} MB |"
        assert row in SCALING, row


@pytest.mark.parametrize("kind", ["channels", "columns", "predicted"])
def test_gates_choose_on_a_mesh_with_explicit_shardings(kind):
    """As `jax.make_mesh` makes it, and `jax.set_mesh` sets it for a user's own loop."""
    rngs = nnx.Rngs(0)
    first, second = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2))
    model = nnx.Sequential(first, nnx.BatchNorm(8, rngs=rngs), nnx.relu, second)
    if kind == "predicted":
        links = {"layers/0": ("layers/1", "layers/3")}
        dynamic = dynprune_jax.predict_channels(model, 0.4, links)
    else:
        ratios = {"channels": (0.4, None), "columns": (None, 0.4)}[kind]
        dynamic = dynprune_jax.make_dynamic(model, *ratios)
    dynamic.eval()
    x = jax.random.normal(jax.random.key(0), (8, 6, 5, 8))

    run = nnx.jit(lambda model, x: dynprune_jax.measure(model, x))
    expected, usage = run(dynamic, x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        got, alike = run(dynamic, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
        assert got.sharding.spec[0] == "data"
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(alike.executed_macs, usage.executed_macs)


def test_rows_are_placed_and_arrays_copied():
    mesh = data_mesh()
    assert local_rows(8, mesh) == slice(0, 8)
    batch = place_batch(np.arange(8), 8, mesh)
    assert [shard.data.shape for shard in batch.addressable_shards] == [(2,)] * 4
    np.testing.assert_array_equal(batch, np.arange(8))
    copies = replicate({"a": jnp.arange(3)}, mesh)["a"]
    assert copies.is_fully_replicated
    assert len(copies.addressable_shards) == 4
    assert replicate(copies, mesh) is copies
