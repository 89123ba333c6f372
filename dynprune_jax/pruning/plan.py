"""Plans: in which form each convolution of a network is executed, found by measuring."""

import dataclasses
import functools
import json
import math
import os
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynprune_jax.convolution import convolve
from dynprune_jax.pruning import native
from dynprune_jax.pruning.calls import Images, as_function, batch_of, intercept
from dynprune_jax.pruning.compact_conv import CompactConv, plain_ratio
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.forms import Form, candidates
from dynprune_jax.pruning.layers import dynamic_layers, replaceable_layers
from dynprune_jax.pruning.masks import Masks

# After a first round, a form this much slower than the best is out.
_HOPELESS = 1.5
_TURN = 0.005  # seconds, see `interleaved`
# A layer is timed as so many in one call, if their maps have at most so many bytes. Alone it would
# find its kernel in the cache, where in a network those of other layers are, and if it is small the
# price of a call would hide how the forms differ.
_IN_A_ROW = 4
_SMALL = 2**22


@dataclasses.dataclass
class Plan:
    """The form of every convolution. Data: print it, save it, load it, change it.

    Attributes:
      forms: by layer name. A layer that is not named is executed masked, by XLA's convolution.
      milliseconds: what each form that came near the fastest took at its best, by layer name and
        form, for one batch.
      measured_on: where and for what: `device`, `processor`, `jax`, the shape and dtype of the
        `images`, the `layers` by their number, their weights and a digest of all that their times
        depend on, the `ratios` of the gates, and whether the `native` form was compiled, or why
        not.
    """

    forms: dict[str, Form]
    milliseconds: dict[str, dict[Form, float]] = dataclasses.field(default_factory=dict)
    measured_on: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fastest(self) -> dict[str, float]:
        """The milliseconds of each layer in its form, where they were measured."""
        return {
            name: self.milliseconds[name][form]
            for name, form in self.forms.items()
            if form in self.milliseconds.get(name, {})
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON, whole or not at all."""
        layers = {
            name: {
                "form": dataclasses.asdict(form),
                "milliseconds": [
                    {**dataclasses.asdict(other), "milliseconds": taken}
                    for other, taken in sorted(
                        self.milliseconds.get(name, {}).items(), key=lambda item: item[1]
                    )
                ],
            }
            for name, form in self.forms.items()
        }
        text = json.dumps({"measured_on": self.measured_on, "layers": layers}, indent=1)
        place = Path(os.path.realpath(path))  # what a link leads to
        part = place.with_name(f".plan.{uuid.uuid4().hex}.part")
        try:
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads a plan that `save` wrote, or one made by hand without times.

        Raises:
          ValueError: if the file is not a plan.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            plan = cls({}, {}, dict(stored.get("measured_on", {})))
            for name, layer in stored["layers"].items():
                plan.forms[name] = Form(**layer["form"])
                times = plan.milliseconds[name] = {}
                for entry in layer.get("milliseconds", ()):
                    form = dict(entry)
                    taken = float(form.pop("milliseconds"))
                    times[Form(**form)] = taken
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a plan; to have one measured there, delete it ({error})"
            ) from error
        return plan


def kept_plan(
    path: Path,
    model: nnx.Module,
    images: Images,
    *others: Any,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The plan in a file; if there is none, one is measured now, and kept there.

    A warning tells of one that was measured for something else, see `compact`.

    Args:
      path: of the file.
      model: as it will run.
      images: a batch, or its shape and dtype.
      *others: what else the model is called with.
      progress: see `measure_plan`.

    Raises:
      ValueError: if the file is not a plan, or a folder.
      OSError: if there is no folder for the file; before anything is measured.
    """
    if path.is_dir():
        raise ValueError(f"plan is {path}, which is a folder; give a file in it")
    if not path.exists():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to keep the plan in")
        plan = measure_plan(model, images, *others, progress=progress)
        plan.save(path)
        return plan
    plan = Plan.load(path)
    now, there = circumstances(model, images), plan.measured_on
    # JAX's version changes often; what an older plan does not tell is not compared.
    compared = ("device", "processor", "images", "ratios", "layers", "native")
    other = [what for what in compared if there.get(what, now[what]) != now[what]]
    if "ratios" in other and "layers" in other:
        other.remove("layers")  # a layer has its ratios
    for what in other:
        warnings.warn(
            f"the plan in {path} was measured for other {what} ({there[what]}, here"
            f" {now[what]}): the answers are the same, but other forms may be faster;"
            " delete it to have a plan measured anew",
            stacklevel=3,  # where `compact` is called
        )
    return plan


def interleaved(
    functions: Mapping[Any, Callable[[], Any]],
    repeats: int,
    warmup: int = 2,
    least: float | None = None,
) -> dict[Any, list[float]]:
    """Times functions in turn, so that a slow moment of the machine falls on all of them.

    Args:
      functions: each does its work and returns arrays, which are waited for.
      repeats: how many turns of each are timed.
      warmup: untimed turns of each before that.
      least: None: a turn is one call. Else a turn is as in steady use: one call that is not timed,
        while caches and threads still are with the function before, and then calls until so many
        seconds have passed.

    Returns:
      The mean seconds of a call, of every turn, by name.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            if least is not None:
                jax.block_until_ready(function())
            calls, start, passed = 0, time.perf_counter(), 0.0
            while not calls or passed < (least or 0.0):
                jax.block_until_ready(function())
                calls += 1
                passed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(passed / calls)
    return seconds


def measure_plan(
    model: nnx.Module,
    images: Images,
    *others: Any,
    repeats: int = 21,
    known: dict[Any, dict[Form, float]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Measures the forms of each convolution on this device, and keeps the fastest.

    Each layer is measured apart from the others, on random maps of the shapes it sees; the better
    forms of a small one as several in a row, each with a kernel of its own, as in a network.
    Layers of equal shape and gates share a measurement.

    Args:
      model: any NNX model, usually from `make_dynamic`, as it will run (`fold_batch_norms`).
      images: a batch, or its shape and dtype; the plan is for that batch size.
      *others: what else the model is called with.
      repeats: how often each form is timed after the first round.
      known: measurements of other networks on this device, to use and to add to.
      progress: called after each layer with how many are done, and how many there are.

    Raises:
      ValueError: for no images.
    """
    layers = replaceable_layers(model)
    batch_of(images)  # refuses what holds none
    shapes = _input_shapes(model, images, *others)
    plan = Plan({}, measured_on=circumstances(model, images))
    measured = {} if known is None else known
    for done, (name, shape) in enumerate(shapes.items()):
        case = _case(layers[name], shape)
        if case not in measured:
            measured[case] = _measure(layers[name], shape, repeats)
        plan.milliseconds[name] = dict(measured[case])  # the plan's own, to change
        plan.forms[name] = min(measured[case], key=measured[case].__getitem__)
        if progress is not None:
            progress(done + 1, len(shapes))
    return plan


def circumstances(model: nnx.Module, images: Images) -> dict[str, str]:
    """What the fastest forms of a model depend on here; see `Plan.measured_on`."""
    ratios = {
        f"{axis} {float(ratio[...]):.4g}"
        for gate in dynamic_layers(model).values()
        for axis in ("channel_ratio", "column_ratio", "feature_ratio")
        if (ratio := getattr(gate, axis)) is not None
    }
    sizes = {
        f"{name} {size}"
        for gate in dynamic_layers(model).values()
        for name in ("channel_group", "column_patch")
        if (size := getattr(gate, name)) > 1
    }
    layers, anywhere = replaceable_layers(model), jax.ShapeDtypeStruct((), jnp.float32)
    # All but the last, which older plans do not tell.
    cases = [(name, _case(layer, anywhere)[:-1]) for name, layer in layers.items()]
    weights = sum(layer.kernel[...].size for layer in layers.values())
    batch = batch_of(images)
    return {
        "device": jax.devices()[0].device_kind,
        "processor": f"{processor()}, {available_cores()} cores",
        "jax": jax.__version__,
        "images": f"{'x'.join(map(str, batch.shape))} {batch.dtype}",
        "layers": f"{len(cases)} of {weights:,} weights, {zlib.crc32(repr(cases).encode()):08x}",
        "ratios": ", ".join([*sorted(ratios), *sorted(sizes)]) or "none",
        "native": native.why_not() or "compiled",
    }


def processor() -> str:
    """The name of the device; of a CPU its maker's, where the system tells it.

    With its family and model: a virtual machine may call all of a maker's processors by one name.
    """
    kind, told = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    lines = told.read_text("utf-8").splitlines() if kind == "cpu" and told.exists() else []
    pairs = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    of_last_core = dict(pairs)
    name = of_last_core.get("model name", kind)
    if "cpu family" in of_last_core:
        name += f" (family {of_last_core['cpu family']}, model {of_last_core.get('model')})"
    return name


def available_cores() -> int:
    """How many CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _input_shapes(model: nnx.Module, *inputs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What each convolution sees, in the order of execution; the last call's, if several."""
    layers = set(replaceable_layers(model))  # names: `record` may hold no arrays
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def record(name: str, layer: Any, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if name in layers:
            batch = x.shape[:-3]
            flat = (math.prod(batch), *x.shape[-3:])
            shapes[name] = jax.ShapeDtypeStruct(flat, x.dtype)
        return call(x, *args, **kwargs)

    watched = intercept(model, nnx.Conv, record)
    function, arrays = as_function(watched, *inputs)
    jax.eval_shape(function, *arrays)
    return shapes


def _case(conv: nnx.Conv, shape: jax.ShapeDtypeStruct) -> Any:
    """All that the time of a layer depends on, so that equal layers are measured once."""
    gates = ()
    if isinstance(conv, DynamicConv):
        wanted = None if conv.feature_ratio is None else float(conv.feature_ratio[...])
        gates = (plain_ratio(conv, "channel"), plain_ratio(conv, "column"), wanted)
        gates += (conv.channel_group, conv.column_patch, conv.columns_of is not None)
    return (
        (shape.shape, str(shape.dtype), str(conv.dtype)),
        (conv.kernel[...].shape, str(conv.kernel[...].dtype)),
        (str(conv.strides), str(conv.padding), str(conv.kernel_dilation)),
        (str(conv.input_dilation), conv.feature_group_count, str(conv.precision)),
        gates,
        conv.conv_general_dilated is convolve,
    )


def _measure(conv: nnx.Conv, shape: jax.ShapeDtypeStruct, repeats: int) -> dict[Form, float]:
    """The milliseconds of one layer in each of its hopeful forms."""
    count = max(1, min(_IN_A_ROW, _SMALL // (math.prod(shape.shape) * shape.dtype.itemsize)))
    keys = jax.random.split(jax.random.key(0), count)
    maps = [jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype) for key in keys]
    gate = CompactConv(conv, Form())
    gate.choice_of = nnx.static(None)  # it is called by itself
    graph, state = nnx.split(gate)
    choose = jax.jit(lambda state, x: nnx.merge(graph, state).masks(x))
    all_masks = [choose(state, x) for x in maps]
    masks = all_masks[0]
    alone = {
        form: _row(conv, form, maps[:1], all_masks[:1])
        for form in candidates(
            conv,
            shape.shape[0],
            group_size=0 if masks.channels is None else gate.group_size(shape.shape[-1]),
            columns=masks.columns is not None,
            features=masks.features is not None,
            platform=jax.default_backend(),
            wide=jnp.finfo(conv.dtype or jnp.result_type(shape.dtype, conv.kernel.dtype)).bits > 32,
        )
    }
    for form in [form for form in alone if form.product == "pallas"]:
        try:
            jax.block_until_ready(alone[form]())
        except Exception as error:  # a GPU that the kernel does not suit raises many kinds
            warnings.warn(f"the form '{form}' is left out: {error!s:.200}", stacklevel=2)
            del alone[form]
    if len(alone) == 1:
        return _best_milliseconds(interleaved(alone, 1))
    times = _best_milliseconds(interleaved(alone, 2, warmup=0, least=_TURN))
    limit = _HOPELESS * min(times.values())
    hopeful = {form: run for form, run in alone.items() if times[form] <= limit}
    if count > 1:
        hopeful = {form: _row(conv, form, maps, all_masks) for form in hopeful}
    times = _best_milliseconds(interleaved(hopeful, repeats, warmup=1, least=_TURN))
    return {form: ms / count for form, ms in times.items()}


def _best_milliseconds(seconds: Mapping[Form, list[float]]) -> dict[Form, float]:
    """Of each form its best turn: what else runs on the machine only ever adds to it."""
    return {form: 1e3 * min(taken) for form, taken in seconds.items()}


def _row(
    conv: nnx.Conv, form: Form, maps: list[Any], all_masks: list[Masks]
) -> Callable[[], list[jax.Array]]:
    """A compiled call of as many layers in a row as there are maps, each in this form."""
    graph, state = nnx.split(CompactConv(conv, form))
    states = [jax.tree.map(jnp.copy, state) for _ in maps]
    leaves, structure = jax.tree.flatten((states, maps, all_masks))
    run = jax.jit(lambda *leaves: _in_a_row(graph, *jax.tree.unflatten(structure, leaves)))
    return functools.partial(run, *leaves)  # leaves: states are flattened in Python


def _in_a_row(
    graph: Any, states: list[Any], maps: list[jax.Array], all_masks: list[Masks]
) -> list[jax.Array]:
    """Convolves maps one after the other, each with a kernel of its own."""
    results = []
    for state, x, masks in zip(states, maps, all_masks, strict=True):
        if results:  # adds nothing, and waits for the one before
            x = x + (0 * jnp.sum(results[-1][:1, :1, :1, :1])).astype(x.dtype)
        layer = nnx.merge(graph, state)
        results.append(layer.convolve(x, masks))
        if layer.chooses_outputs:
            layer.handover.clear()  # there is no normalization here to take it
    return results
