"""Gradient checkpointing: a layer's activations are computed again in the backward pass.

transformers does it for layers in training mode; a policy's language model never is in it, as
dropout is always off. Here only the layers' own flags are set, and only while they run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def prepare_checkpointing(lm: PreTrainedModel) -> None:
    """Let a model's layers be checkpointed inside `checkpointed_layers`.

    Raises:
        ValueError: If the model does not support it.
    """
    if not lm.supports_gradient_checkpointing or not _layers(lm):
        raise ValueError(
            f"gradient_checkpointing: {type(lm).__name__} does not support it; leave it out"
        )
    lm.activation_checkpointing_enable({"use_reentrant": False})
    for layer in _layers(lm):  # some layers apply dropout themselves, by their own flag
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)


@contextmanager
def checkpointed_layers(lm: PreTrainedModel) -> Iterator[None]:
    """Checkpoint the layers that run in here."""
    layers = _layers(lm)
    for layer in layers:
        layer.training = True  # the layer's flag alone, not its parts'
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _layers(lm: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
