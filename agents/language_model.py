"""A causal language model as a distribution over the next token, at packed positions.

What the policy and its frozen reference have in common: loading, the temperature, the tokens
that are never allowed, and whole sequences in one forward pass. No values, no optimizer.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch as th
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import FastGELUActivation, NewGELUActivation

from agents.checkpointing import checkpointed_layers
from agents.decoder import Decoder
from agents.frozen_layers import (
    go_on_from,
    round_frozen,
    run_frozen,
    shard_layers,
    shares_frozen,
)
from agents.heads import (
    UNCAPPED,
    Capping,
    Comparison,
    Head,
    TokenStatistics,
    compare,
    token_statistics,
)
from agents.lora import has_adapters, merged, without_adapters
from agents.model_files import SAFELY, check_model_folder
from agents.packed import PackedLinear, can_pack
from agents.sequences import (
    PAD,
    TokenBatch,
    lengths,
    one_state_per_row,
    similar_lengths,
    take,
)
from agents.states import (
    auto_class,
    example,
    find_capping,
    keep_scale,
    looks_ahead,
    run,
    sequence_states,
    shortest,
)

LM: TypeAlias = str | Path | PreTrainedModel | PreTrainedConfig
"""A folder, a hub id, a live model, or a config to build one from."""


class TokenModel(nn.Module):
    """π(token | ids so far) of a causal LM, for sequences of ids.

    Attributes:
        lm: The transformers model.
        vocab_size: V, the tokenizer's; a model's further rows (padding) are never looked at.
        temperature: Divides the logits.
        allowed_tokens: (V,) bool; the others have probability 0, always.
        dtype: What whole sequences are computed in: float32, or bfloat16 by autocast. What
            learns and log-probabilities are float32 either way.
        capping: What the model makes of its output layer's products.
        n_frozen: Layers, with all before them, whose states a `TokenBatch` may bring along.
        decoder: What `last_hidden` decodes single tokens with, where that is done.
        sharded: The weights are split over several processes.
        gradient_checkpointing: Keep no layer's activations for the backward pass, but its input.
    """

    lm: PreTrainedModel
    vocab_size: int
    temperature: float
    allowed_tokens: th.Tensor
    dtype: th.dtype = th.float32
    capping: Capping = UNCAPPED
    n_frozen: int = 0
    decoder: Decoder
    sharded: bool = False
    gradient_checkpointing: bool = False

    def autocast(self) -> th.autocast:
        """Return the context in which whole sequences are computed."""
        enabled = self.dtype != th.float32
        return th.autocast(
            self.lm.device.type, dtype=self.dtype if enabled else None, enabled=enabled
        )

    def hidden_at(self, batch: TokenBatch) -> th.Tensor:
        """Run whole sequences, some of like length at a time; return each token's state, (N, H)."""
        rows = th.arange(len(batch.ids), device=batch.ids.device)
        # Sharded models run together, and as often on each rank.
        groups = [rows] if self.sharded else similar_lengths(lengths(batch.ids))
        parts = [take(batch, group) for group in groups]
        states = [self._run(part)[part.row, part.position] for part, _ in parts]
        return th.cat(states)[th.cat([places for _, places in parts]).argsort()]

    def _run(self, batch: TokenBatch) -> th.Tensor:
        """Run a batch's sequences in one pass, and return their states (B, L, H)."""
        checkpointed = self.gradient_checkpointing and th.is_grad_enabled()
        with self.autocast(), checkpointed_layers(self.lm) if checkpointed else nullcontext():
            if batch.frozen is None or self.n_frozen == 0:
                return sequence_states(self.lm, batch.ids)
            return go_on_from(self.lm, self.n_frozen, batch.frozen, batch.ids.clamp(min=0))

    def last_hidden(self, obs: th.Tensor) -> tuple[th.Tensor, PreTrainedModel]:
        """Return the state at the last token of each row, and the model that made it.

        Args:
            obs: (n, L) ids, right-padded with -1. A row of nothing but -1 gets any state.

        Returns:
            (n, H), and the LM, or the decoder's copy of it.
        """
        ids = obs.long()
        if not th.is_grad_enabled():
            decode = self.decoder.hidden if self.decoder.takes(ids) else self.decoder.once
            return decode(ids), self.decoder.lm
        held = ids[:, 0] == PAD
        if bool(held.any()):
            ids = ids.clone()
            ids[held, 0] = shortest(self.lm)  # what comes of it is not used
        return self.hidden_at(one_state_per_row(ids)), self.lm

    def run_frozen(self, batch: TokenBatch) -> list[th.Tensor]:
        """Return what the layers that do not learn make of each sequence: B times (length, H)."""
        length = lengths(batch.ids)
        states: dict[int, th.Tensor] = {}
        for rows in similar_lengths(length):
            ids = batch.ids[rows, : int(length[rows].max())].clamp(min=0)
            with self.autocast():
                found = run_frozen(self.lm, self.n_frozen, ids)
            for row, kept in zip(rows.tolist(), found, strict=True):
                states[row] = kept[: int(length[row])].clone()
        return [states[row] for row in range(len(length))]

    def token_statistics(
        self, batch: TokenBatch, hidden: th.Tensor, actions: th.Tensor
    ) -> TokenStatistics:
        """Return log-probability and entropy of the trained tokens, both (N,) in nats."""
        return token_statistics(hidden, actions, self.head(batch))

    @th.no_grad()
    def compare(self, batch: TokenBatch, actions: th.Tensor, reference: "TokenModel") -> Comparison:
        """Compare with another model at the state of each trained token; see `Comparison`."""
        hidden, ref_hidden = self.hidden_at(batch), reference.hidden_at(batch)
        return compare(hidden, ref_hidden, actions, self.head(batch), reference.head(batch))

    def head(self, batch: TokenBatch | None = None, lm: PreTrainedModel | None = None) -> Head:
        """Return the map from hidden states to logits.

        Args:
            batch: Whose masks to apply; None: the permanent one only.
            lm: Whose weights to use; None: the model's own. A bfloat16 logit of 16 is rounded to
                1/8, so what is learned from needs a float32 head even where the body is not;
                a decoder's copy, which only samples, has none.
        """
        layer = (lm or self.lm).get_output_embeddings()
        head = Head.of(layer, self.allowed_tokens, self.temperature, self.capping)
        head = head._replace(dtype=self.dtype)
        if batch is None or batch.masks is None:
            return head
        if bool(batch.masks[:, self.allowed_tokens].all()):
            return head
        return head._replace(masks=head.places_in(batch.masks), mask_id=batch.mask_id)

    def decoding_head(self, lm: PreTrainedModel) -> Head:
        """Return the head for states that `lm` made; for a decoder's copy, kept with it."""
        if lm is self.lm:
            return self.head()
        key = (self.allowed_tokens._version, self.temperature)
        if self.decoder.derived.get("key") != key:
            head = self.head(lm=lm)
            if can_pack(head.weight.device, head.weight.dtype):
                head = head._replace(product=PackedLinear(head.weight, head.bias))
            self.decoder.derived.update(head=head, key=key)
        return self.decoder.derived["head"]


class Reference(TokenModel):
    """The frozen model that the policy is held to: another one, or its own without adapters."""

    def __init__(self, lm: PreTrainedModel, policy: TokenModel) -> None:
        """Freeze `lm`, to be compared with `policy` at its temperature and under its masks.

        Args:
            lm: The reference; or the policy's own LM, whose adapters are left out then, and which
                is left as it is.
            policy: What it is compared with.
        """
        super().__init__()
        self.shares_base = lm is policy.lm and has_adapters(lm)
        if self.shares_base:
            self.__dict__["lm"] = lm  # not a part of this module: its parameters are the policy's
        else:
            self.lm = lm
        self.vocab_size, self.temperature = policy.vocab_size, policy.temperature
        self.dtype, self.capping = policy.dtype, find_capping(lm)
        if policy.n_frozen and shares_frozen(lm, policy.lm, policy.n_frozen):
            self.n_frozen = policy.n_frozen
        self.register_buffer("allowed_tokens", policy.allowed_tokens, persistent=False)
        if not self.shares_base:
            self.requires_grad_(False).eval()
            round_frozen(self.lm, self.dtype)

    def shard(self) -> None:
        """Split the weights over the ranks, by FSDP2."""
        self.lm.float()  # a group of FSDP2 has one dtype
        shard_layers(self.lm)
        fully_shard(self, reshard_after_forward=False)
        register_fsdp_forward_method(self, "hidden_at")
        self.sharded, self.n_frozen = True, 0

    def _run(self, batch: TokenBatch) -> th.Tensor:
        """Run sequences as the policy's model does, but without its adapters."""
        with without_adapters(self.lm) if self.shares_base else nullcontext():
            return super()._run(batch)


def load_lm(lm: LM, vocab_size: int) -> PreTrainedModel:
    """Load a language model in float32 from a folder or hub id, or take one that is live.

    Args:
        lm: What to load.
        vocab_size: Tokens that it must know.

    Raises:
        ValueError: If nothing of that name can be loaded, or if it does not fit.
    """
    if isinstance(lm, PreTrainedModel):
        loaded = lm
    elif hasattr(lm, "get_base_model"):
        raise ValueError(
            "expected a transformers model, got one wrapped by peft: give the base model, and "
            "`lora` for new adapters, or merge the ones it has (merge_and_unload)"
        )
    elif isinstance(lm, PreTrainedConfig):
        loaded = auto_class(lm).from_config(lm, dtype=th.float32)
    else:
        loaded = load_named(str(lm))
    check_fit(loaded, vocab_size)
    fuse_activations(loaded)
    return loaded.float()


def fuse_activations(lm: PreTrainedModel) -> None:
    """Let PyTorch's one operation do what GPT-2's GELU, the tanh form, composes of eight."""
    for module in lm.modules():
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation | FastGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def load_named(lm: str) -> PreTrainedModel:
    """Load a causal LM or encoder-decoder in float32 from a folder or hub id; merge adapters in.

    Raises:
        ValueError: If nothing of that name can be loaded.
    """
    try:
        check_model_folder(lm)
        loaded = class_of(lm).from_pretrained(lm, dtype=th.float32, **SAFELY)
        return merged(loaded) if has_adapters(loaded) else loaded
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        if (Path(lm) / "adapter_config.json").exists():
            reason += (
                " (it holds adapters, whose adapter_config.json says where their base model is)"
            )
        raise ValueError(
            f"expected the folder or hub id of a causal LM, got {lm!r}: {reason}"
        ) from error


def build_lm(config: str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a causal LM with random weights, by torch's generator, for a tokenizer.

    Args:
        config: A JSON file as transformers saves it, `config.json`. Its vocabulary and special
            tokens are set to the tokenizer's.
        tokenizer: With EOS and padding tokens.

    Raises:
        ValueError: If there is no such file, or no causal LM can be built from it.
    """
    if not Path(config).is_file():  # transformers would ask the hub
        raise ValueError(f"expected the JSON file of a model's config, got {str(config)!r}")
    try:
        loaded = AutoConfig.from_pretrained(str(config), trust_remote_code=False)
        loaded.vocab_size = len(tokenizer)
        loaded.bos_token_id = None
        loaded.eos_token_id = tokenizer.eos_token_id
        loaded.pad_token_id = tokenizer.pad_token_id
        return AutoModelForCausalLM.from_config(loaded, dtype=th.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{config}: expected the config of a causal LM: {reason}") from error


def class_of(lm: str) -> Any:
    """Return the class that loads the language model of a folder or hub id."""
    adapters = Path(lm) / "adapter_config.json"
    if adapters.exists():
        lm = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
    try:
        return auto_class(AutoConfig.from_pretrained(lm, trust_remote_code=False))
    except OSError:  # adapters on a hub, or nothing: loading says which
        return AutoModelForCausalLM


def check_fit(lm: PreTrainedModel, vocab_size: int) -> None:
    """Require a causal model whose output layer is where logits come from, for all tokens.

    Raises:
        ValueError: If it is another.
    """
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
    if has_adapters(lm):
        raise ValueError(
            f"expected a model without adapters, got a {name} with some: merge them first "
            "(agents.lora.merged), or give the base model and `lora` for new ones"
        )
    lm.eval()
    keep_scale(lm)
    inputs = example(lm, n_tokens=4)
    capping = find_capping(lm)
    with th.no_grad():
        whole, parts = lm(**inputs).logits, capping(head(run(lm, **inputs)))
    if not th.allclose(whole, parts, atol=1e-4):
        raise ValueError(
            f"{name} makes more of its states than its output layer does, which is not supported: "
            "expected logits = output layer(states), scaled or softly capped at most"
        )
    if looks_ahead(lm):
        raise ValueError(
            f"expected a causal model, got a {name} whose tokens see those that follow them: a "
            "BERT-like model writes with is_decoder=True in its config (config.json of its "
            "folder), and learns to in a warm start"
        )


def check_positions(lm: PreTrainedModel, longest: int) -> None:
    """Require that the model has positions for sequences of `longest` tokens.

    Raises:
        ValueError: If not.
    """
    limit = most_positions(lm)
    if limit is not None and longest > limit:
        raise ValueError(
            f"expected sequences of at most {limit} tokens, which is what {type(lm).__name__} has "
            f"positions for, got up to {longest}: shorten the prompts or max_new_tokens"
        )


def most_positions(lm: PreTrainedModel) -> int | None:
    """Return the length of the longest sequence that a model has positions for; None: any."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None)
