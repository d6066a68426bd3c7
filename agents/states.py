"""From ids to the states that a language model's output layer maps to logits.

Where families of models differ in running whole sequences is settled here, by asking the model and
trying it: what comes before its output layer (BERT has a transformation there), what comes after
(Gemma caps its logits, Cohere scales them), and whether a prompt goes to an encoder (T5). How they
are decoded is in `agents.families`.
"""

import copy
import math
from typing import Any, NamedTuple

import torch as th
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from agents.heads import Capping
from agents.sequences import PAD, lengths

CLOSE = 1e-3
"""How far states of one pass may lie from another's, relative to the largest: rounding makes 1e-6,
a model that sees other tokens or positions 1e-1."""


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads a language model of this config."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


# ------------------------------------------------------------------------- one forward pass


class _Catch(nn.Module):
    """Stands for an output layer: keeps the states that come, and makes one logit of each."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["weight"] = layer.weight  # some models ask for its dtype
        self.caught: th.Tensor | None = None

    def forward(self, states: th.Tensor) -> th.Tensor:
        self.caught = states
        return states[..., :1]


class _Products(nn.Module):
    """Stands for an output layer that gives these products."""

    def __init__(self, layer: nn.Module, products: th.Tensor) -> None:
        super().__init__()
        self.__dict__["weight"] = layer.weight
        self.products = products

    def forward(self, states: th.Tensor) -> th.Tensor:
        return self.products.expand(*states.shape[:2], -1)


def view(model: nn.Module, part: nn.Module, new: nn.Module) -> Any:
    """Return the model with `new` in the place of `part`; all other parts are the same objects.

    Raises:
        ValueError: If it has no such part.
    """
    found = _view(model, part, new)
    if found is None:
        raise ValueError(f"expected a part of {type(model).__name__}, got another module")
    return found


def _view(model: nn.Module, part: nn.Module, new: nn.Module) -> nn.Module | None:
    if model is part:
        return new
    for name, child in reversed(model._modules.items()):  # output layers stand at the end
        found = None if child is None else _view(child, part, new)
        if found is not None:
            twin = copy.copy(model)
            twin._modules = {**model._modules, name: found}
            return twin
    return None


def run(lm: PreTrainedModel, **inputs: Any) -> th.Tensor:
    """Return what `lm(**inputs)` hands to its output layer, (B, L, H), without its logits."""
    head = lm.get_output_embeddings()
    catch = _Catch(head)
    view(lm, head, catch)(**inputs)
    if catch.caught is None:
        raise ValueError(f"{type(lm).__name__} does not call its output layer, expected it to")
    return catch.caught


def width(lm: PreTrainedModel) -> int:
    """Return H, the size of a state before the output layer."""
    return int(lm.get_output_embeddings().weight.shape[1])


def find_capping(lm: PreTrainedModel) -> Capping:
    """Find what a model does to its output layer's products z: logits = cap·tanh(scale·z/cap).

    Raises:
        ValueError: If it does something else.
    """
    head = lm.get_output_embeddings()
    points = th.tensor([1.0, 1e8, -3.0, 50.0], device=head.weight.device)
    products = points[:, None].expand(4, head.weight.shape[0])
    dtypes = {p.dtype for p in lm.parameters()}  # what does not learn may be rounded
    mixed = th.autocast(head.weight.device.type, th.bfloat16, enabled=len(dtypes) > 1)
    with th.no_grad(), mixed:
        logits = view(lm, head, _Products(head, products))(**example(lm, n_tokens=4)).logits[0]
    one, limit = float(logits[0, 0]), float(logits[1, 0])
    capping = Capping(scale=one)
    if abs(limit) < 1e6:
        capping = Capping(scale=math.atanh(min(one / limit, 0.999)) * limit, cap=limit)
    if abs(capping.scale - 1) < 1e-5:
        capping = capping._replace(scale=1.0)
    if not th.allclose(logits, capping(products).to(logits), rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"{type(lm).__name__} changes its logits after the output layer in a way that is not "
            "supported: expected them to be scaled or softly capped at most"
        )
    return capping


# -------------------------------------------------------------------------- whole sequences


def sequence_states(lm: PreTrainedModel, ids: th.Tensor) -> th.Tensor:
    """Run whole sequences.

    Args:
        lm: A causal LM, or an encoder-decoder, which reads the prompt with its encoder.
        ids: (B, L) prompt and completion, right-padded with -1.

    Returns:
        (B, L, H): at each token, what the next one is predicted from. Of padding, and of a
        prompt's tokens before its last one where an encoder reads them, anything.
    """
    if not lm.config.is_encoder_decoder:
        # Right padding needs no attention mask under causal attention, and no position ids.
        return run(lm, input_ids=ids.clamp(min=0), use_cache=False)
    parts = halves(lm, ids)
    states = run(
        lm,
        input_ids=parts.prompt.clamp(min=0),
        attention_mask=(parts.prompt != PAD).long(),
        decoder_input_ids=parts.completion.clamp(min=0),
        use_cache=False,
    )
    column = th.arange(ids.shape[1], device=ids.device) - (lengths(parts.prompt) - 1)[:, None]
    column = column.clamp(0, states.shape[1] - 1)[..., None]
    return states.gather(1, column.expand(-1, -1, states.shape[2]))


class Halves(NamedTuple):
    """Sequences as an encoder-decoder reads them.

    Attributes:
        prompt: (B, P), what the encoder reads, right-padded with -1.
        completion: (B, C), what the decoder reads: its start token and the completion.
    """

    prompt: th.Tensor
    completion: th.Tensor


def halves(lm: PreTrainedModel, ids: th.Tensor) -> Halves:
    """Cut sequences (B, L), right-padded with -1, behind their prompts."""
    start, _ = special_tokens(lm)
    n_prompt, length = prompt_lengths(lm, ids), lengths(ids)
    column = th.arange(int(n_prompt.max()), device=ids.device)
    prompt = ids[:, : len(column)].masked_fill(column >= n_prompt[:, None], PAD)
    column = th.arange(int((length - n_prompt).max()) + 1, device=ids.device)
    source = (n_prompt[:, None] - 1 + column).clamp(max=ids.shape[1] - 1)
    completion = ids.gather(1, source).masked_fill(column > (length - n_prompt)[:, None], PAD)
    completion[:, 0] = start
    return Halves(prompt, completion)


def prompt_lengths(lm: PreTrainedModel, ids: th.Tensor) -> th.Tensor:
    """Count the tokens of each sequence's prompt (B,), which its first end-of-text token ends.

    Tokenizers of encoder-decoders put it there; a completion has ended with its own, so that a text
    under way has one, and an observation alone tells where its prompt ends.

    Raises:
        ValueError: If a sequence (B, L) has no end-of-text token.
    """
    _, ends = special_tokens(lm)
    is_end = th.isin(ids, th.tensor(ends, device=ids.device))
    if not bool(is_end.any(dim=1).all()):
        text = ids[int((~is_end.any(dim=1)).nonzero()[0, 0])]
        raise no_end(lm, text[text != PAD].tolist())
    return is_end.long().argmax(dim=1) + 1


def no_end(lm: PreTrainedModel, prompt: list[int]) -> ValueError:
    """Return the error that a prompt does not end as an encoder's must."""
    return ValueError(
        f"expected prompts that end with their only end-of-text token, one of "
        f"{special_tokens(lm)[1]}, for the encoder of {type(lm).__name__}, got {prompt}: let the "
        "tokenizer add it (T5's does), or write it at the end of each prompt"
    )


def special_tokens(lm: PreTrainedModel) -> tuple[int, list[int]]:
    """Return an encoder-decoder's start token, and its end-of-text tokens.

    Raises:
        ValueError: If its configs do not name them.
    """
    found: dict[str, Any] = {}
    for name in ("decoder_start_token_id", "eos_token_id"):
        configs = (lm.config.get_text_config(), lm.generation_config)
        values = (getattr(config, name, None) for config in configs)
        found[name] = next((value for value in values if value is not None), None)
        if found[name] is None:
            raise ValueError(
                f"expected the config of the encoder-decoder {type(lm).__name__} to name a {name}, "
                "got none: set it, as its tokenizer has it"
            )
    ends = found["eos_token_id"]
    return int(found["decoder_start_token_id"]), list(ends) if isinstance(ends, list) else [ends]


def shortest(lm: PreTrainedModel) -> int:
    """Return a token that is a whole prompt by itself: any, or the end-of-text token."""
    return special_tokens(lm)[1][0] if lm.config.is_encoder_decoder else 0


def example_ids(lm: PreTrainedModel, n_tokens: int = 4, n_rows: int = 1) -> th.Tensor:
    """Return different short sequences (n_rows, n_tokens) to try a model with."""
    n_logits = lm.get_output_embeddings().weight.shape[0]
    ids = th.arange(n_rows * n_tokens, device=lm.device).reshape(n_rows, n_tokens) % n_logits
    if lm.config.is_encoder_decoder:
        end = shortest(lm)
        ids[ids == end] = (end + 1) % n_logits
        ids[0::2, 0] = ids[1::2, 1] = end  # prompts of one token and of two
    return ids


def example(lm: PreTrainedModel, n_tokens: int) -> dict[str, th.Tensor]:
    """Return inputs of a model for which it gives `n_tokens` logits."""
    ids = example_ids(lm, n_tokens)
    return {
        "input_ids": ids,
        **({"decoder_input_ids": ids} if lm.config.is_encoder_decoder else {}),
    }


def looks_ahead(lm: PreTrainedModel) -> bool:
    """Say whether a token changes the states of those before it."""
    ids = example_ids(lm)
    with th.no_grad():
        whole, part = sequence_states(lm, ids), sequence_states(lm, ids[:, :-1])
    return not close(whole[:, :-1], part)


def close(a: th.Tensor, b: th.Tensor) -> bool:
    """Say whether states are the same but for rounding."""
    return bool((a - b).abs().max() <= CLOSE * b.abs().max())


def keep_scale(lm: PreTrainedModel) -> None:
    """Keep RWKV from halving weights in place in eval mode, which is made for float16.

    They would be saved halved, and halved again when they are loaded.
    """
    if getattr(lm.config, "rescale_every", 0):
        with th.no_grad():
            lm.train()(**example(lm, n_tokens=4))  # in training mode it brings them back
        lm.config.rescale_every = 0
        lm.eval()
