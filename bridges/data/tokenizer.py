"""A small byte-level BPE for Python, cut so that the tasks' cues and answers are whole tokens."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Cuts text into pieces that BPE never merges across. A string's opening (' and closing ') are pieces of their own
# even amid other punctuation, otherwise '), and "): would hide the answer of the quote task in longer tokens. A line
# break takes the whole indentation after it, so that a change of depth is one token.
PIECES = r"""\(['"]|['"]\)|\n[\n ]*| ?[\p{L}_]+| ?\p{N}| ?(?:(?!\(['"]|['"]\))[^\s\p{L}\p{N}_])+|[^\S\n]+(?!\S)|\s+"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens, learned from `texts`; any text is encoded and decoded without loss.

    Token 0, `<|endoftext|>`, is beginning, end and padding at once. Every digit is a token of its own. Raises
    ValueError if `vocab_size` is too small for the 256 bytes and the special token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and one special token need at least 257")
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
