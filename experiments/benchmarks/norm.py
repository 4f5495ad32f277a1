"""What quantization costs around a LayerNorm: Dense-LayerNorm-Dense, in decibels.

    python experiments/benchmarks/norm.py

Tokens have scales from e^-3 to e^3. Signal to noise beside the float model, and what
is lost against the kernels alone in 8 bits: 43.3 dB with those alone, 41.2 with all
activations in 16 bits (2.1 less), 37.9 with a 16-bit input and a norm in 8 bits, 36.0
with an 8-bit output as well. With an 8-bit input 5.5 dB, as with the input alone
rounded: small tokens have few codes left. What a norm alone reads has 16 bits in all of
these, by default. 20 s on 2 cores.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Signal to noise of Dense-LayerNorm-Dense under four schemes."""

    json: str = option("", "file for the rows")
    quick: bool = option(False, "under 10 s")
    features: int = option(64, "of the dense layers")
    tokens: int = option(256, "of each of 16 examples")


class Network(nn.Module):
    """Dense-LayerNorm-Dense."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., features]``."""
        h = nn.LayerNorm(name="norm")(nn.Dense(self.features, name="first")(x))
        return nn.Dense(self.features, name="last")(h)


def schemes() -> dict[str, qjax.Scheme]:
    """Which sites are quantized, to which words."""
    only = lambda spec: (qjax.Rule("input:0", spec),)
    return {
        "kernels alone": qjax.Scheme(activations=None),
        "16-bit activations": qjax.Scheme(activations=qjax.QSpec(16)),
        "16-bit input": qjax.Scheme(
            rules=(*only(qjax.QSpec(16)), qjax.Rule("output:0", None))
        ),
        "16-bit input, 8-bit output": qjax.Scheme(rules=only(qjax.QSpec(16))),
        "8-bit input": qjax.Scheme(),
        "8-bit input alone": qjax.Scheme(
            weights=None, activations=None, rules=only(qjax.QSpec(8))
        ),
    }


def compare(
    features: int, tokens: int, schemes: dict[str, qjax.Scheme]
) -> list[dict[str, Any]]:
    """Decibels of each scheme, on the data that it was calibrated on."""
    rng = np.random.default_rng(0)
    scales = np.exp(rng.uniform(-3, 3, (16, tokens, 1)))
    x = (scales * rng.normal(size=(16, tokens, features))).astype(np.float32)
    network = Network(features)
    params = network.init(jax.random.key(0), x)
    wanted = jax.jit(network.apply)(params, x)
    rows = []
    for name, scheme in schemes.items():
        qmodel = qjax.quantize_model(network.apply, params, x, scheme=scheme)
        qstate = qjax.calibrate(qmodel, params, [x])
        found = jax.jit(qmodel.apply)(params, qstate, x)
        rows.append({"scheme": name, "decibels": decibels(wanted, found)})
    return rows


def decibels(wanted: jax.Array, found: jax.Array) -> float:
    """Signal to noise: ``10 log10(sum(wanted^2) / sum((found - wanted)^2))``."""
    signal, noise = (np.square(np.float64(y)).sum() for y in (wanted, found - wanted))
    return float(10 * np.log10(signal / noise))


def main(config: Config) -> list[dict[str, Any]]:
    """Prints a row for each scheme, with what it loses beside the kernels alone."""
    tokens = 16 if config.quick else config.tokens
    rows = compare(config.features, tokens, schemes())
    for row in rows:
        row["loss"] = rows[0]["decibels"] - row["decibels"]
        print(f"{row['scheme']:<26} {row['decibels']:6.1f} dB {row['loss']:6.1f}")
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main(parse(Config))
