import ast
import runpy

import pytest
from conftest import CONFIGS
from flax import nnx

from dynprune_jax import config as config_lib
from dynprune_jax.build import build_dynamic, build_links, build_model
from dynprune_jax.config import with_fields
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.methods import find_method
from dynprune_jax.pruning.attention import STATISTICS
from dynprune_jax.pruning.layers import dynamic_layers

FILES = sorted(CONFIGS.glob("*.py"))
CLASSES = {"digits": (10, 1), "cifar10": (10, 3), "cifar100": (100, 3), "imagenet100": (100, 3)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_is_valid_and_builds(path):
    config = runpy.run_path(str(path))["get_config"]()
    config_lib.check(config)
    classes, channels = CLASSES.get(config.data.name, (1000, 3))

    model = nnx.eval_shape(lambda: build_model(config, classes, channels))
    links = build_links(config, model, channels)  # which cannot be found under a trace
    dynamic = nnx.eval_shape(lambda model: build_dynamic(config, model, links), model)
    assert dynamic_layers(dynamic)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_method_of_a_study_builds(path):
    config = runpy.run_path(str(path))["get_config"]()
    classes, channels = CLASSES.get(config.data.name, (1000, 3))
    model = nnx.eval_shape(lambda: build_model(config, classes, channels))
    built = []
    for name in {*config.study.methods, *config.study.ablations}:
        fields = find_method(name).fields
        assert all(field.startswith(("gate.", "static.", "ascent.", "prune.")) for field in fields)
        changed = with_fields(config, fields)
        config_lib.check(changed)
        if changed.gate in built:  # of several methods it is the same network
            continue
        built.append(changed.gate)
        found = build_links(changed, model, channels)
        dynamic = nnx.eval_shape(
            lambda dense, c=changed, found=found: build_dynamic(c, dense, found), model
        )
        assert dynamic_layers(dynamic)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_says_how_to_run_it_and_what_to_expect(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    for part in ("Paper:", "Command:", "Hardware and time:", "Result:"):
        assert f"\n{part}" in docstring
    assert f"--config=configs/{path.name}" in docstring


def test_a_config_s_file_may_name_a_statistic(config, monkeypatch):
    config.gate.statistic = "own"
    with pytest.raises(UserError, match=r"gate\.statistic is 'own'; choose one of mean, max, l2"):
        config_lib.check(config)
    monkeypatch.setitem(STATISTICS, "own", STATISTICS["mean"])
    config_lib.check(config)
