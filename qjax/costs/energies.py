"""Energy of arithmetic and memory, by the tables of QKeras's tools."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.costs.layers import Layer, Layers, add, times

Place = Literal["dram", "sram", "fixed"]
_WORD = 64  # Bits of one access to SRAM.


@dataclasses.dataclass(frozen=True)
class Process:
    """Energy of a manufacturing process, in pJ: polynomials, highest power first.

    Attributes:
      fixed_add: Addition, of its bits.
      fixed_multiply: Multiplication, of its bits.
      half_add: Addition of float16.
      half_multiply: Multiplication of float16.
      float_add: Addition of float32.
      float_multiply: Multiplication of float32.
      sram: Access to a word of 64 bits, of log2 of the bits of the memory.
      dram: Access, of its bits.
    """

    fixed_add: Sequence[float]
    fixed_multiply: Sequence[float]
    half_add: Sequence[float]
    half_multiply: Sequence[float]
    float_add: Sequence[float]
    float_multiply: Sequence[float]
    sram: Sequence[float]
    dram: Sequence[float]


# Horowitz, "Computing's Energy Problem (and What We Can Do about It)", ISSCC 2014, as
# QKeras fits it: qtools/config_public.py, "horowitz", snapshot 78ea90f. 45 nm, 0.9 V.
horowitz = Process(
    fixed_add=(0.003125, 0.0),
    fixed_multiply=(0.002994791667, 0.001041666667, 0.0),
    half_add=(0.4,),
    half_multiply=(1.1,),
    float_add=(0.9,),
    float_multiply=(3.7,),
    sram=(9.02427321e-04, -2.68847858e-02, 2.08900804e-01, 0.0),
    dram=(20.3125, 0.0),
)


@dataclasses.dataclass(frozen=True)
class Memories:
    """The places of weights and activations.

    Attributes:
      weights: "dram", "sram", or "fixed" for weights in the circuit itself, which cost
        nothing to read.
      activations: "dram", "sram", or "fixed" for none.
      least_sram: Bits of an SRAM, at least; larger ones cost more a word.
      has_io: Whether what comes in and goes out lies in DRAM and passes through SRAM.
        If not, it lies in SRAM.

    Raises:
      ValueError: for another place; for a negative size.
    """

    weights: Place = "dram"
    activations: Place = "dram"
    least_sram: int = 0
    has_io: bool = True

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if getattr(self, name) not in get_args(Place):
                raise ValueError(
                    f"`{name}` of `Memories` must be one of "
                    f"{', '.join(get_args(Place))}, got {getattr(self, name)!r}."
                )
        if self.least_sram < 0:
            raise ValueError(
                "`least_sram` of `Memories` is a number of bits, 0 or more, got "
                f"{self.least_sram}."
            )


def polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Evaluates a polynomial, and returns 0 where it is negative."""
    total: Any = 0.0
    for c in coefficients:
        total = total * x + c
    if isinstance(total, jax.Array):
        return jnp.maximum(total, 0.0)
    return max(total, 0.0) if np.ndim(total) == 0 else np.maximum(total, 0.0)


def access_energy(
    bits: Any, place: Place, *, memory: Memories, process: Process = horowitz
) -> Any:
    """Returns the energy to read or write a tensor, in pJ.

        dram:  20.3125 * bits, and an access to SRAM if `has_io`
        sram:  ceil(bits / 64) * f(log2(max(bits, least_sram)))

    Args:
      bits: Bits of the tensor; may be traced.
      place: Where it lies.
      memory: Least size of an SRAM, and whether DRAM is read through it.
      process: Energies.

    Returns:
      Energy. Traced, words have the derivative of ``bits / 64``.

    References:
      QKeras, qtools/qenergy/qenergy.py, snapshot 78ea90f.
    """
    if place == "fixed":
        return 0.0
    energy: Any = 0.0
    if place == "dram":
        energy = polynomial(process.dram, bits)
        if not memory.has_io:
            return energy
    if isinstance(bits, jax.Array):
        words = bits / _WORD
        words = words + lax.stop_gradient(jnp.ceil(words) - words)
        size = jnp.log2(jnp.maximum(bits, max(memory.least_sram, 1)))
    else:
        words = np.ceil(bits / _WORD)
        size = np.log2(np.maximum(bits, max(memory.least_sram, 1)))
    return energy + words * polynomial(process.sram, size)


def operation_energy(
    op_type: str, bits: Any, *, float_bits: int = 0, process: Process = horowitz
) -> Any:
    """Returns the energy of one operation, in pJ.

    Args:
      op_type: "mul" for a multiplication; else an addition, or what costs as much a
        bit: "add", "shifter", "mux", "xor", "and", "or".
      bits: Bits of the operands; may be traced.
      float_bits: 16 or 32 for floats, 0 for integers.
      process: Energies.

    Raises:
      ValueError: for floats of other bits, and operations that floats have not.
    """
    kinds = {0: "fixed", 16: "half", 32: "float"}
    if float_bits not in kinds or (float_bits and op_type not in ("add", "mul")):
        raise ValueError(
            f"The process has no energy of {op_type!r} of floats of {float_bits} bits: "
            "it has additions and multiplications of 16 and 32."
        )
    name = "multiply" if op_type == "mul" else "add"
    return polynomial(getattr(process, f"{kinds[float_bits]}_{name}"), bits)


def energy(
    layer: Layer, *, memory: Memories | None = None, process: Process = horowitz
) -> Any:
    """Returns the energy of a layer for one example, in pJ.

        products * (multiply(sqrt(b_x * b_w)) + add(accumulator)) + reads + writes

    Weights, inputs and results move once each. What goes in and what the model returns
    lie where `Memories.has_io` says.

    Args:
      layer: The layer.
      memory: Places of weights and activations; DRAM for both by default.
      process: Energies.
    """
    memory = Memories() if memory is None else memory
    io: Place = "dram" if memory.has_io else "sram"
    access = lambda bits, place: access_energy(
        bits, place, memory=memory, process=process
    )
    work, total = layer.work, 0.0
    if work.kind == "input":
        return 0.0
    own = zip(work.inputs, layer.input_bits, strict=True)
    for operand, bits in own:
        place = io if operand.is_given else memory.activations
        total = total + access(times(operand.size, bits), place)
    if layer.weight_bits is not None and work.weights:
        total = total + access(times(work.weights, layer.weight_bits), memory.weights)
    if layer.bias_bits is not None and work.biases:
        total = total + access(times(work.biases, layer.bias_bits), memory.weights)
    place = io if work.is_returned else memory.activations
    total = total + access(times(work.kept, layer.output_bits), place)
    return total + times(work.products, _product_energy(layer, process))


def _product_energy(layer: Layer, process: Process) -> Any:
    """Returns the energy of one multiply-accumulate."""
    if not layer.products:
        return 0.0
    a, b = layer.operand_bits
    sums = layer.accumulator_bits
    if sums is None:
        bits = layer.work.float_bits
        both = (
            operation_energy(name, bits, float_bits=bits, process=process)
            for name in ("mul", "add")
        )
        return sum(both)
    size = jnp.sqrt(a * b) if isinstance(a * b, jax.Array) else np.sqrt(a * b)
    product = operation_energy("mul", size, process=process)
    return product + operation_energy("add", sums, process=process)


def total_energy(layers: Layers, **settings: Any) -> Any:
    """Returns the energy of a model for one example, in pJ: `energy` of each layer."""
    return add(energy(layer, **settings) for layer in layers)
