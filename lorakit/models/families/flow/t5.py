"""T5's encoder as a text encoder (Raffel et al., 2020, arXiv:1910.10683): its files and its tokenizer.

B captions of at most m tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lorakit.api.components import ModelPart
from lorakit.checkpoints import Shapes
from lorakit.errors import ModelError
from lorakit.models.families.flow.sentencepiece import read_sentencepiece
from lorakit.models.families.flow.tokenizer_files import TOKENIZER_JSON, read_tokenizer_json, tokenizer_errors
from lorakit.models.weights.checkpoint import TRANSFORMERS_FILES, PartFormat, Places, Settings
from lorakit.models.weights.counting import count

if TYPE_CHECKING:
    from lorakit.models.interfaces import Tokens

_EMBEDDING, _EMBEDDING_TOO = "shared.weight", "encoder.embed_tokens.weight"
"""What the embedding of tokens is called; files may have it twice."""
_PAD, _END = "<pad>", "</s>"
SETTINGS: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
"""What is taken from configs, and transformers' defaults."""


def t5_format(part: ModelPart, family: str) -> PartFormat:
    """T5's encoder in files of a family."""
    return PartFormat(
        name=part.name,
        title=part.title,
        family=family,
        files=TRANSFORMERS_FILES,
        prefix="text_encoders.t5xxl.transformer.",
        roots=("shared.", "encoder."),
        infer=t5_settings,
        shapes=t5_shapes,
        arrange=_with_one_embedding,
        renaming=lambda _prefix, _shapes, _settings: _file_name,
    )


def _with_one_embedding(places: Places, shapes: Shapes) -> tuple[Places, Shapes]:
    """The tensors with the embedding once, by the name that most files have for it."""
    if _EMBEDDING_TOO not in places:
        return places, shapes
    names = {name: name for name in places if name != _EMBEDDING_TOO}
    names.setdefault(_EMBEDDING, _EMBEDDING_TOO)
    return {name: places[old] for name, old in names.items()}, {name: shapes[old] for name, old in names.items()}


def _file_name(name: str) -> str:
    """What files call a tensor of the module."""
    return _EMBEDDING if name == "embed_tokens.weight" else f"encoder.{name}"


def t5_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `T5Config` for the tensors of an encoder."""
    vocabulary, width = shapes[_EMBEDDING]
    attention, mlp = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    is_gated = f"{mlp}.wi_0.weight" in shapes
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes[f"{mlp}.{'wi_0' if is_gated else 'wi'}.weight"][0],
        "num_layers": count(shapes, "encoder.block.{}."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
    }


def t5_shapes(settings: Settings) -> Shapes:
    """The tensors of an encoder with these settings."""
    return dict(_tensors({**SETTINGS, **settings}))


def _tensors(settings: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden = settings["d_model"], settings["d_ff"]
    inner = settings["d_kv"] * settings["num_heads"]
    yield "embed_tokens.weight", (settings["vocab_size"], width)
    yield "final_layer_norm.weight", (width,)
    buckets = settings["relative_attention_num_buckets"]
    yield "block.0.layer.0.SelfAttention.relative_attention_bias.weight", (buckets, settings["num_heads"])
    inputs = ("wi_0", "wi_1") if settings["feed_forward_proj"].startswith("gated-") else ("wi",)
    for index in range(settings["num_layers"]):
        attention, mlp = f"block.{index}.layer.0", f"block.{index}.layer.1"
        for name in ("q", "k", "v"):
            yield f"{attention}.SelfAttention.{name}.weight", (inner, width)
        yield f"{attention}.SelfAttention.o.weight", (width, inner)
        for name in inputs:
            yield f"{mlp}.DenseReluDense.{name}.weight", (hidden, width)
        yield f"{mlp}.DenseReluDense.wo.weight", (width, hidden)
        for layer in (attention, mlp):
            yield f"{layer}.layer_norm.weight", (width,)


class T5Tokenizer:
    """Turns captions into token ids, the end token behind each."""

    def __init__(self, folder: Path, max_length: int) -> None:
        """With the vocabulary in a folder: `tokenizer.json`, or `spiece.model`.

        What is longer than `max_length` tokens, the end token counted, is cut off. A `ModelError` if the folder's file
        is unusable.
        """
        self.folder, self.max_length = folder, max_length
        self._tokenizer = _read_tokenizer(folder)
        pad, end = self._tokenizer.token_to_id(_PAD), self._tokenizer.token_to_id(_END)
        if pad is None or end is None:
            raise ModelError(f"the tokenizer in {folder} has no {_PAD} and {_END}; it is not that of T5")
        self.pad, self.end = pad, end

    @property
    def vocabulary_size(self) -> int:
        """How many token ids there are, from 0 to the largest."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def __call__(self, captions: Sequence[str], *, length: int | None = None) -> Tokens:
        """`ids` and `mask`, int64 [B, m]; the mask is 0 behind each caption's own tokens.

        Filled up to `length` tokens, or where that is None to one more than the longest caption has, if that is not too
        long.
        """
        import torch

        ids = [[*own[: self.max_length - 1], self.end] for own in self._ids(captions)]
        size = length or min(self.max_length, 1 + max(map(len, ids)))
        filled = [[*own, *[self.pad] * (size - len(own))] for own in ids]
        masks = [[1] * len(own) + [0] * (size - len(own)) for own in ids]
        return {"ids": torch.tensor(filled), "mask": torch.tensor(masks)}

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many tokens captions have, the end token counted, before anything is cut off; imports no torch."""
        return [len(own) + 1 for own in self._ids(captions)]

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        return [own.ids for own in self._tokenizer.encode_batch(list(captions), add_special_tokens=False)]


def _read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder; a `ModelError` if its file is unusable."""
    with tokenizer_errors(folder):
        is_json = (folder / TOKENIZER_JSON).is_file()
        return read_tokenizer_json(folder) if is_json else _unigram(folder / "spiece.model")


def _unigram(file: Path) -> Tokenizer:
    """The tokenizer in a file of SentencePiece, built as transformers builds T5's."""
    pieces, normalization = read_sentencepiece(file.read_bytes())
    unknown = next((index for index, (piece, _) in enumerate(pieces) if piece == "<unk>"), None)
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    if normalization:
        tokenizer.normalizer = normalizers.Precompiled(normalization)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.add_special_tokens([_PAD, _END])
    return tokenizer
