"""This process: its seed, threads and memory, where it computes, and which of several it is."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from configs.settings import Common

if TYPE_CHECKING:
    import torch as th


def set_up(common: Common) -> None:
    """Seed everything, and set threads, before a stage computes."""
    import torch as th
    import transformers
    from stable_baselines3.common.utils import set_random_seed

    give_back_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if common.threads is not None:
        th.set_num_threads(common.threads)
    set_random_seed(common.seed)


def give_back_memory() -> None:
    """Free what is used no more: models hang in cycles, and glibc keeps what they leave."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_memory() -> int:
    """Return the process's peak resident memory, bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_of(common: Common) -> "th.device":
    """Return the torch device."""
    from stable_baselines3.common.utils import get_device

    return get_device(common.device)


def dtype_of(common: Common) -> str:
    """Return the dtype to compute the LM in: bfloat16 where the hardware has it."""
    import torch as th

    if common.dtype != "auto":
        return common.dtype
    device = device_of(common)
    if device.type == "cuda":
        native = th.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = th.cpu.get_capabilities() if device.type == "cpu" else {}
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bfloat16" if native else "float32"


def say(text: str) -> None:
    """Print a line at once; the first process speaks for all."""
    if process_number() == 0:
        print(text, flush=True)


TORCHRUN = "TORCHELASTIC_RUN_ID"
"""The variable by which torchrun makes itself known."""


def process_number() -> int:
    """Return which of the processes that torchrun started this is; 0 without it."""
    return int(os.environ["RANK"]) if {"RANK", TORCHRUN} <= os.environ.keys() else 0


def on_first_process(function: Callable[..., int | None], *arguments: Any) -> int | None:
    """Do a stage on the first process alone, which must not look for the others meanwhile."""
    if process_number() > 0:
        return None
    if TORCHRUN not in os.environ:
        return function(*arguments)
    import torch as th

    threads = th.get_num_threads()
    th.set_num_threads(os.cpu_count() or threads)  # torchrun gives one; the others only wait now
    names = [TORCHRUN, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    names += ["MASTER_ADDR", "MASTER_PORT"]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return function(*arguments)
    finally:
        os.environ.update(hidden)
        th.set_num_threads(threads)


def look_here_for_modules() -> None:
    """Let functions named as module:name be of modules in the folder that one is in."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def progress(total: int | None, what: str) -> Any:
    """Return a progress bar; without a total, a counter."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, leave=False)
