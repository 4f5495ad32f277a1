"""Models as they are simulated: traced, with the plan of their sites."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qjax.model.blocks import Block, Plan
from qjax.model.loops import ScanParts
from qjax.model.masked_sums import MaskedSums
from qjax.model.norm_forms import NormForm
from qjax.model.places import BlockSites
from qjax.model.regions import Regions
from qjax.model.softmaxes import SoftmaxForm
from qjax.model.trace import Equation, Trace
from qjax.schemes.patterns import Site


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """A model, traced for the types of some arguments, with the plan of its sites.

    Attributes:
      model: The trace, in its float32 form if it computes in half precision. Values
        that do not depend on inputs come first.
      out: Tree of the shapes that the model returns.
      plan: Its blocks and sites.
      inputs: Values of the inputs of the model.
      products: Product whose affine part is computed in one -> its block.
      made_of_weights: Product -> its block.
      source: Value -> the equation that makes it.
      tables: Rows that an input chooses -> the table.
      moves: Value -> the value that a shape move makes it of.
      numbers: Root of a block -> its number in the plan.
      masked: Sums before softmaxes of which a part masks.
      exact: Result of a softmax or norm that integers compute -> its form.
      regions: Parts that the backward pass computes again.
      loops: First result of a loop -> the loop.
      first_block: Number of its first block, 0 but for the body of a loop.
    """

    model: Trace
    out: Any
    plan: Plan
    inputs: tuple[int, ...]
    products: Mapping[int, Block]
    made_of_weights: Mapping[int, Block]
    source: Mapping[int, Equation]
    tables: Mapping[int, int]
    moves: Mapping[int, int]
    numbers: Mapping[int, int]
    masked: MaskedSums
    exact: Mapping[int, SoftmaxForm | NormForm]
    regions: Regions
    loops: Mapping[int, "Loop"]
    first_block: int = 0

    @property
    def sites(self) -> tuple[Site, ...]:
        """Returns the sites of the model: its own, then those inside of its loops."""
        found = dict.fromkeys(self.plan.sites)
        for body in self._bodies:
            found.update(dict.fromkeys(body.sites))  # Once where steps share it.
        return tuple(found)

    @property
    def blocks(self) -> tuple[BlockSites, ...]:
        """Returns the sites of each block: those of `Plan.blocks`, then of loops."""
        plan, sites = self.plan, self.plan.sites
        found = []
        for block in plan.blocks:
            at = plan.weights.get(-1 if block.weight is None else block.weight)
            weight = "" if at is None else sites[at].name
            output = sites[plan.activations[block.value]].name
            found.append(BlockSites(output, weight))
        inside = (body.blocks for body in self._bodies)
        return (*found, *itertools.chain.from_iterable(inside))

    @property
    def biases(self) -> tuple[Site, ...]:
        """Returns the biases of the products of the model."""
        inside = (loop.body.biases for loop in self.loops.values())
        own = self.plan.biases.values()
        return (*own, *itertools.chain.from_iterable(inside))

    @property
    def _bodies(self) -> Iterator["TracedModel"]:
        for loop in self.loops.values():
            yield from loop.bodies


class WeightPart(NamedTuple):
    """A part of a known value along its last axis, or its first if it is transposed."""

    value: int
    start: int
    stop: int
    is_transposed: bool = False


class GateForm(NamedTuple):
    """The weights of a gate.

    Attributes:
      kernel: Weights of the inputs, ``[inputs, cells]``.
      recurrent: Weights of the state, ``[cells, cells]``.
      biases: Known values that are added, ``[cells]`` under any leading axes of size 1,
        or one number.
    """

    kernel: WeightPart
    recurrent: WeightPart
    biases: tuple[WeightPart, ...]


@dataclasses.dataclass(frozen=True)
class LstmForm:
    """An LSTM, as the body of a loop computes it. Values are those of the body.

    Attributes:
      cell: Number of the carry that is the cell, 0 or 1; the other one is the state.
      inputs: Number of the operand that has a part for each step.
      gates: Weights of the input, forget, cell and output gate, TFLite's order.
      tensors: Value -> what it is: ``kernel`` (weights), ``gate`` (before its
        function), ``share`` (behind it), ``product`` (what is summed to the cell),
        ``cell`` and ``state``.
    """

    cell: int
    inputs: int
    gates: tuple[GateForm, ...]
    tensors: Mapping[int, str]


class Join(NamedTuple):
    """A result of a loop as its parts, one for each step."""

    pieces: tuple[int, ...]  # In the order of the result.
    equations: tuple[Equation, ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A scan of a model, its body traced with the plan of its sites.

    Attributes:
      parts: What becomes of its operands and results.
      body: A step, as a model of what is known and of data.
      inputs: By operand, its value in the body.
      known: Operands that depend on no input of the model; not whole numbers that
        differ from step to step, by which a step chooses.
      ahead: Equations of the body that read what is known and the same in all steps.
      rest: The other equations of the body.
      name: Name of the loop, with those around it.
      steps: Model of each step, in the order of computation, where steps have grids of
        their own; empty for one grid in all steps.
      starts: Carried operand -> the equation that puts its first value on a grid. These
        and the next are of loops with ``steps``.
      joins: Result with a part for each step -> the parts, and how they are joined.
      lstm: The LSTM that its steps compute, if they compute one.
    """

    parts: ScanParts
    body: TracedModel
    inputs: tuple[int, ...]
    known: frozenset[int]
    ahead: tuple[Equation, ...]
    rest: tuple[Equation, ...]
    name: str = ""
    steps: tuple[TracedModel, ...] = ()
    starts: Mapping[int, Equation] = dataclasses.field(default_factory=dict)
    joins: Mapping[int, Join] = dataclasses.field(default_factory=dict)
    lstm: "LstmForm | None" = None

    @property
    def bodies(self) -> tuple[TracedModel, ...]:
        """Returns the models of its steps, or the one of all."""
        return self.steps or (self.body,)

    @property
    def same(self) -> set[int]:
        """Returns the values of the body that are known and the same in all steps."""
        found = {self.inputs[k] for k in self.known if not self.parts.is_step(k)}
        found.update(self.body.model.constants)
        return found.union(*(e.outputs for e in self.ahead))
