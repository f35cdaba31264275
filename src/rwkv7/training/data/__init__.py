"""From text and records on disk to the tokens of a run, and the files that these lie in."""

from .binidx import CorpusSize, corpus_prefix, open_corpus, write_corpus
from .build import build_corpus
from .chat import (
    ChatData,
    Conversations,
    chat_digest,
    count_chat_tokens,
    open_chat,
    prepare_chat,
)
from .corpus import Corpus, Tokens
from .prepared import DataInfo, TokenData, count_tokens, open_data, prepare_data
from .records import ON_BAD, BadRecords
from .text import Text, find_text, text_digest

__all__ = [
    "ON_BAD",
    "BadRecords",
    "ChatData",
    "Conversations",
    "Corpus",
    "CorpusSize",
    "DataInfo",
    "Text",
    "TokenData",
    "Tokens",
    "build_corpus",
    "chat_digest",
    "corpus_prefix",
    "count_chat_tokens",
    "count_tokens",
    "find_text",
    "open_chat",
    "open_corpus",
    "open_data",
    "prepare_chat",
    "prepare_data",
    "text_digest",
    "write_corpus",
]
