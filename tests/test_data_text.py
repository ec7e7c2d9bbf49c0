"""Tokenizers learned and loaded, and texts as ids and back."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.data import FileError, TextReader, load_tokenizer, reader_from, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["a red ball", "A blue ball, rolling", "größer als 漢字"] * 5
BPE = TextReader(train_tokenizer(TEXTS, 300))
WORD = TextReader(train_tokenizer(TEXTS, kind="word"), length=6)


@given(st.text(min_size=1))
def test_bytes_there_and_back(text):
    """Byte pair encoding says any text, also one it has not learned from."""
    ids = BPE.prepare(text)
    assert ids.dtype == torch.int64
    assert BPE.decode(ids) == text


def test_merges():
    """What is frequent takes fewer tokens; learning again gives the same tokenizer."""
    assert len(BPE.prepare("ball")) < len(BPE.prepare("llab"))
    assert BPE.vocab_size <= 300
    assert train_tokenizer(TEXTS, 300) == BPE.tokenizer


def test_words(tmp_path):
    ids = WORD.prepare("A red rolling thing")
    assert ids.tolist()[3] == 1  # unknown
    assert WORD.decode(ids) == "a red rolling"
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGRÖSSER als, Ball".encode())
    assert WORD.load(path).shape == (4,)
    made = WORD.read(path)
    assert made.shape == WORD.shape == (6,)
    assert made[4:].tolist() == [WORD.padding] * 2 == [0, 0]
    assert len(WORD.prepare("ball " * 20)) == 6
    WORD.write(made, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == "als , ball"


def test_other_tokenizers(tmp_path):
    """A file of another program, with a padding of its own."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 3, "x": 0, "<u>": 1}, "<u>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_padding(pad_id=3, pad_token="<pad>", length=9)
    made.enable_truncation(1)
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"no pad_token '\[PAD\]'"):
        TextReader(loaded)
    reader = TextReader(loaded, length=4, pad_token="<pad>")
    assert reader.filled(reader.prepare("x y")).tolist() == [0, 1, 3, 3]
    (tmp_path / "other.json").write_text('{"no": "tokenizer"}')
    for name, message in (("other.json", "is no tokenizer"), ("none.json", "no such file")):
        with pytest.raises(FileError, match=message):
            load_tokenizer(tmp_path / name)


def test_description():
    described = json.loads(json.dumps(WORD.describe()))
    assert reader_from(described) == WORD
    assert torch.equal(reader_from(described).prepare("blue ball"), WORD.prepare("blue ball"))
    assert (
        pickle.loads(pickle.dumps(WORD)).prepare("ball").tolist() == WORD.prepare("ball").tolist()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextReader("no JSON"), "tokenizer must be the JSON of one"),
        (lambda: TextReader(WORD.tokenizer, length=0), "length must be at least 1, got 0"),
        (lambda: WORD.prepare("  "), "has no tokens"),
        (lambda: train_tokenizer(TEXTS, kind="letters"), "kind must be one of bpe, word"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_other_encodings(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("größer".encode(encoding))
    with pytest.raises(FileError, match=r"a\.txt: is no text"):
        BPE.verify(tmp_path / "a.txt")
