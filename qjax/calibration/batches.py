"""Batches for calibration: samples cut into batches, random samples, a progress bar."""

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.text
from jax.typing import DTypeLike

from qjax.leaves import difference, is_array, leaf_names, shapes_of, show_leaves

MOST_SAMPLES = 1024  # QuantizeML's.


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The way samples become batches: QuantizeML's parameters, with its defaults.

    Attributes:
      num_samples: Number of samples used, the first ones; all if there are fewer.
      batch_size: Examples of a batch; None: one.
      epochs: Number of passes over the samples.

    Raises:
      ValueError: for what is no whole number of at least 1.
    """

    num_samples: int = MOST_SAMPLES
    batch_size: int | None = None
    epochs: int = 1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is None and name == "batch_size":
                continue
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(
                    f"`{name}` must be a whole number of at least 1, got {value!r}."
                )


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of samples, in order, repeated each epoch; `len` counts all batches.

    The last batch of an epoch holds what is left.

    Attributes:
      inputs: The samples of each input of the model, the first axis that of examples.
      number: Number of examples that are used.
      schedule: Schedule of the cuts.
      left_out: Number of examples that are not used.
    """

    inputs: tuple[Any, ...]
    number: int
    schedule: Schedule
    left_out: int = 0

    def __len__(self) -> int:
        return self.schedule.epochs * len(self._starts)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for _ in range(self.schedule.epochs):
            for start in self._starts:
                part = slice(start, min(start + self._starts.step, self.number))
                yield jax.tree.map(lambda x, part=part: x[part], self.inputs)

    @property
    def _starts(self) -> range:
        return range(0, self.number, self.schedule.batch_size or 1)


def cut(samples: Any, example: tuple[Any, ...], schedule: Schedule) -> Batches:
    """Cuts samples into batches without a copy.

    Args:
      samples: The samples of the input of a model, or a tuple of those of each input.
      example: Shapes of the inputs of a batch.
      schedule: Schedule of the cuts.

    Returns:
      The batches, tuples of inputs.

    Raises:
      ValueError: if ``samples`` has not the inputs, or not the axes, of a batch; if
        there are none, or the inputs differ in their number.
    """
    if isinstance(samples, Iterator):
        raise ValueError(
            "`samples` must be an array, got an iterator. Pass what yields batches as "
            "`batches`."
        )
    is_list = isinstance(samples, list)
    inputs = (samples,) if is_list else as_inputs(samples, example)
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
    wanted = [x.shape for x in jax.tree.leaves(example)]
    structure: Any = jax.tree.structure(inputs)
    same = structure == jax.tree.structure(example)
    if not same or [*map(len, shapes)] != [*map(len, wanted)]:
        raise ValueError(
            "`samples` must be an array of the axes of a batch, examples first, or a "
            f"tuple of one for each input. A batch has inputs of {wanted}, `samples` "
            f"has {shapes}. Pass what is in batches already as `batches`. "
            f"{difference(inputs, example)}".rstrip()
        )
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "`samples` must hold at least one example, and as many of each input; got "
            f"inputs of {shapes}."
        )
    (size,) = sizes
    number = min(size, schedule.num_samples)
    return Batches(inputs, number, schedule, size - number)


def as_inputs(batch: Any, example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a batch as the inputs of a model.

    Args:
      batch: A tuple or a list of inputs, or the only input, which may itself be a
        tuple, a named one, a dictionary or any other pytree.
      example: The inputs that the model was made for, or their shapes.

    Returns:
      A tuple of inputs, nested as ``example`` if ``batch`` can be read so.
    """
    structure: Any = jax.tree.structure(example)
    several = tuple(batch) if isinstance(batch, list) else batch
    for inputs in (several, (batch,)):
        if isinstance(inputs, tuple) and jax.tree.structure(inputs) == structure:
            return inputs
    return batch if type(batch) is tuple else (batch,)


def check_batches(batches: Any, example: tuple[Any, ...]) -> None:
    """Raises for a value that is no iterable of batches, before it is used.

    Args:
      batches: Batches of any type; of arrays the axes are looked at.
      example: Shapes of the inputs of a batch.

    Raises:
      TypeError: for a batch, or a model, in place of several batches.
      ValueError: for an array that has not one axis more than the input of the model.
    """
    is_one = isinstance(batches, Mapping | str | bytes) or hasattr(batches, "_fields")
    is_many = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if is_one or not is_many:
        raise TypeError(
            "`batches` must be an iterable of batches, such as a list or a generator, "
            f"got {type(batches).__name__}{_no_data(batches)}. Pass one batch as "
            "`[batch]`, examples that are to be cut into batches as `samples=`."
        )
    rank = getattr(batches, "ndim", None)
    wanted = [x.shape for x in jax.tree.leaves(example)]
    if rank is None or [rank] == [len(shape) + 1 for shape in wanted]:
        return
    raise ValueError(
        "An array as `batches` is read along its first axis, each entry a batch: it "
        f"must have one axis more than the input of the model. Inputs have {wanted}, "
        f"the array has shape {tuple(batches.shape)}. Pass the examples themselves as "
        "`samples=`."
    )


def fault(inputs: tuple[Any, ...], example: Any, first: Any) -> str:
    """Describes what is wrong with a batch, alone or beside the first batch.

    Args:
      inputs: Inputs of the batch, from `as_inputs`.
      example: Shapes of the inputs that the model was made for.
      first: Inputs of the first batch; None for that one.

    Returns:
      The rest of a sentence that begins with the batch, or "".
    """
    leaves = zip(leaf_names(inputs), jax.tree.leaves(inputs), strict=True)
    for name, x in leaves:
        if not is_array(x):
            return (
                f"has at {name} a {type(x).__name__} in place of an array. Convert it "
                "with `numpy.asarray`."
            )
    found = shapes_of(inputs)
    shapes = [x.shape for x in jax.tree.leaves(found)]
    if any(0 in shape for shape in shapes):
        return f"is empty: its inputs have the shapes {shapes}."
    if not have_same_kinds(found, example) or difference(found, example, _same_rank):
        where = difference(found, example, _same_rank)
        return (
            f"has inputs of {show_leaves(found)}, the model was made for "
            f"{show_leaves(example)}. A batch is an array of the same rank and kind, "
            f"or a tuple of one for each input{_no_data(*inputs)}. {where}".rstrip()
        )
    where = "" if first is None else difference(found, first, _same_rest)
    if where:
        return (
            f"has inputs of {show_leaves(found)}, the first one had "
            f"{show_leaves(first)}. Batches may differ in their number of examples "
            f"alone. {where}"
        )
    return ""


def _no_data(*inputs: Any) -> str:
    """Explains that a module or a state of Flax NNX is no data."""
    is_flax = any(type(x).__module__.startswith("flax.nnx") for x in inputs)
    return ", and no state of a module: that holds parameters" if is_flax else ""


def have_same_kinds(inputs: Any, example: Any) -> bool:
    """Returns whether two inputs have one structure and the same kinds of types."""
    kinds = lambda tree: [_kind(x.dtype) for x in jax.tree.leaves(shapes_of(tree))]
    structure: Any = jax.tree.structure(inputs)
    same: bool = structure == jax.tree.structure(example)
    return same and kinds(inputs) == kinds(example)


def same_kind(a: Any, b: Any) -> bool:
    """Returns whether two types are both real, both integer, or equal."""
    return _kind(a.dtype) == _kind(b.dtype)


def _same_rank(a: Any, b: Any) -> bool:
    return same_kind(a, b) and len(a.shape) == len(b.shape)


def _same_rest(a: Any, b: Any) -> bool:
    return bool(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype)


def _kind(dtype: Any) -> str:
    """Returns "floating" or "integer" for a type of numbers, else its own name."""
    for kind in (jnp.floating, jnp.integer):
        if jnp.issubdtype(dtype, kind):
            return str(kind.__name__)
    return str(dtype)


def random_samples(
    shape: tuple[int, ...],
    dtype: DTypeLike = "uint8",
    *,
    low: float | None = None,
    high: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draws random samples where there is no data, by QuantizeML's rule.

        integers: uniform in {low, ..., high};  real: uniform in [low, high)

    of NumPy's ``default_rng(seed)``, the integers as int64. Ranges found on them are no
    substitute for those of data.

    Args:
      shape: Shape of the samples, examples first.
      dtype: Type of the samples, integer or real.
      low: Least value; None: that of an integer type.
      high: Largest value; None: that of an integer type.
      seed: Seed of the generator.

    Returns:
      The samples.

    Raises:
      ValueError: for real types without both ends, and types that are no numbers.

    Example:
      >>> random_samples((2, 3), "int8", seed=5)
      array([[  43,   78, -123],
             [  78,   -8,    3]], dtype=int8)

    References:
      QuantizeML 1.2.5; checked by `tests/conformance`.
    """
    kind, rng = jnp.dtype(dtype), np.random.default_rng(seed)
    if jnp.issubdtype(kind, jnp.integer):
        info = jnp.iinfo(kind)
        least = info.min if low is None else int(low)
        most = info.max if high is None else int(high)
        return rng.integers(least, most, shape, endpoint=True).astype(kind)
    if jnp.issubdtype(kind, jnp.floating) and low is not None and high is not None:
        return rng.uniform(low, high, shape).astype(kind)
    raise ValueError(
        "`dtype` must be an integer type, or a real one with `low` and `high`; got "
        f"{kind} with low={low}, high={high}."
    )


class _Rate(rich.progress.ProgressColumn):
    """The rate of a progress bar in units per second."""

    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        speed = task.finished_speed or task.speed
        if speed is None and task.elapsed:
            speed = (task.completed - task.fields["done"]) / task.elapsed
        return rich.text.Text(f"{speed:.1f} {self._unit}/s" if speed else "")


@contextlib.contextmanager
def progress_bar(
    total: int | None,
    is_shown: bool | None,
    title: str = "calibrate",
    unit: str = "batches",
    *,
    done: int = 0,
) -> Iterator[Callable[..., object]]:
    """Shows the number of batches done, on standard error.

    Args:
      total: Number of batches; None if it is unknown: no remaining time then.
      is_shown: None: if standard error is a terminal.
      title: Title of the bar.
      unit: Name of what is counted.
      done: Number that is done at the start.

    Yields:
      The function to call after each batch, or with the number of several.
    """
    console = rich.console.Console(stderr=True)
    columns: list[rich.progress.ProgressColumn] = [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _Rate(unit),
    ]
    if total is not None:
        columns.append(rich.progress.TimeRemainingColumn())
    is_off = not (console.is_terminal if is_shown is None else is_shown)
    with rich.progress.Progress(*columns, console=console, disable=is_off) as bar:
        task = bar.add_task(title, total=total, completed=done, done=done)
        yield lambda number=1: bar.advance(task, number)
