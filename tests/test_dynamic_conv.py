import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynprune_jax.pruning import attention
from dynprune_jax.pruning.dynamic_conv import DynamicConv, PruneRatio


def conv(channels=8, features=6, kernel=(3, 3), **kwargs):
    return nnx.Conv(channels, features, kernel, rngs=nnx.Rngs(0), **kwargs)


def dynamic(base, **kwargs):
    return DynamicConv(base, rngs=nnx.Rngs(1), **kwargs)


def test_it_is_the_convolution_of_the_masked_map():
    base = conv()
    gate = dynamic(base, channel_ratio=0.5, column_ratio=0.25)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 8))
    masked = np.array(x)
    for image in masked:
        attention_c, attention_hw = image.mean((0, 1)), image.mean(2).ravel()
        image[:, :, np.argsort(-attention_c)[4:]] = 0
        image.reshape(16, 8)[np.argsort(-attention_hw)[12:]] = 0
    np.testing.assert_allclose(gate(x), base(jnp.asarray(masked)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"strides": 2, "padding": "VALID"},
        {"kernel_dilation": 2, "padding": ((1, 2), (0, 3))},
        {"feature_group_count": 2},
        {"kernel": (1, 1), "padding": "CIRCULAR"},
    ],
)
def test_ratio_zero_is_bit_identical_to_the_convolution(geometry):
    base = conv(**geometry)
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 8))
    gate = dynamic(base, channel_ratio=0.0, column_ratio=0.0)
    np.testing.assert_array_equal(gate(x), base(x))
    np.testing.assert_array_equal(nnx.jit(gate)(x), nnx.jit(base)(x))


def test_it_takes_over_the_parameters_under_their_names():
    base = conv()
    gate = dynamic(base, channel_ratio=0.5)
    assert gate.kernel is base.kernel
    assert gate.bias is base.bias
    assert set(nnx.state(gate, nnx.Param)) == {"bias", "kernel"}
    assert set(nnx.state(gate, PruneRatio)) == {"channel_ratio"}
    again = dynamic(gate, column_ratio=0.5)
    assert again.kernel is base.kernel
    assert again.channel_ratio is None


@pytest.mark.parametrize(("groups", "kept"), [(2, 1), (4, 2), (8, 4)])
def test_grouped_convolutions_keep_whole_groups(groups, kept):
    gate = dynamic(conv(features=8, feature_group_count=groups), channel_ratio=0.5)
    x = jax.random.normal(jax.random.key(0), (5, 4, 4, 8))
    channels = np.asarray(gate.masks(x).channels).reshape(5, groups, -1)
    assert (channels.all(2) == channels.any(2)).all()
    assert (channels.all(2).sum(1) == kept).all()
    strength = np.asarray(x).mean((1, 2)).reshape(5, groups, -1).mean(2)
    np.testing.assert_array_equal(channels.all(2), strength >= np.sort(strength)[:, [-kept]])


def test_groups_of_channels_and_patches_of_columns_are_kept_whole():
    gate = dynamic(conv(), channel_ratio=0.5, column_ratio=0.5, channel_group=2, column_patch=3)
    x = jax.random.normal(jax.random.key(0), (5, 6, 4, 8))  # gcd(6, 4) = 2: patches of 2 x 2
    masks = gate.masks(x)
    groups = np.asarray(masks.channels).reshape(5, 4, 2)
    strength = np.asarray(x).mean((1, 2)).reshape(5, 4, 2).mean(2)
    assert (groups.all(2) == groups.any(2)).all()
    np.testing.assert_array_equal(groups.all(2), strength >= np.sort(strength)[:, [2]])
    patches = np.asarray(masks.columns).reshape(5, 3, 2, 2, 2)
    strength = np.asarray(x).mean(3).reshape(5, 3, 2, 2, 2).mean((2, 4)).reshape(5, 6)
    assert (patches.all((2, 4)) == patches.any((2, 4))).all()
    kept = patches.all((2, 4)).reshape(5, 6)
    np.testing.assert_array_equal(kept, strength >= np.sort(strength)[:, [3]])


def test_a_criterion_sees_columns_row_by_row():
    def first(scores, rngs):
        del rngs
        return jnp.broadcast_to(-jnp.arange(scores.shape[-1], dtype=jnp.float32), scores.shape)

    gate = dynamic(conv(), column_ratio=0.5, criterion=first)
    columns = gate.masks(jnp.ones((2, 3, 4, 8))).columns
    row_by_row = [[True] * 4, [True] * 2 + [False] * 2, [False] * 4]
    np.testing.assert_array_equal(columns, [row_by_row] * 2)


def test_sizes_of_groups_and_patches_below_one_are_refused():
    for field in ("channel_group", "column_patch"):
        with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
            dynamic(conv(), channel_ratio=0.5, **{field: 0})


def test_every_input_keeps_exactly_k_and_its_own():
    gate = dynamic(conv(), channel_ratio=0.4, column_ratio=0.3)
    masks = gate.masks(jax.random.normal(jax.random.key(0), (6, 5, 5, 8)))
    assert masks.channels is not None
    assert masks.columns is not None
    np.testing.assert_array_equal(masks.channels.sum(1), 8 - 3)
    np.testing.assert_array_equal(masks.columns.sum((1, 2)), 25 - 7)
    assert len({tuple(row) for row in np.asarray(masks.channels).tolist()}) > 1


def test_one_image_without_a_batch_axis():
    gate = dynamic(conv(), channel_ratio=0.5, column_ratio=0.5)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 8))
    one_by_one = jnp.stack([gate(image) for image in x])
    np.testing.assert_allclose(one_by_one, gate(x), rtol=1e-5, atol=1e-6)


def test_stochastic_dropout_only_in_training():
    gate = dynamic(conv(), channel_ratio=0.5, drop_probability=0.5)
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 8))
    gate.train()
    first, second = gate.masks(x).channels, gate.masks(x).channels
    assert first is not None
    assert second is not None
    assert (first.sum(1) >= 4).all()
    assert not np.array_equal(first, second)
    gate.eval()
    np.testing.assert_array_equal(gate.masks(x).channels.sum(1), 4)


def test_a_view_has_a_mode_of_its_own():
    gate = dynamic(conv(), channel_ratio=0.5, drop_probability=0.5)
    gate.train()
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 8))
    view = nnx.view(gate, deterministic=True)
    np.testing.assert_array_equal(view.masks(x).channels.sum(1), 4)
    assert not gate.deterministic
    assert view.kernel is gate.kernel
    assert nnx.view(view, use_running_average=True, raise_if_not_found=False).deterministic


def test_the_gradient_reaches_only_what_is_kept():
    gate = dynamic(conv(), channel_ratio=0.5)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    kernel_gradient = nnx.grad(lambda gate: jnp.sum(gate(x) ** 2))(gate)["kernel"][...]
    reached = np.abs(kernel_gradient).sum((0, 1, 3)) > 0
    np.testing.assert_array_equal(reached, gate.masks(x).channels[0])


def test_the_ratio_is_traced():
    gate = dynamic(conv(), channel_ratio=0.0, criterion=attention.inverse)
    graph, ratios, rest = nnx.split(gate, PruneRatio, ...)
    traces = []

    @jax.jit
    def kept(ratios):
        traces.append(1)
        return nnx.merge(graph, ratios, rest).masks(jnp.ones((1, 2, 2, 8))).channels.sum()

    for ratio, expected in ((0.0, 8), (0.25, 6), (0.95, 1)):
        assert int(kept(jax.tree.map(lambda r, v=ratio: jnp.full_like(r, v), ratios))) == expected
    assert len(traces) == 1


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"channel_ratio is .* must be in \[0, 1\)"):
        dynamic(conv(), channel_ratio=ratio)


def test_other_mistakes_are_refused():
    with pytest.raises(ValueError, match="drop_probability is 2"):
        dynamic(conv(), channel_ratio=0.5, drop_probability=2.0)
    with pytest.raises(ValueError, match="2-D kernel"):
        dynamic(conv(kernel=(3,)), channel_ratio=0.5)
