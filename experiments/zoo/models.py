"""All models of the zoo."""

from collections.abc import Callable

from experiments.zoo.images import convnext, mixer, unet, vit
from experiments.zoo.member import Member
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
)
