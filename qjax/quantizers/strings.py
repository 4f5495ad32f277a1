"""Specs from strings in QKeras's syntax: "quantized_bits(4,0,1,alpha='auto_po2')".

    spec  = name [ "(" [ item { "," item } ] ")" ]
    item  = [ name "=" ] value
    value = number | string | True | False | None | "[" { value [ "," ] } "]"

Read by a parser of its own: nothing is evaluated.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from qjax.quantizers.spec import SPECS, Spec

# Options that only Keras has a use for: read, and dropped.
_KERAS_ONLY = frozenset({"var_name", "use_variables", "enable_fast_inference"})

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:inf|nan)\b)"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<string>'[^']*'|\"[^\"]*\")"
    r"|(?P<mark>[()\[\],=])"
    r"|(?P<end>$))"
)
_WORDS = {"True": True, "False": False, "None": None}


def parse(text: str) -> Spec:
    """Reads a spec from a string in QKeras's syntax.

    Args:
      text: Name of a quantizer, with or without its options in parentheses: first by
        position, in the order of the fields, then by name. Numbers, ``True``,
        ``False``, ``None``, quoted strings, and lists with commas or spaces. Forms of
        older QKeras are read where they cannot be meant as today's:
        ``quantized_po2(4, -1)``, ``binary('auto')``.

    Returns:
      A spec: `apply` and `encode` take it. ``parse(str(spec)) == spec``.

    Raises:
      TypeError: for what is no string.
      ValueError: with the place of what cannot be read; for an unknown quantizer or
        option, with the closest there are; for options that a quantizer cannot have.
        The message shows today's form.

    Example:
      >>> parse("quantized_bits(4, 0, 1, alpha='auto_po2')")
      QuantizedBits(bits=4, symmetric=True, alpha='auto_po2')
    """
    if not isinstance(text, str):
        raise TypeError(f"A quantizer is named by a string, got {text!r}.")
    name, options = read_call(text, _positional)
    options = _of_today(text, name, options)
    fields = [field.name for field in dataclasses.fields(SPECS[name])]
    for option in options:
        if option not in fields and option not in _KERAS_ONLY:
            hint = closest(option, fields)
            raise ValueError(
                f"`{name}` has no option {option!r}. {hint} Its form: {form(name)}."
            )
    kept = {k: v for k, v in options.items() if k not in _KERAS_ONLY}
    try:
        return SPECS[name](**kept)
    except ValueError as error:
        raise ValueError(f"{error} Its form: {form(name)}.") from error


def form(name: str) -> str:
    """Returns the signature of a quantizer: its options by position, with defaults.

    Example:
      >>> form("quantized_ulaw")
      'quantized_ulaw(bits=8, integer=0, symmetric=False, u=255.0)'
    """
    fields = [f for f in dataclasses.fields(SPECS[name]) if not f.kw_only]
    return f"{name}({', '.join(f'{f.name}={f.default!r}' for f in fields)})"


def _of_today(text: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Reads the signatures of older QKeras where they differ from today's.

    ``quantized_tanh(bits, integer, symmetric)`` had integer bits, which today's has
    not; ``max_value=-1`` was none; `binary` began with ``alpha``, which is a real
    number or a word where today's first option is a truth value.
    """
    found = dict(options)
    if name == "quantized_tanh":
        second = found.get("use_stochastic_rounding", False)
        integer = found.pop("integer", 0 if second in (0, 1) else second)
        if integer != 0:
            raise ValueError(
                f"Cannot read {text!r}: it is of an older QKeras, where `integer` came "
                "second. Today's values lie between -1 and 1, without integer bits: "
                f"{form(name)}. For others use `quantized_bits(bits, integer)`."
            )
    if name in ("quantized_po2", "quantized_relu_po2"):
        if _is_minus_one(found.get("max_value")):
            found["max_value"] = None
    if name == "binary" and isinstance(found.get("use_01"), float | str):
        if "alpha" in found:
            raise ValueError(
                f"Cannot read {text!r}: `use_01` is True or False. Its form: "
                f"{form(name)}."
            )
        found["alpha"] = found.pop("use_01")
    return found


def _is_minus_one(value: Any) -> bool:
    """Returns whether a value is the number -1, which stood for None."""
    return isinstance(value, int | float) and value == -1


def _positional(name: str) -> list[str]:
    """Returns the options of a quantizer that may be positional."""
    if name not in SPECS:
        raise ValueError(f"Unknown quantizer {name!r}. {closest(name, SPECS)}")
    return [f.name for f in dataclasses.fields(SPECS[name]) if not f.kw_only]


def read_call(
    text: str, positional: Callable[[str], list[str]]
) -> tuple[str, dict[str, Any]]:
    """Reads a name with its options.

    Args:
      text: Text, written as for `parse`.
      positional: Name -> options that may go by position; raises for unknown names.

    Returns:
      The name, and its options by name.

    Raises:
      ValueError: with the place of what cannot be read.
    """
    reader = _Reader(text)
    name = reader.take("name", "a name")
    by_position = positional(name)
    options: dict[str, Any] = {}
    if reader.kind != "end":
        reader.mark("(")
        while not reader.has(")"):
            option, value = _item(reader, by_position, options)
            if option in options:
                reader.fail(f"{option!r} is given twice")
            options[option] = value
            if not reader.has(")"):
                reader.mark(",")
        reader.mark(")")
    reader.take("end", "nothing more")
    return name, options


def _item(
    reader: "_Reader", by_position: list[str], options: dict[str, Any]
) -> tuple[str, Any]:
    """Returns one option: its name and its value."""
    if reader.kind == "name" and reader.text not in _WORDS:
        option, reader.has_named = reader.take("name", "an option"), True
        reader.mark("=")
        return option, _value(reader)
    position = len(options)
    if reader.has_named:
        reader.fail("options by position come before those by name")
    if position >= len(by_position):
        known = f": {', '.join(by_position)}" if by_position else ""
        reader.fail(f"at most {len(by_position)} options may go by position{known}")
    return by_position[position], _value(reader)


def _value(reader: "_Reader") -> Any:
    if reader.has("["):
        reader.mark("[")
        items = []
        while not reader.has("]"):
            items.append(_value(reader))
            if reader.has(","):
                reader.mark(",")
        reader.mark("]")
        return items
    if reader.kind == "name" and reader.text in _WORDS:
        return _WORDS[reader.take("name", "a value")]
    if reader.kind == "string":
        return reader.take("string", "a value")[1:-1]
    number = reader.take("number", "a value: a number, a word in quotes, a list")
    try:
        return int(number)
    except ValueError:
        return float(number)


class _Reader:
    """A reader of the tokens of a text with one token of lookahead."""

    def __init__(self, text: str):
        self.kind, self.text, self.has_named = "", "", False
        self._source, self._at = text, 0
        self._advance()

    def has(self, mark: str) -> bool:
        """Returns whether a mark comes next."""
        return self.kind == "mark" and self.text == mark

    def mark(self, mark: str) -> None:
        """Takes a mark, or raises."""
        if not self.has(mark):
            self.fail(f"{mark!r} is wanted")
        self._advance()

    def take(self, kind: str, wanted: str) -> str:
        """Takes a token of a kind, or raises."""
        if self.kind != kind:
            self.fail(f"{wanted} is wanted")
        text = self.text
        if kind != "end":
            self._advance()
        return text

    def fail(self, message: str) -> NoReturn:
        """Raises with the place in the text."""
        found = f"found {self.text!r}" if self.text else "found the end"
        raise ValueError(
            f"Cannot read {self._source!r}: {message} at character "
            f"{self._start}, {found}."
        )

    def _advance(self) -> None:
        match = _TOKEN.match(self._source, self._at)
        if match is None or match.lastgroup is None:
            rest = self._source[self._at :].lstrip()
            self._start, self.text = len(self._source) - len(rest), rest[:1]
            self.fail("no such sign is known")
        self.kind = match.lastgroup
        self.text = match[match.lastgroup]
        self._start, self._at = match.start(match.lastgroup), match.end()


def closest(name: str, known: Iterable[str]) -> str:
    """Returns a hint with the names closest to an unknown one."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return f"The closest: {', '.join(close)}."
    return f"There are: {', '.join(sorted(known))}."
