"""The figures: valid PNGs with the content asked for, in the odd cases too."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from dynprune_jax import plots


def training_rows(column_gate=True):
    rows = [
        {"step": step, "train_accuracy": 0.9 - 0.5 / (1 + step / 100), "train_loss": 1.0}
        for step in range(0, 2000, 50)
    ]
    for row in rows:
        pruning = row["step"] >= 1000
        row["phase"] = "prune" if pruning else "dense"
        if row["step"] % 200 == 0:
            row["test_accuracy"] = row["train_accuracy"] - 0.03
        ramp = min(1.0, (row["step"] - 1000) / 600) if pruning else 0.0
        row["channel_ratio"] = 0.6 * ramp
        row["column_ratio"] = 0.5 * ramp if column_gate else None
    return rows


def report_layers(count):
    layers = [
        {
            "name": f"blocks/{i // 4}/layers/{i % 4}/conv",
            "dense_macs": 38_000_000 // (1 + i // 4),
            "macs": 19_000_000 // (1 + i // 4),
            "executed_macs": 17_500_000.5 // (1 + i // 4),
            "channel_ratio": 0.5,
            "column_ratio": None if i % 2 else 0.25,
        }
        for i in range(count)
    ]
    layers[0] |= {
        "macs": 38_000_000,
        "executed_macs": 36_000_000,
        "channel_ratio": None,
        "column_ratio": None,
    }
    return layers


def kept_masks(count, examples):
    rng = np.random.default_rng(0)
    sides = [max(2, 16 >> (i // 2)) for i in range(count)]
    return {
        f"blocks/{i // 2}/layers/{i % 2}/conv": rng.random((examples, side, side)) < 0.5
        for i, side in enumerate(sides)
    }


def test_where_there_is_no_figure_nothing_is_written(tmp_path):
    plots.save(None, tmp_path / "none.png")
    assert not any(tmp_path.iterdir())


def check_png(path):
    """The file is a picture of a sensible size that is not one plain colour."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = matplotlib.image.imread(path)
    height, width = picture.shape[:2]
    assert 200 <= height <= 4000
    assert 200 <= width <= 2500
    assert picture[..., :3].std() > 0.01


def percent(axis, fraction):
    """What a tick of an axis says at a fraction."""
    (label,) = axis.get_major_formatter().format_ticks([fraction])
    return float(label.removesuffix("%"))


def test_training_draws_every_series_and_tells_the_phases_apart(tmp_path):
    rows = training_rows()
    figure = plots.training_figure(rows)
    left, right = figure.axes
    train, test = [x for x in left.lines if str(x.get_label()).endswith("accuracy")]
    assert len(np.asarray(train.get_xdata())) == 40
    assert len(np.asarray(test.get_xdata())) == 10
    assert [x.get_label() for x in right.lines] == ["channel ratio", "column ratio"]
    assert "accuracy (%)" in left.get_ylabel()
    assert "% removed" in right.get_ylabel()
    assert [x.get_text().strip() for x in left.texts] == ["dense", "prune"]
    assert percent(left.yaxis, 0.5) == percent(right.yaxis, 0.5) == 50
    (shade,) = left.patches
    shaded = shade.get_extents().transformed(left.transData.inverted())
    assert (shaded.x0, shaded.x1) == pytest.approx((1000, 1950))

    plots.save(plots.training_figure(rows), tmp_path / "training.png")
    check_png(tmp_path / "training.png")


def test_training_takes_the_rows_in_any_order():
    line = plots.training_figure(training_rows()[::-1]).axes[0].lines[0]
    assert np.all(np.diff(np.asarray(line.get_xdata(), float)) > 0)


def test_training_without_a_column_gate_or_without_pruning(tmp_path):
    figure = plots.training_figure(training_rows(column_gate=False))
    assert [x.get_label() for x in figure.axes[1].lines] == ["channel ratio"]

    bare = [{"step": row["step"], "train_accuracy": 0.5} for row in training_rows()]
    assert len(plots.training_figure(bare).axes) == 1
    plots.save(plots.training_figure(bare[:1]), tmp_path / "one.png")
    check_png(tmp_path / "one.png")


@pytest.mark.parametrize("rows", [[], [{"step": 0, "train_loss": 1.0}]])
def test_training_with_nothing_to_show_is_no_figure(rows):
    assert plots.training_figure(rows) is None


@pytest.mark.parametrize("count", [1, 7, 110])
def test_layer_macs_draws_two_bars_a_layer(count, tmp_path):
    layers = report_layers(count)
    figure = plots.layer_macs_figure(layers)
    assert figure.get_figheight() > 0.2 * count  # room for each name
    (axes,) = figure.axes
    assert len(axes.patches) == 2 * count
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths[:count], [x["dense_macs"] / 1e6 for x in layers])
    np.testing.assert_allclose(widths[count:], [x["macs"] / 1e6 for x in layers])
    assert [x.get_text() for x in axes.get_yticklabels()] == [x["name"] for x in layers]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first layer is drawn on top
    notes = ["no gate", "channels −50%", "channels −50%, columns −25%"][:count]
    assert [text.get_text() for text in axes.texts[:3]] == notes
    (ticks,) = axes.lines
    np.testing.assert_allclose(ticks.get_xdata(), [x["executed_macs"] / 1e6 for x in layers])
    dense, macs = (sum(x[key] for x in layers) / 1e6 for key in ("dense_macs", "macs"))
    said = f"{dense:,.1f} M dense, {macs:,.1f} M pruned ({1 - macs / dense:.1%} removed)"
    assert axes.get_title() == f"MACs by layer: {said}"
    layers[0]["feature_ratio"] = 0.3  # of the image's convolution too
    assert plots.layer_macs_figure(layers).axes[0].texts[0].get_text() == "outputs −30%"

    plots.save(plots.layer_macs_figure(layers), tmp_path / "layers.png")
    check_png(tmp_path / "layers.png")


def test_layer_macs_of_no_layer_is_no_figure():
    assert plots.layer_macs_figure([]) is None


@pytest.mark.parametrize("spread", [0, 2_000_000])
def test_macs_distribution_counts_every_image_once(spread, tmp_path):
    noise = np.random.default_rng(0).normal(size=500)
    macs = (120_000_000 + spread * noise).astype(np.int64)
    (axes,) = plots.macs_distribution_figure(macs, 300_000_000).axes
    assert sum(bar.get_height() for bar in axes.patches) == 500
    (mean,) = axes.lines
    assert np.asarray(mean.get_xdata(), float)[0] == pytest.approx(macs.mean() / 1e6)
    low, high = axes.get_xlim()
    assert low < macs.min() / 1e6 <= macs.max() / 1e6 < high
    assert "dense 300.0 M" in axes.get_title()
    assert "(60.0% removed)" in axes.get_title()

    plots.save(plots.macs_distribution_figure(macs, np.int64(300_000_000)), tmp_path / "macs.png")
    check_png(tmp_path / "macs.png")


@pytest.mark.parametrize("value", [0, 1, 10**15])
def test_macs_distribution_of_one_image(value, tmp_path):
    plots.save(
        plots.macs_distribution_figure(np.array([value], np.int64), 10**15), tmp_path / "a.png"
    )
    check_png(tmp_path / "a.png")


def test_macs_distribution_of_no_image_is_no_figure():
    assert plots.macs_distribution_figure(np.zeros(0, np.int64), 1) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_kept_columns_darkens_what_is_skipped(channels, tmp_path):
    images = np.full((2, 6, 6, channels), 200, np.uint8)
    mask = np.ones((2, 3, 3), bool)
    mask[1, 0, 2] = False
    figure = plots.kept_columns_figure(images, {"conv": mask})
    assert len(figure.axes) == 4
    _, first, _, second = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    np.testing.assert_array_equal(first, 200)
    skipped = np.zeros((6, 6), bool)
    skipped[:2, 4:] = True  # one column of the map covers two by two pixels
    np.testing.assert_array_equal((second < 200).all(axis=-1), skipped)
    assert "3×3 columns, 94% kept" in figure.axes[1].get_title()
    if channels == 3:
        images[..., 0] = 0
        figure = plots.kept_columns_figure(images, {"conv": mask})
        second = np.asarray(figure.axes[3].images[0].get_array())
        np.testing.assert_array_equal((second == (150, 0, 110)).all(axis=-1), skipped)
        np.testing.assert_array_equal(second[~skipped], images[1][~skipped])

    plots.save(plots.kept_columns_figure(images, {"conv": mask}), tmp_path / "kept.png")
    check_png(tmp_path / "kept.png")


def test_kept_columns_shows_at_most_six_layers_evenly_spread():
    images = np.zeros((1, 16, 16, 1), np.uint8)
    masks = kept_masks(11, 1)
    figure = plots.kept_columns_figure(images, masks)
    shown = [axes.get_title().split("\n")[0] for axes in figure.axes[1:]]
    assert shown == list(masks)[::2]


def test_kept_columns_takes_a_map_finer_than_the_image():
    mask = np.zeros((1, 12, 12), bool)
    image = np.full((1, 6, 6, 3), 255, np.uint8)
    figure = plots.kept_columns_figure(image, {"conv": mask})
    assert (np.asarray(figure.axes[1].images[0].get_array()) < 255).all()


def test_kept_columns_with_nothing_to_show_is_no_figure():
    images = np.zeros((2, 8, 8, 1), np.uint8)
    assert plots.kept_columns_figure(images, {}) is None
    assert plots.kept_columns_figure(images[:0], kept_masks(1, 0)) is None


def test_bars_and_lines_differ_in_lightness():
    # A reader who sees no colour, or a grey print, must still tell dense from pruned.
    (axes,) = plots.layer_macs_figure(report_layers(2)).axes
    dense, pruned = (
        float(np.dot(to_rgba(axes.patches[i].get_facecolor())[:3], (0.2126, 0.7152, 0.0722)))
        for i in (0, 2)
    )
    assert abs(dense - pruned) > 0.2


def test_sensitivity_draws_a_line_for_each_block_and_axis(tmp_path):
    rows = [
        {
            "weights": weights,
            "block": block,
            "axis": f"{axis}_ratio",
            "ratio": ratio,
            "mac_reduction": ratio / 2,
            "accuracy": 1 - ratio * (1 + block),
        }
        for weights in ("dense", "dropout")
        for axis, block in (("channel", 0), ("channel", 1), ("column", 1))
        for ratio in (0.4, 0.0, 0.2)
    ]
    figure = plots.sensitivity_figure(rows)
    names = ["block 0, channels", "block 1, channels", "block 1, columns"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == names
        for line, block in zip(axes.lines, (0, 1, 1), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [0.0, 0.1, 0.2])
            np.testing.assert_allclose(
                line.get_ydata(), [1.0, 0.8 - 0.2 * block, 0.6 - 0.4 * block]
            )
        assert [line.get_linestyle() for line in axes.lines] == ["-", "-", ":"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    dense, dropout = (axes.get_title().split("\n")[1] for axes in figure.axes)
    assert (dense, dropout) == ("other blocks unpruned", "other blocks at their targets")
    plots.save(figure, tmp_path / "sensitivity.png")
    assert plots.sensitivity_figure([]) is None


def test_cascades_are_drawn_over_macs_and_over_the_time_of_each_batch_size(tmp_path):
    rows = [
        {
            "network": "vgg16",
            "image_size": 32,
            "dtype": "float32",
            "batch_size": size,
            "share": share,
            "accuracy": 0.8 + share / 2,
            "dense_accuracy": 0.9,
            "mac_reduction": 0.7 - share,
            "compact_ms": size * (1.0 + share),
            "fastest_dense_ms": size * 3.0,
        }
        for size in (1, 8)
        for share in (0.0, 0.2)
    ]
    figure = plots.cascade_figure(rows)
    macs, *times = figure.axes
    expected = [([0.7, 0.5], [0.8, 0.9]), ([0.0], [0.9])]
    for line, (x, y) in zip(macs.lines, expected, strict=True):
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), y)
    assert figure.get_suptitle() == "vgg16, 32², float32"
    assert [axes.get_title() for axes in times] == ["batches of 1", "batches of 8"]
    for axes in times:  # an image's share of a batch
        np.testing.assert_allclose(axes.lines[0].get_xdata(), [1.0, 1.2])
        np.testing.assert_allclose(axes.lines[1].get_xdata(), [3.0])
    assert [text.get_text() for text in macs.texts] == ["pruned alone", "20% again"]
    plots.save(figure, tmp_path / "cascade.png")
    check_png(tmp_path / "cascade.png")
    assert plots.cascade_figure([]) is None


def test_groups_of_images_are_drawn_with_their_names(tmp_path):
    grey, coloured = np.zeros((2, 4, 4, 1), np.uint8), np.full((3, 4, 4, 3), 9, np.uint8)
    figure = plots.labelled_images_figure(
        {"few": (grey, ["a", "b"]), "more": (coloured, ["c", "d", "e"])}
    )
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "", "c", "d", "e"]
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 0, 1, 1, 1]
    assert [part.get_suptitle() for part in figure.subfigs] == ["few", "more"]
    plots.save(figure, tmp_path / "images.png")
    check_png(tmp_path / "images.png")
    assert plots.labelled_images_figure({"none": (grey[:0], [])}) is None
    assert plots.labelled_images_figure({}) is None


def test_sweep_draws_a_line_for_each_criterion_in_a_panel_for_each_set_of_weights(tmp_path):
    rows = [
        {"weights": weights, "criterion": name, "mac_reduction": cut, "accuracy": 1 - cut * (1 + i)}
        for weights in ("dense", "dropout")
        for i, name in enumerate(("attention", "random", "inverse"))
        for cut in (0.5, 0.0, 0.25)
    ]
    figure = plots.sweep_figure(rows)
    assert [axes.get_title() for axes in figure.axes] == [
        "dense weights",
        "weights after targeted dropout",
    ]
    for axes in figure.axes:
        labels = ["by attention", "by random", "by inverse"]
        assert [line.get_label() for line in axes.lines] == labels
        for i, line in enumerate(axes.lines, 1):
            np.testing.assert_array_equal(line.get_xdata(), [0.0, 0.25, 0.5])
            np.testing.assert_array_equal(line.get_ydata(), [1.0, 1.0 - i / 4, 1.0 - i / 2])
        assert percent(axes.xaxis, 0.5) == percent(axes.yaxis, 0.5) == 50
    plots.save(plots.sweep_figure(rows), tmp_path / "sweep.png")
    assert plots.sweep_figure([]) is None


def test_speedup_draws_a_line_for_each_batch_beside_the_ideal(tmp_path):
    rows = [
        {
            "network": "vgg16",
            "image_size": 32,
            "dtype": "float32",
            "batch_size": batch,
            "mac_reduction": cut,
            "speedup": 1 + cut,
        }
        for batch in (1, 8)
        for cut in (0.5, 0.0)
    ]
    (axes,) = plots.speedup_figure(rows).axes
    ideal, as_dense, *lines = axes.lines
    assert set(as_dense.get_ydata()) == {1.0}
    assert (ideal.get_xdata()[-1], ideal.get_ydata()[-1]) == (0.5, 2.0)
    assert [line.get_label() for line in lines] == ["batch 1", "batch 8"]
    for line in lines:
        np.testing.assert_array_equal(line.get_xdata(), [0.0, 0.5])
        np.testing.assert_array_equal(line.get_ydata(), [1.0, 1.5])
    plots.save(plots.speedup_figure(rows), tmp_path / "speedup.png")
    assert plots.speedup_figure([]) is None


def test_layer_times_draws_two_bars_a_layer(tmp_path):
    dense, compact = {"a": 2.0, "b": 1.0}, {"a": 1.5}
    (axes,) = plots.layer_times_figure(dense, compact).axes
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.0, 1.5, 0.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [bars.get_label().split(",")[0] for bars in axes.containers] == ["dense", "pruned"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first layer is drawn on top
    plots.save(plots.layer_times_figure(dense, compact), tmp_path / "layers.png")
    assert plots.layer_times_figure({}, {}) is None


def of_study(method, cut, *accuracies):
    return [
        {"method": method, "cut": cut, "mac_reduction": cut + 0.01, "accuracy": accuracy}
        for accuracy in accuracies
    ]


def test_curves_draw_the_mean_and_the_spread_over_seeds():
    rows = of_study("dense", 0.0, 0.9, 0.9, 0.6) + of_study("a", 0.5, 0.2, 0.7, 0.9)
    rows += of_study("a", 0.3, 0.8) + of_study("not shown", 0.3, 0.1)
    figure = plots.curves_figure(rows, {"dense": "dense", "a": "A", "missing": "M"}, "a study")
    (axes,) = figure.axes
    dense, curve = (line for line in axes.lines if line.get_linestyle() != "None")
    np.testing.assert_allclose(dense.get_ydata(), [0.8, 0.8])
    np.testing.assert_allclose(curve.get_xydata(), [[0.31, 0.8], [0.51, 0.6]])
    (bars,) = axes.collections
    spread = np.std([0.2, 0.7, 0.9], ddof=1)
    ends = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[0.8, 0.8], [0.6 - spread, 0.6 + spread]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "A"]
    assert plots.curves_figure(rows, {"dense": "dense"}, "") is None


def test_ablations_draw_a_bar_for_each_method_at_one_cut():
    rows = of_study("dense", 0.0, 0.9, 0.9, 0.6) + of_study("a", 0.3, 0.2, 0.7, 0.9)
    rows += of_study("a", 0.5, 0.1) + of_study("b", 0.3, 0.5)
    labels = {"dense": "dense", "b": "B", "a": "A", "missing": "M"}
    figure = plots.ablations_figure(rows, labels, 0.3, "a study")
    (axes,) = figure.axes
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [0.5, 0.6])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B", "A"]
    assert [text.get_text() for text in axes.texts] == ["50.0 ", "60.0 ", "dense "]
    *dots, dense = axes.lines
    assert [list(line.get_xdata()) for line in dots] == [[0.5], [0.2, 0.7, 0.9]]
    np.testing.assert_allclose(dense.get_xdata(), [0.8, 0.8])
    assert axes.get_xlabel() == "test accuracy with 30% of the MACs removed"
    assert plots.ablations_figure(rows, labels, 0.4, "") is None
