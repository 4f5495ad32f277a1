"""C code of gathers, scatters and sorts: integers at places that others name."""

from collections.abc import Sequence

from qjax.formats.c99.calls import CArray, CNode
from qjax.formats.c99.text import number, place


def _others(rank: int, axes: Sequence[int]) -> list[int]:
    return [d for d in range(rank) if d not in axes]


def _start(c: CNode, places: CArray, batch: Sequence[str], k: int, last: int) -> str:
    """Declares a place along an axis; returns its name, where it is clipped."""
    stride = places.shape[-1]
    own = [*places.strides[:-1]]
    at = place(batch, own, k) if stride else "0"
    c.source.line(f"const int64_t s{k} = {places.name}[{at}];")
    c.source.line(f"there = there && s{k} >= 0 && s{k} <= {last};")
    return f"{c.source.prefix}_clip(s{k}, 0, {max(last, 0)})"


def gather(c: CNode) -> None:
    """Adds slices at places of the second input."""
    x, places = c.inputs
    sizes = [
        n if m is None else m for m, n in zip(c["slice_sizes"], x.shape, strict=True)
    ]
    is_filled = c["mode"] != "clip"
    if not x.size:  # No place is there.
        with c.each() as names:
            c.put(c.output.at(names), number(c["fill"]))
        return
    rank = len(c.output.shape)
    batch_axes = _others(rank, c["offset_dims"])
    window = _others(
        len(x.shape), (*c["collapsed_slice_dims"], *c["operand_batching_dims"])
    )
    with c.source.loops([c.output.shape[d] for d in batch_axes]) as batch:
        c.source.line("int there = 1;")
        c.source.line("int64_t at = 0;")
        for k, d in enumerate(c["start_index_map"]):
            own = _start(c, places, batch, k, x.shape[d] - sizes[d])
            c.source.line(f"at += {own} * {x.strides[d]};")
        pairs = zip(
            c["operand_batching_dims"], c["start_indices_batching_dims"], strict=True
        )
        for d, j in pairs:
            c.source.line(f"at += {place([batch[j]], [x.strides[d]])};")
        with c.source.loops([sizes[d] for d in window]) as inner:
            of = dict(zip(batch_axes, batch, strict=True))
            of |= dict(zip(sorted(c["offset_dims"]), inner, strict=True))
            value = f"{x.name}[at + {place(inner, [x.strides[d] for d in window])}]"
            if is_filled:
                value = f"there ? {value} : {number(c['fill'])}"
            else:
                c.source.line("(void)there;")
            c.put(c.output.at([of[d] for d in range(rank)]), value)


def _scattered(c: CNode, places: CArray, updates: CArray, form: str) -> None:
    """Adds updates in order, each where its place is inside.

    Args:
      c: The call.
      places: The places.
      updates: What goes there.
      form: A statement with ``{to}``, what is there, and ``{new}``.
    """
    out, rank = c.output, len(updates.shape)
    batch_axes = _others(rank, c["update_window_dims"])
    single = *c["inserted_window_dims"], *c["operand_batching_dims"]
    windows = dict(
        zip(
            _others(len(out.shape), single),
            sorted(c["update_window_dims"]),
            strict=True,
        )
    )
    # In the order of the places, however their windows lie: the last update stays.
    order = [*batch_axes, *sorted(c["update_window_dims"])]
    with c.source.loops([updates.shape[d] for d in order]) as found:
        names = [found[order.index(d)] for d in range(rank)]
        batch = [names[d] for d in batch_axes]
        c.source.line("int there = 1;")
        c.source.line("int64_t at = 0;")
        for k, d in enumerate(c["scatter_dims"]):
            size = updates.shape[windows[d]] if d in windows else 1
            own = _start(c, places, batch, k, out.shape[d] - size)
            c.source.line(f"at += {own} * {out.strides[d]};")
        pairs = zip(
            c["operand_batching_dims"], c["scatter_indices_batching_dims"], strict=True
        )
        for d, j in pairs:
            c.source.line(f"at += {place([batch[j]], [out.strides[d]])};")
        inner = [names[axis] for axis in windows.values()]
        c.source.line(f"at += {place(inner, [out.strides[d] for d in windows])};")
        check = "" if c["mode"] == "clip" else "if (there) "
        if not check:
            c.source.line("(void)there;")
        to, new = f"{out.name}[at]", updates.at(names)
        c.source.line(check + form.format(to=to, new=new, kind=out.ctype))


def scatter(c: CNode) -> None:
    """Adds a value in which some places are replaced, or have extremes."""
    places, x, updates = c.inputs
    with c.source.loops([x.size]) as names:
        c.put(f"{c.output.name}[{names[0]}]", f"{x.name}[{names[0]}]")
    sign = {"scatter_max": ">", "scatter_min": "<"}.get(c.node.operation)
    form = "{to} = ({kind}){new};"
    if sign is not None:
        form = f"{{to}} = ({{kind}})({{new}} {sign} {{to}} ? {{new}} : {{to}});"
    if updates.size:
        _scattered(c, places, updates, form)


def scatter_add(c: CNode) -> None:
    """Adds sums of what has one place."""
    places, updates = c.inputs
    with c.source.loops([c.output.size]) as names:
        c.put(f"{c.output.name}[{names[0]}]", "0")
    if updates.size:
        zero = number(c["input_zero_point"])
        _scattered(
            c, places, updates, f"{{to}} = ({{kind}})({{to}} + ({{new}} - {zero}));"
        )


def sort(c: CNode) -> None:
    """Adds integers in order along an axis, or their numbers, by a heap."""
    x, axis, line = c.x, c["axis"], c.source.line
    n, stride, is_number = x.shape[axis], x.strides[axis], c.node.operation == "argsort"
    kind = c.output.ctype
    key = lambda q: f"p[{q} * {stride}]"

    def before(a: str, b: str) -> str:
        """Says whether one goes before another; equal ones are in their own order."""
        if not is_number:
            return f"{a} < {b}"
        sign = ">" if c["descending"] else "<"
        ties = f"({key(a)} == {key(b)} && {a} < {b})"
        return f"{key(a)} {sign} {key(b)} || {ties}"

    with c.source.loops([1 if d == axis else m for d, m in enumerate(x.shape)]) as at:
        start = place(at, x.strides)
        line(f"const {x.ctype} *p = {x.name} + {start};")
        line(f"{kind} *q = {c.output.name} + {start};")
        line(f"int first = {n // 2}, end = {n};")
        own = "c" if is_number else key("c")
        line(f"for (int c = 0; c < {n}; ++c) q[c * {stride}] = ({kind}){own};")
        with c.source.block("while (end > 1)"):
            line("int root, child;")
            line(f"{kind} top;")
            with c.source.block("if (first > 0)"):
                line("--first;")
                line(f"top = q[first * {stride}];")
            with c.source.block("else"):
                line("--end;")
                line(f"top = q[end * {stride}];")
                line(f"q[end * {stride}] = q[0];")
            line("root = first;")
            with c.source.block("while ((child = 2 * root + 1) < end)"):
                line(f"{kind} below = q[child * {stride}];")
                with c.source.block("if (child + 1 < end)"):
                    line(f"const {kind} other = q[(child + 1) * {stride}];")
                    line(f"if ({before('below', 'other')}) below = other, ++child;")
                line(f"if (!({before('top', 'below')})) break;")
                line(f"q[root * {stride}] = below;")
                line("root = child;")
            line(f"q[root * {stride}] = top;")
