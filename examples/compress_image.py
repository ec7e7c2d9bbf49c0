"""Compress a picture by vector quantisation: patches, a k-means codebook, and the nearest codes.

    python examples/compress_image.py photo.png            # all of it, with a report
    python examples/compress_image.py --demo               # the same on a photograph it brings
    python examples/compress_image.py compress photo.png photo.mmf
    python examples/compress_image.py decompress photo.mmf restored.png
    python examples/compress_image.py learn-codebook *.png shared.npz
    python examples/compress_image.py compress photo.png photo.mmf --codebook shared.npz

Needs the packages of ``pip install '.[examples]'``.

A compressed file is a header; the codebook, or the SHA-256 of a shared one; the indices; CRC-32 of
all that. Codes are bytes, ordered by brightness, so that neighbouring patches have similar indices.
Indices are stored as all low bytes, then all high bytes. Both are compressed with Zstandard, which
includes its entropy coder. Learned compression, with more than a codebook: mmfast compress.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mmfast
from mmfast.commands.options import within
from mmfast.data import to_float, to_pillow, write_image
from mmfast.data.images import open_image
from mmfast.files import check_writable, write_whole
from mmfast.quality import psnr
from mmfast.sealed import SealedFormat

try:
    import zstandard
    from PIL import Image, ImageDraw
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install '.[examples]' brings it") from None

MAGIC = b"\x89MMF\r\n\x1a\n"
# Patch, channels, shared, width, height, codes; the codebook, the indices.
FORMAT = SealedFormat(MAGIC, 1, "3B3I", 2, "a file that this program compressed")
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 1 << 28
MAX_CODES = 1 << 16
MAX_PATCH = 32
LEARNING_PATCHES = 1 << 18  # a codebook is learned from so many patches at most


class RefusedError(ValueError):
    """An input that cannot be used; the message is for the user."""


@dataclass(frozen=True)
class Codebook:
    """``codes``: uint8 (K, D), D = patch * patch * channels."""

    codes: np.ndarray
    patch: int
    channels: int

    def digest(self) -> bytes:
        """SHA-256 by which a compressed file names a shared codebook."""
        head = struct.pack("<BBI", self.patch, self.channels, len(self.codes))
        return hashlib.sha256(head + self.codes.tobytes()).digest()


@dataclass(frozen=True)
class Compressed:
    """A compressed picture, and how many of its bytes are the codebook's."""

    data: bytes
    codebook_bytes: int
    indices: np.ndarray


# Pictures


def read_image(path: Path) -> np.ndarray:
    """uint8 (height, width, channels), upright, from any 8-bit picture that Pillow reads."""
    image = open_image(path)
    if image.mode.startswith(("I", "F")):
        raise RefusedError(
            f"{path}: pixels of mode {image.mode} (more than 8 bits) are not supported, "
            "convert the picture to 8 bits a channel first"
        )
    if image.mode in ("1", "L"):
        target = "L"
    elif image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        target = "RGBA"
    else:
        target = "RGB"
    pixels = np.asarray(image.convert(target))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def to_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8 (N, D) patches, row by row; the last ones are filled up with the edge's pixels."""
    height, width, channels = pixels.shape
    padding = ((0, -height % patch), (0, -width % patch), (0, 0))
    padded = np.pad(pixels, padding, mode="edge")
    rows, columns = padded.shape[0] // patch, padded.shape[1] // patch
    blocks = padded.reshape(rows, patch, columns, patch, channels).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(rows * columns, patch * patch * channels)


def from_patches(
    patches: np.ndarray, patch: int, height: int, width: int, channels: int
) -> np.ndarray:
    """The reverse of :func:`to_patches`."""
    rows, columns = -(-height // patch), -(-width // patch)
    blocks = patches.reshape(rows, columns, patch, patch, channels).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(rows * patch, columns * patch, channels)[:height, :width]


# Codebooks


def learn(pixels: Sequence[np.ndarray], num_codes: int, patch: int) -> Codebook:
    """A codebook of at most ``num_codes`` codes by k-means on the patches of all pictures."""
    patches = torch.from_numpy(np.concatenate([to_patches(p, patch) for p in pixels]))
    if len(patches) > LEARNING_PATCHES:
        generator = torch.Generator().manual_seed(0)
        patches = patches[torch.randperm(len(patches), generator=generator)[:LEARNING_PATCHES]]
    result = mmfast.kmeans(
        patches.float(), min(num_codes, len(patches)), progress=sys.stderr.isatty()
    )
    codes = result.codebook.round().clamp(0, 255).to(torch.uint8).numpy()
    codes = np.unique(codes, axis=0)  # rounding can make codes equal
    brightness = codes.sum(1, dtype=np.int64)
    return Codebook(codes[brightness.argsort(kind="stable")], patch, pixels[0].shape[2])


def write_codebook(path: Path, codebook: Codebook) -> None:
    """Save a codebook to share, as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, codes=codebook.codes, patch=codebook.patch, channels=codebook.channels)
    write_whole(path, buffer.getvalue())


def read_codebook(path: Path) -> Codebook:
    """Load what :func:`write_codebook` saved."""
    try:
        with np.load(path, allow_pickle=False) as file:
            codes = file["codes"]
            codebook = Codebook(codes, int(file["patch"]), int(file["channels"]))
    except FileNotFoundError:
        raise RefusedError(f"{path}: no such file") from None
    except (
        AttributeError,  # a bare array is no archive
        EOFError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise RefusedError(f"{path}: not a codebook, or damaged ({error})") from None
    check_codebook(codebook, str(path))
    return codebook


def check_codebook(codebook: Codebook, source: str) -> None:
    """Refuse what no codebook can be."""
    width = codebook.patch**2 * codebook.channels
    valid = (
        1 <= codebook.patch <= MAX_PATCH
        and codebook.channels in CHANNELS
        and codebook.codes.dtype == np.uint8
        and codebook.codes.ndim == 2
        and 1 <= len(codebook.codes) <= MAX_CODES
        and codebook.codes.shape[1] == width
    )
    if not valid:
        raise RefusedError(f"{source}: not a codebook of picture patches")


# The compressed file


def nearest(patches: np.ndarray, codebook: Codebook) -> np.ndarray:
    """uint16 (N,): the nearest code of each patch."""
    x = torch.from_numpy(patches).float()
    indices, _ = mmfast.nearest_code(x, torch.from_numpy(codebook.codes).float())
    return indices.numpy().astype("<u2")


def compress(pixels: np.ndarray, codebook: Codebook, *, shared: bool) -> Compressed:
    """The compressed file of a picture, with its codebook or the name of a shared one."""
    height, width, channels = pixels.shape
    if channels != codebook.channels:
        raise RefusedError(
            f"the codebook is for {CHANNELS[codebook.channels]} pictures, "
            f"this one is {CHANNELS[channels]}"
        )
    indices = nearest(to_patches(pixels, codebook.patch), codebook)
    pack = zstandard.ZstdCompressor(level=19).compress
    book = codebook.digest() if shared else pack(codebook.codes.tobytes())
    body = pack(indices.view(np.uint8).reshape(-1, 2).T.tobytes())
    sizes = (width, height, len(codebook.codes))
    data = FORMAT.seal((codebook.patch, channels, shared, *sizes), (book, body))
    return Compressed(data, len(book), indices)


def decompress(data: bytes, shared: Codebook | None = None) -> np.ndarray:
    """The picture in a compressed file, uint8 (height, width, channels)."""
    try:
        (patch, channels, is_shared, width, height, num_codes), (book, body) = FORMAT.open(data)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    sane = (
        1 <= patch <= MAX_PATCH
        and channels in CHANNELS
        and 1 <= width * height <= MAX_PIXELS
        and 1 <= num_codes <= MAX_CODES
    )
    if not sane:
        raise RefusedError("the header makes no sense, though its checksum matches")
    if is_shared:
        codebook = shared_codebook(book, shared)
    else:
        dims = patch * patch * channels
        codes = np.frombuffer(unpack(book, num_codes * dims), np.uint8).reshape(num_codes, dims)
        codebook = Codebook(codes, patch, channels)
    if (codebook.patch, codebook.channels) != (patch, channels):
        raise RefusedError("the header makes no sense, though its checksum matches")
    num_patches = -(-width // patch) * -(-height // patch)
    planes = np.frombuffer(unpack(body, 2 * num_patches), np.uint8).reshape(2, num_patches)
    indices = planes[0] + (planes[1].astype(np.int64) << 8)
    if indices.max() >= len(codebook.codes):
        raise RefusedError("an index is beyond the codebook, though the checksum matches")
    return from_patches(codebook.codes[indices], patch, height, width, channels)


def shared_codebook(digest: bytes, codebook: Codebook | None) -> Codebook:
    """``codebook``, if it is the one that was used."""
    if codebook is None:
        raise RefusedError(
            f"compressed with the shared codebook {digest.hex()[:16]}; give it with --codebook"
        )
    if codebook.digest() != digest:
        raise RefusedError(
            f"wrong codebook: compressed with {digest.hex()[:16]}, "
            f"given {codebook.digest().hex()[:16]}"
        )
    return codebook


def unpack(data: bytes, size: int) -> bytes:
    """Zstandard data that must hold ``size`` bytes."""
    try:
        if zstandard.frame_content_size(data) != size:
            raise RefusedError("damaged: the contents have another size than the header says")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise RefusedError(f"damaged: {error}") from None


# The report


def side_by_side(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The pictures in a row, each under its caption, transparent pixels on white: uint8
    (height, width, 3)."""
    gap, line = 8, 16
    height, width = pictures[0][1].shape[:2]
    size = (len(pictures) * (width + gap) - gap, height + line)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, (caption, pixels) in enumerate(pictures):
        left = i * (width + gap)
        image = to_pillow(to_float(pixels)).convert("RGBA")
        canvas.paste(image, (left, line), image)
        draw.text((left + 2, 2), caption, fill="black")
    return np.asarray(canvas)


def round_trip(arguments: argparse.Namespace) -> None:
    """Everything on one picture, with a report."""
    times: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        times[name] = time.perf_counter() - start

    source = demo_picture() if arguments.demo else arguments.image
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}.mmf"
    restored_path = folder / f"{source.stem}-restored.png"
    compared_path = folder / f"{source.stem}-compared.png"

    with stage("read the picture"):
        pixels = read_image(source)
    if arguments.codebook:
        with stage("load the codebook"):
            codebook = read_codebook(arguments.codebook)
    else:
        with stage("learn the codebook"):
            codebook = learn([pixels], arguments.codes, arguments.patch)
    with stage("compress"):
        packed = compress(pixels, codebook, shared=arguments.codebook is not None)
        write_whole(target, packed.data)
    with stage("decompress"):
        restored = decompress(target.read_bytes(), codebook)
    with stage("write the picture"):
        write_image(to_float(restored), restored_path)

    height, width, channels = pixels.shape
    bits = 8 / (height * width)
    quality = psnr(torch.tensor(pixels), torch.tensor(restored), 255)
    decibels = "no difference" if quality == float("inf") else f"{quality:.2f} dB"
    total = len(packed.data) * bits
    pictures = (
        (f"original, {8 * channels} bits per pixel", pixels),
        (f"restored, {total:.3f} bits per pixel, {decibels}", restored),
    )
    write_image(to_float(side_by_side(pictures)), compared_path)

    console = Console()
    sizes = Table(title=f"{source.name}, {width} x {height} {CHANNELS[channels]}")
    for heading in ("", "bytes", "bits per pixel", "of raw"):
        sizes.add_column(heading, justify="right" if heading else "left")
    part = "hash of the shared codebook" if arguments.codebook else "codebook"
    for name, size in (
        ("raw pixels", pixels.nbytes),
        ("compressed file", len(packed.data)),
        (f"without the {part}", len(packed.data) - packed.codebook_bytes),
    ):
        sizes.add_row(name, f"{size}", f"{size * bits:.3f}", f"{size / pixels.nbytes:.2%}")
    console.print(sizes)
    stages = Table(title="Time")
    stages.add_column("stage")
    stages.add_column("ms", justify="right")
    for name, seconds in times.items():
        stages.add_row(name, f"{1e3 * seconds:.1f}")
    console.print(stages)
    used = f"{len(codebook.codes)} codes of {codebook.patch} x {codebook.patch} pixels"
    console.print(f"PSNR {decibels}, {len(packed.indices)} patches, {used}", highlight=False)
    for path in (target, restored_path, compared_path):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def demo_picture() -> Path:
    """A photograph that scikit-image ships."""
    try:
        import skimage.data
    except ImportError as error:
        raise RefusedError(f"{error}; pip install '.[examples]' brings it") from None
    return Path(skimage.data.__file__).parent / "coffee.png"


# The command line


def run_compress(arguments: argparse.Namespace) -> None:
    """``compress``."""
    pixels = read_image(arguments.image)
    if arguments.codebook:
        codebook = read_codebook(arguments.codebook)
    else:
        codebook = learn([pixels], arguments.codes, arguments.patch)
    packed = compress(pixels, codebook, shared=arguments.codebook is not None)
    write_whole(arguments.output, packed.data)


def run_decompress(arguments: argparse.Namespace) -> None:
    """``decompress``."""
    codebook = read_codebook(arguments.codebook) if arguments.codebook else None
    try:
        pixels = decompress(arguments.input.read_bytes(), codebook)
    except RefusedError as error:
        raise RefusedError(f"{arguments.input}: {error}") from None
    write_image(to_float(pixels), arguments.output)


def run_learn(arguments: argparse.Namespace) -> None:
    """``learn-codebook``."""
    pictures = [read_image(path) for path in arguments.images]
    channels = pictures[0].shape[2]
    for path, pixels in zip(arguments.images, pictures, strict=True):
        if pixels.shape[2] != channels:
            raise RefusedError(
                f"{path} is {CHANNELS[pixels.shape[2]]}, {arguments.images[0]} is "
                f"{CHANNELS[channels]}: a codebook is for one of them"
            )
    write_codebook(arguments.output, learn(pictures, arguments.codes, arguments.patch))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; without the name of a command, that of a picture."""
    learning = argparse.ArgumentParser(add_help=False)
    learning.add_argument(
        "--codes", type=within(1, MAX_CODES), default=256, help="codes to learn, at most (256)"
    )
    learning.add_argument(
        "--patch", type=within(1, MAX_PATCH), default=4, help="side of a patch in pixels (4)"
    )
    codebook = argparse.ArgumentParser(add_help=False)
    codebook.add_argument("--codebook", type=Path, help="a shared codebook, from learn-codebook")

    commands = ("compress", "decompress", "learn-codebook")
    if not arguments or arguments[0] not in commands:
        parser = argparse.ArgumentParser(
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[learning, codebook],
        )
        parser.set_defaults(run=round_trip)
        parser.add_argument("image", type=Path, nargs="?")
        parser.add_argument("--demo", action="store_true", help="use a photograph of scikit-image")
        parser.add_argument("--output-dir", type=Path, default=Path(), help="where to write (.)")
        parsed = parser.parse_args(arguments)
        if (parsed.image is None) != parsed.demo:
            parser.error("give a picture, or --demo")
        return parsed

    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    one = subparsers.add_parser("compress", parents=[learning, codebook])
    one.set_defaults(run=run_compress)
    one.add_argument("image", type=Path)
    one.add_argument("output", type=Path)
    two = subparsers.add_parser("decompress", parents=[codebook])
    two.set_defaults(run=run_decompress)
    two.add_argument("input", type=Path)
    two.add_argument("output", type=Path)
    three = subparsers.add_parser("learn-codebook", parents=[learning])
    three.set_defaults(run=run_learn)
    three.add_argument("images", type=Path, nargs="+")
    three.add_argument("output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; what goes wrong is one line on stderr, and status 1."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check_writable(parsed.output.parent if "output" in parsed else parsed.output_dir)
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
