"""What holds for every command of ``mmfast``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("too_much", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)])
def test_too_little_memory(capsys, monkeypatch, too_much):
    monkeypatch.setattr("mmfast.commands.info.run", lambda given: too_much())
    assert main(["info"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmfast info: out of memory; take fewer samples at a time")
    assert error.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch):
    def wrong(given):
        raise RuntimeError("a defect")

    monkeypatch.setattr("mmfast.commands.info.run", wrong)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["info"])


def test_as_a_module():
    """One line on standard error and status 1, without a traceback."""
    words = "-m", "mmfast", "evaluate", "absent.safetensors"
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mmfast evaluate: absent.safetensors: no such file\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["sampel", "m"], "sampel: did you mean sample?"),
        (["sample", "m", "--uot", "a.png"], "--uot: did you mean --out?"),
        (["sample", "m", "--guidence=2"], "--guidence: did you mean --guidance?"),
        (["train", "vqave", "--out", "a"], "vqave: did you mean vqvae?"),
        (["train", "vqvae", "--ouput", "a"], "required: --out; --ouput: did you mean --out?"),
        (["train", "dit", "--out", "a", "--batchsize", "2"], "did you mean --batch-size?"),
        (["train", "dit", "--out", "a", "--precision", "bfloat61"], "did you mean bfloat16?"),
    ],
)
def test_typing_errors(words, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert meant in capsys.readouterr().err


UNWRITABLE = Path("/proc/nowhere")


@pytest.mark.skipif(not UNWRITABLE.parent.is_dir(), reason="needs a folder that cannot be written")
@pytest.mark.parametrize(
    "words",
    [
        "train vqvae --data absent --out {}",
        "sample absent --out {}.png",
        "sample absent --each {}",
        "compress absent absent {}.mmv",
        "decompress absent absent {}.png",
        "reconstruct absent absent --out {}",
        "evaluate absent --classifier train --keep {}.safetensors",
    ],
)
def test_places_that_cannot_be_written(words, capsys):
    """They are refused first, before anything is read."""
    assert main(words.format(UNWRITABLE).split()) == 1
    assert "nothing can be written to /proc" in capsys.readouterr().err
