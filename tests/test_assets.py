"""Fetching of assets, with packages made here and a download that is played; see `network`."""

import hashlib
import io
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from reward_models import AssetError, assets
from reward_models.assets import Package

MEMBERS = {"thing-1/data/a.txt": b"first " * 1000, "thing-1/b.txt": b"second"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the tests that use the network keep the user's own."""
    if "network" not in request.keywords:
        monkeypatch.setenv("RLHF_GYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_sdist(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return buffer.getvalue()


def make_package(file: str, archive: bytes) -> Package:
    members = {name: sha256(data) for name, data in MEMBERS.items()}
    return Package("thing==1", file, sha256(archive), members)


SDIST = make_sdist({**MEMBERS, "thing-1/setup.py": b"raise SystemExit", "../evil": b"x"})
WHEEL = make_wheel({**MEMBERS, "thing-1/__init__.py": b"", "../evil": b"x"})
PACKAGE = make_package("thing-1.tar.gz", SDIST)


def play_download(monkeypatch: pytest.MonkeyPatch, archive: bytes) -> list[str]:
    """Let "pip" bring this archive; the list that is returned grows with each call."""
    calls: list[str] = []

    def bring(package: Package, folder: Path) -> None:
        calls.append(package.requirement)
        (folder / package.file).write_bytes(archive)

    monkeypatch.setattr(assets, "_pip_download", bring)
    return calls


def assert_nothing_left(cache: Path) -> None:
    assert not cache.exists() or os.listdir(cache) == []


@pytest.mark.parametrize(
    ("file", "archive"), [("thing-1.tar.gz", SDIST), ("thing-1-py3-none-any.whl", WHEEL)]
)
def test_only_the_named_files_are_unpacked(
    file: str, archive: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = play_download(monkeypatch, archive)
    folder = assets._cached_package("thing-1", make_package(file, archive))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "a.txt": MEMBERS["thing-1/data/a.txt"],
        "b.txt": MEMBERS["thing-1/b.txt"],
    }
    assert os.listdir(cache) == ["thing-1"]
    assert not (cache.parent / "evil").exists()
    assert assets._cached_package("thing-1", make_package(file, archive)) == folder
    assert calls == ["thing==1"]


def test_truncated_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_download(monkeypatch, SDIST[:200])
    with pytest.raises(AssetError, match=r"thing-1.tar.gz is not the file that was pinned"):
        assets._cached_package("thing-1", PACKAGE)
    assert_nothing_left(cache)


@pytest.mark.parametrize(
    ("file", "archive"),
    [
        ("thing-1.tar.gz", SDIST[:200]),
        ("thing-1.tar.gz", make_sdist({"other": b""})),
        ("thing-1.tar.gz", b"no archive"),
        ("thing-1-py3-none-any.whl", WHEEL[:200]),
        ("thing-1-py3-none-any.whl", make_wheel({"other": b""})),
    ],
    # Named: an archive holds the time of its making, and workers must collect the same tests.
    ids=["cut sdist", "other sdist", "no sdist", "cut wheel", "other wheel"],
)
def test_archive_that_cannot_be_unpacked(
    file: str, archive: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_download(monkeypatch, archive)
    with pytest.raises(AssetError, match=r"could not unpack thing-1/data/a.txt from thing-1"):
        assets._cached_package("thing-1", make_package(file, archive))
    assert_nothing_left(cache)


def test_member_that_is_not_the_pinned_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = make_sdist({**MEMBERS, "thing-1/b.txt": b"changed"})
    play_download(monkeypatch, changed)
    with pytest.raises(AssetError, match=r"thing-1/b.txt is not the file that was pinned"):
        assets._cached_package("thing-1", make_package("thing-1.tar.gz", changed))
    assert_nothing_left(cache)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interruption_leaves_nothing(
    interrupt: BaseException, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(package: Package, folder: Path) -> None:
        (folder / package.file).write_bytes(SDIST[:200])
        raise interrupt

    monkeypatch.setattr(assets, "_pip_download", half)
    with pytest.raises((KeyboardInterrupt, AssetError)) as caught:
        assets._cached_package("thing-1", PACKAGE)
    if isinstance(interrupt, OSError):
        assert "No space left on device; nothing was left behind" in str(caught.value)
    assert_nothing_left(cache)
    play_download(monkeypatch, SDIST)
    assert assets._cached_package("thing-1", PACKAGE).is_dir()


def test_two_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found the cache empty; the one that comes second takes the first one's folder."""
    barrier = threading.Barrier(2)

    def bring(package: Package, folder: Path) -> None:
        barrier.wait(timeout=10)
        (folder / package.file).write_bytes(SDIST)

    monkeypatch.setattr(assets, "_pip_download", bring)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(assets._cached_package("thing-1", PACKAGE)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "thing-1"] * 2
    assert os.listdir(cache) == ["thing-1"]
    assert sorted(os.listdir(cache / "thing-1")) == ["a.txt", "b.txt"]


def test_file_placed_by_hand_is_used_and_verified(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = play_download(monkeypatch, SDIST)
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "thing-1.tar.gz").write_bytes(b"something else")
    with pytest.raises(AssetError, match="expected sha256"):
        assets._cached_package("thing-1", PACKAGE)
    (cache / "downloads" / "thing-1.tar.gz").write_bytes(SDIST)
    assert assets._cached_package("thing-1", PACKAGE).is_dir()
    assert calls == []


def test_offline_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with an index that nobody serves."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(assets, "_PIP_RETRIES", 0)
    with pytest.raises(
        AssetError, match=r"could not download thing==1: are you offline?"
    ) as caught:
        assets._cached_package("thing-1", PACKAGE)
    assert "\n" not in str(caught.value)
    assert f"put thing-1.tar.gz into {cache / 'downloads'}" in str(caught.value)
    assert_nothing_left(cache)


def test_missing_gguf_reader(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"pip install 'rlhf-gym\[gguf\]'"):
        assets.smollm2()
    assert_nothing_left(cache)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert assets.cache_folder() == cache
    monkeypatch.delenv("RLHF_GYM_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert assets.cache_folder() == Path("/x/rlhf-gym")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == Path.home() / ".cache" / "rlhf-gym"


@pytest.mark.network
def test_real_packages() -> None:
    assert assets.human_ratings_archive().stat().st_size == 2_338_514
    assert assets.sentiment_lexicon().read_text(encoding="utf-8").startswith("$:\t-1.5")
    assert (assets.minilm() / "model.safetensors").stat().st_size == 90_868_376


@pytest.mark.network
@pytest.mark.slow
def test_chinese_reviews() -> None:
    good, bad = assets.chinese_reviews()
    assert len(good.read_text(encoding="utf-8").splitlines()) > 10_000
    assert len(bad.read_text(encoding="utf-8").splitlines()) > 10_000


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_is_what_its_gguf_file_says(tmp_path: Path) -> None:
    """Converted weights give the same logits; head and embedding are still one tensor."""
    import torch as th
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(assets.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    assets._fetch(assets._SMOLLM2, tmp_path)
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file, dtype=th.float32)
    inputs = tokenizer("The movie was", return_tensors="pt")
    with th.no_grad():
        th.testing.assert_close(model(**inputs).logits, quantised(**inputs).logits)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert {parameter.dtype for parameter in model.parameters()} == {th.float32}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat
