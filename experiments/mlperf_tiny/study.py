"""The reference models of MLPerf Tiny and a ResNet-20 at 8 and 4 bits, beside TFLite.

    study=experiments/mlperf_tiny/study.py  # With --data-dir DIR or $QJAX_DATA.
    python $study --speed --models resnet-8 --steps 2000
    python $study --models resnet-20 --steps 300 --learning-rate 1e-3
    python $study --speed --models resnet-8-large --steps 0
    python $study --models mobilenet-0.25 --steps 0

Integer programs on 1,017 test images (one is 0.098 points), seed 0, 2 cores: 385 s for
ResNet-8; 2074 s for ResNet-20, the cores shared with other work. "x": time of LiteRT's
XNNPACK, 2 threads, at batch 1 over that of the program; LiteRT is the faster.

    resnet-8                            right      %  agree %    bytes   x 1
    float                                 895  88.00   100.00  313,704
    TFLite int8, reference kernels        894  87.91    97.54   82,468
    TFLite int8, XNNPACK                  892  87.71    97.64   82,468
    TFLite int8, read by qjax             894  87.91    97.54   82,468
    int8 after training, min_max          896  88.10    98.53   81,520  0.12
    int8 after training, mse              893  87.81    98.13   81,520  0.12
    int8 after training, Linen            896  88.10    98.53   81,520  0.11
    int8 trained                          893  87.81    98.62   81,520  0.12
    w4a8 after training                   550  54.08    56.15   42,840  0.12
    w4a8, first kernel 8 bits, likewise   663  65.19    66.47   43,056  0.12
    w4a8 trained                          874  85.94    93.22   42,840  0.12
    w4a8, first kernel 8 bits, trained    889  87.41    95.77   43,056  0.12
    resnet-20: float                      932  91.64   100.00  1,084,392
    int8 after training, min_max          930  91.45    99.31  276,720
    int8 after training, mse              932  91.64    99.02  276,720
    int8 trained                          932  91.64    98.62  276,720
    w4a8 after training                   917  90.17    95.67  142,552
    w4a8 trained                          937  92.13    94.99  142,552
    resnet-8-large: float                 928  91.25   100.00  1,921,320
    TFLite int8, reference kernels        933  91.74    99.12  490,636
    int8 after training, min_max          931  91.54    98.62  489,688  0.17
    int8 after training, mse              932  91.64    99.02  489,688  0.17
    w4a8 after training                   875  86.04    88.50  249,948  0.17
    w4a8, first kernel 8 bits, likewise   896  88.10    92.82  250,488  0.17

MobileNet, which has no labels: all predictions on its 128 images are those of the float
model, TFLite's, at 8 bits and at 4 after training. At batch 32 LiteRT takes 0.2 of the
time of a program for the ResNets (`experiments/benchmarks/inference.py`).

Every site equals the fake-quantized model's in 99.9998 % of the codes or more, others
are off by one. Calibrators and the rate of learning were chosen by the divergence from
the float model on 1,017 training images that nothing was calibrated or trained on; test
images chose nothing. That the first kernel keeps 8 bits is the usual exception (Zhou et
al., 2016, section 2.7, arXiv:1606.06160).

Training is distillation: the float model's outputs on flipped and cropped images.
"""

import dataclasses
import functools
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.table
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.mlperf_tiny import models  # noqa: E402
from experiments.quickstart import functions  # noqa: E402
from qjax import presets  # noqa: E402
from qjax.formats.tflite import read_tflite  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Integer programs of MLPerf Tiny's models and a ResNet-20, beside TFLite's."""

    data_dir: str = option("", "folder with mlperf_tiny/; default: $QJAX_DATA")
    models: str = option(",".join(models.MODELS), "which, with commas")
    images: int = option(8960, "to train on, the first of 10,000")
    calibration: int = option(1024, "of them to calibrate on")
    left_out: int = option(1017, "to choose a calibrator by, the last of the 10,000")
    test: int = option(1017, "to test on")
    steps: int = option(1500, "of training at 4 bits; a quarter of them at 8; or 0")
    batch_size: int = option(64, "of training")
    learning_rate: float = option(3e-4, "at 4 bits, its peak; a tenth of it at 8")
    seed: int = option(0, "of batches, crops and flips")
    speed: bool = option(False, "times programs and LiteRT, in turn")
    rounds: int = option(50, "timed calls of each")
    threads: int = option(2, "of LiteRT; JAX takes all cores")


HISTOGRAMS = {
    "percentile": qjax.percentile(),
    "mse": qjax.mse(),
    "entropy": qjax.entropy(),
}


class Study(NamedTuple):
    """A float model and its images, as it takes them."""

    source: models.Source
    infer: Callable[..., jax.Array]  # (state, x) -> logits
    train: Callable[..., Any]  # (state, x) -> logits, new statistics
    state: Any
    raw: np.ndarray  # uint8, to train on.
    calibration: np.ndarray
    left_out: np.ndarray  # Neither trained nor calibrated on.
    wanted: np.ndarray  # Logits of the float model on those.
    test: np.ndarray
    labels: np.ndarray


class Row(NamedTuple):
    """What is known of one form of a model."""

    form: str
    guess: np.ndarray  # shape=(test,). Class of each image.
    nbytes: int  # Of the parameters.
    loss: float = np.nan  # KL divergence from the float model on images left out.
    program: qjax.IntegerProgram | None = None
    agreement: qjax.Verification | None = None
    ratios: tuple[float, ...] = ()  # Of LiteRT's time over its own, by batch size.


def prepare(name: str, model: Any, folder: pathlib.Path, config: Config) -> Study:
    """A float model and its images."""
    source = models.MODELS[name]
    train, test = (models.images(folder, s) for s in ("train10k", "test1017"))
    # Outputs of a model without labels are published on the first 128 images alone.
    count = min(config.test, 1017 if source.labelled else 128)
    raw = train.x[: config.images]
    left_out = source.prepare(train.x[-config.left_out :])
    infer, learn, state = functions(model)
    return Study(
        source,
        infer,
        learn,
        state,
        raw,
        source.prepare(raw[: config.calibration]),
        left_out,
        in_chunks(functools.partial(jax.jit(infer), state), left_out),
        source.prepare(test.x[:count]),
        test.y[:count],
    )


def in_chunks(fn: Callable[..., Any], x: np.ndarray, size: int = 128) -> np.ndarray:
    """``fn`` of many images, so many at once; the last are filled up: one compile."""
    places = np.arange(-(-len(x) // size) * size) % len(x)
    chunks = [fn(x[take]) for take in places.reshape(-1, size)]
    return np.concatenate(chunks)[: len(x)]


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence of softmax: ``mean_n sum_c p log(p / q)``."""
    p, q = (jax.nn.log_softmax(y) for y in (wanted, found))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


# After training.


def quantized(study: Study, scheme: qjax.Scheme) -> qjax.QuantizedModel:
    """The model for inference on the grids of a scheme."""
    x = study.test[:2]
    return qjax.quantize_model(study.infer, study.state, x, scheme=scheme)


def calibrated(study: Study, scheme: qjax.Scheme) -> Any:
    """State of the calibrators of a scheme."""
    x = study.calibration
    parts = [x[i : i + 128] for i in range(0, len(x), 128)]
    return qjax.calibrate(quantized(study, scheme), study.state, parts)


def ranges(study: Study) -> dict[str, Any]:
    """What each calibrator finds, written as states of `min_max`."""
    scheme = presets.tflite_int8()
    widest = calibrated(study, scheme)
    found = {"min_max": widest}
    searched = lambda c: dataclasses.replace(scheme, calibrator=c)
    counts = calibrated(study, searched(qjax.percentile()))  # All of them search these.
    for name, calibrator in HISTOGRAMS.items():
        qmodel = quantized(study, searched(calibrator))
        grids = qjax.scales(qmodel, study.state, counts)
        found[name] = {
            site: own._replace(low=grids[site].low, high=grids[site].high)
            for site, own in widest.items()
        }
    return found


def best(study: Study, found: dict[str, Any]) -> str:
    """The calibrator that loses least at 8 bits on the images left out."""
    apply = jax.jit(quantized(study, presets.tflite_int8()).apply)
    losses = {}
    for name, qstate in found.items():
        predict = functools.partial(apply, study.state, qstate)
        losses[name] = divergence(study.wanted, in_chunks(predict, study.left_out))
    print("KL:", ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
    return min(losses, key=lambda name: losses[name])


def lowered(study: Study, form: str, qmodel: Any, state: Any, qstate: Any) -> Row:
    """The integer program of a quantized model, verified, on the test images."""
    program = qjax.lower(qmodel, state, qstate, study.test[:2])
    agreement = qjax.verify(program, qmodel, state, qstate, study.test[:64])
    guess = np.argmax(in_chunks(program, study.test), -1)
    loss = divergence(study.wanted, in_chunks(program, study.left_out))
    print(f"{form}: KL {loss:.5f}", flush=True)
    return Row(form, guess, program.nbytes, loss, program, agreement)


# Training: to give what the float model gives. Such distillation needs no labels.


def batches(x: np.ndarray, config: Config) -> Iterator[np.ndarray]:
    """Shuffled batches, cropped from a margin of 4 and flipped, without end."""
    rng = np.random.default_rng(config.seed)
    n = min(config.batch_size, len(x))
    while True:
        order = rng.permutation(len(x))
        for i in range(0, len(x) - n + 1, n):
            margin = ((0, 0), (4, 4), (4, 4), (0, 0))
            windows = np.lib.stride_tricks.sliding_window_view(
                np.pad(x[order[i : i + n]], margin), x.shape[1:3], axis=(1, 2)
            )
            crops = windows[np.arange(n), *rng.integers(0, 9, (2, n))]
            crops = np.moveaxis(crops, 1, -1)
            flip = rng.random((n, 1, 1, 1)) < 0.5
            yield np.where(flip, crops[:, :, ::-1], crops)


def make_step(forward: Any, teacher: Any, optimizer: Any) -> Callable[..., Any]:
    """One jitted step of ``forward(state, x) -> (logits, statistics)``.

    It nears ``teacher(given, x)``.
    """

    def loss(weights, statistics, x, wanted):
        logits, new = forward(nnx.merge_state(weights, statistics), x)
        return jnp.mean(optax.softmax_cross_entropy(logits, wanted)), new

    @jax.jit
    def step(weights, statistics, opt, given, x):
        wanted = jax.nn.softmax(teacher(given, x))
        grads, new = jax.grad(loss, has_aux=True)(weights, statistics, x, wanted)
        updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(weights, updates), new, opt

    return step


def fit(
    study: Study,
    scheme: qjax.Scheme,
    qstate: Any,
    *,
    rate: float,
    steps: int,
    moving: int,
    config: Config,
) -> Any:
    """Trains on quantized values: Adam, a warm-up over a tenth and a cosine decay.

    In the first ``moving`` steps BatchNorm takes the statistics of each batch and moves
    its own; in the others its own are fixed (Krishnamoorthi, 2018, section 4.2,
    arXiv:1806.08342), as a batch of 64 says less than what it was trained on.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    optimizer, infer = optax.adam(schedule), quantized(study, scheme)
    train = qjax.quantize_model(study.train, study.state, study.test[:2], scheme=scheme)
    of = lambda state: nnx.split_state(state, nnx.Param, ...)
    of_batch = lambda state, x: train.apply(state, qstate, x)
    fixed = lambda state, x: (infer.apply(state, qstate, x), of(state)[1])
    first, later = (make_step(f, study.infer, optimizer) for f in (of_batch, fixed))
    weights, statistics = of(study.state)
    opt = optimizer.init(weights)
    for k, batch in enumerate(itertools.islice(batches(study.raw, config), steps)):
        step, x = first if k < moving else later, study.source.prepare(batch)
        weights, statistics, opt = step(weights, statistics, opt, study.state, x)
    return nnx.merge_state(weights, statistics)


# TFLite's file.


def litert(
    content: bytes, batch: int, threads: int, *, reference: bool = False
) -> Callable[..., np.ndarray]:
    """Codes to codes, by LiteRT's reference kernels or by XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kinds = OpResolverType
    own = Interpreter(
        model_content=content,
        num_threads=threads,
        experimental_op_resolver_type=(
            kinds.BUILTIN_REF if reference else kinds.BUILTIN
        ),
    )
    place, out = own.get_input_details()[0], own.get_output_details()[0]
    own.resize_tensor_input(place["index"], (batch, *place["shape"][1:]))
    own.allocate_tensors()

    def call(codes: np.ndarray) -> np.ndarray:
        own.set_tensor(place["index"], codes)
        own.invoke()
        return own.get_tensor(out["index"])

    return call


def tflite_rows(study: Study, content: bytes, threads: int) -> list[Row]:
    """TFLite's own int8 file, by its kernels and as a program of ours."""
    program = read_tflite(content)
    codes = tflite_codes(program, study.test)
    runs = {
        "TFLite int8, reference kernels": litert(content, 128, threads, reference=True),
        "TFLite int8, XNNPACK": litert(content, 128, threads),
        "TFLite int8, read by qjax": program.codes,
    }
    return [
        Row(form, np.argmax(in_chunks(run, codes), -1), program.nbytes)
        for form, run in runs.items()
    ]


def tflite_codes(program: qjax.IntegerProgram, x: np.ndarray) -> np.ndarray:
    """Images on the grid of the input of a file."""
    grid = program.input_grids[0]
    return np.rint(x / np.float32(grid.scale) + grid.zero_point).astype(np.int8)


def timed(study: Study, rows: list[Row], content: bytes, config: Config) -> list[Row]:
    """Rows with the time of LiteRT's XNNPACK over that of their programs."""
    found: dict[str, list[float]] = {row.form: [] for row in rows}
    codes = tflite_codes(read_tflite(content), study.test)
    for batch in (1, 32):
        x = codes[:batch]
        calls: dict[str, Callable[[], Any]] = {}
        calls[""] = functools.partial(litert(content, batch, config.threads), x)
        for row in rows:
            if row.program is not None:
                run = row.program.run_codes
                given = row.program.params, jnp.asarray(x)
                calls[row.form] = functools.partial(finished, run, *given)
        medians = interleaved(calls, config.rounds)
        print(f"LiteRT, batch {batch}: {1e3 * medians['']:.3f} ms")
        for form in set(calls) - {""}:
            found[form].append(medians[""] / medians[form])
    return [row._replace(ratios=tuple(found[row.form])) for row in rows]


def finished(fn: Callable[..., Any], *args: Any) -> Any:
    """Calls, and waits for the result."""
    return jax.block_until_ready(fn(*args))


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians in seconds of calls in turn: once to settle, once for the time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            call()  # The threads of others spin for a while after their call.
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own[2:]) for name, own in times.items()}


# All of it.


def run(name: str, config: Config) -> tuple[Study, list[Row]]:
    """All forms of a model."""
    folder = models.find(config.data_dir)
    model = models.load(name, folder)
    study = prepare(name, model, folder, config)
    real = functools.partial(jax.jit(study.infer), study.state)
    nbytes = sum(w.nbytes for w in jax.tree.leaves(study.state))
    rows = [Row("float", np.argmax(in_chunks(real, study.test), -1), nbytes, 0.0)]

    found = ranges(study)
    chosen = best(study, found)
    int8, w4a8 = presets.tflite_int8(), presets.w4a8()
    first = qjax.Rule("stem*kernel", int8.weights)
    mixed = dataclasses.replace(w4a8, rules=(first, *w4a8.rules))
    for own in dict.fromkeys(("min_max", chosen)):
        form = f"int8 after training, {own}"
        qmodel = quantized(study, int8)
        rows.append(lowered(study, form, qmodel, study.state, found[own]))
    if name == "resnet-8":
        infer: Any = models.LinenResNet8().apply
        linen = study._replace(infer=infer, state=models.linen_variables(model))
        qmodel, qstate = quantized(linen, int8), calibrated(linen, int8)
        form = "int8 after training, min_max, Linen"
        rows.append(lowered(linen, form, qmodel, linen.state, qstate))
    qstate = found[chosen]
    for form, scheme in (("w4a8", w4a8), ("w4a8, first kernel 8 bits,", mixed)):
        form, qmodel = f"{form} after training, {chosen}", quantized(study, scheme)
        rows.append(lowered(study, form, qmodel, study.state, qstate))
    most, rate = config.steps, config.learning_rate
    for form, scheme, peak, steps, moving in (
        ("int8 trained", int8, 0.1 * rate, most // 4, 0),
        ("w4a8 trained", w4a8, rate, most, most // 10),
        ("w4a8, first kernel 8 bits, trained", mixed, rate, most, most // 10),
    ):
        if steps:
            how = functools.partial(fit, rate=peak, steps=steps, moving=moving)
            state = how(study, scheme, qstate, config=config)
            rows.append(lowered(study, form, quantized(study, scheme), state, qstate))

    if study.source.tflite:
        content = (folder / study.source.tflite).read_bytes()
        rows = timed(study, rows, content, config) if config.speed else rows
        rows[1:1] = tflite_rows(study, content, config.threads)
    return study, rows


def show(name: str, study: Study, rows: list[Row], seconds: float) -> None:
    """Prints the table of a model."""
    table = rich.table.Table(title=f"{name}, {seconds:.0f} s", box=rich.box.SIMPLE)
    columns = "model,right,%,agree %,KL,bytes,codes equal %,off by,x batch 1,x batch 32"
    for column in columns.split(","):
        side: Any = "left" if column == "model" else "right"
        table.add_column(column, justify=side, no_wrap=True, min_width=len(column))
    for row in rows:
        right = int(np.sum(row.guess == study.labels))
        agree = 100 * np.mean(row.guess == rows[0].guess)
        score = [f"{right}", f"{100 * right / len(study.labels):.2f}"]
        equal = off = ""
        if row.agreement is not None:
            sites = [*row.agreement.sites.values()]
            share = sum(r.equal for r in sites) / sum(r.codes for r in sites)
            equal, off = f"{100 * share:.4f}", f"{max(r.max_difference for r in sites)}"
        table.add_row(
            row.form,
            *(score if study.source.labelled else ("", "")),
            f"{agree:.2f}",
            "" if np.isnan(row.loss) else f"{row.loss:.5f}",
            f"{row.nbytes:,}",
            equal,
            off,
            *(f"{ratio:.2f}" for ratio in row.ratios),
        )
    rich.console.Console(width=160).print(table)


if __name__ == "__main__":
    config = parse(Config)
    for name in config.models.split(","):
        start = time.perf_counter()
        found = run(name, config)
        show(name, *found, time.perf_counter() - start)
