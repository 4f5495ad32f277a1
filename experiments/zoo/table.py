"""Takes each model of the zoo through all of qjax: quantize, train, lower, verify.

    python experiments/zoo/table.py [--models vit,bert] [--errors]

Codes of 8 bits, before training; gradients of all are finite. Power-of-two scales: all
codes equal; with the default scheme some are off by one, near a tie. Of models that
choose (experts of a token, rows of a codebook) the table counts the choices that equal
the float model's, and the SQNR where they do. When last run, 8 min for the first ten
and 4 min for the others on 2 cores:

    model            sites  SQNR dB  equal, 2^n   equal, default
    vit                 49     33.3  all 182224   182215/182224
    bert                51     29.9  all 120512   120508/120512
    gpt                 39     29.3  all 144384   144376/144384
    mixer               35     32.0  all 112976   112963/112976
    convnext            29     34.7  all 182864   182828/182864
    decoder             98     24.9  all 181248   181243/181248
    cross_attention     34     32.9  all 55552    all 55552
    audio               50     30.6  all 184320   184314/184320
    unet                88     26.8  all 343680   343659/343680
    conformer          101     31.7  all 441344   441334/441344
    graph_network       33     30.3  all 22336    all 22336
    recommender         21     31.8  all 7328     all 7328
    experts             14     33.3  all 31296    all 31296      99.5 % of choices
    vq_vae              22     37.7  all 67584    all 67584      99.2 % of choices
    dqn                 11     35.6  all 52784    all 52784
    efficientnet        24     40.4  all 204560   all 204560
    bilinear_unet       37     38.3  all 134144   134095/134144
    haiku_mixer         35     27.7  all 112976   112973/112976  with the extra `zoo`
    haiku_dqn           11     34.6  all 52784    all 52784
    equinox_mixer       55     28.7  all 158112   158111/158112
    equinox_dqn         21     33.4  all 64096    all 64096

The decoder and the U-Net are below 28 dB. What follows was measured on them:

- No calibrator helps the decoder: before residual streams had 16 bits, its 24.3 dB
  were 24.1 with `mse`, 24.1 with `percentile(99.99)`, 18.3 with `percentile(99.9)`,
  24.4 with `entropy`, 22.9 on symmetric grids (not run for the U-Net, 25.7). With each
  site alone in 8 bits, all others in 16, a narrower range of it (.9 to .6 of all) is
  better at none of the U-Net's sites and at five of the decoder's, the scores and one
  gate; all of these together give 24.2. So ranges of all values stay the default.
- What normalisations read, and besides them sums alone, has 16 bits by default since:
  24.9 and 26.8, ViT 30.4 to 33.3, GPT 28.5 to 29.3, Mixer 30.8 to 32.0, audio 28.1 to
  30.6, conformer 28.8 to 31.7. Terms of such sums in 16 bits would give 25.2 and 27.2,
  but a transformer's block takes twice as long on native kernels.
- What no product reads in 16 bits, all of it, gives the decoder 26.0 and the U-Net
  28.0; with weights of 16 bits, too, 26.7 and 28.6. So the 8-bit operands of products
  alone keep the decoder below 28 dB. The largest parts of what is left are its tied
  table, which has one scale (16 %; .7 dB would be won), the products of the first
  block's gates (15 %), its first norm (13 %) and the values of attention (12 %).
- With all activations of 16 bits they have 31.9 and 37.1 dB, which are the weights':
  the decoder's with float activations are 31.9, too.

The measure: one batch gives the ranges and the SQNR, over all outputs at once, the
outputs' own sites included; the decoder's logits have a deviation of 1.03 and the
U-Net's outputs .57. A change of one site's bits moves it by up to 1 dB either way.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import qjax  # noqa: E402
from experiments.config import option, parse  # noqa: E402
from experiments.zoo.member import Member  # noqa: E402
from experiments.zoo.models import MODELS, twins  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Takes models of the zoo through all of qjax."""

    models: str = option("", "names with commas; '' for all")
    errors: bool = option(False, "whether refusals are printed whole")


SCHEMES = {
    "power of two": qjax.Scheme(
        qjax.QSpec(8, power_of_two=True), qjax.QSpec(8, power_of_two=True)
    ),
    "default": qjax.Scheme(),
}
LINE = "{:<16}{:>6}{:>11}{:>11}{:>9}{:>9}{:>5}{:>17}{:>17}  {}"
HEAD = (
    *("model", "sites", "quantize s", "step s", "SQNR dB", "choices", "s"),
    *("equal, 2^n", "equal, default", "lower"),
)


@dataclasses.dataclass
class Row:
    """What the table shows of a model. Codes are empty where it does not lower."""

    name: str
    sites: int
    quantize: float  # Seconds.
    step: float  # Seconds, compilation included; nan if gradients are not finite.
    sqnr: float  # dB, of the default scheme; where choices are equal, if there are any.
    choices: float | None = None  # Share of them equal to the float model's.
    codes: dict[str, str] = dataclasses.field(default_factory=dict)
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        step = f"{self.step:.1f}" if np.isfinite(self.step) else "not finite"
        return LINE.format(
            *(self.name, self.sites, f"{self.quantize:.1f}", step),
            f"{self.sqnr:.1f}",
            "-" if self.choices is None else f"{100 * self.choices:.1f} %",
            f"{self.seconds:.0f}",
            *(self.codes.get(name, "-") for name in SCHEMES),
            short(next(iter(self.refusals.values()), "ok")),
        )


def sqnr(real: Any, quantized: Any) -> float:
    """Returns the power of outputs over that of their errors in dB."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    a, b = flat(real).astype(np.float64), flat(quantized).astype(np.float64)
    return 10 * float(np.log10(np.sum(a**2) / np.sum((a - b) ** 2)))


def agreement(member: Member, real: Any, quantized: Any) -> tuple[float, float | None]:
    """Returns the SQNR, and the share of equal choices of a model that chooses.

    A choice that differs is another value, not a noisy one: the SQNR is over the values
    of the places where all choices are equal.
    """
    if member.choices is None:
        return sqnr(real, quantized), None
    equal = member.choices(real) == member.choices(quantized)
    kept = equal.all(-1)
    values = (np.asarray(outputs[0])[kept] for outputs in (real, quantized))
    return sqnr(*values), float(equal.mean())


def is_statistic(path: Any) -> bool:
    """Returns whether a leaf of parameters is a running average of BatchNorm."""
    return "batch_stats" in jax.tree_util.keystr(path)


def trains(member: Member, qmodel: qjax.QuantizedModel, qstate: Any) -> bool:
    """Takes a step of Adam towards random targets; returns whether all is finite."""
    shapes = jax.eval_shape(member.apply, member.params, *member.inputs)
    rng = np.random.default_rng(9)
    targets = [
        rng.normal(size=y.shape).astype(np.float32) for y in jax.tree.leaves(shapes)
    ]
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state, qstate, *inputs):
        def loss(params):
            found = jax.tree.leaves(qmodel.apply(params, qstate, *inputs))
            pairs = zip(found, targets, strict=True)
            return sum(jnp.mean((y - t) ** 2) for y, t in pairs)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        still = lambda path, u: jnp.zeros_like(u) if is_statistic(path) else u
        updates = jax.tree_util.tree_map_with_path(still, updates)
        return optax.apply_updates(params, updates), state, (value, grads)

    params, _, found = step(
        member.params, optimizer.init(member.params), qstate, *member.inputs
    )
    return all(np.isfinite(x).all() for x in jax.tree.leaves((params, found)))


def lowers(member: Member, scheme: qjax.Scheme) -> str:
    """Lowers and verifies a model; returns how many codes are equal."""
    qmodel = qjax.quantize_model(
        member.apply, member.params, *member.inputs, scheme=scheme
    )
    qstate = calibrated(qmodel, member)
    program = qjax.lower(qmodel, member.params, qstate, *member.inputs)
    report = qjax.verify(program, qmodel, member.params, qstate, *member.inputs)
    rows = report.sites.values()
    equal, codes = sum(row.equal for row in rows), sum(row.codes for row in rows)
    return f"all {codes}" if report.is_exact else f"{equal}/{codes}"


def calibrated(qmodel: qjax.QuantizedModel, member: Member) -> Any:
    """Returns ranges of the one batch that there is."""
    return qjax.calibrate(qmodel, member.params, [member.inputs], progress=False)


def run(member: Member) -> Row:
    """Takes a model through all."""
    start = time.perf_counter()
    qmodel = qjax.quantize_model(member.apply, member.params, *member.inputs)
    quantize = time.perf_counter() - start
    qstate = calibrated(qmodel, member)
    real = jax.jit(member.apply)(member.params, *member.inputs)
    quantized = jax.jit(qmodel.apply)(member.params, qstate, *member.inputs)
    before = time.perf_counter()
    is_finite = trains(member, qmodel, qstate)
    step = time.perf_counter() - before if is_finite else float("nan")
    found = agreement(member, real, quantized)
    row = Row(member.name, len(qmodel.sites), quantize, step, *found)
    for name, scheme in SCHEMES.items():
        try:
            row.codes[name] = lowers(member, scheme)
        except (NotImplementedError, ValueError, OverflowError) as error:
            row.refusals[name] = f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - start
    return row


def short(message: str, width: int = 60) -> str:
    """Returns the first line of a message, cut."""
    line = message.partition("\n")[0]
    return line if len(line) <= width else line[: width - 3] + "..."


if __name__ == "__main__":
    config = parse(Config)
    wanted = config.models.split(",") if config.models else [m.__name__ for m in MODELS]
    makers = {make.__name__: make for make in (*MODELS, *twins())}
    print(LINE.format(*HEAD))
    rows = []
    for name in wanted:
        rows.append(run(makers[name]()))
        print(rows[-1], flush=True)
    for row in rows if config.errors else ():
        for scheme, message in row.refusals.items():
            print(f"\n{row.name}, {scheme}: {message}")
