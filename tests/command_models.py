"""Small models with random weights in files, and pictures, that the tests of commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfast.__main__ import main
from mmfast.data import ImageReader, Reader
from mmfast.models import VQVAE, Diffusion, DiT, save_model
from mmfast.train import about_data

D, K, SIZE, CLASSES = 4, 16, 8, 3


def vqvae(channels: int = 3, spatial_dims: int = 2, seed: int = 0, **quantizer: Any) -> VQVAE:
    """With ``quantizer`` instead of a VectorQuantize of 16 codes."""
    torch.manual_seed(seed)
    described = quantizer or {"type": "VectorQuantize", "dim": D, "codebook_size": K}
    made = VQVAE(
        described, D, channels=channels, spatial_dims=spatial_dims, widths=(4, 8), num_blocks=1
    )
    return made.eval()


def data_of(model: VQVAE, reader: Reader | None = None, source: str = "nowhere") -> dict[str, Any]:
    """What a file says of images of 8 x 8 of three classes, or of the reader's."""
    reader = reader or ImageReader(SIZE, channels=model.channels)
    shape = [side or SIZE for side in reader.shape]
    return about_data(source, shape, reader, [f"kind{i}" for i in range(CLASSES)])


def save_vqvae(path: Path, model: VQVAE | None = None, *words: Any) -> Path:
    """The file of a VQVAE on the data of :func:`data_of`."""
    model = model or vqvae()
    save_model(model, path, data=data_of(model, *words), objective=None, latents=None)
    return path


def dit(channels: int = 3, size: int = SIZE, dropout: float = 0.1, **options: Any) -> DiT:
    """Small, of three classes."""
    torch.manual_seed(0)
    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    model = DiT(size, 2, channels, learn_sigma=False, class_dropout_prob=dropout, **given | options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save_dit(
    path: Path,
    *,
    latent: bool = False,
    schedule: str = "flow",
    source: str = "nowhere",
    **options: Any,
) -> Path:
    """The file of a DiT on images, or on the latents of a VQVAE."""
    inner = vqvae()
    model = dit(D, SIZE // 2, **options) if latent else dit(**options)
    save_model(
        model,
        path,
        parts={"vqvae": inner} if latent else None,
        data=data_of(inner, None, source),
        objective=Diffusion(schedule).config,
        latents={"part": "vqvae", "shape": [D, SIZE // 2, SIZE // 2]} if latent else None,
    )
    return path


def picture(path: Path, height: int = 13, width: int = 10, channels: int = 3) -> Path:
    """Smooth colours, as a file."""
    from PIL import Image

    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + c) + c) + np.cos(y / 4) for c in range(channels)]
    pixels = (120 + 50 * np.stack(waves, 2)).astype(np.uint8)
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(path)
    return path


def pictures(root: Path, counts: Sequence[int] = (20, 20, 20)) -> Path:
    """A folder of pictures in folders by class: those of a class are of one colour, with noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind, count in enumerate(counts):
        folder = root / f"kind{kind}"
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (SIZE, SIZE, 3), dtype=np.uint8)
            pixels[..., kind] += 150
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def run(capsys: Any, *words: Any) -> tuple[int, str, str]:
    """Status, standard output and error of ``mmfast`` with these words."""
    status = main([str(word) for word in words])
    out, error = capsys.readouterr()
    return status, out, error


def refused(capsys: Any, *words: Any) -> str:
    """The one line with which a command refuses."""
    status, out, error = run(capsys, *words)
    assert (status, out) == (1, "")
    assert error.startswith(f"mmfast {words[0]}: ")
    assert error.count("\n") == 1
    return error


def read(path: Path) -> np.ndarray:
    """A picture's pixels."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def names(folder: Path) -> Sequence[str]:
    """Of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())
