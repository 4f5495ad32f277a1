"""What a site is: the layer it belongs to, the operation, who reads its value."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from qjax.blocks import MEANS, Block, Plan, data_of
from qjax.channels import Uses, factor_channels
from qjax.normalisations import NORM
from qjax.scheme import Site
from qjax.trace import Equation, Trace

_BOUNDS = {
    (("max", 0.0),): "relu",
    (("max", 0.0), ("min", 6.0)): "relu6",
}


def describe(model: Trace, plan: Plan, names: Sequence[str]) -> Plan:
    """Fills in what rules, presets and configs ask of a site.

    Args:
      model: Trace that the plan is of.
      plan: Sites with names, roles and shapes.
      names: Of the parameters, which are the first inputs of the trace.

    Returns:
      The plan with whole sites.
    """
    return dataclasses.replace(plan, sites=_Describer(model, plan, names).sites())


class _Describer:
    def __init__(self, model: Trace, plan: Plan, names: Sequence[str]):
        self.model, self.plan = model, plan
        self.source = {v: e for e in model.equations for v in e.outputs}
        self.uses = Uses(model, data_of(model, model.inputs[len(names) :]))
        self.modules = {""}
        for name in names:
            parts = name.split("/")[:-1]
            self.modules.update("/".join(parts[: k + 1]) for k in range(len(parts)))
        self.top = next(filter(None, map(self._top, plan.blocks)), "")
        self._known_origins: dict[int, frozenset[int]] = {}

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
            op = op_of(self.model, block)
            for i in before:
                feeds[i].append(op)
            if (at := self._weight_site(block)) is not None:
                sites[at] = self._of_weight(sites[at], op, inputs)
                feeds[at].append(NORM)
        for block in plan.blocks:
            k, op = plan.activations[block.value], op_of(self.model, block)
            own = block.name or plan.sites[k].name.rpartition("/output")[0]
            before = sorted(self._origins(block.root.inputs))
            inputs = tuple(sites[i].name for i in before)
            passed = {sites[i].activation for i in before} - {""}
            sites[k] = sites[k]._replace(
                layer=self._layer(block) or own or sites[k].name,
                op=op,
                activation=self._activation(block, op, passed),
                inputs=inputs,
            )
            for i in before:
                feeds[i].append(op)
            if (at := self._weight_site(block)) is not None:
                sites[at] = self._of_weight(sites[at], op, inputs)
                makes[at].append(k)
        for i in self._origins(self.model.outputs):
            feeds[i].append("return")
        for at, ends in makes.items():
            feeds[at] += [op for k in ends for op in feeds[k]]
        return tuple(
            site._replace(feeds=tuple(dict.fromkeys(feeds[k])))
            for k, site in enumerate(sites)
        )

    def _weight_site(self, block: Block) -> int | None:
        """The site of the factor of a block."""
        if block.weight is None:
            return block.scale_site
        return self.plan.weights[block.weight]

    def _of_weight(self, site: Site, op: str, inputs: tuple[str, ...]) -> Site:
        inputs = tuple(dict.fromkeys((*site.inputs, *inputs)))
        layer = site.name.rpartition("/")[0] or site.name
        return site._replace(layer=layer, op=op, inputs=inputs)

    def _origins(self, values: Iterable[int]) -> frozenset[int]:
        """The activation sites that values are made of, up to the nearest ones."""
        return frozenset().union(*map(self._origin, values))

    def _origin(self, value: int) -> frozenset[int]:
        known, todo = self._known_origins, [value]
        while todo:
            v = todo[-1]
            e = self.source.get(v)
            if v in self.plan.activations:
                known[v] = frozenset([self.plan.activations[v]])
            elif e is None:
                known[v] = frozenset()
            elif missing := [u for u in e.inputs if u not in known]:
                todo += missing
                continue
            else:
                known[v] = frozenset().union(*(known[u] for u in e.inputs))
            todo.pop()
        return known[value]

    def _top(self, block: Block) -> str:
        """The modules around the one whose parameters a block has: ``CNN/``."""
        path, name = block.root.path, block.name
        return path[: -len(name)] if name and path.endswith("/" + name) else ""

    def _layer(self, block: Block) -> str:
        """The module without parameters where a value is made; empty if none."""
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
        return op if block.is_function else ""


def op_of(model: Trace, block: Block) -> str:
    """Returns the name of what a block computes: conv, dense, residual, mean, gelu."""
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
