"""A GPT-2-like decoder with sparse weights and activations (Gao et al. 2025; method.md, sections 5 and 8).

Read: the sublayer's input, after the norm.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from bridges.io.paths import local_folder
from bridges.io.tensors import check_tensors
from bridges.models.attention_mask import position_ids
from bridges.models.sparse.blocks import Block, OutputProjection, RMSNorm, Sink, Trunk, attention_pattern, sinusoids
from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.folder import DOWNLOAD, NONZEROS, locate, read_folder, remove_other_weights
from bridges.models.sparse.nonzeros import write_nonzeros

__all__ = ["SparseConfig", "SparseTransformer"]

INIT_STD = 0.02


class SparseTransformer(PreTrainedModel, GenerationMixin):
    """A weight-sparse transformer (paper 2.1, A.1), with the parameter names of the published checkpoints.

    logits = lm_head(ln_f(h)) + final_logits_bias + bigram_table[input_ids], where h is the stream after the last
    `Block`. A `transformers.PreTrainedModel`: it generates, and `AutoModelForCausalLM` loads it. New models have dense
    random weights; training makes them sparse. `bridges.as_residual(model)` gives it as a `ResidualModel`.

    >>> config = SparseConfig(vocab_size=11, n_layer=2, d_model=32, block_size=8)
    >>> model = SparseTransformer(config).eval()
    >>> input_ids = torch.tensor([[1, 2, 3]])
    >>> model(input_ids).logits.shape  # [batch, seq, vocab]
    torch.Size([1, 3, 11])
    >>> read = []
    >>> handle = model.blocks[0].mlp.c_fc.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    >>> (model(input_ids).logits.shape, (read[0] != 0).sum(-1).tolist())  # AbsTopK keeps a quarter of 32
    (torch.Size([1, 3, 11]), [[8, 8, 8]])
    """

    config_class = SparseConfig
    base_model_prefix = ""
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    config: SparseConfig

    def __init__(self, config: SparseConfig):
        super().__init__(config)
        self.transformer = Trunk(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.final_logits_bias = nn.Parameter(torch.zeros(config.vocab_size))
        table = torch.zeros(config.vocab_size, config.vocab_size) if config.enable_bigram_table else None
        self.bigram_table = None if table is None else nn.Parameter(table)
        self.post_init()
        self._freeze_fixed()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            writes = math.sqrt(2 * self.config.n_layer) if isinstance(module, OutputProjection) else 1
            nn.init.normal_(module.weight, std=INIT_STD / writes)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Sink):
            nn.init.zeros_(module.sink_logit)
        elif module is self:
            self._init_own()

    def _init_own(self) -> None:
        nn.init.zeros_(self.final_logits_bias)
        if self.bigram_table is not None:
            nn.init.zeros_(self.bigram_table)
        wpe = self.transformer.wpe.weight
        if self.config.d_pos_emb is None:
            nn.init.zeros_(wpe)
        elif self.config.sinusoidal_cat_pos_emb:
            wpe.data.copy_(sinusoids(*wpe.shape))

    def _freeze_fixed(self) -> None:
        """Turn off the gradients of parameters that are not trained; transformers turns all on while loading."""
        wpe = self.transformer.wpe.weight
        if self.config.d_pos_emb is None:
            # Zero in a model without positions, not zero in a checkpoint that learned to add them.
            wpe.requires_grad_(wpe.device.type != "meta" and bool(wpe.any()))
        else:
            wpe.requires_grad_(not self.config.sinusoidal_cat_pos_emb)
        if self.bigram_table is not None:
            self.bigram_table.requires_grad_(self.config.learnable_bigram_table)

    @property
    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return list(self.transformer.h)  # pyright: ignore[reportReturnType]

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        position_ids: Int[Tensor, "#b s"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Int[Tensor, "b s"] | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Tensor, " s"] | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, seq, vocab], and the loss in nats per token where `labels` (-100: not counted) are given.

        `attention_mask` [batch, past + seq] is 0 on padding; positions follow it unless `position_ids` are given.
        `logits_to_keep`: the logits of that many last tokens only (0: all), or of the given indices. The hidden
        states are the stream before each layer, then the final norm's output. `cache_position` is ignored; old versions
        of transformers pass it. Raises ValueError when past + seq is over `block_size` or the mask has another shape.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        position_ids, allowed = self.prepare(input_ids, attention_mask, past, position_ids)
        residual, positions = self.embed(input_ids, position_ids), self.positions(position_ids)
        streams = []
        for block in self.blocks:
            streams.append(residual)
            residual = block.attention(residual, positions, allowed, past_key_values)
            residual = block.feed_forward(residual, positions)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.unembed(residual, input_ids, kept)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else _next_token_loss(logits, labels),
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*streams, self.transformer.ln_f(residual)) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        past: int = 0,
        given_ids: Int[Tensor, "#b s"] | None = None,
    ) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "#b 1 s t"]]:
        """Position ids [batch, seq], and which of past + seq keys each query may attend to [1 or batch, 1, seq, keys].

        Raises ValueError when the rows are longer than `block_size` or the mask does not cover them.
        """
        batch, seq = input_ids.shape
        if past + seq > self.config.block_size:
            raise ValueError(
                f"input_ids has rows of {past + seq} tokens; block_size={self.config.block_size} is the most"
            )
        if attention_mask is not None and attention_mask.shape != (batch, past + seq):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask has shape {shape}; it must cover the tokens, {(batch, past + seq)}")
        if given_ids is None and attention_mask is not None:
            given_ids = position_ids(attention_mask)[:, past:]
        elif given_ids is None:
            given_ids = torch.arange(past, past + seq, device=input_ids.device)[None]
        return given_ids.expand(batch, seq), attention_pattern(seq, past, attention_mask, input_ids.device)

    def embed(self, input_ids: Int[Tensor, "b s"], position_ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s d_model"]:
        """The stream at the first site."""
        embedded = self.transformer.wte(input_ids)
        if self.config.d_pos_emb is None:
            embedded = embedded + self.transformer.wpe(position_ids)
        return self.transformer.drop(embedded)

    def positions(self, position_ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s d_pos"] | None:
        """The position channels concatenated to every read, None where the model has none."""
        if self.config.d_pos_emb is None:
            return None
        positions = self.transformer.wpe(position_ids)
        return self.transformer.drop(positions) if self.config.dropout_cat_pos_emb else positions

    def unembed(
        self,
        residual: Float[Tensor, "b s d_model"],
        input_ids: Int[Tensor, "b s"],
        kept: slice | Tensor = slice(None),
    ) -> Float[Tensor, "b kept vocab"]:
        """Logits from the stream at `final`, at the `kept` positions; `input_ids` index the bigram table."""
        logits = self.lm_head(self.transformer.ln_f(residual[:, kept])) + self.final_logits_bias
        return logits if self.bigram_table is None else logits + F.embedding(input_ids[:, kept], self.bigram_table)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: SparseConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model from a folder or a hub id, in evaluation mode.

        Reads what `save_pretrained` writes, dense or sparse, and both published layouts (`beeg_config.json` with
        `final_model.pt`; `config.json` of type circuitgpt with safetensors); their remote code is never run. `config`
        replaces the folder's. Other keyword arguments (`dtype`, `device_map`, `revision`, ...) are those of
        transformers. Raises OSError when a file is missing; ValueError, naming the file and the key or tensor, when
        one is damaged or does not fit.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        path = str(local_folder(pretrained_model_name_or_path) or pretrained_model_name_or_path)
        folder = locate(path, **{key: kwargs.pop(key) for key in DOWNLOAD if key in kwargs})
        checkpoint = read_folder(folder)
        config = checkpoint.config if config is None else config
        check_tensors(checkpoint.tensors, _stored(config), checkpoint.source)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=checkpoint.tensors, **kwargs)
        model: SparseTransformer = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = path
        if kwargs.get("generation_config") is None and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model._freeze_fixed()
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *,
        sparse: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write `config.json`, `generation_config.json` and the weights, each file whole or not at all.

        With `sparse`, the weights are `sparse_model.safetensors` and hold nonzeros only (see `nonzeros.py`);
        otherwise `kwargs` are those of transformers. Weights that an earlier save wrote in the other form are removed.
        Raises ValueError for `sparse` with `push_to_hub`.
        """
        if sparse and kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True needs sparse=False; save first, then use huggingface_hub.upload_folder")
        folder = Path(save_directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            if not sparse:
                kwargs.setdefault("repo_id", folder.resolve().name)
                super().save_pretrained(temporary, is_main_process, state_dict, **kwargs)
            elif is_main_process:
                self._save_nonzeros(Path(temporary), self.state_dict() if state_dict is None else state_dict)
            written = sorted(Path(temporary).iterdir())
            for file in written:
                os.replace(file, folder / file.name)
        remove_other_weights(folder, {file.name for file in written})

    def _save_nonzeros(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)  # pyright: ignore[reportOptionalMemberAccess]
        tied = self.all_tied_weights_keys
        write_nonzeros(folder / NONZEROS, {name: value for name, value in tensors.items() if name not in tied})


def _stored(config: SparseConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint of this configuration, on the meta device."""
    with torch.device("meta"):
        model = SparseTransformer(config)
    return {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}


def _next_token_loss(logits: Float[Tensor, "b s vocab"], labels: Int[Tensor, "b s"]) -> Float[Tensor, ""]:
    logits = logits[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels[:, 1:].flatten().to(logits.device), ignore_index=-100)


AutoConfig.register(SparseConfig.model_type, SparseConfig, exist_ok=True)
AutoModelForCausalLM.register(SparseConfig, SparseTransformer, exist_ok=True)
