"""Graphs whose quantization points, also inside of loops, are values of their own."""

import dataclasses

from qjax.graph.graph import Graph


def exposed(graph: Graph) -> tuple[Graph, dict[str, int]]:
    """Makes the codes at all quantization points values of the outermost graph.

    Args:
      graph: Any graph.

    Returns:
      The graph, whose loops return the codes of each step, and the value of each
      quantization point by its name, those of loops first.
    """
    values, nodes = list(graph.values), []
    found: dict[str, int] = {}
    for node in graph.nodes:
        if not node.graphs:
            nodes.append(node)
            continue
        body, inner = exposed(node.graphs["body"])
        a, first = node.attributes, len(values)
        length = a["length"]
        if length is None:
            steps = graph.values[node.inputs[a["consts"] + a["carries"]]]
            length = steps.shape[0]
        for v in inner.values():
            own = body.values[v]
            values.append(dataclasses.replace(own, shape=(length, *own.shape)))
        made = range(first, len(values))
        body = dataclasses.replace(body, outputs=(*body.outputs, *inner.values()))
        nodes.append(
            dataclasses.replace(
                node, graphs={"body": body}, others=(*node.others, *made)
            )
        )
        found.update(zip(inner, made, strict=True))
    found.update(graph.sites)
    whole = dataclasses.replace(graph, values=tuple(values), nodes=tuple(nodes))
    return whole, found
