import numpy as np

from reward_models.measures import measures, measures_table, samples_table


def episode(prompt, completion, **more):
    return {
        "prompt": prompt,
        "completion": completion,
        "n_tokens": len(completion.split()),
        "finish_reason": "eos",
        "ref_kl": 1.0,
        **more,
    }


def test_a_writer_is_measured_on_its_episodes():
    texts = ["good good good good", "a fine film"]
    episodes = [episode("So", text) for text in texts]
    episodes[0]["finish_reason"] = "length"
    found = measures(episodes, {"score": np.array([1.0, 3.0])})
    assert found["score"][0] == 2 and found["tokens"][0] == 3.5 and found["ended"][0] == 0.5
    assert found["distinct-1"][0] == 4 / 7 and found["distinct-2"][0] == 3 / 5
    assert found["self-bleu"][0] < 0.1  # they share no word
    assert found["repetition"][0] == 0.25  # one of the first text's two 3-grams came before
    value, low, high = found["ref_kl"]
    assert value == low == high == 1


def test_scores_of_any_name_are_in_the_table_in_their_order():
    episodes = [episode("So", text) for text in ("好看", "不好看")]
    found = measures(episodes, {"score": np.array([1.0, 3.0]), "rougeL": np.array([0.5, 0.7])})
    rows = [line.split(" |")[0].strip("| ") for line in measures_table({"one": found}).splitlines()]
    assert rows[2:5] == [
        "score (the reward)", "rougeL", "KL to the warm start (nats per completion)"
    ]  # fmt: skip
    assert found["distinct-1"][0] == 3 / 5
    assert "| KL to the first one (nats" in measures_table({"one": found}, "first one")


def test_the_tables_hold_a_writer_per_column_and_a_bar_does_not_end_a_cell():
    table = measures_table({"one": {"score": [-0.001, -1, 1]}, "two": {"score": [2, 1, 3]}})
    assert "| 0.00 [-1.00, 1.00] | 2.00 [1.00, 3.00] |" in table
    writers = {"one": [episode("a|b", "x\ny"), episode("c", "d")], "two": [episode("a|b", "z")] * 2}
    lines = samples_table(writers, {w: np.array([0.5, -0.5]) for w in writers}, "score", 1)
    assert lines.splitlines()[2:] == ["| a\\|b | x y | +0.5 | z | +0.5 |"]
