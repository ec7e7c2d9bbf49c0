"""Text as tokens, with the tokenizers package."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mmfast.checks import check_choice
from mmfast.data.errors import FileError, blamed_on, needed
from mmfast.data.readers import Reader
from mmfast.data.records import read_manifest, scan_folder
from mmfast.data.text_files import read_text
from mmfast.files import write_whole

PAD, UNKNOWN = "[PAD]", "[UNK]"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1000, kind: str = "bpe") -> str:
    """A tokenizer learned from texts.

    Args:
        texts: to learn from.
        vocab_size: of at most so many tokens.
        kind: ``"bpe"`` joins bytes that often follow each other (byte pair encoding), for any
            text; ``"word"`` knows lower-case words and punctuation, and ``[UNK]`` for all others.

    Returns:
        JSON, as in the files of the tokenizers package; ``[PAD]`` is token 0, ``[UNK]`` token 1.

    Raises:
        ImportError: tokenizers is not installed.
        ValueError: ``kind`` is another.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016).
    """
    tokenizers = needed("tokenizers")
    check_choice("kind", kind, ("bpe", "word"))
    options = {"vocab_size": vocab_size, "special_tokens": [PAD, UNKNOWN], "show_progress": False}
    if kind == "bpe":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=sorted(alphabet), **options)
    else:
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
        )
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        trainer = tokenizers.trainers.WordLevelTrainer(**options)
    made.train_from_iterator(texts, trainer)
    return made.to_str()


def load_tokenizer(path: str | os.PathLike[str]) -> str:
    """A file of the tokenizers package, such as tokenizer.json, as :class:`TextReader` takes it.

    Raises:
        FileError: there is no such file, or it holds no tokenizer.
        ImportError: tokenizers is not installed.
    """
    text = read_text(path)
    try:
        needed("tokenizers").Tokenizer.from_str(text)
    except ImportError:
        raise
    except Exception as error:  # the package raises Exception itself
        raise FileError(path, f"is no tokenizer ({error})") from None
    return text


def texts_in(source: str | os.PathLike[str], *, on_error: str = "raise") -> list[str]:
    """All texts of a folder or manifest, to make a tokenizer of.

    Args:
        source: as of :meth:`mmfast.data.Dataset.from_folder` or its ``from_manifest``.
        on_error: ``"raise"`` or ``"skip"`` files that cannot be read.

    Raises:
        FileError: there is no such folder or manifest, or a file cannot be read.
        ImportError: tokenizers is not installed.
    """
    readers = {"text": TextReader(train_tokenizer([]))}
    find = scan_folder if Path(source).is_dir() else read_manifest
    texts = []
    for record in find(source, readers).records:
        text = record.sources.get("text")
        if isinstance(text, Path):
            try:
                text = read_text(text)
            except FileError:
                if on_error == "raise":
                    raise
                continue
        if text is not None:
            texts.append(text)
    return texts


@dataclass(frozen=True)
class TextReader(Reader):
    """Texts in UTF-8 as int64 ids of tokens, ``(length,)``.

    Args:
        tokenizer: of :func:`train_tokenizer` or :func:`load_tokenizer`.
        length: in tokens, to which longer texts are cut and shorter ones filled up; None keeps
            their own.
        pad_token: that they are filled up with.

    Raises:
        ImportError: tokenizers is not installed.
        ValueError: the tokenizer is none, has no such token, or ``length`` is below 1.
    """

    tokenizer: str
    length: int | None = None
    pad_token: str = PAD

    modality: ClassVar[str] = "text"
    source: ClassVar[str] = "text"
    suffixes: ClassVar[frozenset[str]] = frozenset((".txt",))
    sequential: ClassVar[bool] = True
    inline: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.int64

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self._tokenizer.token_to_id(self.pad_token) is None:
            raise ValueError(f"the tokenizer has no pad_token {self.pad_token!r}")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizers = needed("tokenizers")
        try:
            made = tokenizers.Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # the package raises Exception itself
            raise ValueError(f"tokenizer must be the JSON of one ({error})") from None
        made.no_padding()
        made.no_truncation()
        return made

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._tokenizer.get_vocab_size()

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(length,)``."""
        return (self.length,)

    @property
    def padding(self) -> int:
        """The id of ``pad_token``."""
        return self._tokenizer.token_to_id(self.pad_token)

    def prepare(self, value: str, generator: Generator | None = None) -> Tensor:
        """The ids of a text, not filled up.

        Raises:
            ValueError: the text has no tokens.
        """
        ids = self._tokenizer.encode(value).ids
        if not ids:
            raise ValueError("has no tokens")
        return torch.tensor(ids[: self.length])

    def load(self, path: str | os.PathLike[str], generator: Generator | None = None) -> Tensor:
        """The ids of a file's text; see :meth:`Reader.read`."""
        with blamed_on(path):
            return self.prepare(read_text(path))

    def verify(self, path: str | os.PathLike[str]) -> None:
        """Read the text."""
        self.load(path)

    def decode(self, ids: Tensor) -> str:
        """The text of ids ``(L,)``, without special tokens."""
        kept = [i for i in ids.tolist() if i != self.padding]
        return self._tokenizer.decode(kept)

    def check_name(self, path: str | os.PathLike[str]) -> None:
        """It must be that of a text: .txt."""
        if Path(path).suffix.lower() not in self.suffixes:
            raise ValueError(f"{path}: the name must end in .txt")

    def write(self, value: Tensor, path: str | os.PathLike[str]) -> None:
        """Write the text of ids ``(L,)``."""
        write_whole(path, self.decode(value).encode())
