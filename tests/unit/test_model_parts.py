"""Parts of a model that run through the kernels: norms, and the experts' gates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts, MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from moray.runtime.kernels.gates import SWIGLU
from moray.runtime.kernels.pool import Pool
from moray.runtime.model.expert_gates import apply_gate, fused_gate, is_swiglu
from moray.runtime.model.norm_modules import FusedRMSNorm, fuse_norms


def norm(columns: int) -> MixtralRMSNorm:
    made = MixtralRMSNorm(columns, eps=1e-5)
    made.weight = nn.Parameter(torch.randn(columns))
    return made


@pytest.mark.parametrize("columns", [1, 16, 100, 128, 4096])
def test_a_fused_norm_is_torchs_up_to_the_order_of_the_sum(columns: int) -> None:
    plain = norm(columns)
    model = nn.ModuleDict({"norm": plain})
    fuse_norms(model)
    assert isinstance(model["norm"], FusedRMSNorm)
    x = torch.randn(3, 5, columns) * torch.logspace(-6, 4, 15).view(3, 5, 1)
    torch.testing.assert_close(model["norm"](x), plain(x), rtol=2e-6, atol=1e-7)
    strided = torch.randn(4, 2 * columns)[:, :columns]
    torch.testing.assert_close(model["norm"](strided), plain(strided), rtol=2e-6, atol=1e-7)
    assert model["norm"](torch.empty(0, columns)).shape == (0, columns)


def test_a_norm_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 2048)
    fused = FusedRMSNorm(norm(2048).weight, 1e-6)
    alone = torch.stack([fused(row) for row in x])
    for threads in (1, 2, 5):
        pool = Pool(threads)
        monkeypatch.setattr("moray.runtime.kernels.ops.current_pool", lambda pool=pool: pool)
        assert torch.equal(fused(x), alone)
        pool.close()


def test_norms_that_compute_something_else_stay() -> None:
    shifted, gated = Qwen3NextRMSNorm(32), Qwen3NextRMSNormGated(32)
    half = norm(32).to(torch.bfloat16)
    model = nn.ModuleList([shifted, gated, half, nn.LayerNorm(32)])
    kinds = [type(module) for module in model]
    fuse_norms(model)
    assert [type(module) for module in model] == kinds


def test_the_gate_of_an_experts_module_is_found_by_trying() -> None:
    mixtral = MixtralExperts(MixtralConfig(hidden_size=32, intermediate_size=64, num_local_experts=2))
    assert fused_gate(mixtral) == SWIGLU and is_swiglu(mixtral)
    gpt_oss = GptOssExperts(GptOssConfig(hidden_size=32, intermediate_size=64, num_local_experts=2))
    gate = fused_gate(gpt_oss)
    assert gate is not None and gate.is_interleaved and gate.limit == 7.0 and gate.alpha == 1.702
    assert not is_swiglu(gpt_oss)
    x = 20 * torch.randn(9, 128)
    torch.testing.assert_close(apply_gate(gate, x), gpt_oss._apply_gate(x))


def test_a_gate_of_its_own_is_left_to_torch() -> None:
    experts = MixtralExperts(MixtralConfig(hidden_size=32, intermediate_size=64, num_local_experts=2))
    experts._apply_gate = lambda gate_up: gate_up[..., ::2].sin() * gate_up[..., 1::2]
    assert fused_gate(experts) is None
