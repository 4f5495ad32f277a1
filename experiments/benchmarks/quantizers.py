"""Time of each quantizer, forward and backward, over that of `jnp.tanh`.

    python experiments/benchmarks/quantizers.py

16 million float32 values, medians, interleaved in one process, 2 cores. Element-wise
0.91 to 1.71, learned 1.01 to 1.11, scales from the values 1.32 to 2.88, random draws
3.57 to 7.71 (two draws a value), estimators 0.92 to 1.23.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.config import option, parse  # noqa: E402
from qjax import estimators, quantizers  # noqa: E402
from qjax.affine import QSpec  # noqa: E402
from qjax.quantizers import tensorflow  # noqa: E402

ELEMENTWISE = (
    "quantized_bits(8,0,1)",
    "quantized_bits(8,0,1,alpha=0.7)",
    "quantized_bits(1)",
    "quantized_linear(8)",
    "quantized_linear(8,alpha=0.7)",
    "quantized_relu(8,2)",
    "quantized_relu(8,2,negative_slope=0.25)",
    "quantized_relu(8,use_sigmoid=True)",
    "quantized_tanh(8)",
    "quantized_tanh(8,use_real_tanh=True)",
    "quantized_sigmoid(8)",
    "quantized_sigmoid(8,use_real_sigmoid=True)",
    "quantized_hswish(8,3)",
    "quantized_ulaw(8)",
    "binary",
    "binary(alpha=1.0)",
    "ternary",
    "ternary(alpha=1.0)",
    "quantized_po2(4)",
    "quantized_po2(8)",
    "quantized_relu_po2(4)",
    "hard_sigmoid",
    "smooth_sigmoid",
    "binary_sigmoid",
    "hard_tanh",
    "smooth_tanh",
    "binary_tanh",
    "dorefa_activations(8)",
)
LEARNED = {  # With what they learn.
    "lsq(8)": (0.02,),
    "lsq_plus(8)": (0.02, 0.1),
    "pact(8)": (2.5,),
    "differentiable_bits(2)": (7.6,),
}
FOUND = (
    "quantized_bits(8,0,1,alpha='auto')",
    "quantized_bits(4,0,1,alpha='auto_po2')",
    "quantized_bits(8,0,1,alpha='auto_po2')",
    "quantized_linear(8,alpha='auto')",
    "quantized_linear(8,alpha='auto_po2')",
    "binary(alpha='auto')",
    "binary(alpha='auto_po2')",
    "ternary(alpha='auto')",
    "ternary(alpha='auto_po2')",
    "dorefa_weights(8)",
)
RANDOM = (
    "quantized_bits(8,use_stochastic_rounding=True)",
    "stochastic_binary",
    "bernoulli",
    "stochastic_ternary(alpha='auto')",
    "quantized_po2(4,use_stochastic_rounding=True)",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Quantizers against `jnp.tanh`, forward and backward."""

    json: str = option("", "file for the rows")
    quick: bool = option(False, "under 60 s: 1 million values, few rounds")
    only: str = option("", "quantizers whose string holds this")


def functions() -> dict[str, tuple[str, Callable[[jax.Array], jax.Array]]]:
    """Name -> kind and function."""
    key = jax.random.key(0)
    found: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {}

    def add(kind: str, text: str, *learned: float, **options: Any) -> None:
        spec = quantizers.parse(text)
        arrays = tuple(jnp.float32(v) for v in learned)
        found[text] = kind, lambda x: quantizers.apply(spec, x, *arrays, **options)

    for text in ELEMENTWISE:
        add("element-wise", text)
    for text, learned in LEARNED.items():
        add("learned", text, *learned)
    for text in FOUND:
        add("scale found", text)
    for text in RANDOM:
        add("random", text, key=key)
    spec, ends = QSpec(8, signed=False), (jnp.float32(-2.0), jnp.float32(2.0))
    found["tensorflow.fake_quant_vars"] = (
        "element-wise",
        lambda x: tensorflow.fake_quant_vars(x, *ends, spec),
    )
    for name, estimator in (
        ("clipped_ste", estimators.clipped_ste),
        ("plain_ste", estimators.plain_ste),
        ("soft_rounding", estimators.soft_rounding()),
        ("ewgs", estimators.ewgs()),
    ):
        found[f"quantized_bits(8) with {name}"] = (
            "estimator",
            lambda x, e=estimator: quantizers.quantized_bits(
                x, quantizers.QuantizedBits(8), estimator=e
            ),
        )
    return found


def forward_and_backward(f: Callable[[jax.Array], jax.Array]) -> Any:
    """Jits value and gradient of a function."""

    @jax.jit
    def run(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(f, x)
        return y, *pull(dy)

    return run


def measure(run: Any, *args: jax.Array) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


if __name__ == "__main__":
    config = parse(Config)
    side, rounds = (1024, 9) if config.quick else (4096, 15)
    x, dy = jax.random.normal(jax.random.key(1), (2, side, side))
    tanh = forward_and_backward(jnp.tanh)
    rows = []
    print(f"{side * side:,} values")
    print(f"{'quantizer':48} {'kind':>12} {'ms':>8} {'tanh ms':>8} {'ratio':>6}")
    for name, (kind, f) in functions().items():
        if config.only not in name:
            continue
        run = forward_and_backward(f)
        times: list[tuple[float, float]] = []
        for i in range(rounds + 2):
            pair = measure(run, x, dy), measure(tanh, x, dy)
            if i >= 2:  # After warm-up.
                times.append(pair)
        own, other = (1e3 * statistics.median(t) for t in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        rows.append({"quantizer": name, "kind": kind, "ms": own, "ratio": ratio})
        print(f"{name:48} {kind:>12} {own:>8.1f} {other:>8.1f} {ratio:>6.2f}")
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(rows, indent=1))
