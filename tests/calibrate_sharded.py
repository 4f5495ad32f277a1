"""A calibration on all devices of one or more processes, and a model without rounding.

python tests/calibrate_sharded.py OUT [PROCESS PROCESSES ADDRESS]
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax.affine import QSpec
from qjax.schemes.rules import Rule
from qjax.schemes.scheme import Scheme

CALIBRATORS = {
    "min_max": qjax.min_max(),
    "moving_max": qjax.moving_max(),
    "ema_min_max": qjax.ema_min_max(0.9),
    "percentile": qjax.percentile(95.0),
    "mse": qjax.mse(10),
    "entropy": qjax.entropy(),
    "mean_std": qjax.mean_std(),
}


def fn(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """An output for each calibrator."""
    hidden = jax.nn.relu(x @ params["one"] + params["bias"])
    return tuple(hidden @ w for w in params["two"])


def eighths(*shape: int, seed: int = 0) -> np.ndarray:
    """Multiples of 1/8: all sums and products of the model are exact."""
    values = np.random.default_rng(seed).integers(-16, 17, shape)
    return values.astype(np.float32) / 8


def make() -> tuple[qjax.QuantizedModel, Any]:
    """The model and its parameters."""
    params = {"one": eighths(5, 7, seed=1), "bias": eighths(1, 7, seed=2)}
    params["two"] = [eighths(7, 3, seed=3 + k) for k in range(len(CALIBRATORS))]
    rules = tuple(
        Rule(f"output:{k}", QSpec(8), calibrator)
        for k, calibrator in enumerate(CALIBRATORS.values())
    )
    scheme = Scheme(rules=rules)
    return qjax.quantize_model(fn, params, jnp.ones((1, 5)), scheme=scheme), params


def batches() -> list[np.ndarray]:
    """Three, the last one smaller, whose ranges differ."""
    return [k * eighths(n, 5, seed=k) for k, n in ((3, 16), (4, 16), (2, 8))]


def state(share: Any = lambda x: x) -> Any:
    """After a calibration that was stopped and resumed."""
    qmodel, params = make()
    first, *rest = map(share, batches())
    qstate = jax.device_get(qjax.calibrate(qmodel, params, [first]))
    return jax.device_get(qjax.calibrate(qmodel, params, rest, qstate=qstate))


def failure(share: Any = lambda x: x) -> tuple[str, Any]:
    """The message for a batch with one NaN, and the state of before."""
    qmodel, params = make()
    good, broken, _ = batches()
    broken[13, 2] = np.nan
    try:
        qjax.calibrate(qmodel, params, map(share, (good, broken)))
    except qjax.CalibrationError as error:
        return str(error), jax.device_get(error.qstate)
    raise AssertionError("A NaN went by.")


def _main(
    out: str, process: str = "0", processes: str = "1", address: str = ""
) -> None:
    if processes != "1":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(process))
    sharding = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))

    def share(x: np.ndarray) -> jax.Array:
        """The global array; this process gives its part of it."""
        part = np.split(x, int(processes))[int(process)]
        return jax.make_array_from_process_local_data(sharding, part, x.shape)

    message, before = failure(share)
    leaves = jax.tree.leaves((state(share), before))
    np.savez(out, message, np.int32(jax.device_count()), *leaves)


if __name__ == "__main__":
    _main(*sys.argv[1:])
