"""Multimodal models: their language model, though its vision tower has as many layers."""

import pytest
import torch
import transformers as hf
from pairs import join, sparse_model, with_units

from bridges.models.loading import as_residual
from bridges.steering.edits import Edit
from bridges.steering.steer import steer

VOCAB, SPLIT = 17, ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"]
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
TEXT |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def llava():
    text, vision = hf.LlamaConfig(**TEXT), hf.CLIPVisionConfig(**VISION)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=16)
    return hf.LlavaForConditionalGeneration(config)


def gemma3():
    ids = {"image_token_index": 16, "boi_token_index": 15, "eoi_token_index": 14, "mm_tokens_per_image": 4}
    text = TEXT | {"sliding_window": 8}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=VISION, **ids))


def qwen2_vl():
    ids = {"image_token_id": 16, "video_token_id": 15, "vision_start_token_id": 14, "vision_end_token_id": 13}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=TEXT | ROTARY, vision_config=vision, **ids))


def smolvlm():
    config = hf.SmolVLMConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=16)
    return hf.SmolVLMForConditionalGeneration(config)


def mistral3():
    text, vision = hf.MistralConfig(**TEXT), hf.PixtralVisionConfig(**VISION, head_dim=8)
    config = hf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=16)
    return hf.Mistral3ForConditionalGeneration(config)


FAMILIES = [llava, gemma3, qwen2_vl, smolvlm, mistral3]


def built(family):
    torch.manual_seed(0)
    model = family().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1) * 0.5, 0.3)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_model_is_the_chain(family):
    model, ids = built(family), torch.randint(3, 13, (2, 6), generator=torch.Generator().manual_seed(3))
    chain = as_residual(model)
    assert chain.model is model and chain.sites == SPLIT and (chain.d_model, chain.vocab_size) == (16, VOCAB)
    with torch.no_grad():
        residuals, logits = chain.residuals(ids)
        assert torch.equal(logits, model(ids, use_cache=False).logits)
        for site, residual in zip(chain.sites, residuals, strict=True):
            assert torch.equal(chain.run_from(site, residual, ids), logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["sparse", "encoder"])
def test_a_multimodal_model_is_steered_on_text(family, source):
    """Decoding with a cache against passes over the whole row."""
    model, ids = built(family), torch.randint(3, 13, (2, 6), generator=torch.Generator().manual_seed(3))
    pair = with_units(join(model, sparse_model(dtype=torch.float32)))
    edits = [Edit("0.mlp", 1, 2.0), Edit("1.attn", 2, -1.0, "scale", [0, 2]), Edit("final", 3, 1.0, "add", -1)]
    how = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad(), steer(model, pair.bridge_set, edits, sparse=pair.sparse, source=source):
        found = model.generate(ids, **how)
        whole = model.generate(ids, use_cache=False, **how)
        first = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits[0], first, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(found.logits[0], model(ids, use_cache=False).logits[:, -1], atol=1e-3)


def test_a_prefix_model_is_no_decoder():
    """PaliGemma's prompt tokens read those that follow."""
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT), vision_config=hf.SiglipVisionConfig(**VISION), image_token_index=16
    )
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="model='paligemma' is not a decoder"):
        as_residual(hf.PaliGemmaForConditionalGeneration(config).eval())
