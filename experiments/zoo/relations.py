"""Models of relations: a graph network, a recommender of embedding bags."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.zoo.member import Member, from_linen, from_nnx, tokens


class Interaction(nnx.Module):
    """Edges look at both of their ends; nodes at the sum of the edges they receive."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.edge1 = nnx.Linear(2 * width, width, rngs=rngs)
        self.edge2 = nnx.Linear(width, width, rngs=rngs)
        self.node1 = nnx.Linear(2 * width, width, rngs=rngs)
        self.node2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x, senders, receivers):
        ends = jnp.concatenate([x[senders], x[receivers]], -1)
        sent = self.edge2(nnx.relu(self.edge1(ends)))
        received = jax.ops.segment_sum(sent, receivers, len(x))
        both = jnp.concatenate([x, received], -1)
        return x + self.node2(nnx.relu(self.node1(both)))


class GraphNetwork(nnx.Module):
    """Battaglia et al., 2018, section 3 (arXiv:1806.01261): edges, then nodes."""

    def __init__(self, rngs: nnx.Rngs, features: int = 6, width: int = 16):
        self.embed = nnx.Linear(features, width, rngs=rngs)
        self.first = Interaction(width, rngs)
        self.second = Interaction(width, rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, nodes, senders, receivers):
        x = self.embed(nodes)
        x = self.first(x, senders, receivers)
        x = self.second(x, senders, receivers)
        return self.head(x)


def graph_network() -> Member:
    rng = np.random.default_rng(0)
    nodes = rng.normal(size=(32, 6)).astype(np.float32)
    senders, receivers = rng.integers(0, 32, (2, 80)).astype(np.int32)
    return from_nnx("graph_network", GraphNetwork, nodes, senders, receivers)


class Recommender(nn.Module):
    """Naumov et al., 2019, section 2 (arXiv:1906.00091): the logit of a click.

    Bags of ids become sums of rows; each pair of vectors meets in a dot product.
    """

    rows: int = 32
    width: int = 8

    @nn.compact
    def __call__(self, dense, ids):
        x = nn.relu(nn.Dense(2 * self.width)(dense))
        x = nn.relu(nn.Dense(self.width)(x))
        table = lambda k: nn.Embed(self.rows, self.width, name=f"table_{k}")
        bags = [table(k)(ids[:, k]).sum(1) for k in range(ids.shape[1])]
        vectors = jnp.stack([x, *bags], 1)
        dots = jnp.einsum("bid,bjd->bij", vectors, vectors)
        row, column = np.tril_indices(vectors.shape[1], -1)
        y = jnp.concatenate([x, dots[:, row, column]], -1)
        y = nn.relu(nn.Dense(2 * self.width)(y))
        return nn.Dense(1, name="head")(y)


def recommender() -> Member:
    dense = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    return from_linen("recommender", Recommender(), dense, tokens((32, 3, 4), 32))
