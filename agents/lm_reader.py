"""A language model that reads observations for agents that have none of their own."""

import numpy as np
import torch as th
from stable_baselines3.common.utils import get_device

from agents.families import decoder_for
from agents.heads import mask_logits_
from agents.language_model import LM, TokenModel, load_lm
from agents.states import find_capping, width


class LMReader(TokenModel):
    """What a causal LM makes of observations: its last hidden states and likeliest next tokens.

    Observations that go on where the last ones ended cost one token each (`agents.decoder`), and
    those seen last nothing: wrappers around one environment do well to share a reader.
    """

    def __init__(
        self,
        lm: LM,
        vocab_size: int,
        device: th.device | str = "auto",
        *,
        temperature: float = 1.0,
        dtype: str = "float32",
    ) -> None:
        """Load the model; a live one is used as it is, and may go on learning elsewhere.

        Args:
            lm: The causal LM.
            vocab_size: V, tokens of the observations.
            device: As in SB3.
            temperature: Divides the logits in `log_probs`.
            dtype: What the model is computed in: "float32" or "bfloat16".

        Raises:
            ValueError: If the model does not fit, or dtype or temperature is none.
        """
        super().__init__()
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"expected dtype float32 or bfloat16, got {dtype!r}")
        if temperature <= 0:
            raise ValueError(f"expected temperature > 0, got {temperature}")
        self.lm = load_lm(lm, vocab_size).to(get_device(device))
        self.vocab_size, self.temperature = vocab_size, temperature
        self.dtype = getattr(th, dtype)
        self.register_buffer("allowed_tokens", th.ones(vocab_size, dtype=th.bool))
        self.decoder = decoder_for(self.lm, self.dtype)
        self.capping = find_capping(self.lm)
        self.to(self.lm.device)

    @property
    def hidden_size(self) -> int:
        """H, the size of a hidden state."""
        return width(self.lm)

    @th.no_grad()
    def read(self, obs: np.ndarray) -> np.ndarray:
        """Return the hidden state at each observation's last token: (n, L) ids to (n, H) float32.

        A row of nothing but -1 gets 0.
        """
        hidden, _ = self.last_hidden(self._ids(obs))
        return hidden.float().cpu().numpy()

    def read_aside(self, obs: np.ndarray) -> np.ndarray:
        """Do `read` for observations beside the ones that go on, remembering nothing."""
        return self.decoder.once(self._ids(obs)).float().cpu().numpy()

    @th.no_grad()
    def likeliest(self, obs: np.ndarray, k: int, masks: np.ndarray | None = None) -> np.ndarray:
        """Return the k likeliest next tokens.

        Args:
            obs: (n, L) ids, right-padded with -1.
            k: How many, at most V.
            masks: (n, V) bool, tokens allowed now; the others come last.

        Returns:
            (n, k) int64, the likeliest first.
        """
        hidden, lm = self.last_hidden(self._ids(obs))
        logits = self.decoding_head(lm).logits(hidden)
        if masks is not None:
            mask_logits_(logits, th.as_tensor(np.array(masks), device=logits.device))
        return logits.topk(k, dim=1).indices.cpu().numpy()

    @th.no_grad()
    def log_probs(self, obs: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """Return the log-probability (nats) of each next token.

        Args:
            obs: (n, L) ids, right-padded with -1.
            masks: (n, V) bool, tokens allowed now; the others get −inf.

        Returns:
            (n, V) float32. Of a row of nothing but -1, anything.
        """
        hidden, _ = self.last_hidden(self._ids(obs))
        found = self.head().logits(hidden)  # float32: the decoder's own is made for sampling
        if masks is not None:
            mask_logits_(found, th.as_tensor(np.array(masks), device=found.device))
        log_probs = found.log_softmax(dim=1).cpu().numpy()
        return log_probs if masks is None else np.where(masks, log_probs, -np.inf)

    def _ids(self, obs: np.ndarray) -> th.Tensor:
        return th.as_tensor(np.ascontiguousarray(obs), device=self.lm.device).long()
