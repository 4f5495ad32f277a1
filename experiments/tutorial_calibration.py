"""The advanced tutorial of QuantizeML, step by step, on the same three layers.

It prints the JSON that QuantizeML 0.12.1 printed there (its `dump_config`), and goes on
where the tutorial stops: which rule decided what, the grids, integers.

    python experiments/tutorial_calibration.py
    python experiments/tutorial_calibration.py --samples 64  # quicker
"""

import argparse
import json
import warnings

import jax
import numpy as np
from flax import linen as nn

import qjax


class ThreeLayers(nn.Module):
    """Depthwise convolution, pointwise convolution with a relu, dense layer."""

    @nn.compact
    def __call__(self, x):
        depthwise = nn.Conv(3, (3, 3), feature_group_count=3, padding="VALID")
        x = depthwise.copy(name="dw_conv")(x)
        x = nn.Conv(32, (1, 1), name="pw_conv")(x)
        with jax.named_scope("relu"):  # A layer of its own in Keras.
            x = nn.relu(x)
        return nn.Dense(10, name="dense")(x)


def show(config):
    print(json.dumps(config, indent=4))


def step(title):
    print(f"\n## {title}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1024)
    number = parser.parse_args().samples
    model = ThreeLayers()
    image = np.zeros((1, 28, 28, 3), np.float32)
    params = model.init(jax.random.key(0), image)

    step("1.1 The quantization parameters")
    qparams = qjax.QuantizationParams(
        input_weight_bits=16,
        weight_bits=4,
        activation_bits=6,
        output_bits=12,
        per_tensor_activations=True,
        buffer_bits=24,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qmodel = qjax.quantize_model(model.apply, params, image, qparams=qparams)
    print(*(f"Warning: {w.message}" for w in caught), sep="\n")
    config = qjax.dump_config(qmodel)
    show(config)

    step("1.2 Using a configuration")
    config["relu"]["output_quantizer"] |= {
        "bitwidth": 1,
        "axis": "per-axis",
        "buffer_bitwidth": 32,
    }
    config["relu"]["buffer_bitwidth"] = 32
    config = {"relu": config["relu"]}
    show(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The same.
        new = qjax.quantize_model(
            model.apply, params, image, q_config=config, qparams=qparams
        )
    show(qjax.dump_config(new))
    print("\nWhat decided the grid behind the relu:")
    print(qjax.explain(new, "pw_conv/output"))

    step("2.2 The samples: random ones")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qstate = qjax.calibrate(qmodel, params, num_samples=number)
    print(*(f"Warning: {w.message}" for w in caught), sep="\n")
    print(qjax.scales(qmodel, params, qstate))

    step("2.3 Real samples, in batches, twice")
    samples = np.random.default_rng(0).uniform(0, 255, (number, 28, 28, 3))
    samples = samples.astype(np.float32)
    qstate = qjax.calibrate(qmodel, params, samples=samples, batch_size=100, epochs=2)
    print(qjax.scales(qmodel, params, qstate))

    step("2.1 The rule of the ranges: r = r - (r - new) * (1 - momentum)")
    site, r = "input:0", None
    for _ in range(2):
        for start in range(0, number, 100):
            new_max = np.max(np.abs(samples[start : start + 100]))
            r = new_max if r is None else r - (r - new_max) * np.float32(1 - 0.9)
    print(f"{site}: calibrated {float(qstate[site].high):.5f}, by hand {r:.5f}")

    step("What the tutorial does not ask: do 24 bits hold the accumulators?")
    try:
        qjax.lower(qmodel, params, qstate, image)
    except OverflowError as error:
        print(f"{type(error).__name__}: {error}")
    wide = qjax.QuantizationParams(per_tensor_activations=True)
    qmodel = qjax.quantize_model(model.apply, params, image, qparams=wide)
    qstate = qjax.calibrate(qmodel, params, samples=samples, batch_size=100, epochs=2)
    program = qjax.lower(qmodel, params, qstate, image)
    print("\nWith 8 bits and buffers of 32, as integers:")
    print(qjax.verify(program, qmodel, params, qstate, samples[:8]))


if __name__ == "__main__":
    main()
