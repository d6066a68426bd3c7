"""Hostile files: nothing of theirs is run, nothing outside their folder is opened by name."""

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2
from transformers import BertConfig, BertForSequenceClassification

from agents.language_model import load_lm
from reward_models import LearnedRewardModel, assets
from reward_models.ensemble import RewardEnsemble, load_reward_model
from text_env.vocabulary import load_tokenizer

ROOT = Path(__file__).parent.parent
TRAP = "ran.txt"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def make_lm(folder: Path) -> None:
    tiny_gpt2(9).save_pretrained(folder)


def make_reward_model(folder: Path) -> None:
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def read_lm(folder: Path) -> None:
    load_lm(folder, 9)


def read_reward_model(folder: Path) -> None:
    LearnedRewardModel.load(folder, "cpu")


@pytest.fixture(params=["lm", "reward model"])
def model(request, tmp_path: Path):
    """A folder with a good model and tokenizer, and what loads it."""
    make, read = {
        "lm": (make_lm, read_lm),
        "reward model": (make_reward_model, read_reward_model),
    }[request.param]
    folder = tmp_path / "model"
    make(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder, read


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refuses(model, match: str) -> None:
    """The folder is refused with a ValueError or OSError, and no trap has gone off."""
    folder, read = model
    with pytest.raises((ValueError, OSError), match=match):
        read(folder)
    assert not list(folder.parent.rglob(TRAP))


def test_a_good_folder_is_loaded(model) -> None:
    folder, read = model
    read(folder)


def test_a_pickle_named_safetensors_is_not_opened(model) -> None:
    folder, _ = model
    pickled = pickle.dumps(Trap(folder / TRAP))
    (folder / "model.safetensors").write_bytes(pickled)
    refuses(model, "(?i)header|safetensors")


@pytest.mark.parametrize("as_zip", [True, False])
def test_weights_that_are_a_pickle_are_not_opened(model, as_zip: bool) -> None:
    folder, _ = model
    (folder / "model.safetensors").unlink()
    trap = {"a": Trap(folder / TRAP)}
    th.save(trap, folder / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
    refuses(model, r"model\.safetensors")


def test_adapters_that_are_a_pickle_are_not_opened(model) -> None:
    folder, _ = model
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    th.save({"a": Trap(folder / TRAP)}, folder / "adapter_model.bin")
    refuses(model, r"adapters in adapter_model\.safetensors")


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**40, 100_000_001])
def test_a_tensor_header_that_is_too_large(model, size: int) -> None:
    folder, _ = model
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
    refuses(model, "(?i)header")


@pytest.mark.parametrize("model_type", [None, "unheard-of"])
def test_code_that_a_folder_brings_is_not_run(model, model_type: str | None) -> None:
    folder, read = model
    code = f"open({str(folder / TRAP)!r}, 'w')\n"
    (folder / "theirs.py").write_text(code + "class Config: pass\nclass Model: pass\n")
    names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    auto_map = {"AutoConfig": "theirs.Config", **dict.fromkeys(names, "theirs.Model")}
    change(folder / "config.json", auto_map=auto_map)
    if model_type is None:  # a class that transformers knows: its own code is taken
        read(folder)
        assert not (folder / TRAP).exists()
    else:
        change(folder / "config.json", model_type=model_type)
        refuses(model, "trust_remote_code|custom code")


def test_a_tokenizers_code_is_not_run(tmp_path: Path) -> None:
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / TRAP)!r}, 'w')\nclass T: pass\n")
    for name in ("theirs.T", "../theirs.T"):
        change(
            tmp_path / "tokenizer_config.json",
            auto_map={"AutoTokenizer": [name, name]},
            tokenizer_class="Theirs",
        )
        with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
            load_tokenizer(tmp_path)
        assert not (tmp_path / TRAP).exists()


def test_a_tokenizers_files_are_those_beside_it(tmp_path: Path) -> None:
    """transformers itself ignores paths in tokenizer_config.json; this is so that it stays so."""
    letter_tokenizer("xyz").save_pretrained(tmp_path / "other")
    letter_tokenizer().save_pretrained(tmp_path / "mine")
    other = "../other/tokenizer.json"
    paths = {"tokenizer_file": other, "vocab_file": other, "fast_tokenizer_files": [other]}
    change(tmp_path / "mine" / "tokenizer_config.json", **paths)
    assert "a" in load_tokenizer(tmp_path / "mine").get_vocab()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b", "..", 3])
def test_an_index_of_weights_that_points_out_of_the_folder(model, name: object) -> None:
    folder, _ = model
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(model, "expected the name of a file or folder beside it")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"weight_map": 3}', "{"])
def test_an_index_of_weights_that_is_none(model, content: str) -> None:
    folder, _ = model
    (folder / "model.safetensors.index.json").write_text(content)
    refuses(model, "expected a list of weight files")


@pytest.mark.parametrize("name", ["../model", "..", "/tmp/model", "a/../../model", "", 3, None])
def test_an_ensemble_whose_members_are_elsewhere(tmp_path: Path, name: object) -> None:
    make_reward_model(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    members = [LearnedRewardModel.load(tmp_path / "model", "cpu") for _ in range(2)]
    folder = RewardEnsemble(members, 1.0).save(tmp_path / "ensemble")
    (side,) = folder.glob("*.json")
    change(side, members=[name])
    with pytest.raises(ValueError, match=r"ensemble.*expected the name of a file or folder beside"):
        load_reward_model(folder, "cpu")


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"normalization": {"x": 1}}', "null"])
def test_a_side_file_that_is_none(tmp_path: Path, content: str) -> None:
    make_reward_model(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "reward_model.json").write_text(content)
    with pytest.raises(ValueError, match=r"reward_model\.json: expected what"):
        LearnedRewardModel.load(tmp_path / "model", "cpu")


# ------------------------------------------------------------------ downloads


def test_an_archives_links_and_paths_lead_nowhere(tmp_path: Path) -> None:
    """Members are read by their pinned names and compared with pinned hashes; no name is a path."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, kind in (("p-1/a.txt", tarfile.SYMTYPE), ("p-1/b.txt", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
        outside = tarfile.TarInfo("../../escaped.txt")
        tar.addfile(outside, io.BytesIO())
    archive = tmp_path / "p-1.tar.gz"
    archive.write_bytes(buffer.getvalue())
    (tmp_path / "out" / "in").mkdir(parents=True)
    for member in ("p-1/a.txt", "p-1/b.txt", "../../escaped.txt"):
        package = assets.Package("p==1", archive.name, assets._sha256(archive), {member: "0" * 64})
        with pytest.raises(
            assets.AssetError, match=r"could not unpack|not the file that was pinned"
        ):
            assets._unpack(package, archive, tmp_path / "out" / "in")
    found = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert all(p.parent == tmp_path / "out" / "in" for p in found)
    assert not any("secret" in p.read_text() for p in found)


# ------------------------------------------------------------------ what is written in the tree

FORBIDDEN = {
    r"\b(?:torch|th)\.load\(": "a pickle",
    r"trust_remote_code\s*=\s*True": "code that a folder brings",
    r"weights_only\s*=\s*False": "a pickle",
    r"allow_pickle\s*=\s*True": "a pickle",
    r"\b(?:cloudpickle|dill|joblib|shelve)\b": "a pickle",
    r"\burlretrieve\b|\bsnapshot_download\b|\bhf_hub_download\b": "a download that is not verified",
    r"\.extractall\(|\.extract\(|shutil\.unpack_archive": "names that an archive chooses",
    r"verify\s*=\s*False|_create_unverified_context": "TLS that is not verified",
    r"\bos\.(?:system|popen)\(": "a shell",
}
"""What ruff's rules (pyproject.toml) do not know, as far as they are of the kind."""


def test_nothing_in_the_tree_runs_or_fetches_what_nobody_has_seen() -> None:
    parts = ("agents", "reward_models", "text_env", "stages", "configs", "benchmarks", "examples")
    files = [file for part in parts for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 50
    for file in [*files, ROOT / "train.py"]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern, what in FORBIDDEN.items():
                assert not re.search(pattern, line), f"{file}, line {number}: {what}"


@pytest.mark.parametrize("package", ["agents", "reward_models", "text_env", "stages"])
def test_models_are_loaded_with_safetensors_only_and_without_their_code(package: str) -> None:
    place = ROOT / package
    for file in [place] if place.is_file() else place.rglob("*.py"):
        if file.name == "model_card.py":  # lines that it prints, for the folder they stand in
            continue
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r"Auto(\w+)\.from_pretrained\(([^()]*|\([^()]*\))*\)", text):
            call = match[0]
            if "gguf_file=" in call:  # our own, pinned by its hash
                continue
            safe = "**SAFELY" in call or (
                "trust_remote_code=False" in call and not match[1].startswith("Model")
            )
            assert safe, f"{file}: {call}"


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("exec('1')", "S102"),
        ("eval('1')", "S307"),
        ("import pickle\npickle.loads(b'')", "S301"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "S602"),
        ("import os\nos.system('ls')", "S605"),
        ("import yaml\nyaml.load('')", "S506"),
        ("import tarfile\ntarfile.open('a').extractall()", "S202"),
        ("import urllib.request\nurllib.request.urlopen(input())", "S310"),
        ("import ssl\nssl._create_unverified_context()", "S323"),
    ],
)
def test_the_lint_rules_hold(code: str, rule: str) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "check", "--no-cache", "--stdin-filename", "agents/x.py", "-"]
    result = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT)
    assert rule in result.stdout, result.stderr
