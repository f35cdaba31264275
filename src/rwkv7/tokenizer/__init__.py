"""From text to token ids and back: single bytes (built in), RWKV's World vocabulary, or a file's.

A tokenizer here never loses a byte: text that is not UTF-8 goes in and comes out unchanged.
`StreamDecoder` turns ids that arrive one by one into whole characters. Models and generation know
ids alone, and nothing of this package.
"""

from .builtin import ByteTokenizer, Tokenizer, WorldTokenizer
from .choice import get_tokenizer, tokenizer_of
from .stream import StreamDecoder

__all__ = [
    "ByteTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WorldTokenizer",
    "get_tokenizer",
    "tokenizer_of",
]
