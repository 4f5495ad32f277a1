"""Small models of every kind that leaves the package, and schemes to quantize them."""

import jax.numpy as jnp
from flax import linen as nn

import qjax


class DenseNet(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class NormedCNN(nn.Module):
    """Convolutions with BatchNorm, a max pool."""

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu6(norm()(nn.Conv(6, (3, 3), padding="VALID")(x)))
        return nn.Dense(3)(x.reshape(len(x), -1))


class ResidualNet(nn.Module):
    """A sum of two branches."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.relu(x + nn.Conv(4, (3, 3))(x))


class SeparableNet(nn.Module):
    """A depthwise convolution with strides, a pointwise one."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), (2, 2), feature_group_count=4)(x)
        return nn.relu6(nn.Conv(6, (1, 1))(nn.relu6(x)))


class JoinedNet(nn.Module):
    """Branches side by side."""

    @nn.compact
    def __call__(self, x):
        parts = [nn.relu(nn.Conv(3, (k, k))(x)) for k in (1, 3)]
        return nn.Conv(4, (1, 1))(jnp.concatenate([*parts, x], -1))


class PooledNet(nn.Module):
    """A local and a global average."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.mean((1, 2)))


class GatedNet(nn.Module):
    """A value times its gate."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dense(6)(x) * nn.sigmoid(nn.Dense(6)(x)))


class LSTMNet(nn.Module):
    """An LSTM, and a layer on its last state."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(4))(x)[:, -1])


class AttentionBlock(nn.Module):
    """A block of a transformer."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.relu(nn.Dense(12)(nn.LayerNorm()(x))))


# Name -> the model, and the shape of its input.
MODELS = {
    "mlp": (DenseNet(), (3, 6)),
    "cnn": (NormedCNN(), (3, 8, 8, 2)),
    "residual": (ResidualNet(), (3, 6, 6, 4)),
    "separable": (SeparableNet(), (3, 7, 7, 4)),
    "concat": (JoinedNet(), (3, 5, 5, 2)),
    "average": (PooledNet(), (3, 6, 6, 2)),
    "gate": (GatedNet(), (3, 6)),
    "lstm": (LSTMNet(), (3, 5, 4)),
    "attention": (AttentionBlock(), (3, 5, 8)),
}


def _weights(bits, axis="output", **own):
    return qjax.QSpec(bits, narrow_range=True, axis=axis, **own)


_POWERS = {
    "weights": _weights(8, power_of_two=True),
    "activations": qjax.QSpec(8, power_of_two=True),
}
# Name -> arguments of the scheme. Activations have zero points unless they say not.
SCHEMES = {
    "channel": {"weights": _weights(8)},
    "tensor": {"weights": _weights(8, None)},
    "4 bits": {"weights": _weights(4)},
    "2 bits": {"weights": _weights(2)},
    "symmetric": {"weights": _weights(8), "activations": qjax.QSpec(8, symmetric=True)},
    "powers of two": _POWERS,
}
