"""Models whose weights are sharded over processes, in one process of a group."""

import pytest
import torch
from pairs import gpt2, sparse_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from bridges.models.loading import as_residual


@pytest.fixture
def mesh(tmp_path):
    """A process group of this process alone, left afterwards."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("build", [gpt2, sparse_model])
def test_a_fully_sharded_model_is_refused_with_what_to_do(build, mesh):
    model = build()
    chain = as_residual(model)
    fully_shard(model, mesh=mesh)
    for given in (model, chain):
        with pytest.raises(ValueError, match=r"are DTensors.*; load it unsharded, with device_map='auto'") as raised:
            as_residual(given)
        assert "\n" not in str(raised.value)


def test_the_wrapper_of_fsdp_is_refused_where_it_shards(mesh):
    """One process has the whole weights; the strategy is what several would have."""
    model = FullyShardedDataParallel(gpt2(), device_id=torch.device("cpu"))
    assert as_residual(model).sites == as_residual(gpt2()).sites
    model.sharding_strategy = ShardingStrategy.FULL_SHARD
    with pytest.raises(ValueError, match=r"\(FullyShardedDataParallel holds.*; load it unsharded, with device_map="):
        as_residual(model)
