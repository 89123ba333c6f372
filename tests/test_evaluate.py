import jax.numpy as jnp
import numpy as np
from flax import nnx
from networks import small_vgg

from dynprune_jax import make_dynamic, margin, measure
from dynprune_jax.build import evaluation_images
from dynprune_jax.data.batches import eval_batches
from dynprune_jax.evaluate import evaluate, make_evaluator
from dynprune_jax.models import vgg_digits
from dynprune_jax.network import Network
from dynprune_jax.pruning.attention import random
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.run import Run


def test_every_example_counts_once_however_the_batches_fall():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (11, 8, 8, 1), np.uint8)
    labels = random.integers(0, 10, 11).astype(np.int32)
    model = make_dynamic(vgg_digits(10, image_size=8, rngs=nnx.Rngs(0)), 0.5, 0.25)
    network = Network(model)

    def prepare(images):
        return images.astype(jnp.float32) / 255.0

    evaluator = make_evaluator(network, prepare)
    whole = evaluate(evaluator, network.weights, eval_batches((images, labels), 11))
    parts = evaluate(evaluator, network.weights, eval_batches((images, labels), 4))
    model.eval()
    logits, usage = nnx.jit(measure)(model, prepare(jnp.asarray(images)))
    np.testing.assert_array_equal(parts.correct, np.argmax(logits, -1) == labels)
    for result in (whole, parts):
        assert result.accuracy == np.mean(np.argmax(logits, -1) == labels)
        np.testing.assert_array_equal(result.usage.executed_macs, usage.executed_macs)
        np.testing.assert_array_equal(result.usage.macs, usage.macs)
    summary = parts.summary()
    assert summary["examples"] == 11
    assert summary["executed_macs_per_image"]["min"] == min(usage.executed_macs)
    assert summary["mac_reduction"] == usage.mac_reduction

    none = {name: jnp.float32(0.0) for name in network.values(PruneRatio)}
    dense = evaluate(evaluator, {**network.weights, **none}, eval_batches((images, labels), 4))
    assert dense.usage.mac_reduction == 0.0
    assert (dense.usage.executed_macs == usage.dense_executed_macs).all()


def test_batches_mix_what_a_set_holds_in_order_and_results_are_in_that_order(config, tmp_path):
    run = Run.open(config, tmp_path)
    images, labels = run.dataset.test.read_all()
    model = run.dense.bind(run.dense.weights)
    model.eval()
    logits = nnx.jit(model)(evaluation_images(config, jnp.asarray(images)))
    right = np.argmax(logits, -1) == labels
    assert right.any()
    assert not right.all()
    np.testing.assert_array_equal(run.evaluate(run.dense, run.dense.weights).correct, right)
    # In class folders a batch of neighbours would be of one class.
    _, first, valid = next(run._test_batches())
    assert not np.array_equal(first[valid], labels[: valid.sum()])


def test_what_was_computed_is_told_in_the_order_of_the_set_too(config, tmp_path):
    run = Run.open(config, tmp_path)
    found = run.evaluate(run.dynamic)
    model, images = run.dynamic.bind(), run.dataset.test.read_all()[0]
    model.eval()
    logits, usage = nnx.jit(measure)(model, evaluation_images(config, jnp.asarray(images)))
    assert len(set(usage.executed_macs)) > 10
    np.testing.assert_array_equal(found.usage.executed_macs, usage.executed_macs)
    np.testing.assert_allclose(found.margins, margin(logits), atol=1e-5)


def test_gates_that_draw_do_so_anew_in_every_batch():
    images, labels = np.full((8, 8, 8, 1), 200, np.uint8), np.zeros(8, np.int32)
    network = Network(make_dynamic(small_vgg(10, rngs=nnx.Rngs(0)), 0.5, criterion=random))
    evaluator = make_evaluator(network, lambda images: images.astype(jnp.float32) / 255.0)
    found, again = (
        evaluate(evaluator, network.weights, eval_batches((images, labels), 4)) for _ in range(2)
    )
    assert not np.array_equal(found.margins[:4], found.margins[4:])
    np.testing.assert_array_equal(found.margins, again.margins)  # but the same in every evaluation
