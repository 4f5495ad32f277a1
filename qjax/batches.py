"""What calibration runs on: samples cut into batches, or random ones; its progress."""

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.text
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How samples become batches: QuantizeML's parameters, with its defaults.

    Attributes:
      num_samples: So many are used, the first ones; all of them if there are fewer.
      batch_size: Examples of a batch; None: one.
      epochs: How often the samples are gone through.

    Raises:
      ValueError: for what is no whole number of at least 1.
    """

    num_samples: int = 1024
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
    """Samples in batches, in order, again for each epoch; `len` counts them all.

    The last batch of an epoch holds what is left.

    Attributes:
      inputs: The samples of each input of the model, the first axis that of examples.
      number: How many examples are used.
      schedule: How they are cut.
    """

    inputs: tuple[Any, ...]
    number: int
    schedule: Schedule

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
    """Cuts samples into batches. Copies nothing.

    Args:
      samples: The samples of the input of a model, or a tuple of those of each input.
      example: Shapes of the inputs of a batch.
      schedule: How to cut.

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
    inputs = samples if isinstance(samples, tuple) else (samples,)
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
    wanted = [x.shape for x in jax.tree.leaves(example)]
    structure: Any = jax.tree.structure(inputs)
    same = structure == jax.tree.structure(example)
    if not same or [*map(len, shapes)] != [*map(len, wanted)]:
        raise ValueError(
            "`samples` must be an array of the axes of a batch, examples first, or a "
            f"tuple of one for each input. A batch has inputs of {wanted}, `samples` "
            f"has {shapes}. Pass what is in batches already as `batches`."
        )
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "`samples` must hold at least one example, and as many of each input; got "
            f"inputs of {shapes}."
        )
    return Batches(inputs, min(*sizes, schedule.num_samples), schedule)


def check_axes(batches: Any, example: tuple[Any, ...]) -> None:
    """Raises for an array that is no row of batches.

    Args:
      batches: Of any type; arrays are looked at.
      example: Shapes of the inputs of a batch.

    Raises:
      ValueError: if it has not one axis more than the input of the model.
    """
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


def random_samples(
    shape: tuple[int, ...],
    dtype: DTypeLike = "uint8",
    *,
    low: float | None = None,
    high: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draws values where there is no data: QuantizeML's rule.

        integers: uniform in {low, ..., high};  real: uniform in [low, high)

    of NumPy's ``default_rng(seed)``, the integers as int64. Ranges found on them are no
    substitute for those of data.

    Args:
      shape: Of the samples, examples first.
      dtype: Of the samples, an integer or a real type.
      low: Least value; None: that of an integer type.
      high: Largest value; None: that of an integer type.
      seed: Of the generator.

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
    """Batches per second."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        speed = task.finished_speed or task.speed
        return rich.text.Text("" if speed is None else f"{speed:.1f} batches/s")


@contextlib.contextmanager
def progress_bar(
    total: int | None, is_shown: bool | None
) -> Iterator[Callable[[], object]]:
    """Shows how many batches are done, on standard error.

    Args:
      total: Number of batches; None if it is unknown: no remaining time then.
      is_shown: None: if standard error is a terminal.

    Yields:
      What to call after each batch.
    """
    console = rich.console.Console(stderr=True)
    columns: list[rich.progress.ProgressColumn] = [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _Rate(),
    ]
    if total is not None:
        columns.append(rich.progress.TimeRemainingColumn())
    is_off = not (console.is_terminal if is_shown is None else is_shown)
    with rich.progress.Progress(*columns, console=console, disable=is_off) as bar:
        task = bar.add_task("calibrate", total=total)
        yield lambda: bar.advance(task)
