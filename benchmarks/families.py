"""How fast each family of models is decoded: with its cache, and from whole sequences.

python -m benchmarks.families                  all of them
python -m benchmarks.families mamba t5         some

Models of 4 layers, 256 wide, with random weights and 4096 tokens; 16 rows of 16 prompt tokens and
32 new ones. Prints a table in Markdown, with the machine and its load.
"""

import os
import sys
import time
import warnings
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch as th
import transformers as tf
from gymnasium import spaces

from agents import CausalLMPolicy
from agents.decoder import Decoder
from agents.forecast import measure_decoding
from agents.states import auto_class
from benchmarks.throughput import say

VOCABULARY, WIDTH, LAYERS, HEADS, WINDOW = 4096, 256, 4, 4, 16
ROWS, PROMPT, NEW, ROUNDS = 16, 16, 32, 3
END, START = 1, 0
"""Tokens that end a prompt and begin a completion, for encoder-decoders."""


def config_of(family: str) -> tf.PreTrainedConfig:
    """Return the config of a small model of a family."""
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    small = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    attends = {**small, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    shares = {**attends, "num_key_value_heads": HEADS // 2, **none}
    ends = {"pad_token_id": START, "decoder_start_token_id": START, "eos_token_id": END}
    layers = {"encoder_layers": LAYERS, "decoder_layers": LAYERS}
    layers |= {f"{part}_attention_heads": HEADS for part in ("encoder", "decoder")}
    layers |= {f"{part}_ffn_dim": 4 * WIDTH for part in ("encoder", "decoder")}
    made = {
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **none
        ),
        "llama": lambda: tf.LlamaConfig(**shares),
        "qwen3": lambda: tf.Qwen3Config(head_dim=WIDTH // HEADS, **shares),
        "mistral": lambda: tf.MistralConfig(sliding_window=WINDOW, **shares),
        "gemma2": lambda: tf.Gemma2Config(
            head_dim=WIDTH // HEADS, sliding_window=WINDOW, query_pre_attn_scalar=64, **shares
        ),
        "gemma3": lambda: tf.Gemma3TextConfig(
            head_dim=WIDTH // HEADS, sliding_window=WINDOW, query_pre_attn_scalar=64, **shares
        ),
        "bert": lambda: tf.BertConfig(is_decoder=True, **attends),
        "mamba": lambda: tf.MambaConfig(**small, **none),
        "rwkv": lambda: tf.RwkvConfig(**small),
        "t5": lambda: tf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=4 * WIDTH,
            num_layers=LAYERS, num_heads=HEADS, **ends,
        ),
        "bart": lambda: tf.BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, **layers, **ends),
    }  # fmt: skip
    return made[family]()


DECODED = ("gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3", "bert", "mamba", "rwkv")
FAMILIES = (*DECODED, "t5", "bart")


def tokens_per_second(family: str) -> tuple[float, float | None]:
    """Decode with whole sequences, and with the family's cache, if it has one."""
    config = config_of(family)
    th.manual_seed(0)
    box = spaces.Box(-1, VOCABULARY - 1, (PROMPT + NEW,), dtype=np.int64)
    actions = spaces.Discrete(VOCABULARY)
    lm = auto_class(config).from_config(config)
    policy = CausalLMPolicy(box, actions, lambda _: 0.0, lm=lm)
    prompts = np.random.default_rng(0).integers(2, VOCABULARY, (ROWS, PROMPT))
    prompts[:, -1] = END
    cached, found = policy.decoder, []
    for decoder, n_rounds in ((Decoder(policy.lm), 1), (cached, ROUNDS)):
        policy.decoder = decoder
        rounds = [measure_decoding(policy, list(prompts), ROWS, NEW)[0] for _ in range(n_rounds)]
        found.append(median(rounds))
    return found[0], None if cached.why_uncached else found[1]


def main(families: Sequence[str]) -> None:
    """Print the table."""
    warnings.filterwarnings("ignore", message=".*cannot be cached")
    tf.logging.set_verbosity_error()
    say(
        f"{os.cpu_count()} cores, {th.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}, torch {th.__version__}, transformers {tf.__version__}\n"
    )
    say("| family | whole sequences | cached | |\n|---|--:|--:|--:|")
    start = time.perf_counter()
    for family in families or FAMILIES:
        whole, cached = tokens_per_second(family)
        shown = ("–", "") if cached is None else (f"{cached:,.0f}", f"{cached / whole:.1f} ×")
        say(f"| {family} | {whole:,.0f} | {shown[0]} | {shown[1]} |")
    say(f"\n{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
