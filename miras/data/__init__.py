"""From text to token windows: a corpus, a tokenizer, and the packed file that training reads."""

from miras.data.corpus import Corpus, Split, load_corpus
from miras.data.tokenizer import load_tokenizer, tokenizer_hash
from miras.data.windows import TokenWindows, pack

__all__ = ["Corpus", "Split", "TokenWindows", "load_corpus", "load_tokenizer", "pack", "tokenizer_hash"]
