import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynprune_jax import make_dynamic
from dynprune_jax.pruning import attention


def test_attention_is_the_mean_over_the_other_axes():
    x = jnp.arange(2 * 2 * 2 * 3, dtype=jnp.float32).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(
        attention.channel_attention(x), [[4.5, 5.5, 6.5], [16.5, 17.5, 18.5]]
    )
    np.testing.assert_array_equal(
        attention.column_attention(x), [[[1, 4], [7, 10]], [[13, 16], [19, 22]]]
    )


def test_the_other_statistics_by_hand():
    x = jnp.asarray([[[[3.0, -1.0], [-4.0, 0.0]]]])
    np.testing.assert_array_equal(
        attention.channel_attention(x, attention.STATISTICS["max"]), [[3, 0]]
    )
    np.testing.assert_array_equal(
        attention.column_attention(x, attention.STATISTICS["max"]), [[[3, 0]]]
    )
    np.testing.assert_allclose(
        attention.channel_attention(x, attention.STATISTICS["l2"]),
        [[np.sqrt(12.5), np.sqrt(0.5)]],
    )
    np.testing.assert_allclose(
        attention.column_attention(x, attention.STATISTICS["l2"]),
        [[[np.sqrt(5.0), np.sqrt(8.0)]]],
        rtol=1e-6,
    )


def test_a_magnitude_is_0_only_where_there_is_nothing():
    x = jnp.asarray([[[[3.0, -1.0, 0.0], [-3.0, -1.0, 0.0]]]])
    magnitude = attention.magnitude
    np.testing.assert_array_equal(attention.channel_attention(x, magnitude), [[6, 2, 0]])
    np.testing.assert_array_equal(attention.column_attention(x, magnitude), [[[4, 4]]])


def test_a_gate_ranks_by_its_statistic():
    x = jnp.zeros((1, 2, 2, 8)).at[0, 0, 0, 2].set(3.0).at[0, :, :, 5].set(1.0)
    conv = nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0))
    kept = {
        name: int(np.argmax(make_dynamic(conv, 0.875, statistic=statistic).masks(x).channels))
        for name, statistic in attention.STATISTICS.items()
    }
    assert kept == {"mean": 5, "max": 2, "l2": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"criterion": lambda s, _: s.mean(-1, keepdims=True)},
            r"criterion .* \(2, 1\); .*\(2, 8\)",
        ),
        ({"criterion": lambda *_: None}, "criterion of a gate gave NoneType"),
        ({"statistic": lambda *_: None}, "statistic of a gate gave NoneType"),
        ({"statistic": lambda x, _: x.mean((-3, -2))}, r"statistic .* \(2, 8\); .* \(2, 6, 6\)"),
    ],
)
def test_what_ranks_nothing_is_refused(options, message):
    """A mask of one channel would fit the map, and skip nothing."""
    conv = nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0))
    model = make_dynamic(conv, 0.5, 0.5, **options)
    with pytest.raises(ValueError, match=message):
        model(jnp.ones((2, 6, 6, 8)))


def test_bfloat16_maps_are_ranked_in_float32():
    # 1 and 1 + 1/1024 are the same number in a bfloat16 mean, and different ones in float32.
    x = jnp.ones((1, 32, 32, 2), jnp.bfloat16).at[0, 0, 0, 1].set(2.0)
    scores = attention.channel_attention(x)
    assert scores.dtype == jnp.float32
    assert scores[0, 1] > scores[0, 0]
    for statistic in (*attention.STATISTICS.values(), attention.magnitude):
        assert attention.column_attention(x, statistic).dtype == jnp.float32


def test_one_choice_is_shared_by_a_batch():
    scores = jnp.asarray([[[1.0, 2.0], [5.0, 6.0]], [[3.0, 4.0], [7.0, 8.0]]])
    found = attention.shared(scores, nnx.RngStream(0, tag="gate"))
    np.testing.assert_array_equal(found, [[[2.0, 3.0], [6.0, 7.0]]] * 2)
    with pytest.raises(ValueError, match="needs a batch"):
        attention.shared(jnp.ones(3), nnx.RngStream(0, tag="gate"))


def test_controls_invert_and_draw_afresh():
    rngs = nnx.RngStream(0, tag="gate")
    scores = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(attention.attention(scores, rngs), scores)
    np.testing.assert_array_equal(attention.inverse(scores, rngs), -scores)
    first, second = attention.random(scores, rngs), attention.random(scores, rngs)
    assert first.shape == scores.shape
    assert not np.array_equal(first[0], first[1])  # per input
    assert not np.array_equal(first, second)  # per call
    assert set(attention.CRITERIA) == {"attention", "random", "inverse", "shared"}
