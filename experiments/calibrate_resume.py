"""Calibration that outlives its process: an Orbax checkpoint every few batches.

    python experiments/calibrate_resume.py --stop-after 20  # as if it were killed
    python experiments/calibrate_resume.py                  # goes on

The second run starts at batch 20 of 45 and finds bit for bit the ranges of a run that
was never stopped; 4 to 5 s each on 2 cores.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.data import load  # noqa: E402
from experiments.quickstart import CNN, functions  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Calibration with checkpoints."""

    directory: str = option("calibration_checkpoints", "where the state is kept")
    every: int = option(10, "batches between checkpoints; each part compiles once")
    stop_after: int = option(0, "batches; 0: at the end")


def seen(qstate: Any) -> int:
    """How many batches a state has seen: it knows itself."""
    return int(next(iter(qstate.values())).step)


def calibrate(
    qmodel: qjax.QuantizedModel,
    params: Any,
    batches: Iterable[Any],
    directory: str,
    every: int,
) -> Any:
    """As `qjax.calibrate`, but goes on from the last checkpoint in the directory."""
    with ocp.CheckpointManager(pathlib.Path(directory).resolve()) as manager:
        save = lambda s: manager.save(seen(s), args=ocp.args.StandardSave(s))
        done, qstate = manager.latest_step() or 0, None
        if done:
            init = lambda *x: qmodel.init(params, *x)
            shapes = jax.eval_shape(init, *qmodel.example)
            qstate = manager.restore(done, args=ocp.args.StandardRestore(shapes))
        rest = itertools.islice(batches, done, None)
        for first in rest:
            part = itertools.chain([first], itertools.islice(rest, every - 1))
            try:
                qstate = qjax.calibrate(qmodel, params, part, qstate=qstate)
            except (qjax.CalibrationError, qjax.CalibrationInterrupt) as error:
                if error.qstate and seen(error.qstate) > (manager.latest_step() or 0):
                    save(error.qstate)  # Also what this part found before it failed.
                raise
            save(qstate)
    return qstate


if __name__ == "__main__":
    config = parse(Config)
    x = load("digits").x_train
    batches = [x[i : i + 32] for i in range(0, len(x), 32)]
    fn, _, params = functions(CNN(16, 8, nnx.Rngs(0)))
    scheme = qjax.Scheme(calibrator=qjax.moving_max())
    qmodel = qjax.quantize_model(fn, params, x[:1], scheme=scheme)
    chosen = batches[: config.stop_after or None]
    qstate = calibrate(qmodel, params, chosen, config.directory, config.every)
    whole = qjax.calibrate(qmodel, params, batches[: seen(qstate)])
    jax.tree.map(np.testing.assert_array_equal, qstate, whole)
    print(
        f"{seen(qstate)} batches of {len(batches)}: the ranges of one run, bit for bit"
    )
