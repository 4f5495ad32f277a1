"""Models as they are simulated: traced, with the plan of their sites."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from qjax.model.blocks import Block, Plan, data_of, path_name
from qjax.model.cuts import warn_of_cuts
from qjax.model.finder import find_blocks
from qjax.model.folding import fold_normalisations, read_whole
from qjax.model.masked_exponentials import masked_behind
from qjax.model.norms import NormForm
from qjax.model.places import BlockSites
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.regions import Regions, find_regions
from qjax.model.sites import describe
from qjax.model.softmaxes import SoftmaxForm
from qjax.model.trace import Equation, Trace, trace
from qjax.model.widening import widened
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
      exact: Result of a softmax or norm that integers compute -> its form.
      regions: Parts that the backward pass computes again.
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
    exact: Mapping[int, SoftmaxForm | NormForm]
    regions: Regions

    @property
    def sites(self) -> tuple[Site, ...]:
        """Returns the sites of the model, in the order of the equations."""
        return self.plan.sites

    @property
    def blocks(self) -> tuple[BlockSites, ...]:
        """Returns the sites of each block, in the order of `Plan.blocks`."""
        plan, sites = self.plan, self.plan.sites
        found = []
        for block in plan.blocks:
            at = plan.weights.get(-1 if block.weight is None else block.weight)
            weight = "" if at is None else sites[at].name
            output = sites[plan.activations[block.value]].name
            found.append(BlockSites(output, weight))
        return tuple(found)

    @property
    def biases(self) -> tuple[Site, ...]:
        """Returns the biases of the products of the model."""
        return tuple(self.plan.biases.values())


def trace_model(
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    split: Sequence[str] = (),
    whole_norms: bool = False,
) -> TracedModel:
    """Traces a model and finds its sites.

    Args:
      fn: ``fn(params, *inputs)``.
      params: Parameters of ``fn``; only types are read.
      inputs: Inputs of ``fn``; only types are read.
      split: Functions that end at a site whatever follows: `Constraints`.
      whole_norms: Whether a normalisation is one site though its parts would lower.

    Returns:
      The traced model.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    model, out = trace(fn, params, *inputs, keep_derivatives=True)
    model = widened(model)
    own = model.inputs[len(leaves) :]
    model = fold_normalisations(model, data_of(model, own), in_parts=not whole_norms)
    model = masked_behind(model)
    data = data_of(model, own)
    wholes = ((e.outputs[0], read_whole(model, data, e)) for e in model.equations)
    exact = {v: form for v, form in wholes if form is not None}
    plan = describe(model, find_blocks(model, names, split, exact), names, exact)
    warn_of_cuts(model, plan)
    # Known values come first: a kernel is held by its bias and its BatchNorm.
    known = set(model.avals) - data
    order = sorted(model.equations, key=lambda e: not known.issuperset(e.outputs))
    moves = (e for e in order if e.primitive.name in SHAPE_MOVES)
    of_kind = lambda blocks, kind: (b for b in blocks if b.kind == kind)
    roots = lambda blocks: {b.root.outputs[0]: b for b in of_kind(blocks, "product")}
    return TracedModel(
        model=dataclasses.replace(model, equations=tuple(order)),
        out=out,
        plan=plan,
        inputs=tuple(own),
        products=roots(plan.fused.values()),
        made_of_weights=roots(plan.blocks),
        source={v: e for e in order for v in e.outputs},
        tables={b.value: b.root.inputs[0] for b in of_kind(plan.blocks, "embedding")},
        moves={e.outputs[0]: e.inputs[0] for e in moves},
        numbers={b.root.outputs[0]: k for k, b in enumerate(plan.blocks)},
        exact=exact,
        regions=find_regions(order, model.avals),
    )


class Traces:
    """The last traces of models, by the types of their arguments.

    As under `jax.jit`, a model is a function of its arguments: what else it reads, it
    reads when it is traced. One that closes over arrays is traced each time.

    Attributes:
      folded: Known values that the last lowering has computed: `qjax.lowering.Bound`.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Callable[..., Any], TracedModel]] = {}
        self.folded: dict[str, dict[int, Any]] = {}

    def get(
        self,
        fn: Callable[..., Any],
        params: Any,
        inputs: Sequence[Any],
        split: Sequence[str] = (),
        whole_norms: bool = False,
    ) -> TracedModel:
        """Returns a traced model: that of earlier arguments of the same types, if any.

        Args:
          fn: Same as for `trace_model`, and so are the others.
          params: Parameters of ``fn``.
          inputs: Inputs of ``fn``.
          split: Functions that end at a site.
          whole_norms: Whether a normalisation is one site.

        Returns:
          The traced model.
        """
        leaves, tree = jax.tree.flatten((params, tuple(inputs)))
        types = tuple(map(_type, leaves))
        settings = tuple(getattr(jax.config, name) for name in _SETTINGS)
        mesh = jax.sharding.get_abstract_mesh()
        key = id(fn), tree, types, tuple(split), whole_norms, mesh, settings
        found = self._known.pop(key, None)
        if found is None:
            traced = trace_model(fn, params, inputs, split, whole_norms)
            if not traced.model.is_closed:
                return traced
            found = fn, traced  # With the function, whose number no other gets so.
        self._known[key] = found
        while len(self._known) > _MOST_TRACES:
            self._known.pop(next(iter(self._known)))
        return found[1]


def _type(x: Any) -> Any:
    """Returns the type of an argument, which may be given in its place."""
    if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None:
        return jax.core.ShapedArray(x.shape, x.dtype, weak_type=x.weak_type)
    is_type = isinstance(x, jax.ShapeDtypeStruct | jax.core.ShapedArray)
    return x if is_type else jax.typeof(x)


_MOST_TRACES = 8
# Settings of JAX that a trace may depend on.
_SETTINGS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
)
