"""The configuration of a weight-sparse transformer (method.md, sections 5 and 8).

Read: the sublayer's input, after the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import GenerationConfig, PretrainedConfig

AFRAC_LOCATIONS = (
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
    "resid_post_attn",
    "resid_post_mlp",
)
"""The locations of AbsTopK in a layer, as the paper calls them (A.1)."""

IGNORED_KEYS = frozenset({"flash", "grad_checkpointing", "debug_nans", "enable_sparse_kernels"})
"""Keys of published checkpoints that do not change the function."""

# Written by transformers, or in files made with it; none of them changes the function.
# fmt: off
_LIBRARY_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_experts_implementation",
    "_experts_implementation_internal", "_name_or_path", "architectures", "attn_implementation", "bos_token_id",
    "custom_pipelines", "dtype", "eos_token_id", "experts_implementation", "is_decoder", "model_type",
    "name_or_path", "num_labels", "output_attentions", "pad_token_id", "per_layer_config", "quantization_config",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    "use_return_dict",
    # Of transformers 4, some versions of which write all of them.
    "add_cross_attention", "cross_attention_hidden_size", "decoder_start_token_id", "finetuning_task", "prefix",
    "pruned_heads", "sep_token_id", "tf_legacy_loss", "tie_encoder_decoder", "torchscript", "use_bfloat16",
})
# fmt: on


class SparseConfig(PretrainedConfig):
    """The shape and options of a `SparseTransformer`; its fields are the keys of the published checkpoints.

    `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `max_position_embeddings` and `tie_word_embeddings` are
    transformers' names of `d_model`, `n_layer`, `n_head`, `block_size` and `tied_unembed`; `n_mlp` is an old name of
    `d_mlp`. Defaults are the paper's (A.1). Raises ValueError for an unknown key, a value out of range, or two names of
    one field with different values.

    >>> config = SparseConfig(d_model=64, d_head=16)
    >>> config.n_head, config.d_mlp, config.kept("mlp_neuron")  # a quarter of 256 neurons
    (4, 256, 64)
    >>> SparseConfig(d_model=0)
    Traceback (most recent call last):
    ValueError: d_model=0 must be a positive integer
    """

    model_type = "sparse_transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tied_unembed",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    block_size: int = 1024
    """The largest number of tokens in a row."""
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int | None = None
    """None: d_model / d_head."""
    d_head: int | None = None
    """None: d_model / n_head, or 16 when n_head is None too."""
    d_model: int = 768
    d_mlp: int | None = None
    """Neurons per layer; None: 4 d_model."""
    dropout: float = 0.0
    """Probability of dropout after the embedding, on attention weights and on each sublayer's output."""
    bias: bool = True
    """Whether the matrices inside the layers have biases."""
    ln_bias: bool = True
    """Whether a LayerNorm has a bias; an RMSNorm never has."""
    rms_norm: bool = True
    """RMSNorm if True, LayerNorm if False."""
    residual_activation_type: str = "identity"
    """`identity`, or `relu` on the stream after every sublayer."""
    activation_type: str = "gelu"
    """Activation of the MLP: `gelu` (exact, with erf) or `relu`."""
    afrac: float | None = 0.25
    """AbsTopK keeps int(afrac * size) entries at each of `afrac_loctypes`; None: no AbsTopK anywhere."""
    afrac_loctypes: str = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"
    """Locations of AbsTopK, from `AFRAC_LOCATIONS`, comma-separated or as a list."""
    afrac_by_location: dict[str, float] | None = None
    """The fraction at some of these locations, in place of `afrac`: {"attn_q": 0.25}; no published key."""
    tied_unembed: bool = False
    """Whether the unembedding is the embedding's matrix."""
    tokenizer_name: str | None = None
    enable_bigram_table: bool = False
    """Whether a [vocab_size, vocab_size] table, row = current token, is added to the logits."""
    learnable_bigram_table: bool = False
    """Whether that table gets gradients."""
    d_pos_emb: int | None = None
    """Width of the position channels concatenated to every read; None: positions are added to the embedding."""
    sinusoidal_cat_pos_emb: bool = False
    """Whether those channels are a fixed table of sines and cosines."""
    dropout_cat_pos_emb: bool = False
    """Whether those channels have dropout."""
    sink: bool = True
    """Whether each head has an attention sink: a slot in the softmax with its own logit and zero value."""

    def __init__(self, **keys: Any):
        if keys.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"model_type={keys['model_type']!r} must be {self.model_type!r}; "
                "SparseTransformer.from_pretrained also reads circuitgpt"
            )
        own, common = _split_keys(keys)
        super().__init__(**common)
        for name in FIELDS:
            setattr(self, name, own.get(name, getattr(type(self), name)))
        if not isinstance(self.afrac_loctypes, str):
            self.afrac_loctypes = ",".join(self.afrac_loctypes)
        _validate(self)
        self._derive()
        _validate_k(self)

    def _derive(self) -> None:
        if self.n_head is None and self.d_head is None:
            self.d_head = 16
        self.n_head = self.n_head or _divide(self, "d_head")
        self.d_head = self.d_head or _divide(self, "n_head")
        self.d_mlp = self.d_mlp or 4 * self.d_model

    @property
    def d_read(self) -> int:
        """The number of channels that a sublayer reads: the stream's and the positions'."""
        return self.d_model + (self.d_pos_emb or 0)

    @property
    def locations(self) -> tuple[str, ...]:
        """The locations that have an AbsTopK; none where `afrac` is None."""
        return tuple(p.strip() for p in self.afrac_loctypes.split(",") if p.strip()) if self.afrac is not None else ()

    def fraction_at(self, location: str) -> str:
        """The setting that a location's fraction comes from, for messages."""
        own = (self.afrac_by_location or {}).get(location)
        return f"afrac={self.afrac}" if own is None else f"afrac_by_location={{'{location}': {own}}}"

    def kept(self, location: str) -> int | None:
        """How many entries AbsTopK keeps at a location, None at a location without AbsTopK."""
        if self.afrac is None or location not in self.locations:
            return None
        return int((self.afrac_by_location or {}).get(location, self.afrac) * _sizes(self)[location])


FIELDS = tuple(name for name, kind in SparseConfig.__annotations__.items() if not kind.startswith("ClassVar"))
"""The keys of method.md section 8 that change the function, and tokenizer_name."""


def _split_keys(keys: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of `SparseConfig` under the fields' names, and those of transformers."""
    if keys.get("use_tied_aux_matrix"):
        raise ValueError("use_tied_aux_matrix=True is not supported; only checkpoints with false can be read")
    known_elsewhere = _LIBRARY_KEYS | set(PretrainedConfig().to_dict()) | set(GenerationConfig().to_dict())
    aliases = {**SparseConfig.attribute_map, "n_mlp": "d_mlp"}
    own: dict[str, Any] = {}
    common: dict[str, Any] = {}
    for key, value in keys.items():
        name = aliases.get(key, key)
        if name in FIELDS:
            if name in own and own[name] != value:
                raise ValueError(f"{key}={value!r} disagrees with {name}={own[name]!r}; give one of them")
            own[name] = value
        elif key in known_elsewhere:
            common[key] = value
        elif key not in IGNORED_KEYS and key != "use_tied_aux_matrix":
            raise ValueError(f"{key}={value!r} is not a key of SparseConfig; its keys are {', '.join(FIELDS)}")
    return own, common


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("block_size", "vocab_size", "n_layer", "d_model"), (_is_count, "a positive integer")),
    **dict.fromkeys(
        ("n_head", "d_head", "d_mlp", "d_pos_emb"),
        (lambda value: value is None or _is_count(value), "a positive integer or None"),
    ),
    **dict.fromkeys(
        (name for name in FIELDS if SparseConfig.__annotations__[name] == "bool"),
        (lambda value: isinstance(value, bool), "True or False"),
    ),
    "dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "afrac": (
        lambda value: value is None or _is_fraction(value),
        "a number in (0, 1] or None",
    ),
    "afrac_by_location": (
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_fraction, value.values()))),
        "a dict from locations to numbers in (0, 1], or None",
    ),
    "residual_activation_type": (lambda value: value in ("identity", "relu"), "identity or relu"),
    "activation_type": (lambda value: value in ("gelu", "relu"), "gelu or relu"),
}
"""Per field, what its value must be, as a test and in words."""


def _validate(config: SparseConfig) -> None:
    for name, (holds, wanted) in _RULES.items():
        value = getattr(config, name)
        if not holds(value):
            raise ValueError(f"{name}={value!r} must be {wanted}")
    if not set(config.locations) <= set(AFRAC_LOCATIONS):
        raise ValueError(
            f"afrac_loctypes={config.afrac_loctypes!r} must be locations from {', '.join(AFRAC_LOCATIONS)}"
        )
    if elsewhere := set(config.afrac_by_location or ()) - set(config.locations):
        raise ValueError(
            f"afrac_by_location names {', '.join(sorted(elsewhere))}; it may name the locations that have an AbsTopK, "
            f"{', '.join(config.locations) or 'of which there are none with afrac=None'}"
        )
    if config.d_pos_emb is None and (config.sinusoidal_cat_pos_emb or config.dropout_cat_pos_emb):
        raise ValueError("d_pos_emb=None must be a width when sinusoidal_cat_pos_emb or dropout_cat_pos_emb is True")


def _validate_k(config: SparseConfig) -> None:
    for location in config.locations:
        if config.kept(location) == 0:
            what, size = config.fraction_at(location), _sizes(config)[location]
            raise ValueError(f"{what} keeps 0 of {size} entries at {location}; raise it or leave {location} out")


def _sizes(config: SparseConfig) -> dict[str, int]:
    """The width of the tensor at each location."""
    assert config.n_head and config.d_head and config.d_mlp
    heads = config.n_head * config.d_head
    widths = {"attn_in": config.d_read, "mlp_in": config.d_read, "mlp_neuron": config.d_mlp}
    widths |= {"attn_q": heads, "attn_k": heads, "attn_v": heads}
    return {location: widths.get(location, config.d_model) for location in AFRAC_LOCATIONS}


def _divide(config: SparseConfig, name: str) -> int:
    value = getattr(config, name)
    if config.d_model % value:
        raise ValueError(f"{name}={value} does not divide d_model={config.d_model}; give both n_head and d_head")
    return config.d_model // value
