"""A bridge as a SAELens folder, and back: `cfg.json` of architecture `abstopk`, and `sae_weights.safetensors`.

SAELens knows this architecture since 6.53.0, so that `SAE.load_from_disk` reads the folder as it stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.bridge import Bridge, BridgeSet
from bridges.io.files import write_json, write_tensors
from bridges.io.tensors import check_tensors, read_keys, read_safetensors
from bridges.models.loading import ModelSource, as_residual
from bridges.models.residual import Site

SAE_LENS_VERSION = "6.53.0"
"""The first version with `abstopk`; its layout is what is written."""
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
MEASURED_FILE = "bridge.safetensors"
"""What `fit` measured beside the weights (R, gains, medians, limits): a SAE has no place for it; SAELens ignores it."""
_HOOKS = {"attn": "hook_resid_pre", "block": "hook_resid_pre", "mlp": "hook_resid_mid", "final": "hook_resid_post"}
"""TransformerLens' name of the stream at each kind of site."""
_PLAIN = {
    "architecture": "abstopk",
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}
"""The settings of a SAE that computes what a bridge does."""


def export_sae(
    bridge_set: BridgeSet,
    site: str | int,
    folder: str | Path,
    *,
    dense: ModelSource | None = None,
    model_name: str | None = None,
) -> None:
    """Write the bridge of one site as a SAE of the dense model, which `sae_lens.SAE.load_from_disk(folder)` reads.

    The SAE's input is the dense stream at the bridge's dense site as the model computes it, not normalised; its
    features are the sparse model's channels there, of both signs; its reconstruction is `decode(encode(h))`.

    Args:
        bridge_set: the bridges.
        site: the bridge to write, by sparse site or index.
        folder: gets `cfg.json`, `sae_weights.safetensors` and `bridge.safetensors`; `~` is expanded.
        dense: the dense model, needed only where the dense site is `final`, for the number of its last layer.
            ValueError if the bridges were fitted to another.
        model_name: what SAELens is to load as the model; by default the name that the bridges were fitted under.

    >>> import bridges, tempfile
    >>> from bridges.io.files import read_json
    >>> bridge_set = bridges.load_bridges()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_sae(bridge_set, "1.mlp", folder)
    ...     config = read_json(f"{folder}/cfg.json")
    >>> config["architecture"], config["d_in"], config["d_sae"], config["k"], config["metadata"]["hook_name"]
    ('abstopk', 128, 2048, 512, 'blocks.1.hook_resid_mid')
    """
    bridge, (dense_site, sparse_site) = bridge_set[site], bridge_set.site_pairs[bridge_set.index(site)]
    sides = {side: bridge_set.provenance.get(side, {}).get("name") for side in ("dense", "sparse")}
    metadata = {
        "sae_lens_version": SAE_LENS_VERSION,
        "model_name": model_name or sides["dense"],
        "hook_name": _hook_name(bridge_set, Site(dense_site), dense),
        "dense_site": str(dense_site),
        "sparse_site": str(sparse_site),
        "sparse_model_name": sides["sparse"],
    }
    d_sparse, d_dense = bridge.encoder_weight.shape
    dtype = str(bridge.encoder_weight.dtype).removeprefix("torch.")
    config = {**_PLAIN, "d_in": d_dense, "d_sae": d_sparse, "k": bridge.k, "dtype": dtype, "device": "cpu"}
    folder = Path(folder).expanduser()
    write_tensors(folder / WEIGHTS_FILE, _sae_weights(bridge))
    write_tensors(folder / MEASURED_FILE, dict(bridge.named_buffers()))
    write_json(folder / CONFIG_FILE, {**config, "metadata": metadata})


def load_sae(folder: str | Path) -> Bridge:
    """The bridge in a SAELens folder of architecture `abstopk`, written by `export_sae` or by SAELens.

    What `export_sae` wrote comes back bit for bit. Where SAELens wrote the folder there is no `bridge.safetensors`, and
    what `fit` measures is as in a new `Bridge`. Raises OSError where a file is missing; ValueError, naming the file,
    for a damaged one and for a SAE that computes something else than a bridge.

    >>> import bridges, tempfile
    >>> bridge_set = bridges.load_bridges()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_sae(bridge_set, "1.mlp", folder)
    ...     bridge = load_sae(folder)
    >>> all(torch.equal(tensor, bridge.state_dict()[name]) for name, tensor in bridge_set["1.mlp"].state_dict().items())
    True
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"folder={str(folder)!r} is not a SAELens folder: it has no {CONFIG_FILE}")
    config = read_keys(folder / CONFIG_FILE)
    for name, wanted in _PLAIN.items():
        if config.get(name) != wanted:
            raise ValueError(
                f"{folder / CONFIG_FILE}: {name}={config.get(name)!r}, but a bridge is a SAE with {name}={wanted!r}"
            )
    bridge = _empty_bridge(config, folder / CONFIG_FILE)
    weights, expected = read_safetensors(folder / WEIGHTS_FILE), _sae_weights(bridge)
    check_tensors(weights, expected, folder / WEIGHTS_FILE)
    for name, target in expected.items():
        target.copy_(weights[name])
    if (folder / MEASURED_FILE).is_file():
        measured, buffers = read_safetensors(folder / MEASURED_FILE), dict(bridge.named_buffers())
        check_tensors(measured, buffers, folder / MEASURED_FILE)
        for name, buffer in buffers.items():
            buffer.copy_(measured[name])
    return bridge


def _sae_weights(bridge: Bridge) -> dict[str, Tensor]:
    """The bridge's weights under SAELens' names and in its shapes, as views."""
    return {
        "W_enc": bridge.encoder_weight.data.T,
        "b_enc": bridge.encoder_bias.data,
        "W_dec": bridge.decoder_weight.data.T,
        "b_dec": bridge.decoder_bias.data,
    }


def _empty_bridge(config: dict[str, Any], path: Path) -> Bridge:
    """A bridge of the widths, k and dtype that a `cfg.json` states."""
    sizes = {name: config.get(name) for name in ("d_in", "d_sae", "k")}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{path}: {name}={size!r} must be an integer")
    dtype = getattr(torch, str(config.get("dtype")).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path}: dtype={config.get('dtype')!r} is not a dtype of torch")
    return Bridge(config["d_in"], config["d_sae"], config["k"], dtype)


def _hook_name(bridge_set: BridgeSet, site: Site, dense: ModelSource | None) -> str:
    """TransformerLens' name of the stream at a dense site."""
    layer = site.layer
    if dense is not None:
        residual_model = as_residual(dense)
        bridge_set.check_models(residual_model)
        layer = max(one.layer for one in residual_model.sites if one.layer is not None) if layer is None else layer
    if layer is None:
        raise ValueError(
            f"site={str(site)!r} is the output of the dense model's last layer, whose number only the model knows; "
            "pass dense="
        )
    return f"blocks.{layer}.{_HOOKS[site.kind]}"
