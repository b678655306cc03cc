"""CLIP's tokenizer: captions to token ids, long captions in chunks.

Imports torch when captions become tensors.
B captions, n chunks of 77 tokens: the start token, 75 tokens of the caption, the end token.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from lorakit.checkpoints import read_json
from lorakit.errors import ModelError
from lorakit.models.prompt_weights import weighted_fragments

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 75
"""Tokens of the caption in one chunk."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class CaptionTokenizer:
    """Turns captions into chunks of token ids."""

    def __init__(
        self,
        folder: Path | None = None,
        max_length: int = CHUNK,
        pad: int | None = None,
        *,
        fix_text: bool = False,
    ) -> None:
        """With the vocabulary in a folder, or CLIP's own; `max_length` tokens at most, a multiple of 75.

        `pad` is the id that fills chunks up, the end token if None. With `fix_text`, texts are cleaned by ftfy first,
        with weights each piece alone. A `ModelError` if the folder's files are unusable.
        """
        self._folder = folder
        self.tokenizer = _clip_tokenizer() if folder is None else _folder_tokenizer(folder)
        self.max_length = max_length
        self._clean: Callable[[str], str] = fixed if fix_text else str
        start, end = self.tokenizer.token_to_id(_START), self.tokenizer.token_to_id(_END)
        if start is None or end is None:
            raise ModelError(f"the tokenizer in {folder} has no {_START} and {_END}; it is not CLIP's")
        self.start, self.end = start, end
        self.pad = self.end if pad is None else pad

    @property
    def vocabulary_size(self) -> int:
        """How many token ids there are, from 0 to the largest."""
        return 1 + max(self.tokenizer.get_vocab().values())

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [B, n, 77], of captions of any length; what is too long is cut off.

        A chunk ends with the end token if the caption continues after it, or else with padding. Raises ModelError where
        the folder's files turn out to be damaged.
        """
        return self._in_chunks(self._ids(map(self._clean, captions)))

    def weighted(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids as for captions without brackets, and their weights, float32 [B, n, 77].

        The words of each weight are tokenized alone. Tokens that stand for no words have the weight 1.
        """
        import torch
        from torch.nn.functional import pad

        fragments = [weighted_fragments(caption) for caption in captions]
        ids_of = iter(self._ids(self._clean(words) for own in fragments for words, _ in own))
        tokens = [[(token, weight) for _, weight in own for token in next(ids_of)] for own in fragments]
        ids = self._in_chunks([[token for token, _ in own] for own in tokens])
        weights = torch.ones(len(captions), self.max_length)
        for row, own in zip(weights, tokens, strict=True):
            kept = own[: self.max_length]
            row[: len(kept)] = torch.tensor([weight for _, weight in kept])
        return ids, pad(weights.view(len(captions), -1, CHUNK), (1, 1), value=1.0)

    def lengths(self, captions: Sequence[str], weighted: bool = False) -> list[int]:
        """How many tokens captions have before they are cut off; imports no torch.

        No token reaches over a space, so each word of all captions is tokenized once.
        """
        texts = ([text for text, _ in weighted_fragments(own)] if weighted else [own] for own in captions)
        words = [[word for text in own for word in self._clean(text).split()] for own in texts]
        known = list({word for own in words for word in own})
        lengths = dict(zip(known, map(len, self._ids(known)), strict=True))
        return [sum(lengths[word] for word in own) for own in words]

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        cleaned = list(texts)
        with _damage_told(self._folder):
            return [encoding.ids for encoding in self.tokenizer.encode_batch(cleaned, add_special_tokens=False)]

    def _in_chunks(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """Token ids, int64 [B, n, 77], of the ids of captions of any length."""
        import torch

        stream = torch.full((len(captions), self.max_length + 1), self.pad, dtype=torch.int64)
        for row, own in zip(stream, captions, strict=True):
            ids = [*own[: self.max_length], self.end]
            row[: len(ids)] = torch.tensor(ids)
        body = stream[:, :-1].reshape(len(stream), -1, CHUNK).clone()
        # By lengths, as what pads may be a token of captions, too: `!` is, within words.
        lengths = torch.tensor([[min(len(own), self.max_length)] for own in captions])
        starts = torch.arange(0, self.max_length, CHUNK)
        last = torch.where(lengths >= starts + CHUNK, self.end, stream[:, -1:])
        body[..., 0].masked_fill_(lengths < starts, self.end)
        start = torch.full_like(last, self.start)
        return torch.cat([start.unsqueeze(-1), body, last.unsqueeze(-1)], dim=-1)


def fixed(text: str) -> str:
    """A text as transformers 4 cleans it for CLIP where ftfy is installed.

    Curly quotes, ligatures, full-width letters, HTML entities and wrongly decoded letters become plain ones.
    """
    import ftfy  # takes a third of a second, and few runs need it

    cleaned: str = ftfy.fix_text(text)
    return cleaned.lower()


@cache
def _clip_tokenizer() -> Tokenizer:
    """The tokenizer of OpenAI's CLIP, which the text encoders of Stable Diffusion were trained with."""
    vocabulary, merges = clip_vocabulary()
    return _byte_pair_tokenizer(models.BPE(vocabulary, merges, unk_token=_END, end_of_word_suffix="</w>"))


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of CLIP's 49408 tokens, and the merges of byte pairs by priority.

    Bytes that print stand for themselves, the others for characters from 256 on; then the same at the end
    of a word, then what each merge makes.
    """
    packed = files("lorakit.models.families.sd") / "clip_vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : _MERGES + 1]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    printable = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet = printable + [chr(256 + index) for index in range(256 - len(printable))]
    endings = [f"{character}</w>" for character in alphabet]
    tokens = [*alphabet, *endings, *(left + right for left, right in merges), _START, _END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a diffusers folder: `tokenizer.json`, or `vocab.json` with `merges.txt`."""
    with _damage_told(folder):
        if (folder / "tokenizer.json").is_file():
            content = read_json(folder / "tokenizer.json")
            # Stable Diffusion 2.x and XL pad with `!`. Tools therefore declare it special, so that each `!` in a
            # caption would be padding, where the text encoder was trained with the words `!`, `!!` and so on.
            words = content["model"]["vocab"].keys() - {_START, _END}
            special = [token for token in content["added_tokens"] if token["content"] not in words]
            tokenizer = Tokenizer.from_str(json.dumps({**content, "added_tokens": special}))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        return _byte_pair_tokenizer(models.BPE.from_file(vocabulary, merges, unk_token=_END, end_of_word_suffix="</w>"))


@contextmanager
def _damage_told(folder: Path | None) -> Iterator[None]:
    """Raise what a tokenizer's damaged files cause as a ModelError that names their folder."""
    try:
        yield
    except BaseException as error:
        # The tokenizers library raises plain Exception; where it panics, what is raised is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from error


def _byte_pair_tokenizer(model: models.BPE) -> Tokenizer:
    """A tokenizer that lower-cases, splits words as CLIP does, and merges byte pairs."""
    if model.token_to_id(_START) is None or model.token_to_id(_END) is None:
        raise ValueError(f"it has no {_START} and {_END}")
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([_START, _END])
    return tokenizer
