"""Settings that hold for every test: strict JAX, several fake devices; a small config."""

import gc
import itertools
import os
import runpy
import signal
import tempfile
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest
from ml_collections import ConfigDict

CONFIGS = Path(__file__).parent.parent / "configs"

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the tests' time is compilation: a cheap one here, and in processes that are started.
_CHEAP = ["--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):  # later jaxlibs end at the flag, which they do not know
    _CHEAP.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_CHEAP, os.environ.get("XLA_FLAGS", "")])
# Cheaper still; `rounded_alike` and an environment without JAX's variables do without it.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# What one test has compiled, the next does not compile again.
_CACHE = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

gc.set_threshold(100_000, 100, 100)  # see `forgotten`

# A job in the background of a script is started with Ctrl-C ignored; what obeys it is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What the tests of one file leave is nothing that those of the next have to carry.

    In a process full of traces and programs all takes longer, lowering a new one the most; and
    Python's search for garbage looks at every object that it has not been told to pass over: once
    a file is enough.
    """
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture
def rounded_alike():
    """Code that rounds every element in the same way, as the cheapest does not.

    Max pooling takes the first of equals, and its gradient goes there: for a test that compares
    two programs, one rounding of one of them is another step.
    """
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the tests prepare their data sets, once."""
    return str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def config(data_dir):
    """The digits job, small enough for seconds: 8 dense steps, then 16 with targeted dropout."""
    config = ConfigDict(runpy.run_path(str(CONFIGS / "digits_vgg.py"))["get_config"]())
    config.model = "networks:small_vgg"
    config.batch_size = 16
    config.eval_batch_size = 40
    config.log_every_steps = 4
    config.evaluate_every_epochs = 1
    config.data.data_dir = data_dir
    config.data.image_size = 8
    config.data.train_examples = 128
    config.data.test_examples = 100
    config.dense.epochs = 1
    config.dense.warmup_epochs = 0.0
    config.prune.epochs = 2
    config.ascent.warmup = 0.2
    config.ascent.increment = 0.1
    config.ascent.interval_epochs = 0.5
    config.gate.channel_ratio = (0.3, 0.5)
    config.gate.column_ratio = (0.0, 0.3)
    config.sweep.fractions = (0.0, 1.0)
    config.benchmark.repeats = 3
    return config


@pytest.fixture
def symbolic_shapes():
    """What checks our annotations in tests cannot tell that a batch of n images has n masks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def few_forms(monkeypatch):
    """Plans of two forms a layer: to measure all takes a minute, and tells nothing here."""
    from dynprune_jax.pruning import plan  # not above: annotations are not checked yet there

    every = plan.candidates
    monkeypatch.setattr(plan, "candidates", lambda *a, **k: itertools.islice(every(*a, **k), 2))


@pytest.fixture
def plain_plans(monkeypatch):
    """Plans of a benchmark that were not measured, with every layer as XLA has it."""
    from dynprune_jax.experiments import timing  # as above
    from dynprune_jax.pruning import forms, layers, plan, time_budget

    def measure_plan(model, images, **options):
        names, plain = layers.replaceable_layers(model), forms.Form()
        return plan.Plan(dict.fromkeys(names, plain), {name: {plain: 1.0} for name in names})

    monkeypatch.setattr(timing, "measure_plan", measure_plan)
    monkeypatch.setattr(time_budget, "measure_plan", measure_plan)


@pytest.fixture
def short_reports(monkeypatch):
    """Reports with one control of three and no pictures, where neither is what is tested."""
    from dynprune_jax import report  # as above

    few = {name: report.CRITERIA[name] for name in ("attention", "random")}
    monkeypatch.setattr(report, "CRITERIA", few)
    monkeypatch.setattr(report, "_draw", lambda *_: None)
