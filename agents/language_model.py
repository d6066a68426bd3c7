"""A causal language model as a distribution over the next token, at packed positions.

What the policy and its frozen reference have in common: loading, the temperature, the tokens
that are never allowed, and whole sequences in one forward pass. No values, no optimizer.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch as th
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from agents.heads import TokenStatistics, exact_kl, mask_logits
from agents.heads import token_statistics as statistics_of
from agents.sequences import TokenBatch

LM: TypeAlias = str | Path | PreTrainedModel | PreTrainedConfig
"""A folder, a hub id, a live model, or a config to build one from."""


class TokenModel(nn.Module):
    """π(token | ids so far) of a causal LM, for sequences of ids.

    Attributes:
        lm: The transformers model.
        vocab_size: V, the tokenizer's; a model's further rows (padding) are never looked at.
        temperature: Divides the logits.
        allowed_tokens: (V,) bool; the others have probability 0, always.
        dtype: What whole sequences are computed in: float32, or bfloat16 by autocast. Weights
            and log-probabilities are float32 either way.
        entropy_gradient: Whether entropies are differentiated.
    """

    lm: PreTrainedModel
    vocab_size: int
    temperature: float
    allowed_tokens: th.Tensor
    dtype: th.dtype = th.float32
    entropy_gradient: bool = True

    @property
    def body(self) -> PreTrainedModel:
        """The language model without its head."""
        return self.lm.base_model

    def autocast(self) -> th.autocast:
        """Return the context in which whole sequences are computed."""
        enabled = self.dtype != th.float32
        return th.autocast(
            self.lm.device.type, dtype=self.dtype if enabled else None, enabled=enabled
        )

    def hidden_at(self, batch: TokenBatch) -> th.Tensor:
        """Run whole sequences; return the state of each trained token, (N, H)."""
        # Right padding needs no attention mask under causal attention, and no position ids.
        with self.autocast():
            output = self.body(input_ids=batch.ids.clamp(min=0), use_cache=False)
        return output.last_hidden_state[batch.row, batch.position]

    def token_statistics(
        self, batch: TokenBatch, hidden: th.Tensor, actions: th.Tensor
    ) -> TokenStatistics:
        """Return log-probability and entropy of the trained tokens, both (N,) in nats."""
        return statistics_of(
            hidden, actions, self.head_for(batch), self.vocab_size, self.entropy_gradient
        )

    @th.no_grad()
    def exact_kl(self, batch: TokenBatch, reference: "TokenModel") -> th.Tensor:
        """Sum π·(log π − log π_ref) over the vocabulary at the state of each token: (N,) nats."""
        return exact_kl(
            self.hidden_at(batch),
            reference.hidden_at(batch),
            self.head_for(batch),
            reference.head_for(batch),
            self.vocab_size,
        )

    def head_for(self, batch: TokenBatch) -> Callable[[th.Tensor, slice], th.Tensor]:
        """Return the map from hidden states of a slice of the batch's tokens to their logits."""

        def head(hidden: th.Tensor, place: slice) -> th.Tensor:
            logits = self.logits(hidden)
            if batch.masks is None or batch.mask_id is None:
                return logits
            return mask_logits(logits, batch.masks[batch.mask_id[place]])

        return head

    def logits(self, hidden: th.Tensor, lm: PreTrainedModel | None = None) -> th.Tensor:
        """Map states (N, H) to float32 logits (N, V), with temperature and permanent mask.

        Args:
            hidden: The states.
            lm: Whose head to use; None: the model's own.
        """
        with self.autocast():
            logits = (lm or self.lm).get_output_embeddings()(hidden)
        return mask_logits(
            logits[:, : self.vocab_size].float() / self.temperature, self.allowed_tokens
        )


class Reference(TokenModel):
    """The frozen language model that the policy is held to."""

    def __init__(self, lm: LM, policy: TokenModel) -> None:
        """Load `lm`, to be compared with `policy` at its temperature and under its masks."""
        super().__init__()
        self.lm = load_lm(lm)
        self.vocab_size, self.temperature = policy.vocab_size, policy.temperature
        self.dtype = policy.dtype
        self.register_buffer("allowed_tokens", policy.allowed_tokens)
        check_fit(self.lm, self.vocab_size)
        self.requires_grad_(False).eval()


def load_lm(lm: LM) -> PreTrainedModel:
    """Load a causal LM in float32 from a folder or hub id, or take one that is live.

    Raises:
        ValueError: If nothing of that name can be loaded.
    """
    if isinstance(lm, PreTrainedModel):
        return lm
    if isinstance(lm, PreTrainedConfig):
        return AutoModelForCausalLM.from_config(lm)
    try:
        return AutoModelForCausalLM.from_pretrained(str(lm), dtype=th.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected the folder or hub id of a causal LM, got {str(lm)!r}: {reason}"
        ) from error


def frozen_copy(lm: PreTrainedModel) -> PreTrainedModel:
    """Copy a model; parameters that do not learn are shared rather than copied."""
    shared = {id(p): p for p in lm.parameters() if not p.requires_grad}
    return copy.deepcopy(lm, shared).requires_grad_(False)


def check_fit(lm: PreTrainedModel, vocab_size: int) -> None:
    """Require that head(body(ids)) is the model, and that every action is a token of it."""
    head = lm.get_output_embeddings()
    name = type(lm).__name__
    if head is None:
        raise ValueError(f"expected a causal LM with an output head, got {name}")
    n_logits = head.weight.shape[0]
    if vocab_size > n_logits:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens and the model {n_logits}: expected "
            "a model of at least the tokenizer's vocabulary; load both from one folder"
        )
    lm.eval()
    ids = th.arange(4, device=lm.device)[None] % n_logits
    with th.no_grad():
        whole = lm(input_ids=ids).logits
        parts = head(lm.base_model(input_ids=ids).last_hidden_state)
    if not th.allclose(whole, parts, atol=1e-4):
        raise ValueError(
            f"{name} scales or caps its logits after the head, which is not supported: "
            "expected logits = head(last hidden state)"
        )


def freeze_below(lm: PreTrainedModel, trainable_layers: int | None) -> None:
    """Let only the last layers and the final norm of `lm` learn (None: all of it).

    Raises:
        ValueError: If the model has fewer layers than asked for.
    """
    if trainable_layers is None:
        return
    parts = list(lm.base_model.children())
    place = next((i for i, part in enumerate(parts) if isinstance(part, nn.ModuleList)), None)
    n_layers = 0 if place is None else len(parts[place])
    if place is None or not 0 <= trainable_layers <= n_layers:
        raise ValueError(f"expected 0 to {n_layers} trainable layers, got {trainable_layers}")
    lm.requires_grad_(False)
    # What stands behind the stack of layers works on its output: the final norm.
    for part in [*parts[place][n_layers - trainable_layers :], *parts[place + 1 :]]:
        part.requires_grad_(True)
