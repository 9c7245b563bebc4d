"""Each word, in any language, as a fixed random vector: no vocabulary, no weights, nothing to download.

The vector of a word is read off a SHAKE-256 stream of its UTF-8 bytes, so it is the same on every machine, in every
process and in every version of every library. Word order is left to the model's rotary positions.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from moc_jax.config import HashConfig
from moc_jax.shapes import Float32, typed

_VERSION = b"moc_jax hashed word 1:"  # goes into every vector: another one for another way of splitting or hashing
_BEGIN = "\x02"  # a control character, which `split_words` never yields
_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI SYLLABLE")


# Over the kinds that `_kind` gives to each character: a word, or a single character, each with its marks.
_WORD = re.compile("w[wm]*(?:aw[wm]*)*|sm*")


def split_words(text: str) -> list[str]:
    """Words in lower case; in scripts written without spaces every letter is a word of its own.

    Punctuation separates and is dropped (an apostrophe inside a word is kept); symbols such as emoji are words.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("’", "'")
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # joiners and direction marks are invisible
    kinds = "".join(map(_kind, text))
    return [text[word.start() : word.end()] for word in _WORD.finditer(kinds)]


@functools.lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """`w`: part of a word; `s`: a word by itself; `m`: a mark on what precedes; `a`: apostrophe; or a separator."""
    category = unicodedata.category(character)[0]
    if category in "LN":
        return "s" if unicodedata.name(character, "").startswith(_SPACELESS) else "w"
    return "a" if character == "'" else {"M": "m", "S": "s"}.get(category, " ")


class HashedWords:
    """Words hashed to vectors whose entries are uniform with mean 0 and variance 1."""

    batch_size = 256

    def __init__(self, cfg: HashConfig):
        self.dim = cfg.dim
        self._max_tokens = cfg.max_tokens

    @staticmethod
    def fingerprint(cfg: HashConfig) -> str:
        """See `moc_jax.text.encoder_fingerprint`."""
        return hashlib.sha256(_VERSION + str(cfg.dim).encode()).hexdigest()[:16]

    @typed
    def __call__(self, caption: str) -> Float32[np.ndarray, "L E"]:
        """A begin token, then a row per word.

        Raises:
            ValueError: more than `HashConfig.max_tokens` rows.
        """
        return np.stack([_vector(word, self.dim) for word in self._words(caption)])

    def check(self, caption: str) -> None:
        """See `moc_jax.text.TextEncoder`."""
        self._words(caption)

    def _words(self, caption: str) -> list[str]:
        words = [_BEGIN, *split_words(caption)]
        if len(words) > self._max_tokens:
            raise ValueError(
                f"the caption {caption[:60]!r}{'...' * (len(caption) > 60)} has {len(words)} tokens (words and a begin "
                f"token), but text.max_tokens is {self._max_tokens}; shorten it or raise text.max_tokens"
            )
        return words

    def batch(self, captions: Sequence[str]) -> list[Float32[np.ndarray, "_ E"]]:
        """See `moc_jax.text.TextEncoder`."""
        return [self(caption) for caption in captions]


@functools.lru_cache(maxsize=65536)
def _vector(word: str, dim: int) -> Float32[np.ndarray, " E"]:
    stream = hashlib.shake_256(_VERSION + word.encode("utf-8", "surrogatepass")).digest(2 * dim)
    uniform = (np.frombuffer(stream, "<u2").astype(np.float32) + 0.5) / 65536  # in (0, 1)
    return (uniform * 2 - 1) * np.float32(np.sqrt(3))
