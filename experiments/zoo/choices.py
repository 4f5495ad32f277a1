"""Models of discrete choices: a mixture of experts, the codebook of a VQ-VAE."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from experiments.zoo.member import Member, from_linen, from_nnx, smooth


class Experts(nn.Module):
    """Shazeer et al., 2017, section 2 (arXiv:1701.06538), without noise: layer, router.

    Each token goes through the two experts that the router scores highest. Returns the
    tokens, and which experts they took.
    """

    experts: int = 4
    hidden: int = 32
    best: int = 2

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        scores = nn.Dense(self.experts, use_bias=False, name="router")(x)
        kept, which = jax.lax.top_k(scores, self.best)
        init = nn.initializers.lecun_normal(batch_axis=0)
        widen = self.param("widen", init, (self.experts, width, self.hidden))
        narrow = self.param("narrow", init, (self.experts, self.hidden, width))
        y = nn.relu(jnp.einsum("ni,eih->neh", x, widen))
        y = jnp.einsum("neh,eho->neo", y, narrow)
        chosen = jnp.take_along_axis(y, which[..., None], 1)
        y = x + (nn.softmax(kept)[..., None] * chosen).sum(1)
        return nn.Dense(width, name="head")(y), which


def experts() -> Member:
    x = np.random.default_rng(0).normal(size=(96, 16)).astype(np.float32)
    ordered = lambda outputs: np.sort(outputs[1], -1)
    return from_linen("experts", Experts(), x, choices=ordered)


class Codebook(nnx.Module):
    """A row for each place: the nearest in the sum of squares."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (rows, width)))

    def __call__(self, x):
        table = self.table[...]
        far = (x[..., None, :] - table[None, None, None]) ** 2
        choice = jnp.argmin(far.sum(-1), -1)
        return table[choice], choice


class VQVAE(nnx.Module):
    """Van den Oord et al., 2017, section 3 (arXiv:1711.00937), in inference.

    Patches do not overlap on the way up: what a row of the codebook becomes depends on
    no other. Returns patches, shape=(batch, height, width, pixels), and the rows.
    """

    def __init__(self, rngs: nnx.Rngs, width: int = 16, code: int = 8):
        conv = lambda n, m, size, step: nnx.Conv(
            n, m, (size, size), strides=(step, step), rngs=rngs
        )
        self.down1, self.down2 = conv(3, width, 4, 2), conv(width, width, 4, 2)
        self.encode = conv(width, code, 1, 1)
        self.codebook = Codebook(16, code, rngs)
        self.decode = conv(code, width, 1, 1)
        self.residual1, self.residual2 = (
            conv(width, width, 1, 1),
            conv(width, width, 1, 1),
        )
        self.up = conv(width, 4 * 4 * 3, 1, 1)

    def __call__(self, x):
        x = nnx.relu(self.down2(nnx.relu(self.down1(x))))
        x, choice = self.codebook(self.encode(x))
        x = self.decode(x)
        x = nnx.relu(x + self.residual2(nnx.relu(self.residual1(x))))
        return self.up(x), choice


def vq_vae() -> Member:
    rows = lambda outputs: outputs[1][..., None]
    return from_nnx("vq_vae", VQVAE, smooth((8, 16, 16, 3), (1, 2)), choices=rows)
