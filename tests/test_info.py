"""``python -m mmfast``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfast import backends, info
from mmfast.__main__ import main
from mmfast.registry import OPS


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mmfast")
    assert "info" in out


def test_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inform"])
    assert stopped.value.code == 2
    assert "invalid choice: 'inform' (choose from" in capsys.readouterr().err


def test_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["platform"]["threads"] == torch.get_num_threads()
    assert facts["ops"].keys() == OPS.keys()
    for name, op in OPS.items():
        chosen, against = backends.automatic(op, "cpu")
        assert facts["ops"][name]["cpu"] == {"runs": chosen, "against": against}
        assert {chosen, *against} >= op.backends.keys()


def test_tables_name_every_op_and_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name, op in OPS.items():
        chosen, against = backends.automatic(op, "cpu")
        row = next(line for line in out.splitlines() if f" {name} " in line and " cpu " in line)
        assert f" {chosen} " in row
        for reasons in against.values():
            assert "; ".join(reasons) in out


def test_tables_fit_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    main(["info"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


@pytest.mark.skipif(bool(backends.extension_missing()), reason="the compiled extension is absent")
def test_extension():
    extension = info.collect()["extension"]
    module = backends.extension()
    assert extension["loaded"] is True
    assert extension["isa"] == module.isa()
    assert extension["supported_isas"] == module.supported_isas()
    assert extension["compiler"].startswith(("gcc", "clang"))
    assert extension["torch_target_version"] == "2.11"


def test_absent_extension_says_why(monkeypatch, capsys):
    monkeypatch.setattr(backends, "extension", lambda: ImportError("cannot open shared object"))
    facts = info.collect()
    reason = "the compiled extension is absent (cannot open shared object)"
    assert facts["extension"] == {"loaded": False, "reason": reason}
    assert facts["ops"]["nearest_code"]["cpu"]["runs"] == "reference"
    assert facts["ops"]["nearest_code"]["cpu"]["against"]["cpp"] == [reason]
    monkeypatch.setenv("COLUMNS", "200")
    info.show(facts)
    assert reason in capsys.readouterr().out


@pytest.mark.skipif(bool(backends.extension_missing()), reason="the compiled extension is absent")
@pytest.mark.parametrize("level", ["baseline", "quick"])
def test_instruction_set_from_the_environment(level):
    ran = subprocess.run(
        [sys.executable, "-m", "mmfast", "info", "--json"],
        env={**os.environ, "MMFAST_ISA": level},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(ran.stdout)
    assert facts["environment"]["MMFAST_ISA"] == level
    if level == "baseline":
        assert facts["extension"]["isa"] == "baseline"
    else:
        assert facts["extension"]["isa"] is None
        assert "got quick" in facts["extension"]["isa_error"]
