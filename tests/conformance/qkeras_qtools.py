"""Checks of QTools, qstats, accumulators and sizes, by the fields of a case."""

import json
import math
import pathlib

import pytest

from qjax import qtools
from qjax.costs.energies import Memories

LEAST_SRAM = 8 * 16 * 2**20  # As the notes of the cases say.


def read_json(case):
    """The JSON of a case."""
    name = case.get("json") or case["file"]
    return json.loads((pathlib.Path(case["folder"]) / name).read_text())


def check_same(found, wanted, where):
    """Compares JSON: all equal, floats to 1e-6."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key, value in wanted.items():
            check_same(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
            check_same(a, b, f"{where}/{k}")
    elif isinstance(wanted, float):
        assert math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-12), (
            where,
            found,
            wanted,
        )
    else:
        assert found == wanted, (where, found, wanted)


def _memory(key):
    """``w=sram,a=dram,io=1`` as a memory."""
    fields = dict(part.split("=") for part in key.split(","))
    assert set(fields) == {"w", "a", "io"}
    return Memories(fields["w"], fields["a"], LEAST_SRAM, fields["io"] == "1")


def check_qtools(case, arrays):
    wanted = read_json(case)
    model = qtools.read_model(case["params"]["model"])
    if isinstance(wanted["data_type_map"], str):  # QKeras raised.
        with pytest.raises(ValueError):
            qtools.type_map(model)
        return
    types = qtools.type_map(model, scales=wanted.get("auto_po2_scales"))
    whole = qtools.Reference("fp16", "fp32", is_whole=True)
    made = {
        "data_type_map": types.to_json,
        "roofline": lambda: qtools.roofline_numbers(types),
        "reference_fp16_data_type_map": qtools.type_map(model, reference=whole).to_json,
    }
    for key, value in wanted.items():
        if key in ("energy", "auto_po2_scales"):
            continue
        if isinstance(value, str) and value.startswith("error:"):
            continue  # QKeras raised; nothing to compare with.
        check_same(made[key](), value, key)
    for key, value in wanted["energy"].items():
        energy = qtools.map_energy(types, _memory(key))
        if isinstance(value, str):
            # An average of Keras makes this QTools raise; its additions cost here.
            assert value.startswith("error:") and energy.total > 0
            continue
        check_same(energy.to_json(), value["layers"], f"{key}/layers")
        assert energy.sum() == value["sum"]
        check_same(energy.profile(), value["profile"], f"{key}/profile")


def check_qstats(case, arrays):
    model = qtools.read_model(case["params"]["model"])
    check_same(qtools.model_statistics(model).to_json(), read_json(case), case["id"])


def check_estimate(case, arrays):
    wanted = read_json(case)
    assert set(wanted) == {"input_range", "accumulator_bits"}
    products = {}
    for name in wanted["input_range"]:
        kernel = next(k for k in arrays if k.startswith(f"{name}_") and "kernel" in k)
        bias = arrays.get(f"{name}_bias")
        products[name] = qtools.Product(arrays[kernel], bias)
    found = qtools.accumulator_sizes(products, wanted["input_range"])
    assert found == wanted["accumulator_bits"]


def _shape(text):
    """``64x10+b`` as a shape of a kernel, and whether a bias counts."""
    sizes, _, bias = text.partition("+")
    return tuple(map(int, sizes.split("x"))), bool(bias)


def check_operators(case, arrays):
    for row in read_json(case):
        weight, x = qtools.data_type(row["weight"]), qtools.data_type(row["input"])
        product = qtools.multiplier(weight, x)
        own = product.output
        found = {
            "weight": row["weight"],
            "input": row["input"],
            "impl": product.op_type,
            "name": own.name,
            "bits": own.bits,
            "int_bits": own.int_bits,
            "is_signed": own.is_signed,
            "is_po2": own.is_power,
            "max_val_po2": own.max_value,
            "fp": own.is_float,
            "gate_factor": product.gate_factor,
            "gate_bits": product.gate_bits,
            "adder": _ends(qtools.adder(weight, x)),
            "accumulator": {
                text: _ends(_accumulator(text, own)) for text in row["accumulator"]
            },
        }
        check_same(found, row, f"{row['weight']} * {row['input']}")


def _accumulator(text, product):
    shape, has_bias = _shape(text)
    return qtools.accumulator(shape, product, has_bias=has_bias)


def _ends(operator):
    own = operator.output
    return {"bits": own.bits, "int_bits": own.int_bits, "is_signed": own.is_signed}


def check_forgiving(case, arrays):
    wanted = read_json(case)
    assert set(wanted) <= {"delta", "model", "model_size"}
    for row in wanted["delta"]:
        factor = qtools.ForgivingFactor(row["delta_p"], row["delta_n"], row["rate"])
        found = factor.delta(row["reference"], row["trial"])
        assert math.isclose(found, row["delta"], rel_tol=1e-6, abs_tol=1e-12), row
    index = json.loads((pathlib.Path(case["folder"]) / "index.json").read_text())
    models = {c["id"]: c["params"].get("model") for c in index["cases"]}
    name = f"forward_{wanted['model']}"
    if name not in models:
        pytest.skip(f"the index has no model {name}")
    sizes = qtools.model_bits(qtools.read_model(models[name]))
    check_same(sizes.to_json(), wanted["model_size"], case["id"])


CHECKS = {"qtools": check_qtools, "qstats": check_qstats, "estimate": check_estimate}


def table_check(fn):
    """The check of a table of QTools; None for other tables."""
    if fn.startswith("qtools operator rules"):
        return check_operators
    return check_forgiving if fn.startswith("ForgivingFactor") else None
