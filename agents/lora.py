"""Low-rank adapters (Hu et al. 2021, "LoRA") by peft: one set of base weights, two models.

With its adapters a model is the policy, without them the reference. peft is imported when it is
needed: `pip install 'rlhf-gym[lora]'`.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import nn
from transformers import PreTrainedModel

from agents.frozen_layers import stack_of
from agents.packed import called_linears
from agents.states import example_ids, sequence_states


def add_adapters(
    lm: PreTrainedModel, settings: Mapping[str, Any], trainable_layers: int | None
) -> None:
    """Freeze a model and put adapters beside its linear layers, in place.

    Args:
        lm: The causal LM.
        settings: Arguments of `peft.LoraConfig`: `r` and `lora_alpha`, say. Without
            `target_modules`, all linear layers of the stack are adapted.
        trainable_layers: Only the last layers are adapted; None: all.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If peft refuses the settings, or if the model without its adapters would not
            stay what it is.
    """
    config_class = _peft().LoraConfig
    settings = dict(settings)
    whole = stack_of(lm) is None or lm.config.is_encoder_decoder  # the encoder has layers, too
    if trainable_layers is None and whole:
        settings.setdefault("target_modules", "all-linear")
    if "target_modules" not in settings:
        settings["target_modules"] = linear_names(lm, trainable_layers)
    elif trainable_layers is not None:
        raise ValueError(
            "expected target_modules or trainable_layers, got both: name the layers in one place"
        )
    for name, value in {"bias": "none", "modules_to_save": None}.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"lora: expected {name}={value!r}, as the base model is the reference, got "
                f"{settings[name]!r}"
            )
    ids = example_ids(lm)
    with th.no_grad():
        before = sequence_states(lm.eval(), ids)
    try:
        kind = "SEQ_2_SEQ_LM" if lm.config.is_encoder_decoder else "CAUSAL_LM"
        lm.add_adapter(config_class(task_type=kind, **settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: peft refuses {dict(settings)}: {error}") from error
    looked_up = (lm.get_input_embeddings(), lm.get_output_embeddings())
    if any(hasattr(module, "base_layer") for module in looked_up):
        raise ValueError(
            "lora: expected target_modules without embeddings and the output head, got them too"
        )
    lm.eval()
    with th.no_grad(), without_adapters(lm):
        if not th.allclose(sequence_states(lm, ids), before, atol=1e-4):
            raise ValueError(
                f"lora: {settings} changes the base model, which is the reference: expected the "
                "default init_lora_weights"
            )


def linear_names(lm: PreTrainedModel, n_layers: int | None) -> list[str]:
    """Return the full names of the linear layers that are called in the last `n_layers` layers.

    Raises:
        ValueError: If there are none.
    """
    layers = list(stack_of(lm) or ())
    chosen = layers if n_layers is None else layers[max(0, len(layers) - n_layers) :]
    inside = {id(module) for layer in chosen for module in layer.modules()}
    names = [n for n in sorted(called_linears(lm)) if id(lm.get_submodule(n)) in inside]
    if not names:
        raise ValueError(
            f"lora: expected linear layers in the last {n_layers} of {len(layers)} layers of "
            f"{type(lm).__name__}, got none: name target_modules, or more trainable_layers"
        )
    return names


def has_adapters(lm: nn.Module) -> bool:
    """Say whether a model has adapters."""
    return bool(getattr(lm, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapters(lm: PreTrainedModel) -> Iterator[None]:
    """Switch a model's adapters off for a while."""
    lm.disable_adapters()
    try:
        yield
    finally:
        lm.enable_adapters()


def merged(lm: PreTrainedModel) -> PreTrainedModel:
    """Return a float32 copy, on the CPU, whose weights have taken the adapters up: W + B·A·α/r."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Told what each parameter's copy is, deepcopy makes none on the device.
    copies = {
        id(p): nn.Parameter(p.detach().to("cpu", th.float32, copy=True)) for p in lm.parameters()
    }
    whole = copy.deepcopy(lm, copies).cpu()
    for module in list(whole.modules()):
        for name, part in module.named_children():
            if isinstance(part, BaseTunerLayer):
                part.merge()
                setattr(module, name, part.get_base_layer())
    whole._hf_peft_config_loaded = False
    del whole.peft_config
    return whole


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'rlhf-gym[lora]'") from error
    return peft
