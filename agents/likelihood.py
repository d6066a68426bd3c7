"""How likely texts are under a fixed causal LM: their perplexity, and a reward function of it.

The KL penalty of `TokenPPO` holds a policy to a model token by token; this looks at texts, whoever
wrote them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.language_model import most_positions
from agents.whole_texts import TextModel, encode


class LogLikelihood:
    """Scores a completion by its mean log-probability per token: minus the log of its perplexity.

    The end of the text counts as a token, so that an empty one has a score too. Temperature is 1,
    and every token is allowed. A text that is longer than the model has positions for is cut.

    Args:
        lm: A causal LM; nothing is changed in it.
        tokenizer: Its tokenizer, with an EOS token.
        dtype: What it computes in: "float32", or "bfloat16" by autocast.

    Raises:
        ValueError: If there is no EOS token.
    """

    def __init__(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32"
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("expected a tokenizer with an EOS token, got none: texts have no end")
        self.model, self.tokenizer = TextModel(lm, dtype), tokenizer

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion behind its prompt, nats per token, at most 0: (B,)."""
        rows = encode(self.tokenizer, list(zip(prompts, completions, strict=True)))
        for row in rows:
            row["input_ids"] = row["input_ids"][: most_positions(self.model.lm)]
        log_prob, count = self.model.sums(rows)
        return log_prob / np.maximum(count, 1)  # 0 where prompt and text are empty
