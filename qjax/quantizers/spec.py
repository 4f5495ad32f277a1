"""The options of a quantizer: frozen, printable, a pytree of numbers."""

import dataclasses
import numbers
import types
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np

from qjax.quantizers.learning import Learning

_Value = TypeVar("_Value")

_SPECS: dict[str, type["Spec"]] = {}

SPECS = types.MappingProxyType(_SPECS)  # Name of a quantizer -> class of its options.


def static(default: _Value, *, kw_only: bool = False) -> _Value:
    """Returns a field that is never traced: part of the structure of the pytree."""
    field: _Value = dataclasses.field(
        default=default, kw_only=kw_only, metadata={"static": True}
    )
    return field


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Spec:
    """The base of the options of all quantizers.

    A pytree: its leaves are the numbers and arrays among the fields that are not
    static, so that bits, scales and thresholds may be traced and ``vmap``ped. ``str``
    gives a string that `qjax.quantizers.parse` reads back to an equal spec.

    Attributes:
      name: Name of the quantizer, in strings.
      learning: The learned arrays that it takes after ``x``; None if there are none.
    """

    name: ClassVar[str] = ""
    learning: ClassVar[Learning | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            _SPECS[cls.name] = cls
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, cls._unflatten)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = _as_tuple(value)
            if field.type in (bool, "bool"):
                value = _as_bool(self.name, field.name, value)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raises for invalid options, as far as their values are known."""

    @classmethod
    def _unflatten(cls, aux: tuple[Any, ...], leaves: Any) -> "Spec":
        names, constants = aux
        spec = object.__new__(cls)
        for name, value in (*zip(names, leaves, strict=True), *constants):
            object.__setattr__(spec, name, value)
        return spec

    def _options(self) -> list[str]:
        """Returns the options that differ from their defaults."""
        return [
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if not _is_same(getattr(self, field.name), field.default)
        ]

    def __str__(self) -> str:
        return f"{self.name}({','.join(self._options())})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._options())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _is_same(getattr(self, f.name), getattr(other, f.name))
            for f in dataclasses.fields(self)
        )

    def __hash__(self) -> int:
        return hash(str(self))


def is_known(*values: Any) -> bool:
    """Returns whether numbers have values now, unlike tracers and tree placeholders."""
    kinds = numbers.Number | np.ndarray | np.generic | jax.Array | tuple
    return all(
        isinstance(v, kinds) and not isinstance(v, jax.core.Tracer) for v in values
    )


def check_number(
    spec: Spec,
    field: str,
    rule: str,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    is_open: bool = False,
    is_whole: bool = False,
) -> None:
    """Raises if a known number breaks a rule.

    Args:
      spec: Options.
      field: Name of the number. What is traced passes, and None where that is the
        default.
      rule: The rule in words, for the message.
      low: Least value.
      high: Largest value.
      is_open: Whether ``low`` itself is not allowed.
      is_whole: Whether it must be an integer.

    Raises:
      ValueError: naming the quantizer, the field and the rule.
    """
    value = getattr(spec, field)
    default = type(spec).__dataclass_fields__[field].default
    if value is None and default is None:
        return
    is_text = value is None or isinstance(value, str)
    if not is_text and not is_known(value):
        return
    x = np.asarray(np.nan if is_text else value, np.float64)
    good = (x > low if is_open else x >= low) & (x <= high)
    if is_whole:
        good &= x == np.rint(x)
    if not np.all(good):
        raise ValueError(f"`{spec.name}`: `{field}` must be {rule}, got {value!r}.")


def require(spec: Spec, holds: bool, rule: str) -> None:
    """Raises ValueError with the rule that a combination of options breaks."""
    if not holds:
        raise ValueError(f"`{spec.name}`: {rule} Got {spec}.")


def _flatten_with_keys(spec: Spec) -> tuple[Any, Any]:
    leaves: list[tuple[str, Any]] = []
    constants: list[tuple[str, Any]] = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        is_leaf = not field.metadata.get("static") and not isinstance(
            value, str | tuple | bool | None
        )
        (leaves if is_leaf else constants).append((field.name, value))
    keyed = tuple((jax.tree_util.GetAttrKey(name), value) for name, value in leaves)
    return keyed, (tuple(name for name, _ in leaves), tuple(constants))


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _as_bool(name: str, field: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_) and value not in (0, 1):
        raise ValueError(f"`{name}`: `{field}` must be True or False, got {value!r}.")
    return bool(value)


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    plain = str | bool | None
    if isinstance(a, plain) or isinstance(b, plain):
        return type(a) is type(b) and a == b
    return is_known(a, b) and np.array_equal(np.asarray(a), np.asarray(b))


def _text(value: Any) -> str:
    if isinstance(value, str | bool | None):
        return repr(value)
    if not is_known(value):
        return str(value)
    if isinstance(value, tuple) or np.ndim(value):
        parts = value if isinstance(value, tuple) else np.asarray(value)
        return f"[{','.join(map(_text, parts))}]"
    number = np.asarray(value).item()
    return repr(number)
