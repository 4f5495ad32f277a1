"""Schemes to JSON and back: whole, validated, with the path of any error."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from qjax import estimators, rounding
from qjax.affine import Axis, QSpec
from qjax.calibration.calibrator import Calibrator, parse_calibrator
from qjax.qpoint import Estimator, clipped_ste
from qjax.quantizers.spec import Spec, is_known
from qjax.quantizers.strings import closest, parse
from qjax.schemes.patterns import Where
from qjax.schemes.rules import Constraints, Rule
from qjax.schemes.words import Word

_ESTIMATORS: dict[str, Estimator] = {
    "clipped_ste": clipped_ste,
    "plain_ste": estimators.plain_ste,
}
_ROUNDINGS = {"half_even": rounding.half_even, "half_away": rounding.half_away}


class SchemeError(ValueError):
    """An error for JSON that is no scheme; it begins with the path of the wrong key."""


def write(
    scheme: Mapping[str, Any], usual: Mapping[str, Any], *, indent: int | None = 2
) -> str:
    """Writes the fields of a scheme as JSON, except those with default values.

    Args:
      scheme: Name -> value of each field of a `Scheme`.
      usual: The same of the one with its defaults.
      indent: Indent, passed to ``json.dumps``.

    Returns:
      Text, as `Scheme.to_json` describes it.

    Raises:
      ValueError: for what has no text.
    """
    found: dict[str, Any] = {}
    for role in ("weights", "activations"):
        word = _word_out(role, scheme[role])
        if word != _word_out(role, usual[role]):
            found[role] = word
    if scheme["calibrator"] != usual["calibrator"]:
        found["calibrator"] = _calibrator_out("calibrator", scheme["calibrator"])
    if scheme["estimator"] != usual["estimator"]:
        found["estimator"] = _name_of("estimator", _ESTIMATORS, scheme["estimator"])
    if scheme["buffer_bits"] != usual["buffer_bits"]:
        found["buffer_bits"] = scheme["buffer_bits"]
    fields = dataclasses.asdict(scheme["constraints"])
    plain = dataclasses.asdict(usual["constraints"])
    if fields != plain:
        found["constraints"] = {k: v for k, v in fields.items() if v != plain[k]}
    rules = [_rule_out(f"rules[{k}]", rule) for k, rule in enumerate(scheme["rules"])]
    if rules:
        found["rules"] = rules
    return json.dumps(found, indent=indent)


_S = TypeVar("_S")


def read(text: str, make: Callable[..., _S]) -> _S:
    """Reads a scheme from JSON.

    Args:
      text: Text in the form of `write`.
      make: `Scheme`, which is made of the fields that are there.

    Returns:
      The scheme.

    Raises:
      SchemeError: with the path of the wrong key, what was expected there, and the
        closest key there is.
    """
    try:
        data = json.loads(text, object_pairs_hook=_Object)
    except RecursionError as error:
        raise SchemeError("No JSON of a scheme: it is nested too deeply.") from error
    except (TypeError, ValueError) as error:
        raise SchemeError(f"No JSON: {error}.") from error
    fields = {
        "weights": _word_in,
        "activations": _word_in,
        "rules": _rules_in,
        "calibrator": _calibrator_in,
        "estimator": _chosen(_ESTIMATORS),
        "buffer_bits": _buffer_in,
        "constraints": _constraints_in,
    }
    found: _S = _made("", make, _read("", data, fields))
    return found


_In = Callable[[str, Any], Any]


class _Object(dict[str, Any]):
    """An object of JSON, with the first key that occurs twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        is_whole = len(keys) == len(self)
        self.twice = None if is_whole else next(k for k in keys if keys.count(k) > 1)


def _read(path: str, data: Any, fields: Mapping[str, _In]) -> dict[str, Any]:
    """Reads the fields of an object."""
    if not isinstance(data, dict):
        raise SchemeError(
            f"{path or 'The scheme'}: an object is wanted, got {_short(data)}."
        )
    check_keys(path, data, fields)
    return {key: fields[key](_join(path, key), value) for key, value in data.items()}


def check_keys(path: str, data: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises for a repeated or unknown key, with the closest known key."""
    if isinstance(data, _Object) and data.twice is not None:
        raise SchemeError(f"{_join(path, data.twice)}: this key is there twice.")
    for key in data:
        if key not in known:
            at = _join(path, key)
            raise SchemeError(f"{at}: no such key is known. {closest(key, known)}")


def _short(data: Any) -> str:
    """Returns a found value as text, cut where it is long."""
    try:
        text = repr(data)
    except RecursionError:
        text = f"a {type(data).__name__} that is nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _made(path: str, make: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        return make(**options)
    except (TypeError, ValueError, OverflowError) as error:
        raise SchemeError(f"{path or 'The scheme'}: {error}") from error
    except RecursionError as error:
        raise SchemeError(f"{path}: it is nested too deeply.") from error


def _word_out(path: str, word: Word | None) -> Any:
    if word is None:
        return None
    if not is_known(*(getattr(word, f.name) for f in _numbers(word))):
        raise ValueError(f"{path}: only known numbers go into JSON, got {word}.")
    if isinstance(word, Spec):
        return str(word)
    default, found = QSpec(), {"bits": int(word.bits)}  # type: ignore[arg-type]
    for field in dataclasses.fields(QSpec):
        value = getattr(word, field.name)
        if field.name != "bits" and value != getattr(default, field.name):
            found[field.name] = value
    if "rounding" in found:
        name = _name_of(f"{path}.rounding", _ROUNDINGS, word.rounding)
        return {**found, "rounding": name}
    return found


def _numbers(word: Word) -> list[Any]:
    """Returns the fields that may be traced."""
    fields = dataclasses.fields(word)
    if isinstance(word, QSpec):
        return [f for f in fields if f.name == "bits"]
    plain = str | bool | tuple | None
    return [f for f in fields if not isinstance(getattr(word, f.name), plain)]


def _word_in(path: str, data: Any) -> Word | None:
    if data is None:
        return None
    if isinstance(data, str):
        spec: Spec = _made(path, parse, {"text": data})
        return spec
    fields: dict[str, _In] = {
        "bits": _int_in,
        "signed": _bool_in,
        "narrow_range": _bool_in,
        "symmetric": _bool_in,
        "power_of_two": _bool_in,
        "axis": _axis_in,
        "rounding": _chosen(_ROUNDINGS),
    }
    word: QSpec = _made(path, QSpec, _read(path, data, fields))
    return word


def _rule_out(path: str, rule: Rule) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(rule.pattern, Where):
        fields = dataclasses.fields(Where)
        chosen = {f.name: getattr(rule.pattern, f.name) for f in fields}
        default = Where()
        found["where"] = {k: v for k, v in chosen.items() if v != getattr(default, k)}
    elif isinstance(rule.pattern, str):
        found["pattern"] = rule.pattern
    else:
        raise ValueError(
            f"{path}: a predicate goes into JSON as a `Where`, got {rule.pattern}."
        )
    if rule.bits is not None:
        if not is_known(rule.bits) or np.ndim(rule.bits):
            raise ValueError(f"{path}.bits: only known numbers go into JSON.")
        found["bits"] = int(rule.bits)  # type: ignore[arg-type]
    else:
        found["spec"] = _word_out(f"{path}.spec", rule.spec)
    if rule.calibrator is not None:
        found["calibrator"] = _calibrator_out(f"{path}.calibrator", rule.calibrator)
    if rule.buffer_bits is not None:
        found["buffer_bits"] = rule.buffer_bits
    if rule.estimator is not None:
        name = _name_of(f"{path}.estimator", _ESTIMATORS, rule.estimator)
        found["estimator"] = name
    if rule.reasons:
        found["reasons"] = dict(rule.reasons)
    if rule.optional:
        found["optional"] = True
    if rule.per_step:
        found["per_step"] = True
    return found


def _rules_in(path: str, data: Any) -> tuple[Rule, ...]:
    if not isinstance(data, list):
        raise SchemeError(f"{path}: a list of rules is wanted, got {_short(data)}.")
    return tuple(_rule_in(f"{path}[{k}]", rule) for k, rule in enumerate(data))


def _rule_in(path: str, data: Any) -> Rule:
    fields: dict[str, _In] = {
        "pattern": _text_in,
        "where": _where_in,
        "spec": _word_in,
        "calibrator": _calibrator_in,
        "buffer_bits": _buffer_in,
        "estimator": _chosen(_ESTIMATORS),
        "reasons": _reasons_in,
        "optional": _bool_in,
        "per_step": _bool_in,
        "bits": _int_in,
    }
    found = _read(path, data, fields)
    if ("pattern" in found) == ("where" in found):
        raise SchemeError(f"{path}: either `pattern` or `where` is wanted.")
    if "where" in found:
        found["pattern"] = found.pop("where")
    rule: Rule = _made(path, Rule, found)
    return rule


def _where_in(path: str, data: Any) -> Where:
    globs = "name layer op activation inputs feeds feeds_only lstm".split()
    fields: dict[str, _In] = {
        **dict.fromkeys(globs, _globs_in),
        "role": _role_in,
        "ranks": _ranks_in,
    }
    where: Where = _made(path, Where, _read(path, data, fields))
    return where


def _constraints_in(path: str, data: Any) -> Constraints:
    fields: dict[str, _In] = {
        **dict.fromkeys(("kept", "joined", "overwritten", "split"), _names_in),
        "least_range": _number_in,
        "bias_bits": _int_in,
    }
    found: Constraints = _made(path, Constraints, _read(path, data, fields))
    return found


def _names_in(path: str, data: Any) -> tuple[str, ...]:
    if not isinstance(data, list):
        raise SchemeError(f"{path}: a list of names is wanted, got {data!r}.")
    return tuple(_text_in(f"{path}[{k}]", name) for k, name in enumerate(data))


def _number_in(path: str, data: Any) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise SchemeError(f"{path}: a number is wanted, got {data!r}.")
    return float(data)


def _globs_in(path: str, data: Any) -> str | tuple[str, ...]:
    if isinstance(data, list):
        return tuple(_text_in(f"{path}[{k}]", glob) for k, glob in enumerate(data))
    return _text_in(path, data)


def _role_in(path: str, data: Any) -> str:
    if data not in ("weight", "activation", "bias"):
        raise SchemeError(
            f'{path}: "weight", "activation" or "bias" is wanted, got {_short(data)}.'
        )
    return str(data)


def _ranks_in(path: str, data: Any) -> tuple[int, ...]:
    if not isinstance(data, list):
        raise SchemeError(f"{path}: a list of numbers is wanted, got {_short(data)}.")
    return tuple(_int_in(f"{path}[{k}]", n) for k, n in enumerate(data))


def _reasons_in(path: str, data: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(data, dict):
        raise SchemeError(f"{path}: an object is wanted, got {_short(data)}.")
    check_keys(path, data, data)
    return tuple((key, _text_in(_join(path, key), v)) for key, v in data.items())


def _calibrator_out(path: str, calibrator: Calibrator) -> str:
    if not calibrator.name:
        raise ValueError(
            f"{path}: this calibrator has functions of its own, which no JSON holds."
        )
    return calibrator.name


def _calibrator_in(path: str, data: Any) -> Calibrator:
    text = _text_in(path, data)
    calibrator: Calibrator = _made(path, parse_calibrator, {"text": text})
    return calibrator


def _name_of(path: str, names: Mapping[str, Any], value: Any) -> str:
    name = next((k for k, v in names.items() if v is value), None)
    if name is None:
        raise ValueError(f"{path}: only {', '.join(names)} go into JSON, got {value}.")
    return name


def _chosen(names: Mapping[str, Any]) -> _In:
    def read(path: str, data: Any) -> Any:
        if not isinstance(data, str) or data not in names:
            raise SchemeError(
                f"{path}: one of {', '.join(names)} is wanted, got {_short(data)}."
            )
        return names[data]

    return read


def _text_in(path: str, data: Any) -> str:
    if not isinstance(data, str):
        raise SchemeError(f"{path}: text is wanted, got {_short(data)}.")
    return data


def _int_in(path: str, data: Any) -> int:
    if not isinstance(data, int) or isinstance(data, bool):
        raise SchemeError(f"{path}: a whole number is wanted, got {_short(data)}.")
    return data


def _buffer_in(path: str, data: Any) -> int:
    if not 2 <= _int_in(path, data) <= 32:
        raise SchemeError(f"{path}: a number from 2 to 32 is wanted, got {data}.")
    return int(data)


def _bool_in(path: str, data: Any) -> bool:
    if not isinstance(data, bool):
        raise SchemeError(f"{path}: true or false is wanted, got {_short(data)}.")
    return data


def _axis_in(path: str, data: Any) -> Axis:
    if data is None or data == "output":
        return data
    if isinstance(data, str):
        raise SchemeError(
            f'{path}: a whole number, a list of them, "output" or null is wanted, got '
            f"{data!r}."
        )
    if isinstance(data, list):
        return tuple(_int_in(f"{path}[{k}]", a) for k, a in enumerate(data))
    return _int_in(path, data)
