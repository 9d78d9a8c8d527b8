"""SAELens itself reads the folder, computes what the bridge does, and finds the stream where it says."""

import pytest
import torch

import bridges
from bridges.interop.sae_lens import export_sae, load_sae

sae_lens = pytest.importorskip("sae_lens", minversion="6.53.0")


def test_saelens_reads_the_bundled_bridges_and_computes_the_same(tmp_path):
    """On the bundled models' own streams, in float32: the sums are taken in another order, nothing else differs."""
    pair, bridge_set = bridges.load_pair(), bridges.load_bridges()
    chain, text = bridges.as_residual(pair.dense), pair.tokenizer("for i in range(3):\n    print(i)\n")
    streams, _ = chain.residuals(torch.tensor([text.input_ids]))
    for index, bridge in enumerate(bridge_set):
        export_sae(bridge_set, index, tmp_path, dense=pair.dense)
        sae = sae_lens.SAE.load_from_disk(tmp_path)
        assert type(sae).__name__ == "AbsTopKSAE" and sae.cfg.k == bridge.k == 512
        with torch.no_grad():
            found, wanted = sae.encode(streams[index]), bridge.encode(streams[index])
            # Two entries that are equal but for rounding may change places at the threshold.
            assert ((found != 0) != (wanted != 0)).sum() <= 4
            same = (found != 0) == (wanted != 0)
            torch.testing.assert_close(found[same], wanted[same], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sae.decode(wanted), bridge.decode(wanted), rtol=1e-4, atol=1e-4)


def test_saelens_computes_the_same_features_in_float64(pair, tmp_path):
    export_sae(pair.bridge_set, "1.attn", tmp_path)
    sae, bridge = sae_lens.SAE.load_from_disk(tmp_path), pair.bridge_set["1.attn"]
    h = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(h), bridge.encode(h), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sae(h), bridge.decode(bridge.encode(h)), rtol=1e-12, atol=1e-12)


def test_what_saelens_saves_is_read_as_the_same_bridge(pair, tmp_path):
    export_sae(pair.bridge_set, "0.mlp", tmp_path / "ours")
    sae_lens.SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
    back = load_sae(tmp_path / "theirs")
    for name, parameter in pair.bridge_set["0.mlp"].named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name


def test_the_hook_is_the_stream_at_the_dense_site(tmp_path):
    """In TransformerLens, whose names SAELens uses, with the model's weights as they are."""
    from transformer_lens.model_bridge import TransformerBridge

    dense, _, tokenizer = bridges.load_pair()
    bridge_set, input_ids = bridges.load_bridges(), torch.tensor([tokenizer("print('hello')").input_ids])
    streams, _ = bridges.as_residual(dense).residuals(input_ids)
    lens = TransformerBridge.boot_transformers("gpt2", hf_model=dense, tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        _, cache = lens.run_with_cache(input_ids)
    for index, stream in enumerate(streams):
        export_sae(bridge_set, index, tmp_path, dense=bridges.load_pair().dense)
        hook = sae_lens.SAE.load_from_disk(tmp_path).cfg.metadata.hook_name
        torch.testing.assert_close(cache[hook], stream, rtol=1e-4, atol=1e-4)
