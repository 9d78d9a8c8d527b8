"""Bridge and BridgeSet: linear maps between the residual streams of two models (method.md, section 1).

Read: the sublayer's input, after the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from bridges.bridge_folder import CONFIG_FILE, TENSORS_FILE, FolderConfig, read_tensors
from bridges.bridge_report import BridgeReport, model_card
from bridges.io.files import read_json, write_json, write_tensors, write_text
from bridges.io.fingerprint import checked_fingerprint, fingerprint, same_model
from bridges.io.paths import fetch_folder
from bridges.models.residual import ResidualModel
from bridges.ops.abs_topk import abs_topk, abs_topk_at


class Bridge(nn.Module):
    """The encoder f(h) = AbsTopK(W_enc h + b_enc, k) and the decoder g(z) = W_dec z + b_dec of one site (paper A.3).

    Args:
        d_dense: width of the dense model's residual stream.
        d_sparse: width of the sparse model's.
        k: how many entries of the encoder's output are kept per token; ValueError unless 1 <= k <= d_sparse.
        dtype: of the weights, which start at zero. What `fit` measures besides is float64 where it is one number, at
            least float32 where it is one per channel.

    >>> bridge = Bridge(d_dense=3, d_sparse=4, k=2)
    >>> bridge.randomize(torch.Generator().manual_seed(0))
    >>> z = bridge.encode(torch.ones(1, 5, 3))
    >>> z.shape, (z != 0).sum(-1).tolist()
    (torch.Size([1, 5, 4]), [[2, 2, 2, 2, 2]])
    >>> bridge.decode(z).shape
    torch.Size([1, 5, 3])
    """

    encoder_weight: Float[nn.Parameter, "d_sparse d_dense"]
    encoder_bias: Float[nn.Parameter, " d_sparse"]
    decoder_weight: Float[nn.Parameter, "d_dense d_sparse"]
    decoder_bias: Float[nn.Parameter, " d_dense"]
    rms_dense: Float[Tensor, ""]
    """R, the mean RMS, of the dense stream at this site (method.md, section 4); `fit` measures it, NaN before."""
    rms_sparse: Float[Tensor, ""]
    """R, the mean RMS, of the sparse stream."""
    gain_sparse: Float[Tensor, " d_sparse"]
    """The gain of the sparse model's norm at this site: with `rms_sparse`, the unit of a read without that model."""
    median_dense: Float[Tensor, " d_dense"]
    """Each dense channel's median, which centred norms are measured from (method.md, section 3)."""
    median_sparse: Float[Tensor, " d_sparse"]
    """The sparse channels' medians."""
    norm_limit_dense: Float[Tensor, ""]
    """Tokens of a larger centred norm in the dense stream are massive; infinite where none is left out."""
    norm_limit_sparse: Float[Tensor, ""]
    """The same in the sparse stream."""

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
        wide = _at_least_float32(dtype)
        self.register_buffer("gain_sparse", torch.full((d_sparse,), float("nan"), dtype=wide))
        for side, width in (("dense", d_dense), ("sparse", d_sparse)):
            self.register_buffer(f"median_{side}", torch.zeros(width, dtype=wide))
            self.register_buffer(f"norm_limit_{side}", torch.tensor(float("inf"), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bridge:
        """What `.to`, `.half` and `.cuda` call: what was measured changes device with the weights, but stays exact."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            dtype = _at_least_float32(self.encoder_weight.dtype) if moved is not None and moved.ndim else torch.float64
            if buffer is not None and moved is not None and moved.dtype != dtype:
                self._buffers[name] = buffer.to(moved.device, dtype)
        return self

    def encode(self, h: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch d_sparse"]:
        """f(h): the sparse model's stream predicted from the dense one, with exactly k entries kept per token."""
        return abs_topk(self._affine_map(h), self.k).to(self.encoder_weight.dtype)

    def encode_at(self, h: Float[Tensor, "*batch d_dense"], channels: Sequence[int]) -> Float[Tensor, "*batch n"]:
        """`encode(h)[..., channels]`, bit for bit, without a gradient; faster for a few channels."""
        with torch.no_grad():
            return abs_topk_at(self._affine_map(h), self.k, channels).to(self.encoder_weight.dtype)

    def _affine_map(self, h: Float[Tensor, "*batch d_dense"]) -> Float[Tensor, "*batch d_sparse"]:
        """W_enc h + b_enc in at least float32, also under autocast.

        Rounded to half precision, many entries would equal AbsTopK's threshold, and ties go to low channels.
        """
        dtype = _at_least_float32(self.encoder_weight.dtype)
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.to(dtype), self.encoder_weight.to(dtype), self.encoder_bias.to(dtype))

    def decode(self, z: Float[Tensor, "*batch d_sparse"]) -> Float[Tensor, "*batch d_dense"]:
        """g(z): the dense model's stream predicted from the sparse one."""
        return F.linear(z.to(self.decoder_weight.dtype), self.decoder_weight, self.decoder_bias)

    def decode_delta(self, dz: Float[Tensor, "*batch d_sparse"]) -> Float[Tensor, "*batch d_dense"]:
        """W_dec dz: the change of the dense stream for a change dz of the sparse one; no bias.

        More exact than decode(z + dz) - decode(z), where most digits cancel.
        """
        return F.linear(dz.to(self.decoder_weight), self.decoder_weight)

    @torch.no_grad()
    def is_usual(
        self, h_dense: Float[Tensor, "*batch d_dense"], h_sparse: Float[Tensor, "*batch d_sparse"]
    ) -> Bool[Tensor, "*batch"]:
        """True at the tokens that are massive in neither stream; a token that is not finite counts as usual.

        A token is massive where its centred norm, |h - median|, is over the limit that `fit` measured: many times the
        norm's median. Source: method.md, section 3.
        """
        finite = h_dense.isfinite().all(-1) & h_sparse.isfinite().all(-1).to(h_dense.device)
        return (self.relative_norm(h_dense, h_sparse) <= 1) | ~finite

    @torch.no_grad()
    def relative_norm(
        self, h_dense: Float[Tensor, "*batch d_dense"], h_sparse: Float[Tensor, "*batch d_sparse"]
    ) -> Float[Tensor, "*batch"]:
        """|h - median| of every token over the limit of massive tokens, in the stream where this is larger."""
        sides = (
            (h_dense, self.median_dense, self.norm_limit_dense),
            (h_sparse, self.median_sparse, self.norm_limit_sparse),
        )
        dense, sparse = ((h.to(median) - median).norm(dim=-1) / limit.to(median) for h, median, limit in sides)
        return torch.maximum(dense, sparse)

    def read_columns(self, channels: Sequence[int]) -> Float[Tensor, "n d_dense"]:
        """W_dec[:, c] R_s / gain_s, one read unit of each channel c in the dense stream; R_s is `rms_sparse`.

        Source: method.md, section 4.
        """
        units = self.rms_sparse.to(self.gain_sparse) / self.gain_sparse[list(channels)]
        return (self.decoder_weight[:, list(channels)].T * units[:, None]).detach()

    def randomize(self, generator: torch.Generator) -> None:
        """Set normal weights of variance 1 / fan-in and zero biases, to start gradient steps without a closed form."""
        with torch.no_grad():
            for weight, bias in ((self.encoder_weight, self.encoder_bias), (self.decoder_weight, self.decoder_bias)):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
                bias.zero_()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _module(model: nn.Module | ResidualModel) -> nn.Module:
    return model.model if isinstance(model, ResidualModel) else model


class BridgeSet(nn.Module):
    """The bridges between two models, one per pair of sites; what `bridges.fit` returns.

    A sequence of `Bridge`, also keyed by the sparse model's site. Saved and loaded by `save_pretrained` and
    `from_pretrained`, with the held-out figures (`report`), the logged rows of the fit (`history`) and `provenance`.

    Args:
        site_pairs: (dense site, sparse site) of each bridge, in the models' order.
        bridges: as many `Bridge`s, of equal widths and k.

    >>> from tempfile import TemporaryDirectory
    >>> bridge_set = BridgeSet([("0.attn", "0.attn"), ("1.attn", "2.attn")], [Bridge(3, 4, k=2), Bridge(3, 4, k=2)])
    >>> bridge_set.sites, bridge_set["2.attn"] is bridge_set[1]
    (['0.attn', '2.attn'], True)
    >>> with TemporaryDirectory() as folder:
    ...     bridge_set.save_pretrained(folder)
    ...     BridgeSet.from_pretrained(folder).site_pairs
    [('0.attn', '0.attn'), ('1.attn', '2.attn')]
    """

    def __init__(
        self,
        site_pairs: list[tuple[str, str]],
        bridges: list[Bridge],
        provenance: Mapping[str, Any] | None = None,
        report: BridgeReport | None = None,
        history: list[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.site_pairs = [(str(dense), str(sparse)) for dense, sparse in site_pairs]
        """(dense site, sparse site) of each bridge."""
        self.bridges = nn.ModuleList(bridges)
        self.provenance: dict[str, Any] = dict(provenance or {})
        """Names and fingerprints of both models, settings and versions of the fit; stored in `config.json`."""
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
        """The index of a bridge, given by sparse site or index; KeyError or IndexError says which there are."""
        if isinstance(site, int):
            if not -len(self) <= site < len(self):
                raise IndexError(f"site={site} is out of range; there are {len(self)} bridges")
            return site % len(self)
        if site not in self.sites:
            raise KeyError(f"site={site!r} has no bridge; the bridged sites are {', '.join(self.sites)}")
        return self.sites.index(site)

    def record_models(self, dense: nn.Module | ResidualModel, sparse: nn.Module | ResidualModel) -> None:
        """Store both models' names and fingerprints in `provenance`, for `check_models`."""
        for side, model in (("dense", _module(dense)), ("sparse", _module(sparse))):
            name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
            # A local path means nothing on another machine, and would differ between two equal runs.
            name = Path(name).absolute().name if Path(name).exists() else name
            self.provenance[side] = {"name": name, "fingerprint": fingerprint(model)}

    def check_models(self, dense: nn.Module | ResidualModel, sparse: nn.Module | ResidualModel | None = None) -> None:
        """ValueError if the set was fitted to other models than these, or to these the other way round."""
        for side, model in (("dense", dense), ("sparse", sparse)):
            if model is None or side not in self.provenance:
                continue
            here = checked_fingerprint(_module(model))
            if not same_model(here, self.provenance[side]["fingerprint"]):
                raise ValueError(self._not_fitted_to(side, type(_module(model)).__name__, here))

    def _not_fitted_to(self, side: str, kind: str, here: str) -> str:
        """What is wrong with a model of one side, whose fingerprint is `here`."""
        known, other = self.provenance[side], self.provenance.get("sparse" if side == "dense" else "dense")
        found = f"{side}={kind} is not the model that these bridges were fitted to ({known['name']!r})"
        if other is not None and same_model(here, other["fingerprint"]):
            return (
                f"{found}, but the other one ({other['name']!r}): dense and sparse are swapped, or one is given twice"
            )
        return (
            f"{found}: its parameters hash to {here.split()[0]}, not {known['fingerprint'].split()[0]}; "
            "pass that model, or check_models=False to skip this check"
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the bridge folder: `config.json`, `bridges.safetensors`, `report.json`, `history.json`, model card.

        The same set gives the same bytes. `~` is expanded.
        """
        path = Path(path).expanduser()
        write_tensors(path / TENSORS_FILE, self.tensors())
        write_json(path / "history.json", self.history)
        write_text(path / "README.md", model_card(self.config(), self.report))
        if self.report is not None:
            self.report.save(path / "report.json")
        else:
            (path / "report.json").unlink(missing_ok=True)
        write_json(path / CONFIG_FILE, self.config())

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> BridgeSet:
        """Read a bridge folder, or one on the hub by its id; `~` is expanded.

        `hub`: keyword arguments of the download (revision, token, cache_dir). Raises OSError where nothing is there,
        ValueError naming the file or tensor that is damaged.
        """
        folder = fetch_folder(path, **hub)
        if not (folder / CONFIG_FILE).is_file():
            inner = folder / "bridges"  # where `bridges demo` puts them
            inside = f"; {str(inner)!r} is one" if (inner / CONFIG_FILE).is_file() else ""
            raise FileNotFoundError(f"path={str(path)!r} is not a bridge folder: it has no {CONFIG_FILE}{inside}")
        config = FolderConfig.read(folder)
        bridges = [Bridge(config.d_dense, config.d_sparse, config.k, config.dtype) for _ in config.site_pairs]
        bridge_set = cls(config.site_pairs, bridges, config.provenance)
        tensors = bridge_set.tensors()
        for name, stored in read_tensors(folder, tensors, config.format_version).items():
            tensors[name].data.copy_(stored)
        if (folder / "report.json").is_file():
            bridge_set.report = BridgeReport.load(folder / "report.json")
        if (folder / "history.json").is_file():
            bridge_set.history = read_json(folder / "history.json")
        return bridge_set

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Create the hub repository if it does not exist, upload the bridge folder, and return the commit's URL."""
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
        dtype = first.encoder_weight.dtype
        return FolderConfig(self.site_pairs, d_dense, d_sparse, first.k, dtype, self.provenance).to_dict()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by site and name, as in `bridges.safetensors`."""
        return {
            f"{site}.{name}": tensor
            for site, bridge in zip(self.sites, self, strict=True)
            for name, tensor in bridge.state_dict().items()
        }
