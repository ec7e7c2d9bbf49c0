"""``train``, ``sample`` and ``evaluate`` of models of texts, codes and several modalities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("soundfile")
pytest.importorskip("tokenizers")

from command_models import D, names, read, refused, run, save_vqvae, vqvae

from mmfast.commands.multimodal import maker_of
from mmfast.commands.ranges import Ranges
from mmfast.data import ImageReader, MelReader, readers_from, write_image, write_sound
from mmfast.models import (
    ConditionalDiT,
    Diffusion,
    MultimodalDiffusion,
    MultimodalDiT,
    describe_model,
    load_model,
    save_model,
)
from mmfast.train import about_data

pytestmark = pytest.mark.usefixtures("one_thread")


def words(text):
    return text.split()


QUICK = words(
    "--steps 3 --batch-size 4 --log-every 1 --checkpoint-every 3 --sample-every 3 --device cpu "
    "--hidden-size 16 --depth 1 --num-heads 2 --sampler-steps 2 --vocab-size 300 --text-length 6 "
    "--lr 0.02 --warmup 0 --schedule constant --ema 0"
)
SOUND = {"sample_rate": 4000, "n_mels": 8, "n_fft": 256, "hop": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, sounds and words of two classes; one sample has a word alone."""
    root = tmp_path_factory.mktemp("data")
    rng = torch.Generator().manual_seed(0)
    for i in range(24):
        kind = ("dark", "light")[i % 2]
        place = root / kind
        place.mkdir(exist_ok=True)
        (place / f"{i}.txt").write_text(kind)
        if i == 23:
            continue
        write_image(torch.rand(3, 8, 8, generator=rng) - i % 2, place / f"{i}.png")
        write_sound(torch.rand(1, 1024, generator=rng) - 0.5, 4000, place / f"{i}.wav")
    return root


@pytest.fixture(scope="module")
def multimodal(folder, tmp_path_factory):
    """A run, trained with a file of settings and flags."""
    out = tmp_path_factory.mktemp("runs")
    settings = out / "settings.json"
    settings.write_text(json.dumps({"data": {"readers": {"mel": SOUND}, "size": [8]}}))
    words = "--config", settings, "--data", folder, "--modalities", "image", "mel", "text", "label"
    assert train("multimodal", out / "run", *words, "--frames", 8) == 0
    return out / "run"


def train(kind, out, *words):
    from mmfast.__main__ import main

    return main(["train", kind, "--out", str(out), *QUICK, *map(str, words)])


def maker(path):
    file = path / "model.safetensors"
    return maker_of(file, load_model(file, MultimodalDiT), describe_model(file)["about"])


def test_a_multimodal_run(multimodal, folder):
    about = describe_model(multimodal / "model.safetensors")["about"]
    readers = readers_from(about["data"])
    assert {n: r.shape for n, r in readers.items()} == {
        "image": (3, 8, 8),
        "mel": (8, 8),
        "text": (6,),
    }
    assert about["data"]["classes"] == ["dark", "light"]
    model = load_model(multimodal / "model.safetensors", MultimodalDiT)
    described = model.config["modalities"]
    assert list(described) == ["image", "mel", "text", "label"]
    reader = readers["mel"]
    mels = torch.stack([reader.read(p) for p in sorted(folder.glob("*/*.wav"))])
    assert described["mel"]["mean"] == pytest.approx(mels.mean().item(), abs=0.05)
    assert described["mel"]["std"] == pytest.approx(mels.std().item(), rel=0.2)
    log = (multimodal / "log.csv").read_text().splitlines()
    assert {"image", "mel", "text", "label"} <= set(log[0].split(","))
    assert (multimodal / "samples" / "step-00000003.png").stat().st_size > 100


def test_going_on_with_other_data(multimodal, folder, tmp_path, capsys):
    run_, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(multimodal, run_)
    assert train("multimodal", run_, "--resume", "--steps", 4) == 0
    shutil.copytree(folder, data)
    for path in data.glob("dark/*.png"):
        write_image(torch.zeros(3, 8, 8), path)
    capsys.readouterr()
    assert train("multimodal", run_, "--resume", "--steps", 5, "--data", data) == 1
    assert "prepares its data otherwise" in capsys.readouterr().err


def test_in_the_latents_of_a_vqvae(folder, tmp_path, capsys):
    """Pictures are latents for the model, and pictures for everybody else."""
    file, out = save_vqvae(tmp_path / "vqvae.safetensors"), tmp_path / "run"
    words = "--data", folder, "--modalities", "image", "text", "--size", 8
    assert train("multimodal", out, *words, "--vqvaes", f"image={file}") == 0
    made = maker(out)
    assert made.about["latents"] == {"image": {"part": "vqvae_image"}}
    image = made.model.config["modalities"]["image"]
    assert (image["channels"], image["size"], image["patch_size"]) == (D, [4, 4], [1, 1])
    pictures = torch.stack([ImageReader(8).read(p) for p in sorted(folder.glob("*/*.png"))])
    latents = vqvae().latents(pictures).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(image["mean"]), latents.mean(1), atol=0.1, rtol=0.1)
    torch.testing.assert_close(torch.tensor(image["std"]), latents.std(1), atol=0.1, rtol=0.3)
    assert read(out / "samples" / "step-00000003.png").shape[1] > 8
    common = out, "--steps", 2
    assert run(capsys, "sample", *common, "--text", "dark", "--out", tmp_path / "a.png")[0] == 0
    assert read(tmp_path / "a.png").shape == (8, 8, 3)
    text = made.readers["text"]
    drawn = made.diffusion.generate(
        made.model,
        ["image"],
        {"text": text.filled(text.prepare("dark"))[None]},
        guidance=2.0,
        steps=2,
        seed=torch.zeros(1, dtype=torch.int64),
        progress=False,
    )["image"]
    assert drawn.shape == (1, D, 4, 4)
    wanted = vqvae().decoder(vqvae().quantize(drawn)[0]).clamp(-1, 1)
    shown = torch.tensor(read(tmp_path / "a.png")).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(shown, wanted[0], atol=0.02, rtol=0)
    words = "--given", f"image={folder / 'dark' / '0.png'}", "--want", "text"
    assert run(capsys, "sample", *common, *words, "--out", tmp_path / "a.txt")[0] == 0
    assert run(capsys, "evaluate", *common, "--data", folder, "--limit", 4, "--json")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text=there"], "each for another one of image, mel, got text=there"),
        (["image"], "NAME=FILE"),
        (["image=nowhere.safetensors"], "nowhere.safetensors"),
        (["mel=vqvae"], "takes 3 channels of 2 dimensions"),
    ],
)
def test_no_such_latents(folder, tmp_path, capsys, words, message):
    file = save_vqvae(tmp_path / "vqvae.safetensors")
    words = [word.replace("=vqvae", f"={file}") for word in words]
    common = "--data", folder, "--modalities", "image", "mel", "text", "--size", 8, "--frames", 8
    assert train("multimodal", tmp_path / "run", *common, "--vqvaes", *words) == 1
    assert message in capsys.readouterr().err


def test_files_made_of_files(multimodal, folder, tmp_path, capsys):
    """They are what the library makes of the same, each in its own format."""
    picture, sound = folder / "dark" / "0.png", folder / "dark" / "0.wav"
    common = "sample", multimodal, "--steps", 2
    words = *common, "--given", f"image={picture}", f"mel={sound}"
    out = tmp_path / "text.txt"
    status, said, _ = run(capsys, *words, "--want", "text", "--count", 3, "--out", out)
    assert (status, said) == (0, f"{out}: 3 samples of text\n")
    made = maker(multimodal)
    ids = made.diffusion.generate(
        made.model,
        ["text"],
        {
            "image": ImageReader(8).read(picture).expand(3, -1, -1, -1),
            "mel": MelReader(frames=8, **SOUND).read(sound).expand(3, -1, -1),
        },
        steps=2,
        seed=torch.arange(3),
        progress=False,
    )["text"]
    assert out.read_text() == "".join(made.text_of("text", row) + "\n" for row in ids)

    words = *common, "--text", "dark", "--given", "label=dark", "--want", "image", "--count", 3
    assert run(capsys, *words, "--out", tmp_path / "a.png")[0] == 0
    assert read(tmp_path / "a.png").shape == (8, 3 * 10 - 2, 3)
    assert run(capsys, *words, "--out", tmp_path / "b.png", "--batch", 2)[0] == 0
    assert abs(read(tmp_path / "a.png").astype(int) - read(tmp_path / "b.png")).max() <= 1
    assert run(capsys, *words, "--out", tmp_path / "c.png", "--guidance", 1)[0] == 0
    assert (read(tmp_path / "a.png") != read(tmp_path / "c.png")).any()

    words = *common, "--given", f"text={folder / 'dark' / '0.txt'}", "--each", tmp_path / "each"
    status, said, _ = run(capsys, *words, "--count", 2)
    assert said == f"{tmp_path / 'each'}: 2 samples of image, mel, label\n"
    assert names(tmp_path / "each") == sorted(
        f"{i}-{end}" for i in range(2) for end in ("image.png", "mel.wav", "label.txt")
    )
    assert (tmp_path / "each" / "0-label.txt").read_text() in ("dark\n", "light\n")
    for file in ("a.wav", "mel.png"):  # a sound, or its spectrogram
        assert run(capsys, *words[:-2], "--want", "mel", "--out", tmp_path / file)[0] == 0
    assert MelReader(frames=8, **SOUND).read(tmp_path / "a.wav").shape == (8, 8)
    assert read(tmp_path / "mel.png").shape[:2] == (8, 8)
    assert run(capsys, *common, "--each", tmp_path / "all")[0] == 0  # of nothing
    assert len(names(tmp_path / "all")) == 4


def test_evaluate_multimodal(multimodal, folder, tmp_path, capsys):
    words = "evaluate", multimodal, "--parts", 2, "--steps", 2
    got = json.loads(run(capsys, *words, "--json")[1])
    assert (got["model"], got["samples"]) == ("MultimodalDiT", 2)
    again = json.loads(run(capsys, *words, "--json", "--batch", 1)[1])
    made = maker(multimodal)
    assert list(got["modalities"]) == list(made.model.modalities)
    for name, one in got["modalities"].items():
        assert one["samples"] == 2
        assert one["loss"] == pytest.approx(again["modalities"][name]["loss"], rel=1e-4)
        assert one["loss"] != one["loss_without_condition"]
        assert [part["timesteps"] for part in one["parts"]] == [[1, 500], [501, 1000]]
        assert ("exact" in one) == (name in ("text", "label"))
    shutil.copytree(folder, tmp_path / "other")
    whole = json.loads(run(capsys, *words, "--json", "--data", tmp_path / "other")[1])
    assert (whole["samples"], whole["modalities"]["image"]["samples"]) == (24, 23)
    said = run(capsys, *words)[1]
    assert "text, of 2 samples, from all others" in said
    assert "made exactly" in said


def test_places_in_a_range():
    """One in each of N equal pieces, whatever the batches are."""
    ranges = Ranges(Diffusion("linear"), 4, 25)
    rows = torch.cat([ranges.rows(1, first, 5) for first in range(0, 25, 5)])
    assert rows.sort().values.tolist() == list(range(255, 500, 10))
    assert ranges.timesteps(3) == [750, 999]


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_a_dit_of_texts(conditioning, folder, tmp_path, capsys):
    pictures = "--data", folder, "--size", 8, "--condition", "text"
    assert train("dit", tmp_path / "run", *pictures, "--conditioning", conditioning) == 0
    assert "texts, 6 of 2" in capsys.readouterr().out
    model = load_model(tmp_path / "run" / "model.safetensors", ConditionalDiT)
    assert model.joint == (conditioning == "joint")
    words = "sample", tmp_path / "run", "--steps", 2, "--text", "dark"
    assert run(capsys, *words, "--count", 2, "--out", tmp_path / "a.png")[0] == 0
    assert read(tmp_path / "a.png").shape == (8, 18, 3)
    about = describe_model(tmp_path / "run" / "model.safetensors")["about"]
    reader = readers_from(about["context"]["reader"])["text"]
    ids = reader.prepare("dark")
    drawn = Diffusion(**about["objective"]).sample(
        model,
        (1, 3, 8, 8),
        condition={"context": reader.filled(ids)[None], "lengths": torch.tensor([len(ids)])},
        guidance=2.0,
        steps=2,
        seed=torch.tensor([1]),
        progress=False,
    )
    write_image(drawn[0], tmp_path / "b.png")
    assert (read(tmp_path / "b.png") == read(tmp_path / "a.png")[:, 10:]).all()
    got = json.loads(run(capsys, "evaluate", tmp_path / "run", "--json", "--parts", 2)[1])
    assert (got["model"], got["samples"]) == ("ConditionalDiT", 2)
    assert got["loss"] != got["loss_without_condition"]
    assert "--classifier reads" in refused(
        capsys, "evaluate", tmp_path / "run", "--classifier", "train"
    )
    assert "makes samples from text: give --text" in refused(
        capsys, "sample", tmp_path / "run", "--out", tmp_path / "c.png"
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_a_dit_of_codes_in_latent_space(stages, folder, tmp_path, capsys):
    """Spectrograms' latents, from the codes of pictures."""
    quantizer = {"type": "ResidualVQ", "dim": 4, "num_quantizers": 2, "codebook_size": 16}
    codes = save_vqvae(tmp_path / "c.safetensors", vqvae(**quantizer) if stages == 2 else None)
    reader = MelReader(frames=8, **SOUND)
    mels = vqvae(8, 1)
    about = about_data("nowhere", (8, 8), reader)
    save_model(mels, tmp_path / "l.safetensors", data=about, objective=None, latents=None)
    config = tmp_path / "settings.json"
    config.write_text(json.dumps({"data": {"reader": SOUND}}))
    words = "--config", config, "--data", folder, "--modality", "mel", "--frames", 8
    words += "--condition", "codes", "--context-vqvae", codes
    words += "--vqvae", tmp_path / "l.safetensors", "--patch-size", 1
    assert train("dit", tmp_path / "run", *words) == 0
    assert f"codes of image, {'4 x 4 of 16' if stages == 1 else '32 of 32'}" in (
        capsys.readouterr().out
    )
    given = f"image={folder / 'dark' / '0.png'}"
    words = "sample", tmp_path / "run", "--steps", 2, "--given", given
    assert run(capsys, *words, "--out", tmp_path / "a.png", "--each", tmp_path / "each")[0] == 0
    assert names(tmp_path / "each") == ["0.wav"]
    model = load_model(tmp_path / "run" / "model.safetensors", ConditionalDiT)
    assert model.config["context_codes"] == 16 * stages
    assert run(capsys, "evaluate", tmp_path / "run", "--parts", 2)[0] == 0


def test_training_refuses(folder, tmp_path, capsys):
    def said(kind, *words):
        capsys.readouterr()
        assert train(kind, tmp_path / "run", "--data", folder, *words) == 1
        return capsys.readouterr().err

    assert "modalities must be of image, video" in said("multimodal", "--modalities", "smell")
    assert "not only label" in said("multimodal", "--modalities", "label")
    assert "give --frames" in said("multimodal", "--modalities", "mel", "text")
    words = "--modalities", "video", "text", "--frames", 4
    assert "has the modality video" in said("multimodal", *words)
    assert "mnist are images" in said("multimodal", "--data", "mnist")
    plain = folder / "dark"
    words = "--data", plain, "--modalities", "image", "label", "--size", 8
    assert f"{plain} has no labels" in said("multimodal", *words)
    assert "go together" in said("dit", "--condition", "codes")
    words = "--condition", "codes", "--context-vqvae", save_vqvae(tmp_path / "v.safetensors")
    assert "of another modality than image" in said("dit", *words, "--size", 8)
    assert "no such file" in said("dit", "--condition", "text", "--tokenizer", "absent.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{}/a.png"], "--out is one modality's, image, mel, text, label are wanted"),
        (["--want", "image", "--out", "{}/a.xyz"], "picture format"),
        (["--want", "text", "--out", "{}/a.png"], "must end in .txt"),
        (["--want", "mel", "--out", "{}/a.wav", "--count", "2"], "each into a file of its own"),
        (["--want", "smell", "--out", "{}/a.png"], "the model's modalities are image, mel, text"),
        (["--want", "image", "--given", "image=a", "--out", "{}/a.png"], "a: no such file"),
        (["--given", "image", "--out", "{}/a.png"], "--given must be NAME=FILE"),
        (["--given", "smell=a", "--out", "{}/a.png"], "smell cannot be given"),
        (["--text", "a", "--given", "text=b", "--out", "{}/a.png"], "b: no such file"),
        (["--text", " ", "--want", "text", "--out", "{}/a.txt"], "--want text: it is given"),
        (["--given", "label=grey", "--out", "{}/a.png"], "no class 'grey', there are dark, light"),
        (["--given", "label=dark,light", "--out", "{}/a.png"], "must be one class, got"),
        (["--classes", "dark", "--out", "{}/a.png"], "give --given label=CLASS"),
        (["--guidance", "inf", "--out", "{}/a.png"], "1: no guidance), got inf"),
        ([], "nowhere to write to"),
    ],
)
def test_sampling_refuses(words, message, multimodal, tmp_path, capsys):
    words = [word.format(tmp_path) for word in words]
    assert message in refused(capsys, "sample", multimodal, *words)
    assert not list(Path(tmp_path).iterdir())


def test_files_of_other_versions(multimodal, tmp_path, capsys):
    model = load_model(multimodal / "model.safetensors", MultimodalDiT)
    about = describe_model(multimodal / "model.safetensors")["about"]
    words = "sample", tmp_path / "m", "--each", tmp_path / "each"
    save_model(model, tmp_path / "m", data=about["data"])
    assert "does not say what the model has learned" in refused(capsys, *words)
    save_model(model, tmp_path / "m", data=about["data"], objective={"colour": 1})
    assert "of another version" in refused(capsys, *words)
    data = {**about["data"], "classes": []}
    save_model(model, tmp_path / "m", data=data, objective=MultimodalDiffusion().config)
    assert "its data is of image, mel, text, the model of" in refused(capsys, *words)
    config = {"hidden_size": 16, "depth": 1, "num_heads": 2, "context_codes": 4}
    bare = ConditionalDiT(8, 2, 3, **config)
    save_model(bare, tmp_path / "m", data=about["data"], objective=Diffusion("flow").config)
    assert "conditioned on (context)" in refused(capsys, *words)
