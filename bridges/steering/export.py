"""Fixed edits as plain vectors: tensors, a safetensors file, or a control vector for llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.io.files import replacing, write_tensors
from bridges.models.loading import as_residual
from bridges.models.residual import ResidualModel, Site
from bridges.steering.edits import Edit, as_edit_list, check_edits


def directions(
    bridge_set: BridgeSet, edits: Edit | Sequence[Edit], strength: float = 1.0
) -> dict[str, Float[Tensor, " d_dense"]]:
    """Return what fixed edits add to the dense stream at every position (`at="residual"`), by dense site.

    Source: method.md, section 4. The vectors are [d_dense]; edits of one site sum. Raises ValueError for an edit that
    is not one number added at every position, or that these bridges cannot carry over.

    >>> import bridges, torch
    >>> bridge = bridges.Bridge(d_dense=2, d_sparse=3, k=1)  # by hand: fit() sets all of this
    >>> bridge.decoder_weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> for units in (bridge.rms_dense, bridge.rms_sparse, bridge.gain_sparse):
    ...     _ = units.fill_(1.0)
    >>> bridge_set = bridges.BridgeSet([("0.mlp", "0.mlp")], [bridge])
    >>> directions(bridge_set, [Edit("0.mlp", 1, 2.0, "add"), Edit("0.mlp", 0, -1.0, "add")])
    {'0.mlp': tensor([3., 6.])}
    """
    found: dict[str, Tensor] = {}
    edits = as_edit_list(edits)
    check_edits(bridge_set, edits, strength)
    for edit in edits:
        if not edit.constant:
            raise ValueError(
                f"mode={edit.mode!r} at channel={edit.channel}: only an edit that adds one number at every position is "
                "a fixed direction"
            )
        bridge, (dense_site, _) = bridge_set[edit.site], bridge_set.site_pairs[bridge_set.index(edit.site)]
        delta = strength * edit.value * bridge.read_columns([edit.channel])[0]
        found[dense_site] = found[dense_site] + delta if dense_site in found else delta
    return found


def export_direction(
    dense: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    edits: Edit | Sequence[Edit],
    path: str | Path,
    *,
    strength: float = 1.0,
) -> None:
    """Write fixed edits as plain vectors, for use without this library.

    `path` ends in `.safetensors` (one vector [d_dense] per dense site, to be added to the stream there) or in `.gguf`
    (a control vector that llama.cpp takes with `--control-vector`; needs the gguf package). `dense` is a model object,
    a `ResidualModel`, a folder or a hub id; only a control vector needs it, for the layers.

    llama.cpp adds `direction.N` to the output of layer N, from 1 on. So its vectors can stand at the sites `2.attn`
    (the output of layer 1), `3.attn`, ..., and `final`. Raises ValueError for another site, another file name, or an
    edit that is not a fixed direction.

    >>> import bridges, torch
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import load_file
    >>> dense = bridges.load_pair().dense
    >>> bridge = bridges.Bridge(d_dense=64, d_sparse=3, k=1)  # by hand: fit() sets all of this
    >>> for units in (bridge.rms_dense, bridge.rms_sparse, bridge.gain_sparse):
    ...     _ = units.fill_(1.0)
    >>> bridge_set = bridges.BridgeSet([("0.mlp", "0.mlp")], [bridge])
    >>> with TemporaryDirectory() as folder:
    ...     export_direction(dense, bridge_set, Edit("0.mlp", 1, 2.0, "add"), f"{folder}/direction.safetensors")
    ...     {site: vector.shape for site, vector in load_file(f"{folder}/direction.safetensors").items()}
    {'0.mlp': torch.Size([64])}
    """
    path, vectors = Path(path), directions(bridge_set, edits, strength)
    if not vectors:
        raise ValueError(f"edits={edits!r} must hold an edit to export")
    if path.suffix == ".safetensors":
        write_tensors(path, vectors)
    elif path.suffix == ".gguf":
        residual_model = as_residual(dense)
        layers = {_output_layer(residual_model, site): vector for site, vector in vectors.items()}
        _write_gguf(path, layers, residual_model.model.config.model_type, _n_layers(residual_model))  # pyright: ignore
    else:
        raise ValueError(f"path={str(path)!r} must end in .safetensors or .gguf")


def _n_layers(residual_model: ResidualModel) -> int:
    return 1 + max(site.layer for site in residual_model.sites if site.layer is not None)


def _output_layer(residual_model: ResidualModel, name: str) -> int:
    """The layer whose output is the stream at a site."""
    site = Site(name)
    layer = _n_layers(residual_model) - 1 if site.layer is None else site.layer - 1
    if layer < 1 or site.kind == "mlp":
        raise ValueError(
            f"site={name!r} is not the output of a layer that llama.cpp's control vectors reach (sites 2.attn, 3.attn, "
            "..., final); export to .safetensors"
        )
    return layer


def _write_gguf(path: Path, layers: dict[int, Tensor], model_type: str, n_layers: int) -> None:
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ValueError(f"path={str(path)!r} needs the gguf package: pip install 'sparse-bridges[gguf]'") from None
    with replacing(path) as temporary:
        writer = GGUFWriter(str(temporary), "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", n_layers)
        for layer, vector in sorted(layers.items()):
            writer.add_tensor(f"direction.{layer}", vector.to(torch.float32).cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
