"""From text and records on disk to the tokens of a run, and the files that these lie in."""

from .binidx import CorpusSize, corpus_prefix, open_corpus, write_corpus
from .build import build_corpus
from .corpus import Corpus, Tokens
from .prepared import DataInfo, TokenData, open_data, prepare_data
from .records import BadRecords
from .text import Text, find_text, text_digest

__all__ = [
    "BadRecords",
    "Corpus",
    "CorpusSize",
    "DataInfo",
    "Text",
    "TokenData",
    "Tokens",
    "build_corpus",
    "corpus_prefix",
    "find_text",
    "open_corpus",
    "open_data",
    "prepare_data",
    "text_digest",
    "write_corpus",
]
