"""``mmfast sample``: pictures from a DiT's file alone, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from command_models import (
    SIZE,
    D,
    data_of,
    dit,
    names,
    picture,
    read,
    refused,
    run,
    save_dit,
    save_vqvae,
    vqvae,
)

from mmfast.data import WaveformReader, to_uint8
from mmfast.models import Diffusion, save_model
from mmfast.train import about_data


def drawn(capsys, file, out, *words):
    """The picture that the command writes."""
    status, printed, _ = run(capsys, "sample", file, "--out", out, "--steps", 3, *words)
    assert status == 0
    assert str(out) in printed
    return read(out)


@pytest.mark.parametrize("latent", [False, True])
def test_a_row_for_each_class(tmp_path, capsys, latent):
    file, folder = save_dit(tmp_path / "m.safetensors", latent=latent), tmp_path / "each"
    shown = drawn(capsys, file, tmp_path / "a.png", "--count", 2, "--each", folder)
    assert shown.shape == (3 * SIZE + 4, 2 * SIZE + 2, 3)
    assert names(folder) == [f"kind{c}-{i}.png" for c in range(3) for i in range(2)]
    one = read(folder / "kind1-1.png")
    np.testing.assert_array_equal(shown[10:18, 10:18], one)
    some = drawn(capsys, file, tmp_path / "b.png", "--count", 2, "--classes", "kind2,0")
    np.testing.assert_array_equal(some[:8], shown[20:])
    np.testing.assert_array_equal(some[10:], shown[:8])


def test_the_samples_are_the_models(tmp_path, capsys):
    """They are those that the library draws with the seeds that the documents name."""
    file = save_dit(tmp_path / "m.safetensors", latent=True)
    words = "--classes", "1", "--count", 2, "--seed", 5, "--sampler", "flow_heun", "--guidance", 3
    shown = drawn(capsys, file, tmp_path / "a.png", *words)
    seeds = torch.tensor([(5 << 32) + (1 << 16) + i for i in range(2)])
    latents = Diffusion("flow").sample(
        dit(D, SIZE // 2),
        (2, D, SIZE // 2, SIZE // 2),
        classes=torch.ones(2, dtype=torch.int64),
        guidance=3.0,
        sampler="flow_heun",
        steps=3,
        seed=seeds,
        progress=False,
    )
    model = vqvae()
    with torch.no_grad():
        images = to_uint8(model.decoder(model.quantize(latents)[0])).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(shown[:, :8], images[0])
    np.testing.assert_array_equal(shown[:, 10:], images[1])


@pytest.mark.parametrize("words", [(), ("--sampler", "ddim"), ("--sampler", "euler_ancestral")])
def test_seeds(tmp_path, capsys, words):
    """A sample does not depend on how many are drawn at a time, or beside it."""
    file = save_dit(tmp_path / "m.safetensors", schedule="linear")
    whole = drawn(capsys, file, tmp_path / "a.png", "--count", 3, *words)
    pieces = drawn(capsys, file, tmp_path / "b.png", "--count", 3, "--batch", 2, *words)
    assert np.abs(whole.astype(int) - pieces).max() <= 1
    fewer = drawn(capsys, file, tmp_path / "c.png", "--count", 2, *words)
    assert np.abs(whole[:, :18].astype(int) - fewer).max() <= 1
    other = drawn(capsys, file, tmp_path / "d.png", "--count", 3, "--seed", 1, *words)
    assert np.abs(whole.astype(int) - other).max() > 5


def test_guidance(tmp_path, capsys):
    file = save_dit(tmp_path / "m.safetensors")
    default, two, none = (
        drawn(capsys, file, tmp_path / "a.png", "--count", 1, *words)
        for words in ((), ("--guidance", 2), ("--guidance", 1))
    )
    np.testing.assert_array_equal(default, two)
    assert (default != none).any()
    without = save_dit(tmp_path / "n.safetensors", dropout=0.0)
    drawn(capsys, without, tmp_path / "a.png", "--count", 1)
    words = "sample", without, "--out", tmp_path / "b.png", "--guidance", 2
    assert "needs a model that was trained with dropped labels" in refused(capsys, *words)


def test_what_is_refused(tmp_path, capsys):
    file, out = save_dit(tmp_path / "m.safetensors"), tmp_path / "a.png"
    words = "sample", file, "--out", out

    assert "no class 'cat', there are kind0, kind1, kind2" in refused(
        capsys, *words, "--classes", "0,cat"
    )
    assert "no class '3'" in refused(capsys, *words, "--classes", "3")
    assert "alpha + sigma = 1" in refused(
        capsys,
        "sample",
        save_dit(tmp_path / "l.safetensors", schedule="linear"),
        *words[2:],
        "--sampler",
        "flow_euler",
    )
    other = save_vqvae(tmp_path / "v.safetensors")
    assert "holds a VQVAE, expected a DiT" in refused(capsys, "sample", other, *words[2:])
    save_model(dit(), tmp_path / "bare.safetensors")
    said = refused(capsys, "sample", tmp_path / "bare.safetensors", *words[2:])
    assert "does not say what the model has learned" in said
    save_model(dit(), tmp_path / "new.safetensors", objective={"schedule": "new"})
    said = refused(capsys, "sample", tmp_path / "new.safetensors", *words[2:])
    assert "an objective of another version" in said
    lost = {"part": "vqvae", "shape": [D, 4, 4]}
    objective = Diffusion("flow").config
    save_model(dit(), tmp_path / "lost.safetensors", objective=objective, latents=lost)
    said = refused(capsys, "sample", tmp_path / "lost.safetensors", *words[2:])
    assert "its VQVAE, part 'vqvae'" in said
    assert "no safetensors" in refused(capsys, "sample", picture(tmp_path / "p.png"), *words[2:])
    assert "there is no folder" in refused(
        capsys, "sample", file, "--out", tmp_path / "absent" / "a.png"
    )
    assert "picture format" in refused(
        capsys, "sample", file, "--out", tmp_path / "a.xyz", "--steps", 1, "--count", 1
    )
    assert not out.exists()


@pytest.mark.parametrize(
    "words", [("--steps", "0"), ("--count", "x"), ("--seed", "-1"), ("--sampler", "new")]
)
def test_wrong_command_lines(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run(capsys, "sample", tmp_path, "--out", tmp_path / "a.png", *words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["-1", "-0.5", "nan", "inf"])
def test_guidance_without_a_meaning(tmp_path, capsys, scale):
    file = save_dit(tmp_path / "m.safetensors")
    for words in (("sample", file, "--out", tmp_path / "a.png"), ("evaluate", file)):
        said = refused(capsys, *words, f"--guidance={scale}")
        assert "--guidance must be a finite number from 0 (0: without the condition" in said
    assert not (tmp_path / "a.png").exists()


def test_guidance_0_is_of_no_class(tmp_path, capsys):
    file = save_dit(tmp_path / "m.safetensors")
    shown = drawn(capsys, file, tmp_path / "a.png", "--count", 1, "--guidance", 0)
    seeds = torch.arange(3) << 16
    null = torch.full((3,), 3)
    x = Diffusion("flow").sample(dit(), (3, 3, SIZE, SIZE), classes=null, steps=3, seed=seeds)
    for i, made in enumerate(to_uint8(x)):
        got = shown[i * (SIZE + 2) : i * (SIZE + 2) + SIZE].astype(int)
        assert np.abs(got - made.permute(1, 2, 0).numpy().astype(int)).max() <= 1


def test_classes_by_name(tmp_path, capsys):
    """Names may have commas; a class that is named twice would be written once."""
    classes = ["a, b", "c", "d"]
    file, data = tmp_path / "m.safetensors", {**data_of(vqvae()), "classes": classes}
    save_model(dit(), file, data=data, objective=Diffusion("flow").config, latents=None)
    words = "--steps", 1, "--count", 1, "--each", tmp_path / "each"
    assert run(capsys, "sample", file, "--classes", "a, b", *words)[0] == 0
    assert names(tmp_path / "each") == ["a, b-0.png"]
    for twice in ("c,c", "c, 1"):
        said = refused(capsys, "sample", file, "--classes", twice, *words)
        assert f"{twice[-1]!r} is named twice" in said


def test_a_picture_of_a_model_that_says_nothing_of_its_data(tmp_path, capsys):
    file, out = tmp_path / "m.safetensors", tmp_path / "a.png"
    save_model(dit(), file, objective=Diffusion("flow").config, latents=None)
    assert run(capsys, "sample", file, "--out", out, "--steps", 1, "--count", 1)[0] == 0
    assert out.exists()
    assert "its data" in refused(capsys, "sample", file, "--each", tmp_path, "--steps", 1)


def test_one_sound(tmp_path, capsys):
    """It is written as such by a DiT, too; several are not."""
    soundfile = pytest.importorskip("soundfile")
    file, out = tmp_path / "m.safetensors", tmp_path / "a.wav"
    reader = WaveformReader(8000, length=64)
    data = about_data("nowhere", (1, 64), reader, ["kind0", "kind1", "kind2"])
    model = dit(1, (64,))
    save_model(model, file, data=data, objective=Diffusion("flow").config, latents=None)
    words = "sample", file, "--out", out, "--steps", 1
    assert "8 samples go into a picture" in refused(capsys, *words, "--classes", 1)
    assert run(capsys, *words, "--classes", 1, "--count", 1)[0] == 0
    assert soundfile.info(out).frames == 64
