"""All models of the zoo."""

import importlib
import importlib.util
from collections.abc import Callable

from experiments.zoo.choices import experts, vq_vae
from experiments.zoo.images import convnext, mixer, unet, vit
from experiments.zoo.member import Member
from experiments.zoo.pixels import bilinear_unet, dqn, efficientnet
from experiments.zoo.relations import graph_network, recommender
from experiments.zoo.sounds import audio, conformer
from experiments.zoo.texts import bert, cross_attention, decoder, gpt

MODELS: tuple[Callable[[], Member], ...] = (
    vit,
    bert,
    gpt,
    mixer,
    convnext,
    decoder,
    cross_attention,
    audio,
    unet,
    conformer,
    graph_network,
    recommender,
    experts,
    vq_vae,
    dqn,
    efficientnet,
    bilinear_unet,
)


def twins() -> tuple[Callable[[], Member], ...]:
    """Returns the twins in other libraries, where the extra `zoo` is installed."""
    if not all(map(importlib.util.find_spec, ("haiku", "equinox"))):
        return ()
    return importlib.import_module("experiments.zoo.twins").MODELS
