"""A small byte-level BPE tokenizer for Python in which the cues and answers of the tasks are single tokens."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Splits text into pieces; BPE merges within a piece only. (' and ') are pieces of their own, also next to other
# punctuation: otherwise the answer of the quote task would be part of longer tokens such as '), and "):. A line break
# and the indentation after it are one piece, so that a change of depth is one token.
PIECES = r"""\(['"]|['"]\)|\n[\n ]*| ?[\p{L}_]+| ?\p{N}| ?(?:(?!\(['"]|['"]\))[^\s\p{L}\p{N}_])+|[^\S\n]+(?!\S)|\s+"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` tokens on `texts`; it encodes and decodes any text without loss.

    Token 0, `<|endoftext|>`, is the BOS, EOS and padding token. Every digit is a token of its own. Raises ValueError if
    `vocab_size` is too small for the 256 bytes and the special token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257, for 256 bytes and one special token")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
