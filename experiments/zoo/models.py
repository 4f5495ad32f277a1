"""All models of the zoo."""

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
