"""A value network of its own: a second language model beside the policy's."""

import torch as th

from agents.families import decoder_for
from agents.frozen_layers import freeze_below, round_frozen
from agents.language_model import LM, TokenModel, load_lm


class ValueNetwork(TokenModel):
    """A language model whose last hidden states are what values are read from.

    It costs a second decoder in the rollout, and a second forward and backward pass in the update;
    what it learns does not disturb the policy, nor the other way round.
    """

    def __init__(
        self, lm: LM, vocab_size: int, trainable_layers: int | None, dtype: th.dtype
    ) -> None:
        """Build it around a language model; the arguments are `CausalLMPolicy`'s."""
        super().__init__()
        self.lm, self.dtype = load_lm(lm, vocab_size), dtype
        freeze_below(self.lm, trainable_layers)
        head = self.lm.get_output_embeddings()
        if head.weight is not self.lm.get_input_embeddings().weight:
            head.requires_grad_(False)  # no value comes through it
        self.decoder = decoder_for(self.lm, dtype)
        round_frozen(self.lm, dtype)
