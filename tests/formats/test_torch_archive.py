"""A tensor is read from wherever its archive lies in a file, whatever address that is."""

from __future__ import annotations

import pytest
import torch

from resilience.formats.torch_archive import aligned, saved_bytes, tensor_in

DTYPES = [torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1, 3, 8, 15])
def test_a_tensor_at_any_address_is_read_in_whole_and_in_part(dtype: torch.dtype, start: int) -> None:
    tensor = torch.arange(60).reshape(5, 4, 3).to(dtype)
    content = memoryview(bytearray(start) + bytearray(saved_bytes(tensor)))[start:]
    found, lies_there = tensor_in(content, "the archive", (dtype, tensor.shape))
    assert lies_there
    for part in (lambda t: t, lambda t: t[1:3], lambda t: t[:, 1:3, 2:], lambda t: t[2, 1, 1]):
        out = torch.empty_like(part(tensor))
        out.copy_(aligned(part(found)))
        assert torch.equal(out, part(tensor))
