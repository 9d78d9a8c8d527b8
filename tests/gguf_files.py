"""A tiny Llama as a GGUF file, written with llama.cpp's own package."""

from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
WORDS = ["<|endoftext|>", "a", "b", "c", "ab", "Ġ"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A layer's modules here and in llama.cpp."""


def tiny_llama():
    """A Llama of two layers over the six words."""
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=4, max_position_embeddings=16, **SHAPE)
    return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(model, path):
    """The model's weights, unquantised, and a tokenizer of the six words."""
    config, weights = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * (len(WORDS) - 1)])
    writer.add_token_merges(["a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for here, there in NAMES.items():
            weight = weights[f"model.layers.{layer}.{here}.weight"]
            if there in ("attn_q", "attn_k"):  # llama.cpp rotates neighbouring channels, transformers two halves
                halves = weight.reshape(config.num_attention_heads, 2, -1, config.hidden_size)
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{there}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
