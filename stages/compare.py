"""How often one policy's completions are better than another's."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.settings import Common, Compare
from stages.data import data
from stages.process import device_of, say, set_up
from stages.run_folder import folder_of, write_text
from stages.writing import as_in_ppo, prompts_of, samples_of, some_prompts


def compare(common: Common, settings: Compare) -> None:
    """Say how often one policy's completions are better than another's: judge, reward, people."""
    import numpy as np

    from reward_models import load_reward_model
    from reward_models.conversations import answers_of, as_texts
    from reward_models.evaluation import share_interval
    from reward_models.feedback import FeedbackStore, tasks_side_by_side, with_chats
    from reward_models.feedback.agreement import win_rates, with_equal_pairs
    from reward_models.feedback.chats import side_by_side
    from text_env.prompts import load_prompts

    set_up(common)
    folder, policies = folder_of(common), (settings.first, settings.second)
    run = Path(settings.first).parent
    settings = as_in_ppo(run, settings)
    source = settings.prompts or prompts_of(run, "evaluate") or data(common) / "test_prompts.jsonl"
    prompts = some_prompts(load_prompts(source), settings.n_prompts, common.seed)
    mine, theirs = (samples_of(common, settings, lm, prompts, 1) for lm in policies)
    chats = theirs.chats | mine.chats
    asked = [as_texts(episode)[0] for episode in mine.episodes]
    sides = [[as_texts(episode)[1] for episode in side.episodes] for side in (mine, theirs)]
    answers = [answers_of(side.episodes) for side in (mine, theirs)]
    same = np.array([one == two for one, two in zip(*sides, strict=True)])
    found: dict[str, Any] = {}
    for name in ("judge", "reward_model"):
        if (folder / name).exists():
            model = load_reward_model(folder / name, device_of(common))
            one, two = (a.mean(model.score(a.prompts, a.completions)) for a in answers)
            tie = same | (one == two)  # equal texts are, whatever is in their batches
            wins = float(np.sum((one > two) & ~tie) + 0.5 * np.sum(tie))
            found[name] = [*share_interval(wins, len(asked)), len(asked)]
    file = settings.store or folder / "compare.sqlite"  # nothing is learned from these answers
    if settings.ask:
        with FeedbackStore(file, common.seed) as store:
            new = store.add(
                with_chats(tasks_side_by_side(mine.texts, theirs.texts, policies), chats)
            )
        say(f"{new} new tasks: python train.py annotate --run {folder} --store {file}")
    if file.exists():
        with FeedbackStore(file) as store:
            rates = {
                (r.origin, r.against): with_equal_pairs(r.rate, int(same.sum()), len(asked))
                for r in win_rates(store.answers())
            }
        if policies in rates:
            found["people"] = list(rates[policies])
        elif policies[::-1] in rates:  # rates are of the first by name
            share, low, high, n = rates[policies[::-1]]
            found["people"] = [1 - share, 1 - high, 1 - low, n]
    if not found:
        raise ValueError(f"expected a judge or reward_model in {folder}, or answers; found none")
    say(f"{settings.first} is better than {settings.second}, on {len(asked)} prompts:")
    if same.any():
        say(f"  {same.sum()} of the pairs are equal: half a win each; people are not asked them")
    for name, (share, low, high, n) in found.items():
        say(f"  {name}: {share:.2f} [{low:.2f}, {high:.2f}] of {n}")
    rows = []
    for prompt, *pair in zip(asked, *sides, strict=True):
        rows.append({"prompt": prompt, "first": pair[0], "second": pair[1]})
        chat = side_by_side(chats, prompt, pair)
        if chat is not None:
            rows[-1]["chat"] = asdict(chat)
    result = {"policies": policies, "win_rate": found, "equal": int(same.sum())}
    write_text(
        folder / "compare.json",
        json.dumps(result | {"samples": rows}, indent=1, ensure_ascii=False),
    )
