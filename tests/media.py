"""Files of every format of pictures, sound and video, as bytes."""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import torch

from mmfast.data import to_uint8, write_video

PICTURES = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "ppm": "PPM",
}
SOUNDS = ["wav", "flac", "ogg", "opus", "mp3", "aiff", "au"]
T, HEIGHT, WIDTH = 20, 32, 48
WRITTEN = ["mp4", "mkv", "webm", "mov"]
READ = [*WRITTEN, "avi", "mpg"]


def movie():
    """A picture that gets brighter, by 8 levels of 256 a frame, the left half more so."""
    levels = torch.arange(T)[None, :, None, None] * 8.0 + 20
    video = levels.expand(3, T, HEIGHT, WIDTH).clone()
    video[..., : WIDTH // 2] += 60
    return video / 127.5 - 1


@functools.cache
def picture_file(suffix):
    """Noise, 40 x 50."""
    from PIL import Image

    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, PICTURES[suffix])
    return buffer.getvalue()


@functools.cache
def sound_file(suffix):
    """A second of noise at 16 kHz."""
    import soundfile

    noise = torch.rand(1, 16000, generator=torch.Generator().manual_seed(0)) - 0.5
    buffer = io.BytesIO()
    kind = {"opus": "OGG"}.get(suffix, suffix.upper())
    subtype = "OPUS" if suffix == "opus" else None
    soundfile.write(buffer, noise[0].numpy(), 16000, subtype, format=kind)
    return buffer.getvalue()


@functools.cache
def video_file(suffix):
    """:func:`movie`; in the formats that are only read, written by PyAV alone."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{suffix}")
        if suffix in WRITTEN:
            write_video(movie(), path)
        else:
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mpeg4" if suffix == "avi" else "mpeg1video", 25)
                stream.width, stream.height, stream.bit_rate = WIDTH, HEIGHT, 4_000_000
                stream.pix_fmt = "yuv420p"
                for i in range(T):
                    pixels = to_uint8(movie()[:, i]).permute(1, 2, 0).contiguous().numpy()
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        return path.read_bytes()
