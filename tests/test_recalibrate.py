import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import mixed_plan

from dynprune_jax import compact, fold_batch_norms, make_dynamic, predict_channels, recalibrate
from dynprune_jax.models import vgg_digits
from dynprune_jax.models.links import links
from dynprune_jax.pruning.recalibrate import mean_of


def images(seed, batch=6):
    return jax.random.normal(jax.random.key(seed), (batch, 8, 8, 1))


def small():
    return vgg_digits(10, image_size=8, width=0.1, rngs=nnx.Rngs(0))


@nnx.jit
def call(model, x):
    return model(x)


def copied(model):
    """Its variables, but for keys of random numbers."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    return {path: np.array(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def test_the_statistics_are_those_of_what_the_gates_keep():
    class Net(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(6, 4, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x, train):
            return self.norm(self.conv(x), use_running_average=not train)  # whatever its mode

    model = make_dynamic(Net(), channel_ratio=0.5)
    batches = [jax.random.normal(jax.random.key(seed), (5, 3, 3, 6)) for seed in range(3)]
    means, variances = [], []
    for batch in np.asarray(batches, np.float64):
        kept = np.zeros_like(batch)
        for image in range(5):
            attention = batch[image].mean(axis=(0, 1))
            chosen = np.argsort(-attention)[:3]
            kept[image, :, :, chosen] = batch[image, :, :, chosen]
        y = kept.reshape(-1, 6) @ np.asarray(model.conv.kernel[...], np.float64)[0, 0]
        means.append(y.mean(axis=0))
        variances.append(y.var(axis=0))
    recalibrate(model, batches, False)
    np.testing.assert_allclose(model.norm.mean[...], np.mean(means, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], np.mean(variances, axis=0), rtol=1e-4)


def test_statistics_that_are_not_finite_are_made_anew():
    model = small()
    recalibrate(model, [images(0)])
    expected = copied(model)
    norm = model.blocks[0].layers[0].norm
    norm.mean[...] = jnp.full_like(norm.mean[...], jnp.nan)
    norm.var[...] = jnp.full_like(norm.var[...], jnp.inf)
    recalibrate(model, [images(0)])
    jax.tree.map(np.testing.assert_array_equal, copied(model), expected)


@pytest.mark.parametrize("kind", ["attention", "predicted"])
def test_with_the_statistics_of_a_batch_evaluation_is_what_training_computes_of_it(kind):
    model = small()
    if kind == "attention":
        model = make_dynamic(model, 0.5, 0.25)
    else:
        reads = links(model)
        model = predict_channels(model, 0.5, reads)
    model.train()
    expected = call(nnx.clone(model), images(1))
    before = copied(model)
    recalibrate(model, [images(1)])
    after = copied(model)
    statistics = {path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))}
    for path, value in before.items():
        assert np.array_equal(after[path], value) == (path not in statistics)
    assert not model.blocks[0].layers[0].norm.use_running_average  # its mode is as it was
    model.eval()
    np.testing.assert_allclose(call(model, images(1)), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_called_again_has_the_mean_of_its_calls_and_else_nothing_changes():
    class Net(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(1, 3, (3, 3), rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.calls = nnx.BatchStat(jnp.int32(0))  # what it keeps for itself

        def __call__(self, x):
            self.calls[...] += jnp.int32(1)
            return sum(self.norm(self.conv(scale * x)) for scale in scales)

    model, scales = Net(), (1.0, 2.0, 4.0)
    maps = [np.asarray(model.conv(scale * images(0))) for scale in scales]
    recalibrate(model, [images(0)])
    for name in ("mean", "var"):
        expected = sum(getattr(y, name)(axis=(0, 1, 2)) for y in maps) / 3
        np.testing.assert_allclose(getattr(model.norm, name)[...], expected, rtol=1e-4, atol=1e-6)
    assert model.calls[...] == 0
    assert model.calls[...].dtype == jnp.int32


def test_what_a_norm_is_told_to_leave_out_is_left_out():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x, mask=jnp.arange(len(x))[:, None, None, None] < 4)

    model = Net()
    recalibrate(model, [images(0)])
    np.testing.assert_allclose(model.norm.mean[...], [np.mean(images(0)[:4])], rtol=1e-4)


def test_of_several_batches_it_is_their_mean():
    trees = [{"a": jnp.asarray([1.0, 2.0])}, {"a": jnp.asarray([3.0, 6.0])}, {"a": jnp.zeros(2)}]
    np.testing.assert_allclose(mean_of(trees)["a"], [4 / 3, 8 / 3], rtol=1e-6)


def test_what_cannot_be_recalibrated_is_refused():
    model = make_dynamic(small(), 0.5)
    with pytest.raises(ValueError, match="batches is one array; give batches in a list"):
        recalibrate(model, images(0))
    with pytest.raises(ValueError, match="batches has none"):
        recalibrate(model, [])
    with pytest.raises(TypeError) as wrong:  # as a loader for training gives them
        recalibrate(model, [(images(0), jnp.zeros(4, jnp.int32))])
    assert wrong.value.__notes__[-1] == "batches hold what the model is called with: no labels"
    with pytest.raises(
        ValueError, match=r"images has the shape \(0, 8, 8, 1\); give a batch of some"
    ):
        recalibrate(model, [images(0), images(0)[:0]])
    fast = compact(model, images(0), plan=mixed_plan(model))
    with pytest.raises(ValueError, match="recalibrate the model that it was made from"):
        recalibrate(fast, [images(0)])
    with pytest.raises(ValueError, match="are folded; recalibrate what it was made from"):
        recalibrate(fold_batch_norms(model, images(0)), [images(0)])
    with pytest.raises(ValueError, match=r"Linear has no nnx.BatchNorm"):
        recalibrate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [jnp.zeros((1, 2))])


def test_it_is_as_at_test_time_whatever_mode_a_model_is_in():
    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 8))
    conv, norm = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    found = []
    for mode in (nnx.Module.eval, nnx.Module.train):
        model = make_dynamic(nnx.Sequential(conv, nnx.clone(norm)), 0.5, drop_probability=0.0)
        mode(model)  # in training it would drop nothing
        recalibrate(model, [x])
        found.append(model.layers[1].var[...])
    np.testing.assert_array_equal(*found)
