"""Energy of a model by its data-type map, and its numbers for a roofline."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qjax.costs.energies import (
    Memories,
    Place,
    Process,
    access_energy,
    horowitz,
    operation_energy,
)
from qjax.qtools.keras_models import AVERAGES, NORMS
from qjax.qtools.operators import Circuit
from qjax.qtools.type_maps import LayerTypes, TypeMap

# Parts of the energy that count, by the class of a layer: config_public.py.
COUNTED: Mapping[str, tuple[str, ...]] = {
    "QActivation": ("outputs",),
    "QAdaptiveActivation": ("outputs",),
    "Activation": ("outputs",),
    "QBatchNormalization": ("parameters",),
    "BatchNormalization": ("parameters",),
    "Add": ("op_cost",),
    "Subtract": ("op_cost",),
    "MaxPooling2D": ("op_cost",),
    "default": ("inputs", "parameters", "op_cost"),
}
# Layers whose parameters are read, and whose products cost: not the folded ones.
_READ = ("Dense", "Conv1D", "Conv2D", "DepthwiseConv2D")


@dataclasses.dataclass(frozen=True)
class EnergyReport:
    """The energy of a model for one example, in pJ.

    Attributes:
      layers: Layer -> its class and the energy of inputs, outputs, parameters and
        operations, each rounded to two digits.
      total: All of it, whole pJ.
    """

    layers: Mapping[str, tuple[str, Mapping[str, float]]]
    total: int

    def sum(self, counted: Mapping[str, tuple[str, ...]] = COUNTED) -> int:
        """Returns the energy of the parts that count, whole pJ."""
        return int(sum(row["total"] for row in self.profile(counted).values()))

    def profile(
        self, counted: Mapping[str, tuple[str, ...]] = COUNTED
    ) -> dict[str, dict[str, Any]]:
        """Returns the parts of each layer, and the total of those that count."""
        found = {}
        for name, (cls, parts) in self.layers.items():
            names = counted.get(cls, counted.get("default", ()))
            total = sum(parts[part] for part in names)
            found[name] = {"energy": dict(parts), "total": total}
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns QTools's JSON."""
        rows: dict[str, Any] = {
            name: {"class_name": cls, "energy": dict(parts)}
            for name, (cls, parts) in self.layers.items()
        }
        return {**rows, "total_cost": self.total}


def map_energy(
    types: TypeMap, memory: Memories | None = None, process: Process = horowitz
) -> EnergyReport:
    """Returns the energy of a model by its data-type map.

        op = count * (gate_factor * e(gate_bits) + add(accumulator bits))

    Args:
      types: The map.
      memory: Places of weights and activations; DRAM for both by default.
      process: Energies.

    Returns:
      The energy. As in QTools folded convolutions cost nothing but their activations.
      An average costs its additions; this snapshot of QTools raises for one of Keras,
      as it looks for an accumulator under an older name.

    Raises:
      ValueError: for floats of other than 16 and 32 bits.

    References:
      QKeras, qtools/qenergy/qenergy.py, snapshot 78ea90f.
    """
    memory = Memories() if memory is None else memory
    rows, total = {}, 0.0
    for name, own in types.layers.items():
        parts = {
            "inputs": _inputs(own, memory, process),
            "outputs": _outputs(own, types, memory, process),
            "parameters": _parameters(own, memory, process),
            "op_cost": _operations(own, process),
        }
        total += sum(parts.values())
        rounded = {part: float(f"{value:.2f}") for part, value in parts.items()}
        rows[name] = own.layer.cls, rounded
    return EnergyReport(rows, int(total))


def _access(
    size: int, bits: int, place: Place, memory: Memories, process: Process
) -> float:
    return float(access_energy(size * bits, place, memory=memory, process=process))


def _end(memory: Memories) -> Place:
    return "dram" if memory.has_io else "sram"


def _inputs(own: LayerTypes, memory: Memories, process: Process) -> float:
    is_first = "in" in own.layer.inputs
    place = _end(memory) if is_first else memory.activations
    pairs = zip(own.layer.input_shapes, own.inputs, strict=True)
    return sum(
        _access(math.prod(shape), t.bits, place, memory, process) for shape, t in pairs
    )


def _outputs(
    own: LayerTypes, types: TypeMap, memory: Memories, process: Process
) -> float:
    layer = own.layer
    place = _end(memory) if layer.name in types.model.ends else memory.activations
    size = math.prod(layer.output_shape)
    return _access(size, own.output.bits, place, memory, process)


def _parameters(own: LayerTypes, memory: Memories, process: Process) -> float:
    layer, place = own.layer, memory.weights
    read = lambda size, bits: _access(size, bits, place, memory, process)
    if layer.base in NORMS:
        size = layer.weight_shapes[0][0]
        return sum(read(size, t.bits) for t in own.types.values())
    if layer.base not in _READ:
        return 0.0
    kernel = layer.weight_shapes[0]
    total = read(math.prod(kernel), own.types["weight"].bits)
    if "bias" in own.types:
        total += read(kernel[-1], own.types["bias"].bits)
    return total


def _gate(operator: Circuit, process: Process) -> float:
    float_bits = operator.output.bits if operator.output.is_float else 0
    one = operation_energy(
        operator.op_type, operator.gate_bits, float_bits=float_bits, process=process
    )
    return operator.gate_factor * float(one)


def _addition(operator: Circuit, process: Process) -> float:
    plain = Circuit(operator.output, "add", 1, operator.output.bits)
    return _gate(plain, process)


def _operations(own: LayerTypes, process: Process) -> float:
    layer, operators = own.layer, own.operators
    if layer.base in NORMS:
        names = ("internal_divide_quantizer", "internal_multiplier")
        made = (operators[name] for name in names if name in operators)
        return own.count * sum(_gate(operator, process) for operator in made)
    if layer.cls in ("Add", "Multiply"):
        operator = operators[f"{layer.cls}_quantizer"]
        return (len(own.inputs) - 1) * own.count * _gate(operator, process)
    if layer.cls in AVERAGES:
        return own.count * _addition(operators["pool_sum_accumulator"], process)
    if layer.base not in _READ:
        return 0.0
    product = _gate(operators["multiplier"], process)
    return own.count * (product + _addition(operators["accumulator"], process))


def roofline_numbers(
    types: TypeMap, *, has_input: bool = True, float_bits: int = 32
) -> dict[str, float]:
    """Returns QTools's numbers for a roofline, and those of the model in float.

    ``ACE`` counts bit operations, products times the bits of both operands; bytes are
    of kernels and biases, and of the results of quantized activations.

    Args:
      types: The data-type map.
      has_input: Whether the input counts among the activations.
      float_bits: Bits of floats.
    """
    bits = {"": None, "_float": float_bits}
    found: dict[str, float] = {}
    for end, own in bits.items():
        found[f"ACE{end}"] = sum(_ace(row, own) for row in types.layers.values())
        size = sum(_weight_bytes(row, own) for row in types.layers.values())
        found[f"weight_in_bytes{end}"] = size
        size = sum(_output_bytes(row, own) for row in types.layers.values())
        first = math.prod(types.model.input_shape) * (own or types.source.bits) / 8.0
        found[f"activation_in_bytes{end}"] = size + first if has_input else size
    return found


def _ace(row: LayerTypes, bits: int | None) -> int:
    if "weight" not in row.types:
        return 0
    pair = (
        (row.inputs[0].bits, row.types["weight"].bits) if bits is None else (bits,) * 2
    )
    return row.count * pair[0] * pair[1]


def _weight_bytes(row: LayerTypes, bits: int | None) -> int:
    if "weight" not in row.types:
        return 0
    shapes = row.layer.weight_shapes
    pairs = zip(("weight", "bias"), shapes[: 1 + row.layer.has_bias], strict=False)
    own = ((math.prod(s), bits or row.types[name].bits) for name, s in pairs)
    return sum(int(size * each / 8.0) for size, each in own)


def _output_bytes(row: LayerTypes, bits: int | None) -> int:
    if row.layer.cls != "QActivation":
        return 0
    size = math.prod(row.layer.output_shape)
    return int(size * (bits or row.output.bits) / 8.0)
