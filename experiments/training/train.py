"""Quantization-aware training as it is done: one script, a flag for each way of it.

    python experiments/training/train.py [FLAGS]
    python experiments/training/train.py --table [--data-dir DIR]

Prints the mean loss of the last ten steps, and that of the first step; with --table a
row for each way, in a process of its own: compute types, devices, remat, a stop.
Networks are a CNN with BatchNorm on images and a transformer of two blocks on
characters; weights have 4 bits, activations 8, with moving ranges or LSQ's learned
scales. With --table --data fashion_mnist --data-dir DIR, and tinyshakespeare.txt in
DIR/text, on 2 cores; the loss begins at 2.3501 (CNN) and 4.6810 (transformer):

                                 CNN                  transformer
                                 ranges    learned    ranges    learned
    float32                      1.605520  1.601573   2.578804  2.606139
    8 devices                    1.605521  1.600760   2.578826  2.606775
    remat                        1.605520  1.601573   2.578122  2.607374
    stopped and resumed          1.605520  1.601573   2.578804  2.606139
    bfloat16                     1.602507  1.594089   2.578423  2.605840
    bfloat16, 8 devices, remat   1.603883  1.595710   2.578785  2.608044

A sum in another order moves a code now and then, and learned scales most.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.config import option, parse  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a quantized network and prints its loss."""

    model: str = option("cnn", "cnn or transformer")
    data: str = option("digits", "of the CNN: digits, mnist or fashion_mnist")
    data_dir: str = option("", "folder with NAME.npz and text/; default: $QJAX_DATA")
    dtype: str = option("float32", "compute type: float32, bfloat16 or float16")
    devices: int = option(1, "number of devices that share a batch, virtual on a CPU")
    remat: bool = option(False, "whether blocks are under jax.checkpoint")
    learned: bool = option(False, "LSQ's scales in place of moving ranges")
    stop: int = option(0, "step at which the training is stopped, saved and resumed")
    steps: int = option(120, "of training")
    batch_size: int = option(64, "of training")
    learning_rate: float = option(3e-3, "of Adam, falling to 0 as a cosine")
    delay: int = option(20, "steps in float first")
    freeze: int = option(90, "step from which ranges, scales and averages stay")
    table: bool = option(False, "runs all rows of the table, each in its process")


CONFIG: Config = parse(Config) if __name__ == "__main__" else Config()
if CONFIG.devices > 1:  # Before JAX starts.
    flag = f"--xla_force_host_platform_device_count={CONFIG.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import qjax  # noqa: E402
from experiments.data import load  # noqa: E402
from qjax import QSpec, Rule, training  # noqa: E402
from qjax.quantizers import LSQ  # noqa: E402

LENGTH = 32  # Characters of a context.


class Block(nn.Module):
    """A convolution with BatchNorm, of stride 2."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes in training: statistics are those of the batch."""
        x = nn.Conv(self.features, (3, 3), 2, use_bias=False, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
        return nn.relu(x)


class CNN(nn.Module):
    """Two blocks and a head."""

    classes: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits of images."""
        block = nn.remat(Block) if self.remat else Block
        for k, features in enumerate((16, 32)):
            x = block(features, self.dtype, name=f"block_{k}")(x)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


class Layer(nn.Module):
    """A block of a transformer: causal attention, then two dense layers."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds both to the values."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2], jnp.int32))
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(4, dtype=self.dtype)(y, mask=mask)
        y = nn.Dense(128, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(nn.gelu(y))


class Transformer(nn.Module):
    """Embeddings, two blocks and a head."""

    classes: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits of the next characters."""
        places = self.param("places", nn.initializers.normal(0.02), (1, LENGTH, 32))
        x = nn.Embed(self.classes, 32, dtype=self.dtype)(x) + places.astype(self.dtype)
        layer = nn.remat(Layer) if self.remat else Layer
        for k in range(2):
            x = layer(self.dtype, name=f"layer_{k}")(x)
        return nn.Dense(self.classes, dtype=self.dtype)(x)


class Task(NamedTuple):
    """A network, and its data in order."""

    network: nn.Module
    inputs: np.ndarray
    labels: np.ndarray


def task(config: Config) -> Task:
    """Makes the network and reads its data."""
    dtype = jnp.dtype(config.dtype)
    rng = np.random.default_rng(0)
    count = config.steps * config.batch_size
    if config.model == "cnn":
        split = load(config.data, config.data_dir)
        order = rng.integers(0, len(split.x_train), count)
        network = CNN(10, dtype, config.remat)
        return Task(network, split.x_train[order], split.y_train[order])
    folder = pathlib.Path(config.data_dir or os.environ.get("QJAX_DATA", ""))
    path = folder / "text" / "tinyshakespeare.txt"
    if not path.exists():  # A text that is always there.
        path = pathlib.Path(__file__).resolve().parents[2] / "LICENSE"
    text = path.read_text()
    characters = sorted(set(text))
    codes = np.array([characters.index(c) for c in text], np.int32)
    starts = rng.integers(0, len(codes) - LENGTH - 1, count)
    rows = starts[:, None] + np.arange(LENGTH)
    network = Transformer(len(characters), dtype, config.remat)
    return Task(network, codes[rows], codes[rows + 1])


class Run(NamedTuple):
    """The state of a training: all there is to save."""

    params: Any
    learned: Any
    stats: Any
    qstate: Any
    optimizers: Any
    count: jax.Array


def scheme(config: Config) -> qjax.Scheme:
    """Words of 4 and 8 bits; the logits stay accumulators."""
    rules = (Rule("input:0", QSpec(8), optional=True), Rule("output:0", None))
    if config.learned:
        return qjax.Scheme(LSQ(4, axis="output"), LSQ(8), rules)
    word = QSpec(4, narrow_range=True, axis="output")
    return qjax.Scheme(word, QSpec(8), rules, qjax.ema_min_max(0.9))


def train(config: Config) -> list[float]:
    """Trains and returns the loss of each step."""
    network, inputs, labels = task(config)
    first = inputs[: config.batch_size]
    variables = network.init(jax.random.key(0), first)
    forward = lambda v, x: network.apply(v, x, mutable=["batch_stats"])
    qmodel = qjax.quantize_model(forward, variables, first, scheme=scheme(config))
    qstate = qjax.calibrate(qmodel, variables, [first])
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    slow = training.scale_learned({"scale": 0.1} if config.learned else {})
    ends = training.freeze_after(config.freeze), training.keep_bounds(qmodel)
    own = optax.chain(optax.adam(rate), slow, *ends)
    optimizers = optax.adam(rate), own
    delay = training.quant_delay(config.delay)

    def step(run: Run, batch: tuple[jax.Array, jax.Array]) -> tuple[Run, jax.Array]:
        is_frozen = run.count >= config.freeze

        def loss(params: Any, learned: Any) -> Any:
            state = {**run.qstate, "learned": learned} if learned else run.qstate
            (logits, new), moved = qmodel.apply_and_update(
                {"params": params, **run.stats},
                state,
                batch[0],
                qnoise_factor=delay(run.count),
                update=~is_frozen,
            )
            logits = logits.astype(jnp.float32)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
            stats = training.freeze(is_frozen, run.stats, {**run.stats, **new})
            return each.mean(), (stats, moved)

        found = jax.value_and_grad(loss, (0, 1), has_aux=True)(run.params, run.learned)
        (value, (stats, moved)), slopes = found
        news, states = [], []
        trees = (run.params, run.learned)
        for tx, s, tree, g in zip(
            optimizers, run.optimizers, trees, slopes, strict=True
        ):
            updates, s = tx.update(g, s, tree)
            news.append(optax.apply_updates(tree, updates))
            states.append(s)
        moved.pop("learned", None)
        return Run(*news, stats, moved, tuple(states), run.count + 1), value

    params, learned = variables.pop("params"), qstate.pop("learned", {})
    starts = optimizers[0].init(params), own.init(learned)
    run = Run(params, learned, variables, qstate, starts, jnp.int32(0))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    run = jax.device_put(run, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("data"))
    jitted, losses = jax.jit(step, donate_argnums=0), []
    for k in range(config.steps):
        if config.stop and k == config.stop:
            run = resumed(run)
        part = slice(k * config.batch_size, (k + 1) * config.batch_size)
        batch = jax.device_put((inputs[part], labels[part]), split)
        run, loss = jitted(run, batch)
        losses.append(float(loss))
    return losses


def resumed(run: Run) -> Run:
    """Saves a training to a file, forgets it, and reads it."""
    leaves, tree = jax.tree.flatten(run)
    places = [leaf.sharding for leaf in leaves]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run.npz"
        np.savez(path, *map(np.asarray, leaves))
        del run, leaves
        with np.load(path) as file:
            arrays = [file[f"arr_{k}"] for k in range(len(places))]
    return jax.tree.unflatten(tree, map(jax.device_put, arrays, places))


WAYS = {
    "float32": (),
    "8 devices": ("--devices", "8"),
    "remat": ("--remat",),
    "stopped and resumed": ("--stop", "50"),
    "bfloat16": ("--dtype", "bfloat16"),
    "bfloat16, 8 devices, remat": ("--dtype", "bfloat16", "--devices", "8", "--remat"),
}


def table(config: Config) -> None:
    """Runs each row in a process of its own and prints the table."""
    print(
        "| network | grids | way | loss, mean of the last 10 steps | first step | s |"
    )
    print("|---|---|---|---|---|---|")
    for model in ("cnn", "transformer"):
        for grids in ("ranges", "learned"):
            for way, flags in WAYS.items():
                own = ["--model", model, "--data", config.data, *flags]
                own += ["--data-dir", config.data_dir] if config.data_dir else []
                own += ["--steps", str(config.steps)]
                own += ["--learned"] if grids == "learned" else []
                start = time.time()
                command = [sys.executable, __file__, *own]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                last, begun = done.stdout.split()[-2:]
                took = time.time() - start
                print(f"| {model} | {grids} | {way} | {last} | {begun} | {took:.0f} |")


if __name__ == "__main__":
    if CONFIG.table:
        table(CONFIG)
    else:
        found = train(CONFIG)
        print(f"{np.mean(found[-10:]):.6f} {found[0]:.6f}")
