"""The glossary of dimension letters, jaxtyping's aliases and the one decorator that checks shapes at trace time.

| letter | dimension |
|---|---|
| B | scenes in a batch |
| N | tokens of a scene: the text block, then the video block |
| L | text tokens (the first L of N) |
| V | video tokens (the last V of N) |
| H | attention heads |
| D | size of a head |
| M | width of the model |
| C | chunks in the chunk table |
| K | slots for picked chunks (top_k, and drop-in slots in training) |
| S | shots |
| P | captions: the global one, then one per shot (S + 1) |
| F | frames of a scene, all shots one after another (latent frames unless said otherwise) |
| Y, X | rows and columns of a frame |
| Z | channels of a latent |
| E | width of a text embedding |
"""

from beartype import beartype
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped, UInt8, jaxtyped

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "Int32", "Key", "Shaped", "UInt8", "typed"]


def typed(function):
    """Checks the array shapes and types in `function`'s signature whenever it is called or traced."""
    return jaxtyped(typechecker=beartype)(function)
