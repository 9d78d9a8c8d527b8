"""Models with an encoder are refused in one line, also inside a wrapper."""

import pytest
import transformers as hf
from torch import nn

from bridges.models.loading import as_residual

SHAPE = {"vocab_size": 61, "d_model": 32}
LAYERS = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
GEMMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
GEMMA |= {"num_key_value_heads": 2, "vocab_size": 61}
BERT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(**SHAPE, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def t5gemma():
    halves = {side: hf.T5GemmaModuleConfig(**GEMMA) for side in ("encoder", "decoder")}
    return hf.T5GemmaForConditionalGeneration(hf.T5GemmaConfig(**halves, vocab_size=61))


def whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SHAPE, **LAYERS, **sizes, **ids))


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**SHAPE, **LAYERS, max_position_embeddings=64))


def two_berts():
    decoder = hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**BERT), decoder)
    return hf.EncoderDecoderModel(config)


@pytest.mark.parametrize("build", [t5, t5gemma, whisper, bart, two_berts])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_an_encoder_decoder_is_refused_in_one_line(build, wrap):
    model = build()
    refused = rf"^model='{model.config.model_type}' is an encoder-decoder \({type(model).__name__}\); bridges need a"
    with pytest.raises(ValueError, match=refused):
        as_residual(wrap(model))
