"""What holds for every command of ``mmfast``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmfast.__main__ import main
from mmfast.commands import COMMANDS

DOCS = Path(__file__).parent.parent / "docs" / "commands.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_place_in_the_docs(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[name].split()[0] in capsys.readouterr().out
    assert f"## mmfast {name}" in DOCS.read_text()


def test_without_safetensors(tmp_path, capsys, monkeypatch):
    """One line says what brings it."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    model = tmp_path / "m.safetensors"
    model.touch()
    assert main(["evaluate", str(model)]) == 1
    assert "pip install 'mmfast[train]' brings it" in capsys.readouterr().err


def test_ctrl_c(capsys, monkeypatch):
    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmfast.commands.info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "")


def test_as_a_module():
    """One line on standard error and status 1, without a traceback."""
    words = "-m", "mmfast", "evaluate", "absent.safetensors"
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mmfast evaluate: absent.safetensors: no such file\n"
