import json
import shlex
import sys

import pytest
from PIL import Image

from dynprune_jax import config as config_lib
from dynprune_jax.errors import UserError
from dynprune_jax.experiments import study as study_lib
from dynprune_jax.experiments.methods import METHODS, find_method
from dynprune_jax.experiments.study import at_cut, study
from dynprune_jax.experiments.study_tables import figures, read_rows, tables
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.run import Run
from dynprune_jax.train import train_and_evaluate


@pytest.fixture
def small(config, short_reports):
    config.gate.column_ratio = ()
    config.ascent.increment = 0.4
    config.study.seeds = (3,)
    config.study.cuts = (0.2, 0.3)
    config.study.methods = ("l1",)
    config.study.ablations = ("both",)
    config.study.ablation_cut = 0.3
    return config


def test_a_study_runs_each_point_once(small, tmp_path, monkeypatch):
    rows = study(small, tmp_path)
    points = {(row["method"], row["cut"], row["seed"]) for row in rows}
    assert points == {
        ("dense", 0.0, 3),
        ("l1", 0.2, 3),
        ("l1", 0.3, 3),
        ("both", 0.3, 3),
    }
    for row in rows:
        coarse = 0.11 if row["method"] == "both" else 0.04  # the last maps have 4 columns
        assert 0 <= row["mac_reduction"] - row["cut"] < coarse
        assert 0 <= row["accuracy"] <= 1
        spread = row["executed_macs_per_image"]
        assert (spread["min"] < spread["max"]) == (row["method"] == "both")
        text = (
            (tmp_path / f"{row['method']}-{row['cut'] * 100:g}-seed3.json").read_text("utf-8")
            if row["cut"]
            else (tmp_path / "dense-seed3.json").read_text("utf-8")
        )
        assert json.loads(text) == row
        assert str(tmp_path) not in text  # no path of this machine
    both = next(row for row in rows if row["method"] == "both")
    assert both["config"]["gate.column_ratio"] == [both["config"]["gate.column_ratio"][0]] * 2
    for name in ("curves", "ablations"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 150

    def fail(*_):
        raise AssertionError("a finished run ran again")

    monkeypatch.setattr(study_lib, "_pruned", fail)
    monkeypatch.setattr(study_lib, "_dense", fail)
    assert study(small, tmp_path) == rows
    assert (tmp_path / "table.md").read_text("utf-8") == "\n\n".join(tables(rows)) + "\n"


def test_a_study_is_of_one_config(small, tmp_path, monkeypatch):
    """And of its own folder: what lies in the one that a user happens to be in is no matter."""
    monkeypatch.setattr(study_lib, "_runs", lambda *_: {})
    study(small, tmp_path / "study")
    small.study.seeds = (3, 4)  # more of it
    small.data.threads = 1
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoints").mkdir(parents=True)
    (elsewhere / "config.json").write_text('{"a": 1}')
    monkeypatch.chdir(elsewhere)
    assert study(small, tmp_path / "study") == []
    at_cut(small, 0.2)
    small.dense.learning_rate = 0.5
    with pytest.raises(UserError, match=r"of another config: config\.dense\.learning_rate is"):
        study(small, tmp_path / "study")
    with pytest.raises(UserError, match="is of another config"):
        study(small, elsewhere)
    (elsewhere / "config.json").write_text(small.to_json())
    with pytest.raises(UserError, match="is a run's; give a study a folder of its own"):
        study(small, elsewhere)
    small.data.image_size = 1
    with pytest.raises(UserError, match="image_size"):
        study(small, tmp_path / "other")
    small.prune.epochs = 0
    with pytest.raises(UserError, match=r"config\.prune\.epochs is 0; a study"):
        study(small, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_no_training_can_make_is_said_before_it(small, tmp_path, monkeypatch, capfd):
    said = []

    def train(*_):
        said.append(capfd.readouterr().out)
        return row("dense", 0.0, 3, 0.5)

    monkeypatch.setattr(study_lib, "_dense", train)
    monkeypatch.setattr(study_lib, "_pruned", lambda _, name, cut, *__: row(name, cut, 3, 0.5))
    # Filters of the first block alone leave; gates skip columns too, in both.
    small.gate.channel_ratio, small.gate.column_ratio = (0.2, 0.0), (0.5, 0.5)
    small.study.methods, small.study.ablations = ("attention", "l1+as_gates", "trained_on"), ()
    small.study.cuts, small.ascent.increment = (0.2, 0.6, 0.99), 0.2
    with pytest.raises(UserError, match=r"^not done: attention-99, l1"):
        study(small, tmp_path)
    (lines,) = said
    assert "attention-99: config.study: no factor" in lines
    assert "l1+as_gates-99: config.study: no factor" in lines
    assert "l1+as_gates-60: config.static.allotment is 'gate', and the gates skip 60." in lines
    points = {(row["method"], row["cut"]) for row in read_rows(tmp_path)}
    assert points == {
        ("dense", 0.0),
        ("attention", 0.2),
        ("attention", 0.6),
        ("l1+as_gates", 0.2),
        *(("trained_on", cut) for cut in small.study.cuts),
    }


def test_where_no_cut_can_be_made_no_dense_network_is_trained(small, tmp_path, monkeypatch):
    def trained(*_):
        raise AssertionError("for nothing")

    monkeypatch.setattr(study_lib, "_dense", trained)
    small.study.methods, small.study.cuts, small.study.ablations = ("attention",), (0.99,), ()
    with pytest.raises(UserError, match=r"^not done: attention-99; attention-99: config\.study"):
        study(small, tmp_path)


def test_only_what_is_missing_is_looked_at_before(small, tmp_path, monkeypatch):
    def trained(*_):
        raise AssertionError("begun")

    def none(_, points):
        return [(point, UserError("no factor")) for point in points]

    monkeypatch.setattr(study_lib, "_dense", trained)
    monkeypatch.setattr(study_lib, "_impossible", none)
    monkeypatch.setattr(study_lib, "_opened", lambda _: None)
    monkeypatch.setattr(study_lib, "figures", lambda _: {})
    small.study.seeds, small.study.cuts, small.study.ablations = (3, 4), (0.99,), ()
    small.study.methods = ("attention",)
    for seed in small.study.seeds:
        with pytest.raises(UserError, match=r"^not done: attention-99; attention-99: no factor$"):
            study(small, tmp_path)
        result = row("attention", 0.99, seed, 0.5)
        (tmp_path / f"attention-99-seed{seed}.json").write_text(json.dumps(result))
    with pytest.raises(AssertionError, match="begun"):  # the dense networks are missing
        study(small, tmp_path)
    small.study.methods = ()  # and can be all that is asked for
    with pytest.raises(AssertionError, match="begun"):
        study(small, tmp_path)


def test_lower_cuts_of_other_convolutions_are_looked_at_too(small):
    """Gates on fewer convolutions need higher ratios for less, and do not get there in time."""
    small.gate.layers = ("blocks/*/layers/1/conv",)
    small.gate.channel_ratio, small.gate.column_ratio = (0.5, 0.5), ()
    small.ascent.warmup, small.ascent.increment = 0.2, 0.2
    points = [("attention", cut) for cut in (0.65, 0.75, 0.8)]
    found = dict(study_lib._impossible(small, points))
    assert [cut for _, cut in found] == [0.8, 0.65]
    small.gate.block_columns, small.gate.column_ratio = True, (0.5, 0.5)
    assert not [*study_lib._impossible(small, [("attention", 0.99)])]


def test_a_study_may_start_from_a_checkpoint(small, tmp_path):
    small.prune.epochs, epochs = 0, small.prune.epochs
    train_and_evaluate(small, tmp_path / "dense")
    small.prune.epochs, small.prune.start = epochs, "checkpoint"
    small.prune.checkpoint = str(tmp_path / "dense")
    assert not [*study_lib._impossible(small, [("l1", 0.2), ("attention", 0.2)])]


def test_what_another_process_has_done_meanwhile_is_not_done_again(small, tmp_path, monkeypatch):
    small.study.seeds, small.study.cuts, small.study.ablations = (0, 1), (0.2,), ()
    done = []

    def train(config, name, *rest):
        (tmp_path / "dense-seed1.json").write_text(json.dumps(row("dense", 0.0, 1, 0.5)))
        done.append(name)
        return row("dense", 0.0, 0, 0.5) if isinstance(name, int) else row(name, 0.2, 0, 0.5)

    monkeypatch.setattr(study_lib, "_dense", train)
    monkeypatch.setattr(study_lib, "_pruned", train)
    monkeypatch.setattr(study_lib, "_impossible", lambda *_: ())
    study(small, tmp_path)
    assert done == [0, "l1", "l1"]


def test_a_study_goes_on_past_what_fails(small, tmp_path, capfd):
    small.study.methods, small.study.cuts = ("l1",), (0.99, 0.2)
    small.study.ablations = ()
    with pytest.raises(UserError, match=r"^not done: l1-99; l1-99: config"):
        study(small, tmp_path)
    lines = capfd.readouterr().out
    assert "l1-99: config.study: no factor" in lines
    assert "run 1 of 3: dense-seed3\n" in lines
    assert "run 3 of 3: l1-20-seed3\n" in lines
    points = {(row["method"], row["cut"]) for row in read_rows(tmp_path)}
    assert points == {("dense", 0.0), ("l1", 0.2)}
    assert "| static, L1 norm |" in (tmp_path / "table.md").read_text("utf-8")
    with pytest.raises(UserError, match="is a study's; give a run a folder of its own"):
        Run.open(small, tmp_path)


def test_a_study_goes_on_with_the_next_seed(small, tmp_path, monkeypatch):
    def train(config, name, *_):
        if (config, name) == (small, 1):
            raise UserError("the loss is nan")
        return row("dense", 0.0, 0, 0.5) if isinstance(name, int) else row(name, 0.2, 0, 0.5)

    monkeypatch.setattr(study_lib, "_dense", train)
    monkeypatch.setattr(study_lib, "_pruned", train)
    monkeypatch.setattr(study_lib, "figures", lambda _: {})
    small.study.seeds, small.study.cuts, small.study.ablations = (0, 1, 2), (0.2,), ()
    with pytest.raises(UserError, match=r"^not done: dense-seed1; dense-seed1: the loss is nan$"):
        study(small, tmp_path)
    found = {path.name for path in tmp_path.glob("*-seed*.json")}
    assert found == {f"{name}-seed{seed}.json" for name in ("dense", "l1-20") for seed in (0, 2)}


@pytest.mark.parametrize("text", ['{"method": "l1", "cut"', "[]", '{"method": "l1", "cut": 0.2}'])
def test_a_file_that_is_no_result_is_said(small, tmp_path, text):
    (tmp_path / "l1-20-seed3.json").write_text(text)
    with pytest.raises(UserError, match=r"l1-20-seed3\.json is no result of a study; delete it"):
        study(small, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["l1-20-seed3.json"]


@pytest.mark.parametrize("cut", [0.15, 0.6])
def test_ratios_that_are_scaled_to_a_cut_are_proportions(config, cut):
    """Those of the config itself, which no run has, need not be reached, nor skip anything."""
    config.ascent.increment = 0.05
    config.gate.channel_ratio, config.gate.column_ratio = (0.1, 0.3), ()
    scaled = at_cut(config, cut)
    for others in ((0.3, 0.9), (0.0001, 0.0003)):
        config.gate.channel_ratio = others
        found = at_cut(config, cut).gate.channel_ratio
        assert found == pytest.approx(scaled.gate.channel_ratio, abs=2e-3)


@pytest.mark.parametrize("cut", [0.15, 0.6])
def test_ratios_are_scaled_to_a_cut(config, tmp_path, cut):
    config.ascent.increment = 0.5
    scaled = at_cut(config, cut)
    assert scaled.gate.layers == config.gate.layers
    for axis in ("channel_ratio", "column_ratio"):
        before, after = config.gate[axis], scaled.gate[axis]
        factors = {round(b / a, 2) for a, b in zip(before, after, strict=True) if a and b < 0.95}
        assert len(factors) == 1
        assert [b == 0 for b in after] == [a == 0 for a in before]
    run = Run.open(scaled, tmp_path)
    targets = run.dynamic.values(PruneRatio)
    assert run.mac_reduction() >= cut
    assert run.mac_reduction({name: 0.99 * ratio for name, ratio in targets.items()}) < cut


def test_shared_columns_are_counted_on_images(config, tmp_path):
    """Where both sides lose columns, how many taps are left depends on where the columns are."""
    config.data.image_size = 16
    config.gate.channel_ratio = ()
    config.gate.column_ratio = (0.3, 0.3)
    config.gate.block_columns = True
    config.ascent.increment = 0.5
    run = Run.open(at_cut(config, 0.5), tmp_path)
    assert run.evaluate(run.dynamic).usage.mac_reduction == pytest.approx(0.5, abs=0.02)


def test_gates_go_on_every_convolution_where_a_cut_needs_it(config):
    config.gate.layers = ("blocks/*/layers/1/conv",)
    assert at_cut(config, 0.1).gate.layers == ("blocks/*/layers/1/conv",)
    config.ascent.increment = 0.5
    assert at_cut(config, 0.8).gate.layers == ("*",)
    with pytest.raises(UserError, match=r"no factor .* cuts 99% .*; the highest cut 9\d\.\d%$"):
        at_cut(config, 0.99)


def row(method, cut, seed, accuracy, untrained=0.1):
    return {
        "method": method,
        "cut": cut,
        "seed": seed,
        "accuracy": accuracy,
        "mac_reduction": cut,
        "accuracy_untrained": untrained,
        "executed_mac_reduction": cut,
        "accuracy_by_other_criteria": {"random": accuracy / 2, "inverse": 0.1},
        "config": {"model": "vgg16", "data.image_size": 32},
        "data": {"classes": 10, "train_examples": 50000},
    }


def test_pictures_say_what_they_are_of():
    rows = [row(name, cut, seed, 0.9) for seed in (0, 1) for name, cut in (("dense", 0), ("l1", 1))]
    rows += [row("attention", cut, 0, 0.9) for cut in (0.5, 0.7)]
    curves, ablations = (figures(rows)[name] for name in ("curves", "ablations"))
    title = "vgg16, 32², 10 classes, 50,000 training images, 2 seeds"
    assert curves.axes[0].get_title() == ablations.get_suptitle() == title
    (alone,) = figures(rows[-2:])["curves"].axes
    assert alone.get_title().endswith(" images, 1 seed")


def test_the_tables_by_hand():
    rows = [
        row("dense", 0.0, 0, 0.9),
        row("dense", 0.0, 1, 0.92),
        row("l1", 0.5, 0, 0.7),
        row("attention", 0.5, 0, 0.88),
        row("attention", 0.5, 1, 0.9),
        row("attention", 0.7, 0, 0.8, untrained=0.2),
        row("random", 0.5, 0, 0.3),
    ]
    curves, single, controls = tables(rows)
    static = [dict(one) for one in rows]
    for one in static[3:5]:
        one["accuracy_made_static"] = one["accuracy"] - 0.01
    made = tables(static)
    assert made[:2] == [curves, single]
    assert [line.split(" | ")[-1] for line in made[2].splitlines()] == [
        "made static |",
        "|---|---|---|---|---|---|---|",
        "88.00 ± 1.41 |",
        "not measured |",
    ]
    assert curves.splitlines() == [
        "| method | dense | 50% cut | 70% cut |",
        "|---|---|---|---|",
        "| dynamic, by attention | 91.00 ± 1.41 | 89.00 ± 1.41 | 80.00 |",
    ]
    assert single.splitlines() == [
        "| at a cut of 50% | accuracy | without training for it | executed cut |",
        "|---|---|---|---|",
        "| dynamic, by attention | 89.00 ± 1.41 | 10.00 ± 0.00 | 50.0% |",
        "| static, L1 norm | 70.00 | 10.00 | 50.0% |",
        "| random selection | 30.00 | 10.00 | 50.0% |",
    ]
    assert controls.splitlines() == [
        "| weights trained for | cut | its own choice | one for a batch | random | inverse |",
        "|---|---|---|---|---|---|",
        "| dynamic, by attention | 50% | 89.00 ± 1.41 | not measured | 44.50 ± 0.71"
        " | 10.00 ± 0.00 |",
        "| dynamic, by attention | 70% | 80.00 | not measured | 40.00 | 10.00 |",
    ]
    assert tables([]) == []


def test_the_table_of_cascades_by_hand():
    def cascade(*pairs):
        return [
            {"share": share, "accuracy": accuracy, "mac_reduction": 0.7 - share}
            for share, accuracy in pairs
        ]

    rows = [
        row("dense", 0.0, 0, 0.9),
        row("attention", 0.5, 0, 0.6),
        row("attention", 0.7, 0, 0.5) | {"cascade": cascade((0.0999, 0.7), (0.3, 0.8))},
        row("attention", 0.7, 1, 0.5) | {"cascade": cascade((0.1, 0.8), (0.3, 0.8))},
        row("attention", 0.7, 2, 0.9),  # it was not looked at again
        row("l1", 0.5, 0, 0.4) | {"cascade": cascade((0.2, 0.7))},
        row("l1", 0.7, 0, 0.4) | {"cascade": []},
    ]
    *_, table = tables(rows)
    assert table.splitlines() == [
        "| the dense network sees again | cut | none | the least sure 10% | the least sure 20%"
        " | the least sure 30% |",
        "|---|---|---|---|---|---|",
        "| dynamic, by attention | 70% | 50.00 ± 0.00 | 75.00 ± 7.07 (60.0%) | not measured"
        " | 80.00 ± 0.00 (40.0%) |",
        "| static, L1 norm | 50% | 40.00 | not measured | 70.00 (50.0%) | not measured |",
    ]


def test_the_one_cut_is_that_of_most_methods():
    rows = [row("attention", cut, 0, 0.9) for cut in (0.5, 0.7)] + [row("l1", 0.3, 0, 0.8)]
    rows += [row(name, 0.5, 0, 0.7) for name in ("random", "inverse")]
    rows += [row(name, 0.5, 0, 0.6) for name in ("l1+taylor", "of_old")]  # shown nowhere
    rows += [{**row("random", 0.5, 1, 0.9), "mac_reduction": 0.506}]
    del rows[-1]["executed_mac_reduction"]
    curves, one, _ = tables(rows)
    assert [line.split(" | ")[0] for line in curves.splitlines()[2:]] == [
        "| dynamic, by attention",
        "| static, L1 norm",
    ]
    assert one.splitlines()[0].startswith("| at a cut of 50% |")
    assert [line.split(" | ")[::3] for line in one.splitlines()[2:]] == [
        ["| dynamic, by attention", "50.0% |"],
        ["| random selection", "50.0% |"],
        ["| inverse selection", "50.0% |"],
    ]


def test_a_run_without_a_report_has_its_accuracy_in_the_tables():
    whole = [row("predicted", cut, 0, 0.8) for cut in (0.4, 0.55)] + [row("random", 0.55, 0, 0.7)]
    known = ("method", "cut", "seed", "accuracy", "mac_reduction")
    rows = [{name: r[name] for name in known} for r in whole]
    curves, one, controls = tables(rows)
    assert curves.endswith("| not measured | 80.00 | 80.00 |")
    assert one.endswith("| random selection | 70.00 | not measured | not measured |")
    assert controls.endswith("| 55% | 80.00 | not measured | not measured | not measured |")


def test_the_command_of_a_run_repeats_it_alone(config, monkeypatch):
    config.seed = 3
    monkeypatch.setattr("sys.argv", ["main.py", "--mode=study", "--config", "my configs/x.py"])
    more = ["--config.study.seeds=(1, 2)", "-config.prune.epochs=10", "--config.data.path=/here"]
    places = ["--config.data.data_dir=/there", "--config.data.archive=/a.tar"]
    monkeypatch.setattr("sys.argv", [*sys.argv, *more, *places])
    config.data.archive = "/a.tar"
    line = study_lib.command("l1", 0.55, config)
    flags = [part for part in shlex.split(line)[3:] if "DIR" not in part]
    assert flags == [
        "--mode=study",
        "--config=my configs/x.py",
        "--config.data.name=digits",
        "--config.data.archive=FILE",
        "--config.prune.epochs=10",
        "--config.study.seeds=(3,)",
        "--config.study.methods=('l1',)",
        "--config.study.cuts=(0.55,)",
        "--config.study.ablations=()",
    ]
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert study_lib.command("l1", 0.55, config) is None


def test_methods_join(config):
    joined = find_method("l1+distillation")
    assert joined.label == "static, L1 norm, distilled from the dense network"
    assert joined.is_static
    assert joined.removes
    assert joined.fields == {"static.criterion": "l1", "prune.distillation": 0.7}
    assert not find_method("predicted+distillation").is_static
    trained_on = find_method("trained_on+distillation")
    assert trained_on.is_static
    assert not trained_on.removes
    with pytest.raises(UserError, match=r"l1\+taylor contradict each other in config.static"):
        find_method("l1+taylor")
    with pytest.raises(UserError, match=r"as_gates needs one that removes filters, such as l1\+as"):
        find_method("as_gates")
    with pytest.raises(UserError, match=r"trained_on\+as_gates needs one that removes filters"):
        find_method("trained_on+as_gates")
    for name, field in (
        ("l1+shared", "gate.criterion"),
        ("no_ascent+taylor", "ascent.warmup"),
        ("l1+as_gates+shared", "gate.criterion"),
        ("l1+predicted", "gate.kind"),
    ):
        with pytest.raises(UserError, match=rf"has no gates; config\.{field} is theirs"):
            find_method(name)
    assert "gate.kind" in find_method("l1+as_predicted").fields


def test_an_unknown_method_is_said(small, tmp_path):
    small.study.methods = ("attention", "l1+attentoin")
    with pytest.raises(UserError, match=r"config.study.methods has 'l1\+attentoin'; choose of att"):
        study(small, tmp_path / "not_made")
    assert not (tmp_path / "not_made").exists()


def test_every_method_changes_fields_that_are_there(config):
    fields = config_lib.flatten(config)
    for method in METHODS.values():
        assert method.fields.keys() <= fields.keys()
    for name in {*config.study.methods, *config.study.ablations}:
        find_method(name)


def test_a_method_changes_what_its_name_says():
    for field, names in {
        "gate.statistic": ("max", "l2"),
        "gate.criterion": ("random", "inverse", "shared"),
        "static.criterion": ("l1", "geometric_median", "taylor"),
    }.items():
        for name in names:
            assert find_method(name).fields == {field: name}
    assert find_method("no_dropout").fields == {"gate.drop_probability": 0.0}
    assert find_method("channels").fields == {"gate.column_ratio": ()}
    assert find_method("columns").fields["gate.channel_ratio"] == ()
    assert find_method("elastic").fields["ascent.lowest_fraction"] == 0.0


@pytest.mark.parametrize("name", ["attention", "l1"])
def test_a_row_tells_what_the_report_of_its_run_does(config, tmp_path, monkeypatch, name):
    def result(accuracy):
        spread = {"mean": 1.0, "min": 1.0, "max": 1.0}
        macs = {"macs_per_image": spread, "executed_macs_per_image": spread}
        reductions = {"mac_reduction": 0.5, "executed_mac_reduction": 0.4}
        return {"accuracy": accuracy, "gate_operations_per_image": 7, **macs, **reductions}

    untrained = {"attention": "targeted_dropout", "l1": "training"}[name]
    report = {
        "dense": result(0.9),
        "pruned": result(0.8),
        f"pruned_without_{untrained}": result(0.3),
        "pruned_by_other_criteria": {"random": result(0.2)},
        "pruned_made_static": result(0.7) if name == "attention" else None,
        "cascade": [{"share": 0.1, "threshold": 0.6, **result(0.85)}],
        **dict.fromkeys(("dense_macs_per_image", "device", "versions", "data", "seconds"), 1),
    }
    monkeypatch.setattr(study_lib, "_at_point", lambda config, *_: config)
    trains = {"attention": "train_and_evaluate", "l1": "static"}[name]
    monkeypatch.setattr(study_lib, trains, lambda *_: report)
    row = study_lib._pruned(config, name, 0.5, 3, tmp_path / "dense", tmp_path / "run")
    assert (row["accuracy"], row["accuracy_untrained"]) == (0.8, 0.3)
    assert row["accuracy_by_other_criteria"] == {"random": 0.2}
    assert row.get("accuracy_made_static") == (0.7 if name == "attention" else None)
    (cascade,) = row["cascade"]
    assert (cascade["share"], cascade["threshold"], cascade["accuracy"]) == (0.1, 0.6, 0.85)


@pytest.mark.parametrize(
    ("field", "value"), [("eval_batch_size", 20), ("prune.recalibration_images", 40)]
)
def test_rows_of_a_study_are_evaluated_alike(small, tmp_path, monkeypatch, field, value):
    monkeypatch.setattr(study_lib, "_runs", lambda *_: {})
    study(small, tmp_path)
    with pytest.raises(UserError, match=rf"of another config: config\.{field} is"):
        study(study_lib.with_fields(small, {field: value}), tmp_path)
