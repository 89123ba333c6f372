import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given
from hypothesis import strategies as st

from dynprune_jax import Cascade, export_model, load_exported, margin
from dynprune_jax.build import evaluation_images
from dynprune_jax.evaluate import cascaded, threshold_of
from dynprune_jax.run import Run


class Flat(nnx.Module):
    """A classifier of five classes, as small as one can be."""

    def __init__(self, seed):
        self.linear = nnx.Linear(12, 5, rngs=nnx.Rngs(seed))

    def __call__(self, images):
        return self.linear(images.reshape(len(images), 12))


def images(batch, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, 2, 2, 3))


def test_the_margin_by_hand():
    logits = jnp.log(jnp.array([[0.2, 0.7, 0.1], [0.4, 0.2, 0.4], [1.0, 1e-30, 1e-30]]))
    np.testing.assert_allclose(margin(logits + 5.0), [0.5, 0.0, 1.0], atol=1e-6)
    rounded = logits.astype(jnp.bfloat16)  # and nothing is rounded again
    np.testing.assert_array_equal(margin(rounded), margin(rounded.astype(jnp.float32)))
    np.testing.assert_array_equal(margin(jnp.array([[jnp.nan, 1.0], [1.0, jnp.inf]])), [0.0, 0.0])
    with pytest.raises(ValueError, match="a margin is between two classes"):
        margin(jnp.zeros((3, 1)))


@nnx.jit
def call(model, x):
    return model(x)


@given(st.sampled_from([1, 5, 8]), st.sampled_from([1, 3, 8]), st.floats(0, 1), st.integers(0, 99))
def test_the_second_network_sees_what_the_first_is_unsure_of(batch, chunk, share, seed):
    x, first, second = images(batch, seed), Flat(0), Flat(1)
    sure = np.asarray(margin(first(x)))
    ranked = np.concatenate([[0.0], np.sort(sure), [2.0]])
    threshold = ranked[round(share * batch) :][:2].mean()  # of none, some or all, halfway
    expected = [
        np.asarray((second if sure[i] < threshold else first)(x[i : i + 1]))[0]
        for i in range(batch)
    ]
    found = call(Cascade(first, second, threshold, chunk), x)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)


def test_logits_have_the_dtype_of_the_first_network():
    rounded = nnx.Sequential(Flat(1), lambda logits: logits.astype(jnp.bfloat16))
    for chunk in (1, 4):
        found = call(Cascade(Flat(0), rounded, 2.0, chunk), images(4))
        np.testing.assert_array_equal(found, rounded(images(4)).astype(jnp.float32))


@pytest.mark.parametrize(
    ("batch", "chunk", "calls"),
    [
        (7, 3, {0: 0, 1: 1, 3: 1, 4: 2, 7: 3}),
        (3, 3, {0: 0, 1: 1, 3: 1}),  # one turn at most
        (1, 1, {0: 0, 1: 1}),
    ],
)
def test_the_second_network_is_called_as_often_as_needed(batch, chunk, calls):
    called = []

    def of_batch(images):
        called.append(len(images))
        return np.zeros(5, np.float32)

    class Counted(Flat):
        def __call__(self, images):
            # A pure one: the compiler may move it to where it is computed in vain.
            nothing = jax.pure_callback(of_batch, jax.ShapeDtypeStruct((5,), jnp.float32), images)
            return super().__call__(images) + nothing[None]

    x = images(batch)
    ranked = np.sort(np.asarray(margin(Flat(0)(x))))
    for unsure, expected in calls.items():
        called.clear()
        threshold = 2.0 if unsure == batch else ranked[unsure]
        jax.block_until_ready(call(Cascade(Flat(0), Counted(1), threshold, chunk), x))
        assert called == [chunk] * expected


def test_a_cascade_is_one_program_for_every_threshold_and_can_be_exported():
    x, traced = images(4), []

    @nnx.jit
    def call(model, x):
        traced.append(x.shape)
        return model(x)

    for threshold in (0.0, 0.3, 2.0):
        model = Cascade(Flat(0), Flat(1), threshold)
        exported = load_exported(export_model(model, x))
        np.testing.assert_allclose(exported(x), call(model, x), atol=1e-6)
    assert traced == [x.shape]


def test_what_cannot_be_a_cascade_is_refused():
    with pytest.raises(ValueError, match="chunk is 0; it must be at least 1"):
        Cascade(Flat(0), Flat(1), 0.5, chunk=0)
    with pytest.raises(ValueError, match="threshold is nan; it must be a number"):
        Cascade(Flat(0), Flat(1), jnp.float32("nan"))
    other = nnx.Sequential(Flat(1), lambda logits: logits[:, :1])
    with pytest.raises(ValueError, match=r"\(2, 1\), the first one \(4, 5\); both must have"):
        Cascade(Flat(0), other, 0.5, chunk=2)(images(4))
    any_number = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 2, 2, 3"), jnp.float32)
    with pytest.raises(ValueError, match="for a given number of images, not for batch"):
        export_model(Cascade(Flat(0), Flat(1), 0.5), any_number)
    assert Cascade(Flat(0), Flat(1), 0.5)(images(0)).shape == (0, 5)


@example([0.25, float(np.nextafter(np.float32(0.25), np.float32(1)))], 0.5)
@example([0.0, 1.4e-45], 0.5)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), st.floats(0, 0.999))
def test_a_threshold_has_the_share_below_it(margins, share):
    margins = np.float32(margins)
    below = np.sum(margins < threshold_of(margins, share))
    count = int(share * len(margins) + 1e-9)
    ranked = np.sort(margins)
    tied = count and ranked[count - 1] == ranked[count]
    assert below < count if tied else below == count
    if not count:
        assert threshold_of(margins, share) == 0.0
    assert threshold_of(margins, 1 - 1e-12) <= np.max(margins)


def test_accuracy_and_macs_of_both_are_those_of_the_slow_loop(config, tmp_path):
    run = Run.open(config, tmp_path)
    first = run.evaluate(run.dynamic, run.dynamic.weights)
    second = run.evaluate(run.dense, run.dense.weights)
    again = set(np.argsort(first.margins)[:30])
    right, macs, executed = 0, 0, 0
    for i in range(100):
        right += bool((second if i in again else first).correct[i])
        macs += int(first.usage.macs[i]) + (i in again) * second.usage.dense_macs
        executed += int(first.usage.executed_macs[i])
        executed += (i in again) * second.usage.dense_executed_macs
    found = cascaded(first, second, 0.3)
    assert found["share"] == 0.3
    assert found["accuracy"] == right / 100
    assert found["examples"] == 100
    assert found["macs_per_image"]["mean"] == pytest.approx(macs / 100)
    assert found["executed_macs_per_image"]["mean"] == pytest.approx(executed / 100)
    assert found["mac_reduction"] == pytest.approx(1 - macs / 100 / second.usage.dense_macs)
    reduction = 1 - executed / 100 / second.usage.dense_executed_macs
    assert found["executed_mac_reduction"] == pytest.approx(reduction)
    # And the accuracy that of the two networks executed as one.
    stored, labels = run.dataset.test.read_all()
    models = run.dynamic.bind(), run.dense.bind()
    for model in models:
        model.eval()
    logits = call(
        Cascade(*models, found["threshold"], chunk=16),
        evaluation_images(config, jnp.asarray(stored)),
    )
    assert np.sum(np.argmax(logits, -1) == labels) == right
    alone = cascaded(first, second, 0.0)
    assert alone["accuracy"] == first.accuracy
    assert alone["mac_reduction"] == pytest.approx(first.usage.mac_reduction)
