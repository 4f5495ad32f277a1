"""Traces of models, with the plans of their sites."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from qjax.model.blocks import Plan, data_of, path_name
from qjax.model.cuts import warn_of_cuts
from qjax.model.finder import find_blocks
from qjax.model.folding import fold_normalisations, read_whole
from qjax.model.lineage import Lineage
from qjax.model.loops import ScanParts, Surroundings, body_of, is_loop, scan_parts
from qjax.model.lstms import with_lstm
from qjax.model.masked_exponentials import masked_behind
from qjax.model.masked_sums import find_masked_sums
from qjax.model.masks_apart import masks_apart
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.regions import find_regions
from qjax.model.sites import describe
from qjax.model.softmaxes import SoftmaxForm
from qjax.model.steps import Pattern, in_steps, with_ends
from qjax.model.trace import Equation, Trace, trace
from qjax.model.traced_model import Loop, TracedModel
from qjax.model.widening import widened


def trace_model(
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    split: Sequence[str] = (),
    whole_norms: bool = False,
    per_step: Sequence[Pattern] = (),
) -> TracedModel:
    """Traces a model and finds its sites.

    Args:
      fn: ``fn(params, *inputs)``.
      params: Parameters of ``fn``; only types are read.
      inputs: Inputs of ``fn``; only types are read.
      split: Functions that end at a site whatever follows: `Constraints`.
      whole_norms: Whether a normalisation is one site though its parts would lower.
      per_step: Patterns of sites in loops whose steps have grids of their own.

    Returns:
      The traced model.

    Raises:
      ValueError: for a loop of too many steps that have grids of their own.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    model, out = trace(fn, params, *inputs, keep_derivatives=True)
    settings = _Settings(tuple(split), whole_norms, tuple(per_step))
    return _planned(widened(model), out, names, settings)


class _Settings(NamedTuple):
    split: tuple[str, ...]
    whole_norms: bool
    per_step: tuple[Pattern, ...]


def _planned(
    model: Trace,
    out: Any,
    names: Sequence[str],
    settings: _Settings,
    around: Surroundings | None = None,
) -> TracedModel:
    """Finds the sites of a trace, whose first inputs are parameters with some names."""
    own = model.inputs[len(names) :]
    in_parts = not settings.whole_norms
    model = masks_apart(model, data_of(model, own))
    model = fold_normalisations(model, data_of(model, own), in_parts=in_parts)
    model = masked_behind(model)
    data = data_of(model, own)
    wholes = ((e.outputs[0], read_whole(model, data, e)) for e in model.equations)
    exact = {v: form for v, form in wholes if form is not None}
    found = find_blocks(model, names, settings.split, exact, around)
    plan = describe(model, found, names, exact, around)
    masked = find_masked_sums(model, data, plan, exact)
    for e in model.equations if masked.values else ():
        form = exact.get(e.outputs[0]) if e.outputs else None
        if isinstance(form, SoftmaxForm) and e.inputs[0] in masked.values:
            exact[e.outputs[0]] = form.masked()
    warn_of_cuts(model, plan)
    # Known values come first: a kernel is held by its bias and its BatchNorm.
    known = set(model.avals) - data
    order = sorted(model.equations, key=lambda e: not known.issuperset(e.outputs))
    moves = (e for e in order if e.primitive.name in SHAPE_MOVES)
    of_kind = lambda blocks, kind: (b for b in blocks if b.kind == kind)
    roots = lambda blocks: {b.root.outputs[0]: b for b in of_kind(blocks, "product")}
    first = 0 if around is None else around.first_block
    model = dataclasses.replace(model, equations=tuple(order))
    loops = _loops(model, plan, names, data, settings, around)
    if any(loop.steps for loop in loops.values()):
        own_describe = lambda m, p: describe(m, p, names, exact, around)
        model, plan, loops = with_ends(model, plan, loops, own_describe)
    return TracedModel(
        model=model,
        out=out,
        plan=plan,
        inputs=tuple(own),
        products=roots(plan.fused.values()),
        made_of_weights=roots(plan.blocks),
        source={v: e for e in order for v in e.outputs},
        tables={b.value: b.root.inputs[0] for b in of_kind(plan.blocks, "embedding")},
        moves={e.outputs[0]: e.inputs[0] for e in moves},
        numbers={b.root.outputs[0]: first + k for k, b in enumerate(plan.blocks)},
        masked=masked,
        exact=exact,
        regions=find_regions(order, model.avals),
        loops=loops,
        first_block=first,
    )


def _loops(
    model: Trace,
    plan: Plan,
    names: Sequence[str],
    data: set[int],
    settings: _Settings,
    around: Surroundings | None,
) -> dict[int, Loop]:
    """Traces the bodies of the loops of a model, and finds their sites."""
    equations = [
        e for e in model.equations if is_loop(e) and not data.isdisjoint(e.inputs)
    ]
    if not equations:
        return {}
    lineage = Lineage(model, names)
    taken = Counter[str]() if around is None else around.taken
    if around is None:
        taken.update(site.name.partition(":")[0] for site in plan.sites)
    count = (0 if around is None else around.first_block) + len(plan.blocks)
    outer = "" if around is None else f"{around.name}/"
    found: dict[int, Loop] = {}
    for k, e in enumerate(equations):
        parts = scan_parts(e)
        is_known = [
            v not in data
            and not parts.is_carry(n)
            and not (parts.is_step(n) and model.is_number(v))
            for n, v in enumerate(e.inputs)
        ]
        sides: tuple[list[Any], list[Any]] = [], []
        for known, aval in zip(is_known, parts.body.in_avals, strict=True):
            sides[0 if known else 1].append(aval)
        inner, out = trace(body_of(parts, is_known), *sides, keep_derivatives=True)
        inner = dataclasses.replace(inner, is_step=True)
        split = len(sides[0])
        order = iter(inner.inputs[:split]), iter(inner.inputs[split:])
        inputs = tuple(next(order[0 if known else 1]) for known in is_known)
        pairs = zip(e.inputs, is_known, strict=True)
        own = [lineage.leaf_name(v) for v, known in pairs if known]
        ends = inputs[parts.consts : parts.consts + parts.carries]
        name = f"{outer}scan_{k}"
        inside = Surroundings(ends, name, taken, count)
        body = _planned(inner, out, own, settings, inside)
        loop = with_lstm(_loop(parts, body, inputs, is_known, name))
        loop = in_steps(loop, settings.per_step)
        count += sum(len(own.blocks) for own in loop.bodies)
        found[e.outputs[0]] = loop
    return found


def _loop(
    parts: ScanParts,
    body: TracedModel,
    inputs: tuple[int, ...],
    is_known: list[bool],
    name: str,
) -> Loop:
    """Returns a loop, the equations of its body in two parts."""
    known = frozenset(k for k, is_one in enumerate(is_known) if is_one)
    same = {inputs[k] for k in known if not parts.is_step(k)}
    same.update(body.model.constants)
    ahead: list[Equation] = []
    rest: list[Equation] = []
    for step in body.model.equations:
        is_same = same.issuperset(step.inputs)
        same.update(step.outputs if is_same else ())
        (ahead if is_same else rest).append(step)
    return Loop(parts, body, inputs, known, tuple(ahead), tuple(rest), name)


class Traces:
    """The last traces of models, by the types of their arguments.

    As under `jax.jit`, a model is a function of its arguments: what else it reads, it
    reads when it is traced. One that closes over arrays is traced each time.

    Attributes:
      folded: Known values that the last lowering has computed: `qjax.lowering.Bound`.
      folds: The same of the bodies of loops.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Callable[..., Any], TracedModel]] = {}
        self.folded: dict[str, dict[int, Any]] = {}
        self.folds: dict[tuple[int, ...], dict[str, dict[int, Any]]] = {}

    def get(
        self,
        fn: Callable[..., Any],
        params: Any,
        inputs: Sequence[Any],
        split: Sequence[str] = (),
        whole_norms: bool = False,
        per_step: Sequence[Pattern] = (),
    ) -> TracedModel:
        """Returns a traced model: that of earlier arguments of the same types, if any.

        Args:
          fn: Same as for `trace_model`, and so are the others.
          params: Parameters of ``fn``.
          inputs: Inputs of ``fn``.
          split: Functions that end at a site.
          whole_norms: Whether a normalisation is one site.
          per_step: Patterns of sites in loops whose steps have grids of their own.

        Returns:
          The traced model.
        """
        leaves, tree = jax.tree.flatten((params, tuple(inputs)))
        types = tuple(map(_type, leaves))
        settings = tuple(getattr(jax.config, name) for name in _SETTINGS)
        mesh = jax.sharding.get_abstract_mesh()
        own = tuple(split), whole_norms, tuple(per_step)
        key = id(fn), tree, types, own, mesh, settings
        found = self._known.pop(key, None)
        if found is None:
            traced = trace_model(fn, params, inputs, *own)
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
