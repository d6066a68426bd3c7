"""The whole of rlhf-gym, composed: one stage after another, from texts to a better policy.

    python train.py                      the main job: all stages with their defaults
    python train.py STAGE --help         one stage alone: sft, reward, ppo, evaluate
    python train.py run --config F.yaml  the same with a file of settings
    python train.py check --model M --reward R   in a minute: would a run with these work?
    python train.py tune --run RUN       better settings of PPO; chat RUN: talk with its policy
    python train.py annotate, feedback, compare, loop   with people, or simulated ones: --help
    torchrun --nproc-per-node 2 -- train.py …   the same, PPO on several processes

Every stage reads what the ones before left in the run folder and adds its own part; each input
can be given by hand instead. Nothing heavy is imported before the arguments are parsed.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.settings import (
    PPO,
    SFT,
    Annotate,
    Chat,
    Check,
    Common,
    Compare,
    Evaluate,
    Export,
    Forget,
    Import,
    Loop,
    Reward,
    Run,
    SignIn,
    Tune,
    Worth,
)
from stages.chat import chat
from stages.check import check
from stages.compare import compare
from stages.evaluate import evaluate
from stages.loop import as_plain, loop, loop_begun, refuse_other_settings
from stages.people import (
    annotate,
    export_answers,
    forget,
    import_answers,
    make_account,
    worth,
)
from stages.ppo import ppo
from stages.process import TORCHRUN, on_first_process, process_number, say
from stages.resume import as_begun
from stages.reward import reward
from stages.rewards import by_name
from stages.run_folder import MAKES, folder_of, refuse_to_replace, require_files
from stages.sft import sft
from stages.tune import tune

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def run(common: Common, settings: Run) -> None:
    """Do all stages: warm start, reward model and judge, PPO, evaluation."""
    start = time.time()
    require_files(settings)  # now, not when the stage that reads them begins
    say(f"Run folder: {common.run}")
    on_first_process(sft, common, settings.sft)
    given = settings.ppo.prompts is None or settings.reward.feedback is not None
    if given or "learned" in by_name(settings.ppo.reward):  # not for metrics of a task of one's own
        on_first_process(reward, common, settings.reward)
    ppo(common, settings.ppo)
    on_first_process(evaluate, common, settings.evaluate)
    say(f"The whole run took {time.time() - start:.0f} s.")


STAGES: dict[str, tuple[Callable[..., int | None], type]] = {
    "run": (run, Run),
    "sft": (sft, SFT),
    "reward": (reward, Reward),
    "ppo": (ppo, PPO),
    "evaluate": (evaluate, Evaluate),
    "check": (check, Check),
    "chat": (chat, Chat),
    "annotate": (annotate, Annotate),
    "feedback account": (make_account, SignIn),
    "feedback import": (import_answers, Import),
    "feedback export": (export_answers, Export),
    "feedback forget": (forget, Forget),
    "feedback worth": (worth, Worth),
    "compare": (compare, Compare),
    "loop": (loop, Loop),
    "tune": (tune, Tune),
}


def make_parser() -> "ArgumentParser":
    """Build the command line from the settings: one subcommand per stage."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="train.py", description=(__doc__ or "").split("\n\n")[0])
    subcommands = parser.add_subcommands(required=True, dest="stage")
    nested: dict[str, Any] = {}
    for name, (function, settings) in STAGES.items():
        command = ArgumentParser(description=function.__doc__)
        command.add_argument("--config", action="config", help="A YAML file of settings.")
        command.add_class_arguments(Common)
        command.add_class_arguments(settings, as_positional=True)
        group, _, action = name.rpartition(" ")
        if group and group not in nested:
            outer = ArgumentParser(description="Answers from elsewhere, and what becomes of them.")
            subcommands.add_subcommand(group, outer, help=outer.description)
            nested[group] = outer.add_subcommands(required=True, dest="action")
        nested.get(group, subcommands).add_subcommand(action, command, help=function.__doc__)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do a stage; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "run")
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    began = loop_begun(parsed)
    if began is not None:  # what is not asked for otherwise is as it was
        parsed = parser.parse_args([arguments[0], "--config", str(began), *arguments[1:]])
    name, chosen = parsed.stage, parsed[parsed.stage]
    parts = parser.instantiate(parsed)[name]
    if name == "feedback":
        name, parts = f"{name} {chosen.action}", parts[chosen.action]
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read by GNU's OpenMP when torch is imported: threads wait for the next of many small
        # pieces of work awake, but only for microseconds, as longer would starve their neighbours.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    function, settings_type = STAGES[name]
    common = Common(**{f.name: parts[f.name] for f in fields(Common)})
    settings = settings_type(**{f.name: parts[f.name] for f in fields(settings_type)})
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("reward_models").setLevel(logging.INFO)
    try:
        resumes = isinstance(settings, PPO) and settings.resume is not None
        if resumes:
            common.run = resumed_run(common, settings)
            asked = parser.parse_args(arguments, defaults=False)[name]
            settings = as_begun(common, settings, asked)
        elif isinstance(settings, Run) and settings.ppo.resume is not None:
            raise ValueError("expected resume with the stage ppo, got it with run")
        if process_number() == 0 and name not in ("check", "chat"):
            common.run = run_folder(common, name)
            if not resumes:
                refuse_to_replace(common, name)
        with held(common, name):
            if began is not None:
                refuse_other_settings(began, chosen)
            if name in ("run", "loop"):
                file = "config.yaml" if name == "run" else "config-loop.yaml"
                save_config(common, file, chosen)
            if name in ("run", "ppo"):
                code = function(common, settings)
            else:
                code = on_first_process(function, common, settings)
            if name in MAKES and not resumes:
                save_config(common, f"config-{name}.yaml", chosen)
    except KeyboardInterrupt:
        goes_on = name in ("loop", "tune")
        left = "the same command goes on" if goes_on else "what earlier stages left is in place"
        say(f"train.py: interrupted; {left}")
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if os.environ.get("RLHF_GYM_DEBUG"):
            raise
        message = " ".join(str(error).split())
        which = f" in process {process_number()}" if TORCHRUN in os.environ else ""
        print(f"train.py {name}: error{which}: {message}", file=sys.stderr)
        print("(RLHF_GYM_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    except Exception as error:
        signum = getattr(error, "signum", None)  # StoppedBySignal, which is not imported here
        if signum is None:
            raise
        go_on = f"loop --run {common.run}" if name == "loop" else f"ppo --resume {common.run}"
        say(f"train.py {name}: {error}: python train.py {go_on}")
        return 128 + int(signum)
    return code or 0


def resumed_run(common: Common, settings: PPO) -> Path:
    """Return the run folder to go on with, which `run` may name too."""
    assert settings.resume is not None
    if common.run not in (None, settings.resume):
        raise ValueError(f"expected one run folder, got --run {common.run} and {settings.resume}")
    return settings.resume


@contextmanager
def held(common: Common, name: str) -> Iterator[None]:
    """Hold the run folder for this process, in stages that leave something in it."""
    if process_number() > 0 or name not in (*MAKES, "run", "loop"):
        yield
        return
    from agents.checkpoint_store import one_process

    with one_process(folder_of(common)):
        yield


def run_folder(common: Common, name: str) -> Path:
    """Return the run folder, made if it is not there; a single stage has to be told which."""
    if common.run is None and name != "run":
        raise ValueError(f"expected --run FOLDER, the run that {name} belongs to, got none")
    folder = common.run or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    if name != "annotate":  # which makes it when there is something to ask about
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_config(common: Common, name: str, chosen: "Namespace") -> None:
    """Write what was asked for beside the results, in the form that --config reads."""
    import yaml

    from reward_models.atomic import atomic_file

    if process_number() > 0:
        return
    with atomic_file(folder_of(common) / name) as aside:
        aside.write_text(yaml.safe_dump(as_plain(chosen), sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    code = main()
    if TORCHRUN in os.environ:
        from agents import ranks

        ranks.leave(code)
    sys.exit(code)
