"""Bridge and BridgeSet: linear maps between the residual streams of a dense and a sparse model (method, section 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bridges.bridge_report import BridgeReport, model_card
from bridges.io.files import read_json, write_json, write_tensors, write_text
from bridges.io.fingerprint import checked_fingerprint, fingerprint, same_model
from bridges.io.tensors import check_tensors, read_keys, read_safetensors
from bridges.ops.abs_topk import abs_topk, abs_topk_at

FORMAT_VERSION = 2


class Bridge(nn.Module):
    """The encoder f(h) = AbsTopK(W_enc h + b_enc, k) and the decoder g(z) = W_dec z + b_dec of one site."""

    encoder_weight: Float[nn.Parameter, "d_sparse d_dense"]
    encoder_bias: Float[nn.Parameter, " d_sparse"]
    decoder_weight: Float[nn.Parameter, "d_dense d_sparse"]
    decoder_bias: Float[nn.Parameter, " d_dense"]
    rms_dense: Float[Tensor, ""]
    """R of the dense stream here (method, section 4), measured by `fit`; NaN before."""
    rms_sparse: Float[Tensor, ""]
    gain_sparse: Float[Tensor, " d_sparse"]
    """What the sparse model's norm here multiplies each channel by, so that reads have units without that model."""

    def __init__(self, d_dense: int, d_sparse: int, k: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not 1 <= k <= d_sparse:
            raise ValueError(f"k={k} must lie between 1 and the sparse width {d_sparse}")
        self.k = k
        self.encoder_weight = nn.Parameter(torch.zeros(d_sparse, d_dense, dtype=dtype))
        self.encoder_bias = nn.Parameter(torch.zeros(d_sparse, dtype=dtype))
        self.decoder_weight = nn.Parameter(torch.zeros(d_dense, d_sparse, dtype=dtype))
        self.decoder_bias = nn.Parameter(torch.zeros(d_dense, dtype=dtype))
        self.register_buffer("rms_dense", torch.tensor(float("nan"), dtype=torch.float64))
        self.register_buffer("rms_sparse", torch.tensor(float("nan"), dtype=torch.float64))
        self.register_buffer("gain_sparse", torch.full((d_sparse,), float("nan"), dtype=dtype))

    def encode(self, h: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch d_sparse"]:
        """f(h): the sparse model's stream as read off the dense one, exactly k entries per token."""
        return abs_topk(self._affine_map(h), self.k).to(self.encoder_weight.dtype)

    def encode_at(self, h: Float[Tensor, "*batch d_dense"], channels: Sequence[int]) -> Float[Tensor, "*batch n"]:
        """`encode(h)[..., channels]`, bit for bit and without a gradient, at less cost for a few channels."""
        with torch.no_grad():
            return abs_topk_at(self._affine_map(h), self.k, channels).to(self.encoder_weight.dtype)

    def _affine_map(self, h: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch d_sparse"]:
        """W_enc h + b_enc in at least float32, also under autocast.

        Rounded to half precision, many entries would equal AbsTopK's threshold, and ties go to low channels.
        """
        dtype = torch.promote_types(self.encoder_weight.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.to(dtype), self.encoder_weight.to(dtype), self.encoder_bias.to(dtype))

    def decode(self, z: Float[Tensor, "*batch d_sparse"]) -> Float[Tensor, "*batch d_dense"]:
        """g(z): the dense model's stream as read off the sparse one."""
        return F.linear(z.to(self.decoder_weight.dtype), self.decoder_weight, self.decoder_bias)

    def decode_delta(self, dz: Float[Tensor, "*batch d_sparse"]) -> Float[Tensor, "*batch d_dense"]:
        """W_dec dz: what a change of the sparse stream means to the dense one; no bias, no cancellation."""
        return F.linear(dz.to(self.decoder_weight), self.decoder_weight)

    def read_columns(self, channels: Sequence[int]) -> Float[Tensor, "n d_dense"]:
        """W_dec[:, c] R_s / gain_s: a read unit of each channel, in the dense stream (method, section 4)."""
        units = self.rms_sparse.to(self.gain_sparse) / self.gain_sparse[list(channels)]
        return (self.decoder_weight[:, list(channels)].T * units[:, None]).detach()

    def randomize(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1 / fan-in, zero biases: where gradient steps start without a closed form."""
        with torch.no_grad():
            for weight, bias in (
                (self.encoder_weight, self.encoder_bias),
                (self.decoder_weight, self.decoder_bias),
            ):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
                bias.zero_()


class BridgeSet(nn.Module):
    """The bridges between two models, keyed by the sparse model's sites, with what they came from and how they fare."""

    def __init__(
        self,
        pairs: list[tuple[str, str]],
        bridges: list[Bridge],
        provenance: Mapping[str, Any] | None = None,
        report: BridgeReport | None = None,
        history: list[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.site_pairs = [(str(dense), str(sparse)) for dense, sparse in pairs]
        """(dense site, sparse site) of each bridge."""
        self.bridges = nn.ModuleList(bridges)
        self.provenance: dict[str, Any] = dict(provenance or {})
        """Names and fingerprints of both models, the settings and versions of the fit."""
        self.report = report
        """Held-out figures, None before `evaluate` or `fit`."""
        self.history = history if history is not None else []
        """The logged rows of the fit, as in `metrics.jsonl`."""

    @property
    def sites(self) -> list[str]:
        """The sparse site of each bridge, the keys of the set."""
        return [sparse for _, sparse in self.site_pairs]

    def __len__(self) -> int:
        return len(self.bridges)

    def __iter__(self) -> Iterator[Bridge]:
        return iter(self.bridges)  # pyright: ignore[reportReturnType]

    def __getitem__(self, site: str | int) -> Bridge:
        return self.bridges[self.index(site)]  # pyright: ignore[reportReturnType]

    def index(self, site: str | int) -> int:
        """The place of a bridge, given by sparse site or index; KeyError or IndexError names those there are."""
        if isinstance(site, int):
            if not -len(self) <= site < len(self):
                raise IndexError(f"site={site} is out of range; there are {len(self)} bridges")
            return site % len(self)
        if site not in self.sites:
            raise KeyError(f"site={site!r} has no bridge; bridged are {', '.join(self.sites)}")
        return self.sites.index(site)

    def remember(self, dense: nn.Module, sparse: nn.Module) -> None:
        """Keep both models' names and fingerprints."""
        for side, model in (("dense", dense), ("sparse", sparse)):
            name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
            # A folder's place says nothing to another machine, and must not differ between two equal runs.
            name = Path(name).name if Path(name).is_dir() else name
            self.provenance[side] = {"name": name, "fingerprint": fingerprint(model)}

    def check_models(self, dense: nn.Module, sparse: nn.Module | None = None) -> None:
        """ValueError if the set was fitted to other models than these."""
        for side, model in (("dense", dense), ("sparse", sparse)):
            known = self.provenance.get(side)
            if model is None or known is None:
                continue
            here = checked_fingerprint(model)
            if not same_model(here, known["fingerprint"]):
                raise ValueError(
                    f"{side}={type(model).__name__} is not the model that these bridges were fitted to "
                    f"({known['name']!r}): its parameters hash to {here.split()[0]}, not "
                    f"{known['fingerprint'].split()[0]}; pass that model, or check_models=False to insist"
                )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the bridge folder; the same set gives the same bytes."""
        path = Path(path)
        write_tensors(path / "bridges.safetensors", self.tensors())
        write_json(path / "history.json", self.history)
        write_text(path / "README.md", model_card(self.config(), self.report))
        if self.report is not None:
            self.report.save(path / "report.json")
        else:
            (path / "report.json").unlink(missing_ok=True)
        write_json(path / "config.json", self.config())

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> BridgeSet:
        """Read a bridge folder, or one on the hub by its id (`hub`: revision, token, cache_dir).

        OSError where there is none, ValueError naming the file or tensor that is damaged.
        """
        folder = Path(path)
        if not folder.is_dir():
            if folder.is_absolute() or str(path).count("/") != 1:
                raise OSError(f"path={str(path)!r} is neither a bridge folder nor a hub id (owner/name)")
            try:
                folder = Path(snapshot_download(str(path), **hub))
            except (OSError, ValueError) as error:  # offline, or no such repository: the hub does not name the path
                reason = " ".join(str(error).split())
                raise OSError(f"path={str(path)!r} is no folder here, and the hub did not give it: {reason}") from error
        if not (folder / "config.json").is_file():
            raise OSError(f"path={str(path)!r} has no config.json: not a bridge folder")
        config = read_keys(folder / "config.json")
        bridge_set = cls._from_config(config, folder)
        bridge_set._load(folder / "bridges.safetensors")
        if (folder / "report.json").is_file():
            bridge_set.report = BridgeReport.load(folder / "report.json")
        if (folder / "history.json").is_file():
            bridge_set.history = read_json(folder / "history.json")
        return bridge_set

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Create the hub repository if need be and upload the bridge folder; returns the commit's address."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload bridges")
        return commit.commit_url

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        first = self[0]
        d_sparse, d_dense = first.encoder_weight.shape
        return {
            "format_version": FORMAT_VERSION,
            "pairs": [list(pair) for pair in self.site_pairs],
            "d_dense": d_dense,
            "d_sparse": d_sparse,
            "k": first.k,
            "dtype": str(first.encoder_weight.dtype).removeprefix("torch."),
            **self.provenance,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by site and name, as in `bridges.safetensors`."""
        return {
            f"{site}.{name}": tensor
            for site, bridge in zip(self.sites, self, strict=True)
            for name, tensor in bridge.state_dict().items()
        }

    @classmethod
    def _from_config(cls, config: dict[str, Any], folder: Path) -> BridgeSet:
        if config.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / 'config.json'}: format_version={config.get('format_version')!r}, this version of bridges "
                f"reads {FORMAT_VERSION}"
            )
        own = ("format_version", "pairs", "d_dense", "d_sparse", "k", "dtype")
        if missing := [key for key in own if key not in config]:
            raise ValueError(f"{folder / 'config.json'} lacks {missing[0]!r}: it is not a bridge folder's")
        if not isinstance(getattr(torch, str(config["dtype"]), None), torch.dtype):
            raise ValueError(f"{folder / 'config.json'}: dtype={config['dtype']!r} is no dtype of torch")
        pairs, *sizes = (config[name] for name in own[1:5])
        named = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        if not named or not pairs or not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"{folder / 'config.json'}: pairs, d_dense, d_sparse or k is none; fetch it again")
        d_dense, d_sparse, k = sizes
        dtype, pairs = getattr(torch, config["dtype"]), [(dense, sparse) for dense, sparse in pairs]
        provenance = {key: value for key, value in config.items() if key not in own}
        return cls(pairs, [Bridge(d_dense, d_sparse, k, dtype) for _ in pairs], provenance)

    def _load(self, path: Path) -> None:
        stored, wanted = read_safetensors(path), self.tensors()
        check_tensors(stored, wanted, path)
        for name, tensor in wanted.items():
            tensor.data.copy_(stored[name])
