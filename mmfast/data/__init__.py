"""Readers of images, videos, sound and text, and datasets of them."""

from mmfast.data.audio import MelReader, WaveformReader, write_sound
from mmfast.data.collate import collate, length_mask
from mmfast.data.dataset import Dataset
from mmfast.data.errors import FileError
from mmfast.data.images import ImageReader, to_float, to_pillow, to_uint8, write_image
from mmfast.data.mel import LogMel
from mmfast.data.memory import InMemory
from mmfast.data.readers import Reader, reader_from, readers_from
from mmfast.data.records import read_manifest, scan_folder
from mmfast.data.report import Report
from mmfast.data.resample import resample
from mmfast.data.sampling import BatchSampler, Draw, Loader
from mmfast.data.splits import split_by_group, split_by_label
from mmfast.data.text import TextReader, load_tokenizer, texts_in, train_tokenizer
from mmfast.data.video import VideoReader, write_video

__all__ = [
    "BatchSampler",
    "Dataset",
    "Draw",
    "FileError",
    "ImageReader",
    "InMemory",
    "Loader",
    "LogMel",
    "MelReader",
    "Reader",
    "Report",
    "TextReader",
    "VideoReader",
    "WaveformReader",
    "collate",
    "length_mask",
    "load_tokenizer",
    "read_manifest",
    "reader_from",
    "readers_from",
    "resample",
    "scan_folder",
    "split_by_group",
    "split_by_label",
    "texts_in",
    "to_float",
    "to_pillow",
    "to_uint8",
    "train_tokenizer",
    "write_image",
    "write_sound",
    "write_video",
]
