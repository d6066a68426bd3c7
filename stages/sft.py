"""The warm start: a language model is fitted to texts."""

from dataclasses import asdict

from configs.settings import SFT, Common
from stages.data import data
from stages.models import named_model
from stages.process import device_of, dtype_of, say
from stages.run_folder import stage


def sft(common: Common, settings: SFT) -> None:
    """Warm-start a language model on texts; leaves the folder sft."""
    from agents.language_model import build_lm, load_config, load_named
    from agents.saving import replaced_folder
    from agents.sft import warm_start
    from text_env.own_tokenizer import learn_tokenizer
    from text_env.prompts import load_examples, whole_text
    from text_env.vocabulary import load_tokenizer

    with stage(common, "sft") as (facts, made):
        texts = load_examples(settings.texts or data(common) / "language.jsonl")
        if settings.model.endswith(".json"):
            config = load_config(settings.model)
            tokenizer = learn_tokenizer(map(whole_text, texts), config.vocab_size)
            lm = build_lm(config, tokenizer)
        else:
            model = named_model(settings.model)
            tokenizer, lm = load_tokenizer(model), load_named(model)
        report = warm_start(
            lm.to(device_of(common)),
            tokenizer,
            texts,
            max_tokens=settings.max_tokens,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            trainable_layers=settings.trainable_layers,
            dtype=dtype_of(common),
            seed=common.seed,
            progress_bar=True,
        )
        with replaced_folder(made / "sft") as folder:
            lm.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        facts["sft"] = asdict(report)
        facts["model"] = settings.model
        say(
            f"held-out loss {report.loss_before:.2f} -> {report.loss_after:.2f} nats per token "
            f"({report.n_texts} texts, {report.steps} updates)"
        )
