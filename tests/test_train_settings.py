"""Typed settings from mappings, files and flags."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.train.settings import DiTRun, VQVAERun
from mmfast.train.typed import SettingError, add_flags, build, given_flags, read_settings, setting

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = setting((1, 2), "of 100 % of the layers")
    kind: Literal["a", "b"] = setting("a", "which")
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    rate: float = setting(0.5, "how fast")
    fast: bool = setting(False, "or not")
    name: str | None = setting(None, "of it")
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0, got {self.rate}")


def test_build():
    values = {"rate": 2, "name": "x", "inner": {"widths": [3], "extra": {"deep": [1]}}}
    made = build(Outer, values)
    assert made == Outer(2.0, False, "x", Inner((3,), "a", {"deep": [1]}))
    assert type(made.rate) is float
    assert build(Outer, {"name": None}) == Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rat": 1}, "settings: unknown setting 'rat'; did you mean 'rate'?"),
        ({"zzz": 1}, "settings: unknown setting 'zzz'; known are fast, inner, name, rate"),
        ({"inner": {"witdhs": [1]}}, "settings: inner: unknown setting 'witdhs'; did you mean"),
        ({"rate": "1"}, "settings: rate must be of type float, got '1'"),
        ({"rate": True}, "rate must be of type float, got True"),
        ({"rate": -1}, "settings: rate must be at least 0, got -1.0"),
        ({"fast": 1}, "fast must be of type bool, got 1"),
        ({"name": 1}, "name must be of type str, got 1"),
        ({"inner": 1}, "inner must be named settings, got 1"),
        ({"inner": {"kind": "c"}}, "kind must be one of a, b, got 'c'"),
        ({"inner": {"widths": 1}}, "widths must be a list, got 1"),
        ({"inner": {"widths": [1, "2"]}}, "widths must be of type int, got '2'"),
        ({"inner": {"extra": []}}, "extra must be of type dict"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(SettingError) as error:
        build(Outer, values)
    assert message in str(error.value)


@given(
    st.builds(
        Outer,
        rate=st.floats(0, 10),
        fast=st.booleans(),
        name=st.none() | st.text(),
        inner=st.builds(
            Inner,
            widths=st.lists(st.integers()).map(tuple),
            kind=st.sampled_from(["a", "b"]),
            extra=st.dictionaries(st.text(), st.integers()),
        ),
    )
)
def test_json_and_back(made):
    import dataclasses

    assert build(Outer, json.loads(json.dumps(dataclasses.asdict(made)))) == made


def parsed(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    for cls in (Outer, Inner):
        add_flags(parser, cls)
    namespace = parser.parse_args(words)
    return {**given_flags(namespace, Outer), **given_flags(namespace, Inner)}


def test_flags(capsys):
    assert parsed() == {}
    got = parsed("--rate", "3", "--fast", "--widths", "4", "5", "--kind", "b", "--name", "n")
    assert got == {"rate": 3.0, "fast": True, "name": "n", "widths": [4, 5], "kind": "b"}
    assert parsed("--no-fast") == {"fast": False}
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "how fast (0.5)" in text
    assert "of 100 % of the layers (1 2)" in text
    assert "--extra" not in text


def test_files(tmp_path):
    (tmp_path / "a.toml").write_text("rate = 1\n[inner]\nwidths = [7]\n")
    (tmp_path / "a.json").write_text('{"rate": 1, "inner": {"widths": [7]}}')
    for name in ("a.toml", "a.json"):
        assert build(Outer, read_settings(tmp_path / name)) == Outer(1.0, inner=Inner((7,)))
    (tmp_path / "b.toml").write_text("rate = = 1")
    (tmp_path / "b.json").write_text("[1]")
    for name, message in (
        ("b.toml", "not read as TOML: "),
        ("b.json", "must hold named settings, got a list"),
        ("c.json", "No such file"),
        ("c.yaml", r"settings are read from \.json and \.toml files"),
    ):
        with pytest.raises(SettingError, match=message):
            read_settings(tmp_path / name)


@pytest.mark.parametrize("cls", [VQVAERun, DiTRun])
def test_flags_of_a_run_have_one_meaning(cls):
    """No name occurs in two sections: a flag says whose it is."""
    import typing

    names = [
        name
        for section in typing.get_type_hints(cls).values()
        for name in typing.get_type_hints(section)
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("quantizer", ["VectorQuantize", "ResidualVQ", "FSQ", "LFQ", "SimVQ"])
def test_quantisers(quantizer):
    """The settings describe quantisers that exist."""
    import torch

    from mmfast.models import VQVAE

    config = build(
        VQVAERun, {"model": {"quantizer": quantizer, "codebook_size": 16, "levels": [3]}}
    )
    model = VQVAE(config.model.described(), 32, widths=(4, 8), num_blocks=1)
    model.train()(torch.rand(4, 3, 8, 8)).loss.backward()
