from importlib.util import find_spec

import pytest
import torch

import bridges.ops.abs_topk as abs_topk
from bridges.ops.compiled import compiled


@pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")
def test_no_folder_for_the_compiled_code(monkeypatch):
    """Numba refuses to cache where it finds no writable folder; the kernel then lives for the process."""
    import numba

    def refuse(cache=False, njit=numba.njit, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuse)
    keep = compiled.__wrapped__(abs_topk._keep_kernel)
    kept = torch.empty(3, dtype=torch.int32)
    keep(torch.tensor([4, 5, 6], dtype=torch.int32).numpy(), torch.tensor([True, False, True]).numpy(), kept.numpy())
    assert kept.tolist() == [4, 0, 6]
