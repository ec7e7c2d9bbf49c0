"""Datasets from folders and manifests: what belongs together, is missing, broken, or random."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from mmfast.data import (
    Dataset,
    Draw,
    FileError,
    ImageReader,
    Loader,
    TextReader,
    progress,
    readers_from,
    train_tokenizer,
)
from mmfast.data.dataset import _sorted

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tokenizers")

WORDS = ("zero", "one", "two", "three")
READERS = {
    "image": ImageReader(4),
    "text": TextReader(train_tokenizer(WORDS, kind="word"), length=3),
}


def picture(path, value=0, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def text(path, words):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)


def value(sample):
    """The grey value of a flat picture."""
    return round(float((sample["image"].mean() + 1) * 127.5))


def pairs(root, count=4):
    """Flat: pictures and words of one stem."""
    for i in range(count):
        picture(root / f"{i:04}.png", 10 * i)
        text(root / f"{i:04}.txt", " ".join(["two"] * i + [WORDS[i]]))


def test_flat_folder(tmp_path):
    pairs(tmp_path)
    text(tmp_path / ".hidden.txt", "one")
    text(tmp_path / "notes.md", "what this is")
    data = Dataset.from_folder(tmp_path, READERS)
    assert [record.name for record in data.records] == ["0000", "0001", "0002", "0003"]
    sample = data[2]
    assert sample.keys() == {"image", "text", "text_length"}
    assert value(sample) == 20
    assert sample["text"].dtype == torch.int64
    assert READERS["text"].decode(sample["text"]) == "two two two"
    assert data[0]["text"].tolist()[1:] == [0, 0]
    assert (data[0]["text_length"], sample["text_length"]) == (1, 3)
    assert (data.report.ignored, data.report.refused) == ([str(tmp_path / "notes.md")], [])
    batch = data.collate([data[0], data[2]])
    assert batch["image"].shape == (2, 3, 4, 4)
    assert batch["text_length"].tolist() == [1, 3]
    with pytest.raises(IndexError):
        data[4]


def test_classes(tmp_path):
    for name, count in (("cat", 2), ("dog", 3), ("Ant", 1)):
        for i in range(count):
            picture(tmp_path / name / "deeper" / f"{i}.png", i)
    readers = {"image": READERS["image"]}
    data = Dataset.from_folder(tmp_path, readers)
    assert data.classes == ["Ant", "cat", "dog"]
    assert data.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert [int(data[i]["label"]) for i in range(6)] == data.labels.tolist()
    assert "label" not in Dataset.from_folder(tmp_path, readers, labels=False)[0]
    some = Dataset.from_folder(tmp_path, readers, classes=["dog", "cat"], on_error="skip")
    assert some.labels.tolist() == [-1, 1, 1, 0, 0, 0]
    assert "label 'Ant' is none of dog, cat" in str(some.report)
    picture(tmp_path / "outside.png")
    assert Dataset.from_folder(tmp_path, readers).classes == []
    required = Dataset.from_folder(tmp_path, readers, labels=True, require=["label"])
    assert len(required) == 6
    assert required.report.left_out == ["outside"]


def test_numbers_are_labels(tmp_path):
    for digit in ("0", "3", "10"):
        picture(tmp_path / digit / "a.png")
    data = Dataset.from_folder(tmp_path, {"image": READERS["image"]})
    assert len(data.classes) == 11
    assert sorted(data.labels.tolist()) == [0, 3, 10]


def test_large_numbers_are_names():
    """Such as dates, which would make millions of classes."""
    assert _sorted(["20240131", "9", "100"]) == ["9", "100", "20240131"]
    assert len(_sorted(["0", "999"])) == 1000


def test_missing(tmp_path):
    pairs(tmp_path)
    (tmp_path / "0001.txt").unlink()
    (tmp_path / "0003.png").unlink()
    data = Dataset.from_folder(tmp_path, READERS)
    batch = data.collate([data[i] for i in range(4)])
    assert batch["image_present"].tolist() == [True, True, True, False]
    assert batch["text_present"].tolist() == [True, False, True, True]
    assert batch["text_length"].tolist() == [1, 0, 3, 3]
    assert not batch["image"][3].any()
    assert not batch["text"][1].any()
    assert str(data.report) == "4 samples\n1 without image\n1 without text"
    both = Dataset.from_folder(tmp_path, READERS, require=("image", "text"))
    assert [record.name for record in both.records] == ["0000", "0002"]
    assert both.report.left_out == ["0001", "0003"]
    assert both[0].keys() == {"image", "text", "text_length"}


def breakages(root):
    """Four whole pairs, then broken ones; returns reasons by name."""
    pairs(root)
    whole = (root / "0001.png").read_bytes()
    broken = {
        "0010.png": (b"", "is empty"),
        "0011.png": (whole[:-24], "is a damaged picture"),
        "0012.jpg": (whole, "is named as JPEG, but holds PNG"),
        "0013.png": (b"just text", "is no picture"),
        "0014.txt": ("größer".encode("latin-1"), "is no text in UTF-8: byte 0xf6 at 2"),
        "0015.txt": (b"", "is empty"),
        "0016.txt": (b" \n", "is empty"),
        "0017.txt": (b"a\0b", "is no text: a zero byte at 1"),
    }
    for name, (data, _) in broken.items():
        (root / name).write_bytes(data)
    text(root / "0010.txt", "one")  # is left of its sample
    picture(root / "0000.webp", 99)
    broken["0000.webp"] = b"", "is a second image of sample 0000, beside 0000.png"
    return {name: reason for name, (_, reason) in broken.items()}


def test_broken_files_are_skipped_by_name(tmp_path, capsys):
    reasons = breakages(tmp_path)
    data = Dataset.from_folder(tmp_path, READERS, on_error="skip")
    assert [record.name for record in data.records] == ["0000", "0001", "0002", "0003", "0010"]
    refused = {error.path: error.reason for error in data.report.refused}
    assert refused.keys() == {str(tmp_path / name) for name in reasons}
    for name, reason in reasons.items():
        assert reason in refused[str(tmp_path / name)]
    printed = capsys.readouterr().err
    assert printed.startswith("5 samples\n1 without image\n9 files refused:\n")
    assert all(str(tmp_path / name) in printed for name in reasons)
    assert "7 samples left out:\n  0011\n" in printed
    assert data[4]["image_present"].tolist() is False
    assert value(data[0]) == 0


def test_broken_files_are_refused(tmp_path):
    reasons = breakages(tmp_path)
    while reasons:
        with pytest.raises(FileError) as caught:
            Dataset.from_folder(tmp_path, READERS)
        (name,) = (name for name in reasons if str(tmp_path / name) == caught.value.path)
        assert reasons.pop(name) in str(caught.value)
        (tmp_path / name).unlink()
    assert len(Dataset.from_folder(tmp_path, READERS)) == 5


def test_unverified(tmp_path):
    """What is broken shows when it is read: an error, or a warning and a missing modality."""
    pairs(tmp_path)
    (tmp_path / "0002.png").write_bytes(b"")
    strict = Dataset.from_folder(tmp_path, READERS, verify=False)
    assert strict[1]["image_present"]
    with pytest.raises(FileError, match=r"0002.png: is empty"):
        strict[2]
    lenient = Dataset.from_folder(tmp_path, READERS, verify=False, on_error="skip")
    with pytest.warns(UserWarning, match=r"skipped .*0002.png: is empty"):
        batch = lenient.collate([lenient[i] for i in range(4)])
    assert batch["image_present"].tolist() == [True, True, False, True]
    # Files that broke since they were checked are an error, as samples do not say what is there.
    checked = Dataset.from_folder(tmp_path, READERS, on_error="skip", require=("image",))
    (tmp_path / "0001.png").unlink()
    with pytest.raises(FileError, match=r"0001.png: no such file"):
        checked[1]


def test_nothing(tmp_path):
    with pytest.raises(
        ValueError, match=f"no samples: there are no files for {', '.join(READERS)}"
    ):
        Dataset.from_folder(tmp_path, READERS)
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ValueError, match=r"no samples: 0 samples\n1 files ignored, .*\n.*notes.md"):
        Dataset.from_folder(tmp_path, READERS)
    with pytest.raises(FileError, match="no such folder"):
        Dataset.from_folder(tmp_path / "none", READERS)
    with pytest.raises(ValueError, match="at least one reader"):
        Dataset.from_folder(tmp_path, {})
    with pytest.raises(ValueError, match="require must be one of image, text, label, got 'sound'"):
        Dataset.from_folder(tmp_path, READERS, require=["sound"])
    with pytest.raises(ValueError, match="on_error must be one of raise, skip"):
        Dataset.from_folder(tmp_path, READERS, on_error="ignore")


ROWS = [
    {"name": "a", "image": "pictures/0.png", "text": 'zero one\n"two", three', "label": "x"},
    {"name": "b", "image": "", "text": "one", "label": "y"},
    {"name": "c", "image": "pictures/2.png", "text": "", "label": ""},
]


def manifest(path, rows=ROWS):
    for i in range(3):
        picture(path.parent / "pictures" / f"{i}.png", 10 * i)
    if path.suffix == ".csv":
        quoted = ['"{}"'.format(v.replace('"', '""')) for row in rows for v in row.values()]
        lines = [",".join(quoted[i : i + 4]) for i in range(0, len(quoted), 4)]
        path.write_text("\n".join(["name,image,text,label", *lines]) + "\n")
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ["all.csv", "all.jsonl"])
def test_manifest(tmp_path, name):
    data = Dataset.from_manifest(manifest(tmp_path / name), READERS)
    assert [record.name for record in data.records] == ["a", "b", "c"]
    assert data.classes == ["x", "y"]
    batch = data.collate([data[i] for i in range(3)])
    assert batch["image_present"].tolist() == [True, False, True]
    assert batch["text_present"].tolist() == [True, True, False]
    assert batch["label"].tolist() == [0, 1, -1]
    assert value(data[2]) == 20
    assert READERS["text"].decode(batch["text"][0]) == "zero one"


def test_manifest_of_text_files_and_numbers(tmp_path):
    text(tmp_path / "words" / "a.txt", "three")
    (tmp_path / "m.jsonl").write_text('{"text_file": "words/a.txt", "label": 2}\n')
    data = Dataset.from_manifest(tmp_path / "m.jsonl", {"text": READERS["text"]})
    assert READERS["text"].decode(data[0]["text"]) == "three"
    assert (len(data.classes), int(data[0]["label"])) == (3, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: is empty"),
        ("a.csv", "image,text\nx.png\n", "line 2: has not as many columns as the header"),
        ("a.csv", "image,text\nx.png,a,b\n", "line 2: has not as many columns as the header"),
        ("a.csv", 'image,text\nx.png,"a', "line 1: unexpected end of data"),
        ("a.csv", "picture,text\nx.png,a\n", "has no column image, only picture, text"),
        ("a.jsonl", '{"image": "x.png"}\n{"image": ', "line 2: no JSON"),
        ("a.jsonl", '["x.png"]', "line 1: must be an object, is list"),
        ("a.jsonl", '{"image": ["x.png"]}', "line 1: image must be text or a number, is list"),
        ("a.yaml", "image: x.png", "the name must end in .csv or .jsonl"),
        ("a.csv", "image,text\nx.png,a\n", "x.png: no such file"),
        ("a.jsonl", '{"image": "pictures/1.png", "text": " "}', r"1 \(text\): has no tokens"),
    ],
)
def test_broken_manifests(tmp_path, name, content, message):
    picture(tmp_path / "pictures" / "1.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=message):
        Dataset.from_manifest(tmp_path / name, READERS)


def test_augmentation(tmp_path):
    """Depends on seed, epoch and sample, not on workers, order or subsets."""
    ramp = np.arange(40, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    for name in "abcdef":
        Image.fromarray(ramp).save(tmp_path / f"{name}.png")
    readers = {"image": ImageReader(4, random_crop=True)}

    def values(data, **options):
        loader = Loader(data, 2, shuffle=False, **options)
        return [value({"image": image}) for _ in range(2) for b in loader for image in b["image"]]

    data = Dataset.from_folder(tmp_path, readers, augment=True, seed=5)
    want = values(data)
    assert len(set(want)) > 6  # of 12: two epochs
    assert values(data, workers=2) == want
    other = Dataset.from_folder(tmp_path, readers, augment=True, seed=6)
    assert values(other) != want
    part = data.subset([4, 1])
    assert len(part) == 2
    assert [value(part[Draw(i, 1)]) for i in range(2)] == [want[6 + 4], want[6 + 1]]
    plain = Dataset.from_folder(tmp_path, readers)
    assert len(set(values(plain))) == 1
    memory = data.in_memory()
    assert [value(memory[i]) for i in range(6)] == want[:6]


def test_description(tmp_path):
    pairs(tmp_path / "c")
    data = Dataset.from_folder(tmp_path, READERS)
    described = json.loads(json.dumps(data.describe()))
    assert described["classes"] == ["c"]
    assert readers_from(described) == READERS
    assert readers_from(READERS["image"].describe()) == {"image": READERS["image"]}
    again = Dataset.from_folder(tmp_path, readers_from(described), classes=described["classes"])
    for name, tensor in data[3].items():
        assert torch.equal(again[3][name], tensor)
    with pytest.raises(ValueError, match="must have modality or modalities, got size"):
        readers_from({"size": 3})


@pytest.mark.parametrize("patience", [0, 60])
def test_progress(monkeypatch, capsys, patience):
    """A bar on a terminal, if it takes long."""
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.tracked(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert ("counting" in capsys.readouterr().err) == (patience == 0)


def test_packages_that_are_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'mmfast\[train\]' brings it"):
        ImageReader(4).prepare(np.zeros((4, 4, 3), np.uint8))
