"""The descriptions of sites: their layer, their operation, their readers."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.model.blocks import MEANS, Block, Plan, constant_of, data_of
from qjax.model.channels import Uses, factor_channels
from qjax.model.loops import Surroundings, is_loop
from qjax.model.norm_forms import NormForm
from qjax.model.normalisations import NORM
from qjax.model.primitives import SHAPE_MOVES
from qjax.model.softmaxes import SoftmaxForm
from qjax.model.trace import Equation, Trace, evaluate
from qjax.schemes.patterns import Site

CARRY = "carry"  # What a sum that a loop carries is for the values that it adds.
_BOUNDS = {
    (("max", 0.0),): "relu",
    (("max", 0.0), ("min", 6.0)): "relu6",
}


def describe(
    model: Trace,
    plan: Plan,
    names: Sequence[str],
    exact: Mapping[int, SoftmaxForm | NormForm] | None = None,
    around: Surroundings | None = None,
) -> Plan:
    """Completes the facts of a site that rules, presets and configs ask for.

    Args:
      model: Trace that the plan is of.
      plan: Sites with names, roles and shapes.
      names: Names of the parameters, which are the first inputs of the trace.
      exact: Result of a softmax or norm that integers compute -> its form.
      around: Loop of which the trace is the body; None for a whole model.

    Returns:
      The plan with whole sites.

    Raises:
      ValueError: for a name that is no text, which neither traces nor files hold.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The parameter {name!r} has half of a surrogate pair in its name, "
                "which is no text. Rename it."
            ) from error
    describer = _Describer(model, plan, names, exact or {}, around)
    return dataclasses.replace(plan, sites=describer.sites())


class _Describer:
    def __init__(
        self,
        model: Trace,
        plan: Plan,
        names: Sequence[str],
        exact: Mapping[int, SoftmaxForm | NormForm],
        around: Surroundings | None,
    ):
        self.model, self.plan, self.exact = model, plan, exact
        self.source = {v: e for e in model.equations for v in e.outputs}
        self.uses = Uses(model, data_of(model, model.inputs[len(names) :]))
        self.users: dict[int, list[Equation]] = collections.defaultdict(list)
        for e in model.equations:
            for v in e.inputs:
                self.users[v].append(e)
        self.modules = {""}
        for name in names:
            parts = name.split("/")[:-1]
            self.modules.update("/".join(parts[: k + 1]) for k in range(len(parts)))
        self.top = next(filter(None, map(self._top, plan.blocks)), "")
        self._known_origins: dict[int, frozenset[int]] = {}
        self._is_inside = around is not None
        self._carries: dict[int, int] = {}  # Site of what a loop carries -> its end.
        if around is not None:
            for u, v in zip(around.carried, model.outputs, strict=False):
                if v in plan.activations:
                    self._known_origins[u] = frozenset([plan.activations[v]])
                    self._carries[plan.activations[v]] = v

    def sites(self) -> tuple[Site, ...]:
        plan = self.plan
        sites = list(plan.sites)
        for v, k in plan.weights.items():
            sites[k] = sites[k]._replace(**self.uses.channels(v)._asdict())
        for at in (b.scale_site for b in plan.blocks):
            if at is not None:
                found = factor_channels(sites[at].shape)
                sites[at] = sites[at]._replace(**found._asdict())
        feeds: dict[int, list[str]] = collections.defaultdict(list)
        makes: dict[int, list[int]] = collections.defaultdict(list)  # A weight -> ends.
        for k, site in enumerate(sites):
            if site.role == "activation":
                sites[k] = site._replace(layer=site.name, op="input")
        for block in plan.inner:
            before = sorted(self._origins(block.root.inputs))
            inputs = tuple(sites[i].name for i in before)
            op = self._op(block)
            for i in before:
                feeds[i].append(op)
            if (at := self._weight_site(block)) is not None:
                sites[at] = self._of_weight(sites[at], op, inputs)
                feeds[at].append(NORM)
        for block in plan.blocks:
            k, op = plan.activations[block.value], self._op(block)
            own = block.name or plan.sites[k].name.rpartition("/output")[0]
            before = sorted(self._origins(block.root.inputs))
            inputs = tuple(sites[i].name for i in before)
            passed = {sites[i].activation for i in before} - {""}
            sites[k] = sites[k]._replace(
                layer=self._layer(block) or own or sites[k].name,
                op=op,
                activation=self._activation(block, op, passed),
                inputs=inputs,
                reads=self._reads(block),
            )
            is_sum = k in self._carries and block.kind == "residual"
            for i in before:
                feeds[i].append(CARRY if is_sum else op)
            if (at := self._weight_site(block)) is not None:
                sites[at] = self._of_weight(sites[at], op, inputs)
                makes[at].append(k)
        for e in filter(is_loop, self.model.equations):
            for i in self._origins(e.inputs):
                feeds[i].append(e.primitive.name)
        for k in self._carries:
            feeds[k].append(CARRY)
        if not self._is_inside:
            for i in self._origins(self.model.outputs):
                feeds[i].append("return")
        for at, ends in makes.items():
            feeds[at] += [op for k in ends for op in feeds[k]]
        for block in plan.blocks:
            k = plan.activations[block.value]
            name = self._overwritten(block, sites, feeds)
            sites[k] = sites[k]._replace(overwrites=name)
        return tuple(
            site._replace(feeds=tuple(dict.fromkeys(feeds[k])))
            for k, site in enumerate(sites)
        )

    def _weight_site(self, block: Block) -> int | None:
        """Returns the site of the factor of a block."""
        if block.weight is None:
            return block.scale_site
        return self.plan.weights[block.weight]

    def _of_weight(self, site: Site, op: str, inputs: tuple[str, ...]) -> Site:
        inputs = tuple(dict.fromkeys((*site.inputs, *inputs)))
        layer = site.name.rpartition("/")[0] or site.name
        return site._replace(layer=layer, op=op, inputs=inputs)

    def _origins(self, values: Iterable[int]) -> frozenset[int]:
        """Returns the nearest activation sites that values are made of."""
        return frozenset().union(*map(self._origin, values))

    def _origin(self, value: int) -> frozenset[int]:
        known, todo = self._known_origins, [value]
        while todo and value not in known:
            v = todo[-1]
            e = self.source.get(v)
            if v in self.plan.activations:
                known[v] = frozenset([self.plan.activations[v]])
            elif e is None or is_loop(e):  # What is inside is described apart.
                known[v] = frozenset()
            elif missing := [u for u in e.inputs if u not in known]:
                todo += missing
                continue
            else:
                known[v] = frozenset().union(*(known[u] for u in e.inputs))
            todo.pop()
        return known[value]

    def _reads(self, block: Block) -> tuple[str, ...]:
        """Returns the site of each operand of a block that is data."""
        sites, found = self.plan.sites, []
        for v in block.root.inputs:
            origins = self._origin(v) if self.model.is_real(v) else frozenset()
            if origins:
                (k, *others) = origins
                found.append("" if others else sites[k].name)
        # An elementwise function is of one value, however often it is read.
        return tuple(dict.fromkeys(found)) if block.is_function else tuple(found)

    def _overwritten(
        self, block: Block, sites: Sequence[Site], feeds: dict[int, list[str]]
    ) -> str:
        """Returns the first operand that a runtime may overwrite with the value.

        It has the shape of the value, is read there alone, and as it is; an example has
        more than one number, and the model is neither given the operand nor does it
        return the value.
        """
        end = sites[self.plan.activations[block.value]]
        of = {k: v for v, k in self.plan.activations.items()}
        by_name = {site.name: k for k, site in enumerate(sites)}
        if "return" in feeds[self.plan.activations[block.value]]:
            return ""
        for name in end.reads:
            k = by_name.get(name)
            if k is None or sites[k].op == "input" or len(feeds[k]) != 1:
                continue
            shape, users = self.model.shape(of[k]), self.users[of[k]]
            if block.is_function:
                is_direct = not any(u.primitive.name in SHAPE_MOVES for u in users)
            else:
                is_direct = of[k] in block.root.inputs
            is_same = shape == self.model.shape(block.root.outputs[0])
            once = end.reads.count(name) == 1
            if is_direct and is_same and once and math.prod(shape[1:]) > 1:
                return name
        return ""

    def _op(self, block: Block) -> str:
        """Returns the name of a block's operation, by the value of its weight too."""
        if block.weight is not None and self._is_interpolation(block):
            return "resize"
        return op_of(self.model, block)

    def _is_interpolation(self, block: Block) -> bool:
        """Returns whether a product averages its operand by weights that sum to 1."""
        e = block.root
        if e.primitive.name != "dot_general":
            return False
        weight = self._number(e.inputs[block.weight_operand])
        if weight is None:
            return False
        over = e.params["dimension_numbers"][0][block.weight_operand]
        total = weight.astype(np.float64).sum(tuple(over))
        return bool(np.all(weight >= 0) and np.allclose(total, 1, atol=1e-5))

    def _number(self, v: int) -> np.ndarray | None:
        """Returns a value that is computed of constants alone; None for others."""
        todo, needed = [v], []
        while todo:
            u = todo.pop()
            if u in self.source and u not in self.model.constants:
                e = self.source[u]
                needed.append(e)
                todo += e.inputs
            elif constant_of(self.model, u) is None:
                return None
        known = {u: constant_of(self.model, u) for e in needed for u in e.inputs}
        order = {e.outputs[0]: k for k, e in enumerate(self.model.equations)}
        unique = {e.outputs[0]: e for e in needed}.values()
        with jax.ensure_compile_time_eval():
            for e in sorted(unique, key=lambda e: order[e.outputs[0]]):
                values = evaluate(e, *(jnp.asarray(known[u]) for u in e.inputs))
                known.update(zip(e.outputs, values, strict=True))
        found = known.get(v)
        return constant_of(self.model, v) if found is None else np.asarray(found)

    def _is_log_softmax(self, e: Equation) -> bool:
        """Returns whether ``e`` is ``x - log(sum(exp(x)))``."""
        total = self._after(e.inputs[1], "log", "reduce_sum", "exp")
        return total is not None and total.inputs[0] == e.inputs[0]

    def _is_l2_normalize(self, e: Equation) -> bool:
        """Returns whether ``e`` divides ``x`` by the root of its sum of squares."""
        root = "rsqrt" if e.primitive.name == "mul" else "sqrt"
        for x, v in (e.inputs, e.inputs[::-1]) if root == "rsqrt" else (e.inputs,):
            total = self._after(v, root, "reduce_sum")
            square = None if total is None else self._before(total.inputs[0])
            if square is not None and set(square.inputs) == {x}:
                return square.primitive.name in ("mul", "integer_pow", "square")
        return False

    def _after(self, v: int, *names: str) -> Equation | None:
        """Returns the last equation of a chain back from ``v``, by names; else None."""
        e = None
        for name in names:
            e = self._before(v)
            if e is None or e.primitive.name != name:
                return None
            v = e.inputs[0]
        return e

    def _before(self, v: int) -> Equation | None:
        """Returns the equation behind a value, through moves and constant bounds."""
        e, passed = self.source.get(v), (*SHAPE_MOVES, "max", "add")
        is_known = lambda u: constant_of(self.model, u, self.source) is not None
        while e is not None and e.primitive.name in passed:
            data = [u for u in e.inputs if not is_known(u)]
            if len(data) != 1:
                break
            e = self.source.get(data[0])
        return e

    def _top(self, block: Block) -> str:
        """Returns the modules around the one with the block's parameters: ``CNN/``."""
        path, name = block.root.path, block.name
        return path[: -len(name)] if name and path.endswith("/" + name) else ""

    def _layer(self, block: Block) -> str:
        """Returns the module without parameters that makes a value, or ""."""
        if block.weight is not None and not block.bounds:
            return ""
        path = (block.end or block.root).path
        path = path.removeprefix(self.top)
        return "" if path in self.modules or path + "/" == self.top else path

    def _activation(self, block: Block, op: str, passed: set[str]) -> str:
        if block.bounds:
            return _BOUNDS.get(tuple(block.bounds), "clip")
        if op in ("mean", "avg_pool", "concatenate"):
            return min(passed, default="")
        form = self.exact.get(block.root.outputs[0])
        if isinstance(form, NormForm) and form.is_of_length_one:
            return "l2_normalize"
        name = block.root.primitive.name
        if name == "sub" and self._is_log_softmax(block.root):
            return "log_softmax"
        if name in ("mul", "div") and self._is_l2_normalize(block.root):
            return "l2_normalize"
        return op if block.is_function else ""


def op_of(model: Trace, block: Block) -> str:
    """Returns the name of a block's operation: conv, dense, residual, mean, gelu."""
    e = block.root
    if block.kind != "product":
        return MEANS.get(block.kind, block.kind) if block.affine else block.kind
    if e.primitive.name == "dot_general":
        return "matmul" if block.weight is None and not block.name else "dense"
    return _conv(model, e)


def _conv(model: Trace, e: Equation) -> str:
    groups = e.params["feature_group_count"]
    channel = e.params["dimension_numbers"].lhs_spec[1]
    is_depthwise = groups > 1 and groups == model.shape(e.inputs[0])[channel]
    kind = (
        "depthwise_conv" if is_depthwise else "grouped_conv" if groups > 1 else "conv"
    )
    return f"{kind}_transpose" if max(e.params["lhs_dilation"], default=1) > 1 else kind
