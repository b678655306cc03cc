"""Files of tokenizers, read by Hugging Face's `tokenizers`; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_JSON = "tokenizer.json"


@contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """Raises a `ModelError` for what goes wrong when the tokenizer in a folder is read."""
    try:
        yield
    except BaseException as error:
        # The tokenizers library raises plain Exception; where it panics, what is raised is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the tokenizer in {folder} cannot be read ({reason}); download it again") from error


def read_tokenizer_json(folder: Path) -> Tokenizer:
    """The tokenizer in a folder's `tokenizer.json`, which neither truncates nor pads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
