import pytest

from bridges.models.sparse.model import SparseConfig


def test_defaults_are_those_of_the_paper():
    config = SparseConfig()
    assert (config.rms_norm, config.tied_unembed, config.sink, config.afrac) == (True, False, True, 0.25)
    assert len(config.locations) == 8 and not any(location.startswith("resid") for location in config.locations)
    assert (config.d_head, config.n_head, config.d_mlp) == (16, 48, 3072)


def test_missing_widths_are_derived_from_the_others():
    assert SparseConfig(d_model=64).n_head == 4
    assert SparseConfig(d_model=64, n_head=2).d_head == 32
    assert SparseConfig(d_model=64, d_head=32).n_head == 2
    free = SparseConfig(d_model=64, n_head=3, d_head=5, d_mlp=7)
    assert (free.n_head, free.d_head, free.d_mlp) == (3, 5, 7)


def test_k_is_a_fraction_of_the_width_at_each_place():
    config = SparseConfig(d_model=30, n_head=3, d_head=4, d_mlp=50, d_pos_emb=9, afrac=0.1)
    assert {
        location: config.kept(location)
        for location in ("attn_in", "attn_q", "attn_out", "mlp_neuron", "resid_post_mlp")
    } == {
        "attn_in": 3,  # of 39
        "attn_q": 1,  # of 12
        "attn_out": 3,
        "mlp_neuron": 5,
        "resid_post_mlp": None,
    }
    assert SparseConfig(afrac=None).kept("attn_in") is None
    own = SparseConfig(d_model=64, d_head=16, afrac_by_location={"attn_q": 0.5})
    assert (own.kept("attn_q"), own.kept("attn_k")) == (32, 16)
    assert SparseConfig.from_dict(own.to_dict()).kept("attn_q") == 32


def test_names_of_transformers_and_old_names_set_the_same_fields():
    config = SparseConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=20, n_mlp=9
    )
    assert (config.d_model, config.n_layer, config.n_head, config.block_size, config.d_mlp) == (64, 3, 2, 20, 9)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (64, 3, False)
    assert "hidden_size" not in config.to_dict()


def test_keys_that_do_not_change_the_function_are_ignored():
    config = SparseConfig(flash=True, debug_nans=True, grad_checkpointing=True, enable_sparse_kernels=True)
    assert not hasattr(config, "flash")
    assert SparseConfig(use_tied_aux_matrix=False, bos_token_id=0, eos_token_id=1, dtype="float32").eos_token_id == 1


def test_save_and_load_give_the_same_configuration(tmp_path):
    config = SparseConfig(d_model=64, afrac=None, d_pos_emb=4, afrac_loctypes=["attn_in", "mlp_in"], pad_token_id=3)
    config.save_pretrained(tmp_path)
    again = SparseConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.afrac_loctypes == "attn_in,mlp_in"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"n_layers": 2}, "n_layers=2 is not a key of SparseConfig; its keys are block_size"),
        ({"d_model": 0}, "d_model=0 must be a positive integer"),
        ({"n_layer": True}, "n_layer=True must be a positive integer"),
        ({"d_mlp": 1.5}, "d_mlp=1.5 must be a positive integer or None"),
        ({"sink": 1}, "sink=1 must be True or False"),
        ({"dropout": 1.0}, r"dropout=1.0 must be a number in \[0, 1\)"),
        ({"afrac": 0.0}, r"afrac=0.0 must be a number in \(0, 1\] or None"),
        ({"afrac_loctypes": "attn_in,mlp"}, "afrac_loctypes='attn_in,mlp' must be locations from attn_in"),
        ({"activation_type": "silu"}, "activation_type='silu' must be gelu or relu"),
        ({"residual_activation_type": "gelu"}, "residual_activation_type='gelu' must be identity or relu"),
        ({"sinusoidal_cat_pos_emb": True}, "d_pos_emb=None must be a width when sinusoidal_cat_pos_emb"),
        ({"d_model": 40}, "d_head=16 does not divide d_model=40"),
        ({"d_model": 40, "n_head": 3}, "n_head=3 does not divide d_model=40"),
        ({"d_model": 16, "afrac": 0.05}, "afrac=0.05 keeps 0 of 16 entries at attn_in"),
        (
            {"d_model": 16, "afrac_by_location": {"mlp_in": 0.05}},
            r"afrac_by_location=\{'mlp_in': 0.05\} keeps 0 of 16 entries at mlp_in; raise it or leave mlp_in out",
        ),
        (
            {"afrac_by_location": {"attn_in": 0}},
            r"afrac_by_location=\{'attn_in': 0\} must be a dict from locations to",
        ),
        (
            {"afrac_by_location": {"mlp": 0.5}},
            "afrac_by_location names mlp; it may name the locations that have an AbsTopK",
        ),
        ({"afrac": None, "afrac_by_location": {"mlp_in": 0.5}}, "names mlp_in; .* none with afrac=None"),
        ({"d_model": 64, "hidden_size": 32}, "hidden_size=32 disagrees with d_model=64"),
        ({"use_tied_aux_matrix": True}, "use_tied_aux_matrix=True is not supported"),
        ({"model_type": "gpt2"}, "model_type='gpt2' must be 'sparse_transformer'"),
    ],
)
def test_an_invalid_configuration_is_refused_by_key(keys, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**keys)
