"""Every family of models behind the one policy keeps the same promises.

Each is built from a tiny config. Its weights are made large: random ones hardly attend to
anything, so that a wrong mask or position would not show.
"""

import copy
import re
import warnings

import numpy as np
import pytest
import torch as th
import transformers as tf
from conftest import letter_tokenizer, tiny_gpt2, tiny_llama
from test_agents_decoder import Rows
from test_agents_token_ppo import make_env, make_model

from agents import LMReader, TokenPPO, checks
from agents.decoder import CachedDecoder, Decoder
from agents.families import decoder_for
from agents.language_model import load_lm
from agents.seq2seq_decoder import Seq2SeqDecoder
from agents.sft import warm_start
from agents.state_decoder import StateDecoder
from agents.states import auto_class, find_capping
from agents.whole_texts import encode, whole_texts

V, EOS = 40, 7  # the letter tokenizer's
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **ENDS,
}
GEMMA = {**SMALL, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}


def qwen2(v: int) -> tf.PreTrainedConfig:
    return tf.Qwen2Config(vocab_size=v, **SMALL)


def qwen3(v: int) -> tf.PreTrainedConfig:
    return tf.Qwen3Config(vocab_size=v, head_dim=8, **SMALL)


def mistral(v: int) -> tf.PreTrainedConfig:
    return tf.MistralConfig(vocab_size=v, sliding_window=5, **SMALL)


def gemma2(v: int) -> tf.PreTrainedConfig:
    return tf.Gemma2Config(
        vocab_size=v, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **GEMMA
    )


def gemma3(v: int) -> tf.PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention"]
    return tf.Gemma3TextConfig(vocab_size=v, layer_types=kinds, **GEMMA)


def cohere(v: int) -> tf.PreTrainedConfig:
    return tf.CohereConfig(vocab_size=v, logit_scale=0.25, **SMALL)


def mamba(v: int) -> tf.PreTrainedConfig:
    return tf.MambaConfig(
        vocab_size=v, hidden_size=32, num_hidden_layers=2, state_size=4, conv_kernel=3, **ENDS
    )


def mamba2(v: int) -> tf.PreTrainedConfig:
    return tf.Mamba2Config(
        vocab_size=v, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16,
        n_groups=2, chunk_size=4, **ENDS,
    )  # fmt: skip


def rwkv(v: int) -> tf.PreTrainedConfig:
    return tf.RwkvConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2, rescale_every=1)


def bert(v: int) -> tf.PreTrainedConfig:
    return tf.BertConfig(
        vocab_size=v, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, is_decoder=True,
    )  # fmt: skip


def t5(v: int) -> tf.PreTrainedConfig:
    return tf.T5Config(
        vocab_size=v, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2,
        num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=12,
        pad_token_id=8, decoder_start_token_id=8, eos_token_id=EOS,
    )  # fmt: skip


def bart(v: int) -> tf.PreTrainedConfig:
    return tf.BartConfig(
        vocab_size=v, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=64, pad_token_id=8, bos_token_id=None, eos_token_id=EOS,
        decoder_start_token_id=EOS, forced_eos_token_id=None,
    )  # fmt: skip


MADE = {"gpt2": lambda v: tiny_gpt2(v).config, "llama": lambda v: tiny_llama(v).config}
OTHERS = (qwen2, qwen3, mistral, gemma2, gemma3, cohere, mamba, mamba2, rwkv, bert, t5, bart)
CONFIGS = MADE | {make.__name__: make for make in OTHERS}
DECODERS = dict.fromkeys(CONFIGS, CachedDecoder)
DECODERS |= {"mamba": StateDecoder, "mamba2": StateDecoder, "rwkv": Decoder}
DECODERS |= {"t5": Seq2SeqDecoder, "bart": Decoder}  # BART's positions are those of columns
ENCODERS = ("t5", "bart")


def tiny(name: str, vocab_size: int = V) -> tf.PreTrainedModel:
    """A model whose tokens see one another."""
    th.manual_seed(0)
    config = CONFIGS[name](vocab_size)
    lm = auto_class(config).from_config(config, dtype=th.float32).eval()
    with th.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1 and name != "t5":  # its own are large
                parameter.mul_(5)
    return lm


@pytest.fixture(params=[name for name in CONFIGS if name not in ("qwen2", "mamba2", "cohere")])
def family(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def silent_but_for(request):
    """No family warns but those that say that they are not cached."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*cannot be cached")
        yield


def plain_logits(lm, row: np.ndarray) -> th.Tensor:
    """What a family's own forward pass says of the token after a row: no cache, no batch."""
    ids, more = row[row >= 0], {}
    if lm.config.is_encoder_decoder:
        n_prompt = ids.tolist().index(EOS) + 1
        written = [lm.config.decoder_start_token_id, *ids[n_prompt:].tolist()]
        ids, more = ids[:n_prompt], {"decoder_input_ids": th.tensor([written])}
    with th.no_grad():
        return lm(input_ids=th.as_tensor(ids)[None], **more, use_cache=False).logits[0, -1]


class PromptsWithEnds(Rows):
    """Rows whose prompts, and they alone, have an end, as a T5 tokenizer gives them."""

    def begin(self, row: int) -> None:
        super().begin(row)
        self.ids[row][self.ids[row] == EOS] = EOS + 1
        self.ids[row, (self.ids[row] >= 0).sum() - 1] = EOS

    def step(self) -> None:
        super().step()
        for ids in self.ids:
            ids[np.flatnonzero(ids == EOS)[1:]] = EOS + 1


def rows_of(name: str, n: int = 5) -> Rows:
    return (PromptsWithEnds if name in ENCODERS else Rows)(n, restart=0.15)


def env_of(name: str):
    end = "<eos>" if name in ENCODERS else ""
    return make_env(prompts=[prompt + end for prompt in (">", ">>", ">a>", ">bb>")])


@pytest.mark.parametrize("family", CONFIGS)
def test_cached_log_probs_are_the_full_forward_passs(family) -> None:
    lm = tiny(family)
    decoder, rows = decoder_for(lm), rows_of(family)
    assert type(decoder) is DECODERS[family]
    head, capping = lm.get_output_embeddings(), find_capping(lm)
    worst = 0.0
    with th.no_grad():
        for _ in range(30):
            logits = capping(head(decoder.hidden(rows.tensor())))
            expected = th.stack([plain_logits(lm, row) for row in rows.ids])
            error = (logits.log_softmax(1) - expected.log_softmax(1)).abs().max()
            worst = max(worst, float(error))
            rows.step()
    assert worst <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_rollout_and_its_update_keep_what_a_policy_promises(family, tmp_path) -> None:
    lm = tiny(family, 9)
    model = make_model(
        lm=lm, env=env_of(family), kl_coef=0.1, n_steps=24, n_epochs=1, learning_rate=1e-2
    )
    start = copy.deepcopy(model.policy.state_dict())
    model.learn(1)  # the first minibatch's ratio is checked to be 1
    kl = model.logger.name_to_value["rollout/ref_kl_per_token_exact"]
    assert abs(kl) < 1e-6
    changed = [n for n, p in model.policy.named_parameters() if not th.equal(p, start[n])]
    assert len(changed) > 10 and all(p.isfinite().all() for p in model.policy.parameters())
    model.policy.lm.save_pretrained(tmp_path / "lm")
    again = auto_class(lm.config).from_pretrained(tmp_path / "lm").eval()
    for row in model._last_obs:
        found = plain_logits(again, row)
        th.testing.assert_close(found, plain_logits(model.policy.lm, row), atol=1e-5, rtol=1e-5)
    # A token's log-probability depends neither on its batch nor on how it is asked for.
    obs = th.as_tensor(model._last_obs)
    tokens, values, log_prob = model.policy(obs)
    for row in range(len(obs)):
        value, one, _ = model.policy.evaluate_actions(obs[row : row + 1], tokens[row : row + 1])
        th.testing.assert_close(one[0], log_prob[row], atol=1e-4, rtol=0)
        th.testing.assert_close(value[0], values[row], atol=1e-4, rtol=1e-4)


def test_some_layers_learn_and_the_rest_stays(family) -> None:
    model = make_model(
        lm=tiny(family, 9),
        env=env_of(family),
        kl_coef=0.1,
        policy_kwargs={"trainable_layers": 1},
    )
    start = {n: p.clone() for n, p in model.policy.lm.named_parameters()}
    model.learn(1)
    kl = model.logger.name_to_value["rollout/ref_kl_per_token_exact"]
    changed = {n for n, p in model.policy.lm.named_parameters() if not th.equal(p, start[n])}
    learned = {n for n, p in model.policy.lm.named_parameters() if p.requires_grad}
    assert abs(kl) < 1e-6 and changed and changed <= learned < set(start)
    assert not any("embed" in n for n in changed)
    assert not any(re.search(r"\.(\d+)\.", n + ".9.")[1] == "0" for n in changed)


@pytest.mark.parametrize("family", ["gemma2", "mamba", "t5", "rwkv"])
def test_a_reader_reads_with_every_decoder(family) -> None:
    lm = tiny(family)
    reader, rows = LMReader(lm, V, "cpu"), rows_of(family, n=3)
    for _ in range(4):
        found = reader.log_probs(rows.ids)
        expected = np.stack([plain_logits(lm, row).log_softmax(0).numpy() for row in rows.ids])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        rows.step()


@pytest.mark.parametrize("name", ["gemma2", "mamba", "t5"])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(name, tmp_path) -> None:
    model = make_model(lm=tiny(name, 9), env=env_of(name), kl_coef=0.1)
    model.learn(64)
    model.save(tmp_path / "half")
    model.learn(64, reset_num_timesteps=False)
    again = TokenPPO.load(tmp_path / "half", env=env_of(name))
    again.learn(64, reset_num_timesteps=False)
    for (part, expected), (_, found) in zip(
        model.policy.named_parameters(), again.policy.named_parameters(), strict=True
    ):
        assert th.equal(expected, found), part


# ------------------------------------------------------------------------- what is special


def test_capping_is_found_by_trying() -> None:
    assert find_capping(tiny("llama")) == (1.0, None)
    scale, cap = find_capping(tiny("gemma2"))
    assert (scale, round(cap, 5)) == (1.0, 3.0)
    assert find_capping(tiny("cohere")) == (0.25, None)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_gradients_through_a_cap_are_autograds(family) -> None:
    for frozen in (False, True):
        model = make_model(
            lm=tiny(family, 9), policy_kwargs={"temperature": 0.7}, n_steps=8, kl_coef=0
        )
        policy = model.policy
        policy.lm.get_output_embeddings().weight.requires_grad_(not frozen)
        model.learn(1)
        batch = next(model.rollout_buffer.get(10**6))
        learns = [p for p in policy.lm.parameters() if p.requires_grad]
        _, log_prob, entropy = policy.evaluate(batch.observations, batch.actions)
        found = th.autograd.grad(log_prob.sum() + 0.3 * entropy.sum(), learns)
        ids, row, position = batch.observations[:3]
        logits = policy.lm(input_ids=ids.clamp(min=0)).logits[row, position] / 0.7
        log_p = logits.masked_fill(~policy.allowed_tokens, -1e9).log_softmax(1)
        loss = log_p.gather(1, batch.actions[:, None]).sum() - 0.3 * (log_p.exp() * log_p).sum()
        for a, b in zip(found, th.autograd.grad(loss, learns), strict=True):
            th.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = tf.BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    with pytest.raises(ValueError, match="is_decoder=True"):
        load_lm(config, V)


# ------------------------------------------------------------- encoder-decoders from end to end


def test_an_encoder_decoder_learns_completions_of_prompts() -> None:
    tokenizer, lm = letter_tokenizer("abcdef"), tiny("t5", 9)
    pairs = [(f"{'>' * n}{letter}<eos>", letter * 4) for letter in "abcdef" for n in (1, 2, 3)]
    with pytest.raises(ValueError, match="pairs of a prompt and its completion for T5"):
        warm_start(lm, tokenizer, ["abc", "abd"])
    report = warm_start(
        lm, tokenizer, pairs, epochs=16, batch_size=8, learning_rate=2e-2, held_out=1
    )
    assert report.loss_before > 1.5 and report.loss_after < 0.8
    with pytest.raises(ValueError, match="prompts that end with their only end-of-text token"):
        warm_start(lm, tokenizer, [("ab", "c"), ("b", "c")], max_steps=1)


def test_of_a_pair_the_completion_alone_is_learned() -> None:
    (row,) = encode(letter_tokenizer("abcdef"), [("ab>", "cd")])
    assert row == {"input_ids": [0, 1, 6, 2, 3, 7], "n_given": 3}
    batch = whole_texts([row, {"input_ids": [4, 5, 7], "n_given": 1}])
    assert batch.row.tolist() == [0, 0, 0, 1, 1] and batch.position.tolist() == [2, 3, 4, 0, 1]


def test_a_saved_encoder_decoder_is_loaded_by_name(tmp_path) -> None:
    tiny("t5", 9).save_pretrained(tmp_path / "t5")
    model = make_model(lm=str(tmp_path / "t5"), env=env_of("t5"))
    assert model.policy.lm.config.is_encoder_decoder
    assert isinstance(model.policy.decoder, Seq2SeqDecoder)


def test_prompts_without_an_end_are_refused_by_an_encoder_decoder() -> None:
    model = make_model(lm=tiny("t5", 9))
    with pytest.raises(ValueError, match="let the tokenizer add it"):
        model.learn(1)


@pytest.mark.parametrize("name", ["gemma2", "mamba", "bert", "t5"])
def test_adapters_checkpointing_and_bfloat16(name) -> None:
    lora = {"r": 4}
    if name == "mamba":
        with pytest.raises(ValueError, match="remove it from `target_modules`"):
            make_model(lm=tiny(name, 9), policy_kwargs={"lora": lora})
        lora["target_modules"] = ["in_proj", "x_proj"]
    kwargs = {"lora": lora, "gradient_checkpointing": True, "dtype": "bfloat16"}
    model = make_model(
        lm=tiny(name, 9), env=env_of(name), kl_coef=0.1, n_steps=8, policy_kwargs=kwargs
    )
    model.learn(64)
    ups = [p for n, p in model.policy.named_parameters() if "lora_B" in n]  # 0 at the start
    assert len(ups) > 2 and all(p.isfinite().all() and p.any() for p in ups)


@pytest.mark.parametrize("name", ["bert", "t5", "rwkv"])
def test_the_checks_say_what_holds(name) -> None:
    model = make_model(lm=tiny(name, 9), env=env_of(name))
    prompts = [row[row >= 0] for row in model.env.reset()]
    model._allow_tokens_of(model.env)
    walked = checks.walk(model.policy, prompts, 6)
    found = checks.check_cache(model.policy, walked)
    assert found.level == ("look" if name == "rwkv" else "ok"), found
    assert ("cannot be cached" in found.said) == (name == "rwkv")
    found = checks.check_padding(model.policy, walked)
    assert found.level == "ok" and ("left" in found.said) == (name == "bert")
    assert checks.check_temperature(model.policy, prompts[0]).level == "ok"
