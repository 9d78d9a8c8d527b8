"""steer(): inside, an ordinary Hugging Face model runs with edits of sparse channels pushed into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache
from transformers.utils.generic import ModelOutput

from bridges.bridge import BridgeSet
from bridges.models.huggingface.decompose import base_model
from bridges.models.loading import as_residual
from bridges.models.modes import eval_mode
from bridges.models.residual import HookFunction, ResidualModel
from bridges.steering.companion import Pass, Shadow, leading_pass
from bridges.steering.delta import EntryPoint, stream_to_read
from bridges.steering.edits import Edit, as_edit_list, check_edits
from bridges.steering.positions import Place, Windows, place_of
from bridges.steering.registry import Steering, installed, listed, lock

Source = Literal["sparse", "encoder"]


@contextmanager
def steer(
    dense: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    edits: Edit | Sequence[Edit],
    *,
    sparse: nn.Module | ResidualModel | None = None,
    strength: float = 1.0,
    at: EntryPoint = "read",
    source: Source = "sparse",
    check_models: bool = True,
) -> Iterator[None]:
    """Inside, `dense` runs with the edits pushed through the decoders into it (method, section 4; paper A.4).

    Forward passes and `generate` work as ever: with a (dynamic) cache or without, greedy, sampled or with beams, padded
    on either side. `at="read"`: the edit enters the input of the dense sublayer alone; `at="residual"`: the stream, so
    that every later layer sees it. Edits that set or scale need the channel's reading: of the `sparse` model, which
    runs beside the dense one on the same tokens, or (`source="encoder"`) of the encoder on the unedited dense stream.
    Readings carry no gradient. Edits of one channel compose in order; contexts nest. Strength 0 or no edits change no
    bit. The prompt is what `generate` is given; of other calls the first of a cache, or without a cache one that is not
    the last call and a token more.

    The model is as it was on every way out. ValueError, before anything is changed, for edits that cannot be, or models
    other than those the bridges were fitted to (unless `check_models` is False).
    """
    edits = as_edit_list(edits)
    for name, value, known in (("at", at, get_args(EntryPoint)), ("source", source, get_args(Source))):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    check_edits(bridge_set, edits, strength)
    if not edits or strength == 0:
        yield
        return
    with installed(dense).paused():  # so that taking the model apart meets no outer edit
        chain, beside = as_residual(dense), None
        if sparse is not None:
            with lock(sparse):
                beside = as_residual(sparse)
        if check_models:
            bridge_set.check_models(chain.model, None if beside is None else beside.model)
        steering = _Steering(chain, beside, bridge_set, edits, strength, at, source)
    with steering.installed():
        yield


class _Steering(Steering):
    """One `steer()`: what it hooks into the model, and what it knows of the call at hand."""

    def __init__(
        self,
        dense: ResidualModel,
        sparse: ResidualModel | None,
        bridge_set: BridgeSet,
        edits: list[Edit],
        strength: float,
        at: EntryPoint,
        source: Source,
    ):
        self.dense, self.sparse, self.bridge_set, self.at = dense, sparse, bridge_set, at
        self.places = [
            place_of(dense, sparse, bridge_set, site, [e for e in edits if e.site == site], strength)
            for site in dict.fromkeys(edit.site for edit in edits)
        ]
        self.places.sort(key=lambda place: place.dense_site)
        self.readers = {p.bridge: _readers(dense, bridge_set, p) for p in self.places} if at == "read" else {}
        self.idle = self.running = False
        self.windows, self.window = Windows(edits), None
        reading = [place for place in self.places if place.mode]
        if reading and source == "sparse" and sparse is None:
            raise ValueError(
                f"mode={reading[0].mode!r} at site={reading[0].edits[0].site!r} needs the channel's reading: pass "
                "sparse=, the model to read it from, or source='encoder'"
            )
        self.source, self.reading = source, reading
        self.in_flight: list[Place] = []
        self.apart: list[Place] = []
        self.beside = sparse if source == "sparse" else dense
        self.shadow = Shadow(self.beside.model) if reading and self.beside is not None else None

    def _in_flight(self) -> list[Place]:
        """What the encoder reads off the edited run: the first edited site, where nothing was edited before it.

        Later sites, and all of them where another steer() is active, need an unedited run of their own.
        """
        first = self.reading[:1] == self.places[:1] and list(installed(self.dense)) == [self]
        return self.reading[:1] if self.source == "encoder" and first else []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the model runs with the edits."""
        model = self.dense.model
        with ExitStack() as stack:
            if not all(place.constant for place in self.places):
                handles = [
                    model.register_forward_pre_hook(self._before, with_kwargs=True),
                    model.register_forward_hook(self._after, always_call=True),
                ]
                if (base := base_model(model)) is not model:
                    handles.append(base.register_forward_pre_hook(self._refuse_alone))
                for handle in handles:
                    stack.callback(handle.remove)
            stack.enter_context(listed(model, self))
            for place in self.places:
                for context in self._hooks(place):
                    stack.enter_context(context)
            yield

    def _hooks(self, place: Place) -> Iterator[Any]:
        add = _Adding(self, place, place.to_stream) if self.at == "residual" else None

        def on_stream(h: Tensor) -> Tensor | None:
            if place in self.in_flight:
                self._encode(place, h)
            return None if add is None else add(h)

        if add is not None or (self.source == "encoder" and place in self.reading):
            yield self.dense.hook_residuals({place.dense_site: self._unless_idle(on_stream)})
        if add is None:
            readers = {m: self._unless_idle(_Adding(self, place, unit)) for m, unit in self.readers[place.bridge]}
            yield self.dense.hook_modules(readers)

    def _unless_idle(self, visitor: HookFunction) -> HookFunction:
        return lambda h: None if self.idle else visitor(h)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward pass of the dense model: where its tokens stand, and the readings taken apart."""
        if self.idle:
            return
        self.running = True
        call = leading_pass(model, args, kwargs)
        if call.picked and self.at == "read" and self.places[-1].dense_site == len(self.dense.sites) - 1:
            raise ValueError("logits_to_keep: with an edit of what the head reads give a number of tokens, not indices")
        self.window = self.windows.of(call)
        self.in_flight = self._in_flight()
        self.apart = [place for place in self.reading if place not in self.in_flight]
        if self.apart:
            assert self.beside is not None
            itself = self.beside.model is model
            with lock(self.beside.model), installed(model).paused() if itself else eval_mode(self.beside.model):
                self._read(call)

    def _refuse_alone(self, base: nn.Module, _args: tuple) -> None:
        if not (self.idle or self.running):
            raise ValueError(
                f"model={type(base).__name__} was called by itself inside steer(); call the whole model, which is told "
                "where its tokens stand"
            )

    def _after(self, _model: nn.Module, _args: tuple, output: Any) -> None:
        if self.idle:
            return
        self.running = False
        if self.apart and isinstance(output, tuple | ModelOutput):
            parts = output.values() if isinstance(output, ModelOutput) else output
            for cache in (part for part in parts if isinstance(part, Cache)):
                assert self.shadow is not None
                self.shadow.join(cache)  # one that the model made for itself, or filled only now

    def _read(self, call: Pass) -> None:
        assert self.shadow is not None and self.beside is not None
        if self.source == "sparse":
            visitors = {p.sparse_site: self._keep(p) for p in self.apart}
            with self.beside.hook_reads(visitors):  # pyright: ignore[reportArgumentType]
                self.shadow.run(call)
        else:
            visitors = {p.dense_site: lambda h, p=p: self._encode(p, h) for p in self.apart}
            with eval_mode(self.shadow.model), self.beside.hook_residuals(visitors):
                self.shadow.run(call)

    def _keep(self, place: Place) -> HookFunction:
        def keep(read: Tensor) -> None:
            place.reading = read[..., place.channels].detach()

        return keep

    @torch.no_grad()
    def _encode(self, place: Place, h: Tensor) -> None:
        """v = gain_s z / R_s with z = f(h): the encoder's reading of the unedited stream."""
        bridge = self.bridge_set[place.bridge]
        z = bridge.encode_at(h.detach().to(bridge.encoder_weight.device), place.channels)
        place.reading = (z * place.read_unit).to(h.device)


class _Adding:
    """A visitor that adds a site's edits to a stream or to a read."""

    def __init__(self, steering: _Steering, place: Place, unit: Float[Tensor, "channels d"]):
        self.steering, self.place, self.unit = steering, place, unit
        self._vectors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, h: Tensor) -> Tensor:
        if self.place.constant:
            key = (h.dtype, h.device)
            if key not in self._vectors:
                self._vectors[key] = (self.place.total() @ self.unit).to(device=h.device, dtype=h.dtype)
            return h + self._vectors[key]
        window = self.steering.window
        assert window is not None, "the model's own forward ran first"
        changes = self.place.changes(window)
        added = (changes @ self.unit.to(changes)).to(h)
        return h + added[:, -h.shape[1] :]  # the head reads the last tokens alone where logits_to_keep says so


def _readers(dense: ResidualModel, bridge_set: BridgeSet, place: Place) -> list[tuple[nn.Module, Tensor]]:
    """Every module that reads the site's stream, with what a read unit of each channel adds to its input."""
    modules, rms = dense.read_modules(place.dense_site), bridge_set[place.bridge].rms_dense
    norms = [dense.norm(place.dense_site, reader) for reader in range(len(modules))]
    if any((norm.centred, norm.present) != (norms[0].centred, norms[0].present) for norm in norms):
        raise ValueError(
            f"site={dense.sites[place.dense_site]!r} is read through norms of two kinds; use at='residual'"
        )
    return [(m, stream_to_read(norm, rms, place.to_stream)) for m, norm in zip(modules, norms, strict=True)]
