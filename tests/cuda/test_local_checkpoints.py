"""Local checkpoints by NVRx's interface of a state that lies on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilience.integrations.nvrx import BasicTensorAwareStateDict, LocalCheckpointManager


@pytest.mark.parametrize("is_async", [False, True])
def test_a_state_on_the_device_comes_back_to_it_as_it_was_when_it_was_saved(tmp_path: Path, is_async: bool) -> None:
    weight, step = torch.randn(700, 900, device="cuda"), torch.zeros((), device="cuda", dtype=torch.int64)
    half, host = torch.randn(33, device="cuda").bfloat16(), torch.arange(5)
    before = [each.clone() for each in (weight, step, half, host)]
    state = BasicTensorAwareStateDict({"model": {"weight": weight}, "rest": [step, half, host, "words"]})
    request = LocalCheckpointManager(tmp_path).save(state, 3, is_async)
    for each in (weight, step, half, host):
        each.add_(1)  # training goes on
    if request is not None:
        request.execute_sync()
    assert all(each.device.type == "cpu" for each in state.tensors)
    restarted = LocalCheckpointManager(tmp_path)
    assert restarted.find_latest() == 3
    loaded, ckpt_id = restarted.load()
    assert ckpt_id == (3, 0, "")
    assert [each.device.type for each in loaded.tensors] == ["cuda", "cuda", "cuda", "cpu"]
    assert all(torch.equal(one, other) for one, other in zip(loaded.tensors, before, strict=True))
    assert loaded.state_dict["rest"][3] == "words"
