"""Every preset is one that its stage takes."""

from pathlib import Path

import pytest

import train

PRESETS = sorted((Path(train.__file__).parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_command_in_a_presets_head_is_understood(preset, capsys) -> None:
    head = preset.read_text(encoding="utf-8")
    commands = [line for line in head.splitlines() if line.startswith("#") and "train.py" in line]
    assert commands, "expected a line that says how it is used"
    for command in commands:
        arguments = command.split("train.py", 1)[1].split()
        parser = train.make_parser()
        parser.parse_args(arguments if arguments[0] != "--config" else ["run", *arguments])
