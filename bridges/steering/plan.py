"""What one steer() does, and the list of those that a model is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bridges.bridge import BridgeSet
from bridges.models.residual import ResidualModel
from bridges.steering.delta import EntryPoint
from bridges.steering.edits import Edit, SiteEdit, build_site_edit

Source = Literal["sparse", "encoder"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one steer() does. Nothing of it changes."""

    dense: ResidualModel
    sparse: ResidualModel | None
    site_edits: list[SiteEdit]
    """In the order of the dense sites."""
    at: EntryPoint
    source: Source

    @property
    def constant(self) -> bool:
        """Whether every edit adds one number everywhere."""
        return all(site_edit.constant for site_edit in self.site_edits)

    @property
    def reading(self) -> list[SiteEdit]:
        """Those that need readings."""
        return [site_edit for site_edit in self.site_edits if site_edit.reading_mode]

    @property
    def edits_head_input(self) -> bool:
        """Whether an edit changes what the unembedding reads."""
        return self.at == "read" and self.site_edits[-1].dense_site == len(self.dense.sites) - 1

    @property
    def hooked_modules(self) -> list[nn.Module]:
        """The smallest modules that contain a hook."""
        return [self.dense.hooked_module(site_edit.dense_site) for site_edit in self.site_edits]


def build_plan(
    dense: ResidualModel,
    sparse: ResidualModel | None,
    bridge_set: BridgeSet,
    edits: list[Edit],
    strength: float,
    at: EntryPoint,
    source: Source,
) -> Plan:
    """The plan of these edits; raises ValueError if they need readings and there is no model to take them from."""
    site_edits = [
        build_site_edit(dense, sparse, bridge_set, site, [e for e in edits if e.site == site], strength, at)
        for site in dict.fromkeys(edit.site for edit in edits)
    ]
    site_edits.sort(key=lambda site_edit: site_edit.dense_site)
    plan = Plan(dense, sparse, site_edits, at, source)
    if plan.reading and source == "sparse" and sparse is None:
        first = plan.reading[0]
        raise ValueError(
            f"mode={first.reading_mode!r} at site={first.edits[0].site!r} needs the channel's reading: pass sparse=, "
            "the model to read it from, or source='encoder'"
        )
    return plan


class ActivePlans(list[Plan]):
    """The plans of every steer() that a model is in, kept on the model as `_steer_plans`."""

    paused = False
    """Whether the model runs without any edit for a while."""

    def __deepcopy__(self, _memo: Any) -> ActivePlans:
        if self.paused:  # decompose copies submodules, without their hooks
            return ActivePlans()
        raise ValueError("model is steered, and a copy would keep the hooks of the edits; leave steer() to copy it")


def active_plans(model: Any) -> ActivePlans:
    """The list of a module; an empty one for a module that has none, and for a model that is named by a folder."""
    return vars(model).get("_steer_plans", ActivePlans()) if isinstance(model, nn.Module) else ActivePlans()


@contextmanager
def unedited(model: Any) -> Iterator[None]:
    """Inside, the model runs without the edits of any steer()."""
    active = active_plans(model)
    before, active.paused = active.paused, True
    try:
        yield
    finally:
        active.paused = before


@contextmanager
def listed(plan: Plan, active: ActivePlans) -> Iterator[None]:
    """Inside, the plan is among those of its model. Plans may leave in any order; the last one removes the list."""
    attributes = vars(plan.dense.model)
    attributes["_steer_plans"] = active
    active.append(plan)
    try:
        yield
    finally:
        active.remove(plan)
        if not active:
            del attributes["_steer_plans"]
