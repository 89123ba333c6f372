import functools
import itertools
import json
import re
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from networks import trained

from dynprune_jax.errors import UserError
from dynprune_jax.experiments.benchmark import _trained_or_fresh, benchmark
from dynprune_jax.experiments.timing import Compiled, dense_ways, quartiles_ms, summary, timed
from dynprune_jax.pruning import plan as plan_lib
from dynprune_jax.pruning import time_budget
from dynprune_jax.pruning.compact_conv import CompactConv
from dynprune_jax.pruning.folding import FoldedNorm
from dynprune_jax.pruning.forms import Form
from dynprune_jax.pruning.layers import all_modules, conv_layers
from dynprune_jax.pruning.plan import Plan, interleaved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture
def rows(config, folder, few_forms):
    """The benchmark of the small digits network, run once: its own ratios, and ratio 0."""
    if not (folder / "benchmark.json").exists():
        config.gate.layers = ("blocks/1/*",)  # of the others there is a dense plan
        config.gate.channel_ratio, config.gate.column_ratio = (0.0, 0.8), (0.0, 0.3)
        config.benchmark.batch_sizes = (2,)
        config.benchmark.ratios = (0.0,)
        benchmark(config, folder)
    return json.loads((folder / "benchmark.json").read_text())


def test_its_rows_hold_what_they_promise(rows):
    assert [(row["batch_size"], bool(row["mac_reduction"])) for row in rows] == [
        (2, False),
        (2, True),
    ]
    for row in rows:
        assert row["network"] == "networks:small_vgg"
        assert row["image_size"] == 8
        assert row["dtype"] == "float32"
        assert row["device"].endswith(" cores")
        assert row["fastest_dense_ms"] == min(row["dense_ms"].values())
        assert row["speedup"] == row["fastest_dense_ms"] / row["compact_ms"]
        assert row["ideal_speedup"] == 1 / (1 - row["mac_reduction"])
        assert row["realised"] == row["speedup"] / row["ideal_speedup"]
        assert row["masked_ms"] > 0
        assert row["compact_memory_mb"] > 0
        assert row["largest_difference_of_logits"] < 1e-4
        assert row["images_per_second"] == 2000 / row["compact_ms"]
        low, high = row["compact_quartiles_ms"]
        assert low <= row["compact_ms"] <= high
    for row in rows[1::2]:
        assert row["channel_ratio"] == [0.0, 0.8]
        assert row["random_masks_ms"] > 0
        assert row["static_ms"] > 0
        # A smaller network of as many MACs, to what whole filters allow.
        assert row["mac_reduction"] > 0.15
        assert 0 <= row["static_mac_reduction"] - row["mac_reduction"] < 0.06


def test_narrow_layers_are_not_taken_for_the_image_s(config, tmp_path):
    config.data.name, config.model, config.width = "cifar10", "resnet20", 0.1
    model, channels = _trained_or_fresh(config, tmp_path)
    assert min(conv.in_features for conv in conv_layers(model).values()) < channels == 3


def test_at_ratio_0_the_compact_network_is_the_dense_one(rows, folder):
    dense = Plan.load(folder / "plan_batch_2_dense.json")
    assert Plan.load(folder / "plan_batch_2_0.000.json") == dense
    for row in rows[::2]:
        assert row["ideal_speedup"] == 1.0
        same = row["dense_ms"]["best form of each layer"] / row["compact_ms"]
        assert 1 / 3 < same < 3  # the same program: noise alone, on a machine that runs tests


def test_it_draws_its_pictures(rows, folder):
    for name in ("speedup.png", "layer_times_batch_2.png"):
        assert (folder / name).stat().st_size > 10_000


def test_a_slowed_dense_way_is_not_the_baseline():
    def work(seconds):
        time.sleep(seconds)
        return jnp.zeros(())

    quick = functools.partial(work, 0.0)
    ways = {"slowed": lambda: work(0.02), "quick": quick, "compact": quick, "elsewhere": quick}
    seconds = {name: {name: taken} for name, taken in interleaved(ways, repeats=5).items()}
    dense = seconds["slowed"] | seconds["quick"]
    row = summary(dense, seconds["compact"], mac_reduction=0.5, others=seconds["elsewhere"])
    assert row["fastest_dense"] == "quick"
    assert set(row["dense_ms"]) == {"slowed", "quick"}
    assert set(row["other_runtimes_ms"]) == {"elsewhere"}
    assert row["ideal_speedup"] == 2.0


def test_the_fastest_dense_way_is_timed_as_often_as_compact_however_fast_that_is():
    def work(seconds):
        time.sleep(seconds)
        return jnp.zeros(())

    calls = itertools.count()
    ways = {
        "slow": lambda: work(0.2),
        "fast": lambda: work(0.3 if next(calls) == 5 else 0.02),  # something else ran
        "compact": lambda: work(0.001),
    }
    found = timed(ways, 5, beside=("slow", "fast"))
    assert {name: len(times) for name, times in found.items()} == {
        "slow": 3,
        "fast": 5,
        "compact": 5,
    }


def test_the_dense_ways_are_what_they_are_called():
    model = trained("small_vgg", image_size=4, width=0.1)
    model.eval()
    names = list(conv_layers(model))
    plan = Plan(
        dict.fromkeys(names, Form("rows")),
        {name: {Form(): 1.0, Form("patches"): 2.0} for name in names[:2]},
    )
    ways = dense_ways(model, jnp.ones((1, 4, 4, 1)), plan)
    folded = {
        name: isinstance(way.blocks[0].layers[0].norm, FoldedNorm) for name, way in ways.items()
    }
    assert [name for name in ways if not folded[name]] == ["lax.conv, norms apart"]
    for name, forms in {
        "matrix products": [Form("patches")] * 2,  # what has been measured
        "best form of each layer": [Form("rows")] * 4,
    }.items():
        convs = [layer for layer in all_modules(ways[name]).values() if type(layer) is CompactConv]
        assert [layer.form for layer in convs] == forms
    x = jnp.linspace(0.0, 1.0, 16).reshape(1, 4, 4, 1)
    by_lax = ways["lax.conv"]
    run = Compiled(by_lax, jnp.ones((1, 4, 4, 1)))
    np.testing.assert_allclose(run(x), by_lax(x), atol=1e-5)
    assert not np.allclose(run(), run(x))


def test_summary_by_hand():
    row = summary({"a": [0.9, 0.1, 0.2]}, {"compact": [0.1] * 3, "masked": [0.4] * 3}, 0.6)
    assert row["fastest_dense_ms"] == 200.0
    assert row["compact_ms"] == 100.0
    assert row["masked_ms"] == 400.0
    assert row["speedup"] == 2.0
    assert row["realised"] == pytest.approx(0.8)
    assert quartiles_ms([i / 10 for i in range(1, 8)]) == pytest.approx([200.0, 600.0])


def test_a_config_that_prunes_nothing_has_nothing_to_compare(config, tmp_path):
    config.gate.channel_ratio = config.gate.column_ratio = ()
    config.prune.epochs = 0
    with pytest.raises(UserError, match="nothing to compare"):
        benchmark(config, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("plain_plans")
def test_where_filters_cannot_go_as_far_the_static_network_is_left_out(config, tmp_path, capsys):
    """Its filters go where the ratios are, in the first block; its gates leave columns out too."""
    config.width, config.static.allotment = 0.25, "gate"
    config.gate.channel_ratio, config.gate.column_ratio = (0.1, 0.0), (0.9, 0.9)
    config.benchmark.batch_sizes, config.benchmark.ratios = (1,), ()
    (row,) = benchmark(config, tmp_path / "b")
    assert row["random_masks_ms"] > 0
    assert "static_ms" not in row
    assert "static network left out: no removal of filters takes" in capsys.readouterr().out


@pytest.mark.usefixtures("plain_plans")
@pytest.mark.parametrize(
    ("model", "removes"), [("Small", True), ("Halves", False), ("Eights", False)]
)
def test_of_a_network_of_ones_own(config, tmp_path, capsys, model, removes):
    config.model = f"own:{model}"
    config.gate.channel_ratio, config.gate.column_ratio = (0.2,), ()
    config.benchmark.batch_sizes, config.benchmark.ratios = (1,), ()
    (row,) = benchmark(config, tmp_path / "b")
    assert ("static_ms" in row) == removes
    assert ("static network left out" in capsys.readouterr().out) != removes


def test_ratios_are_first_scaled_to_a_budget_of_time(
    config, tmp_path, monkeypatch, capsys, plain_plans
):
    """As if a convolution took as many milliseconds as the share of the channels that it keeps."""

    def milliseconds(model, images):
        layers = all_modules(model).values()
        ratios = [x.channel_ratio or 0.0 for x in layers if isinstance(x, CompactConv)]
        return len(ratios) - sum(ratios)

    monkeypatch.setattr(time_budget, "_milliseconds", milliseconds)
    config.gate.channel_ratio, config.gate.column_ratio = (0.2, 0.4), ()
    config.benchmark.ratios, config.benchmark.batch_sizes = (), (2,)
    config.benchmark.milliseconds = 3.0
    (row,) = benchmark(config, tmp_path)
    low, high = row["channel_ratio"]
    assert low > 0.2
    assert high == pytest.approx(2 * low, abs=1e-4)
    told = capsys.readouterr().out
    assert f'"--config.gate.channel_ratio=({low}, {high})"' in told
    assert f"beside the others it takes {row['compact_ms']:.3g} ms, of 3.0" in told
    for budget, message in (
        (1e-9, "config.benchmark.milliseconds is 1e-09; the network takes 4 with all ratios at 0"),
        (5.0, "config.benchmark.milliseconds is 5.0; without pruning the network takes 4"),
    ):
        config.benchmark.milliseconds = budget
        with pytest.raises(UserError, match=re.escape(message)):
            benchmark(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_allotment_by_ratios_needs_some(config, tmp_path):
    config.gate.channel_ratio, config.static.allotment = (), "gate"
    with pytest.raises(UserError, match=r"config\.static\.allotment is 'gate'"):
        benchmark(config, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_turn_of_steady_use_begins_with_a_call_that_is_not_timed(monkeypatch):
    calls = []

    def work():
        calls.append(2.0)  # seconds
        return jnp.zeros(())

    monkeypatch.setattr(plan_lib, "time", SimpleNamespace(perf_counter=lambda: sum(calls)))
    assert interleaved({"a": work}, repeats=2, warmup=0, least=5.0) == {"a": [2.0, 2.0]}
    assert len(calls) == 2 * (1 + 3)


def test_interleaved_takes_turns_after_the_warm_up():
    calls = []

    def work(name):
        calls.append(name)
        return jnp.zeros(())

    seconds = interleaved({n: (lambda n=n: work(n)) for n in "ab"}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
