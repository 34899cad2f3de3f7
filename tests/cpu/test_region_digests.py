"""Digests of what receivers hold in another dtype than was sent, scaled or cut."""

from __future__ import annotations

import pytest
import torch

from packedcomm import FullWeightSender, WeightReceiver, region_digests
from packedcomm.copying import Part
from tests.helpers.in_process import Round, sessions

# Elements of the tensors: none, one, and sizes around the alignment of temporary memory.
SIZES = (0, 1, 7, 8, 9, 64, 100, 1000)


def weights(dtype):
    generator = torch.Generator().manual_seed(1)
    return {f"t{n}": torch.randn(n, generator=generator).to(dtype) for n in SIZES}


class Converting:
    """Holds tensors of another dtype, and halves and quarters of them."""

    fixed_destinations = True

    def __init__(self, sent, dtype, scale):
        self.scale = scale
        self.whole = {name: torch.zeros(t.shape, dtype=dtype) for name, t in sent.items()}
        self.half = {name: torch.zeros(len(t) // 2, dtype=dtype) for name, t in sent.items()}

    def place(self, manifest):
        return [
            [
                Part(self.whole[spec.name], None, self.scale),
                Part(self.half[spec.name], (spec.shape[0] // 4,), self.scale),
            ]
            for spec in manifest.specs
        ]

    def commit(self, manifest):
        pass

    def check(self, sent):
        for name, tensor in sent.items():
            expected = (tensor.float() * self.scale).to(self.whole[name].dtype)
            begin = len(expected) // 4
            assert torch.equal(self.whole[name], expected)
            assert torch.equal(self.half[name], expected[begin : begin + len(self.half[name])])


@pytest.mark.parametrize("kept", [1, 300, 1 << 20], ids=["one by one", "in turns", "kept"])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.bfloat16, 0.5), (torch.float32, 0.5)]
)
def test_converted_values_are_verified_at_every_sync(monkeypatch, kept, dtype, scale):
    monkeypatch.setattr(region_digests, "_KEPT_BYTES", kept)
    sent = weights(torch.float32)
    target = Converting(sent, dtype, scale)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(target, end)
        sender = FullWeightSender(sent, session, verify=True)
        for version in range(3):
            for tensor in sent.values():
                tensor += 1
            done = Round(sender.sync, [receiver])
            assert done.sent.verified
            assert done.sent.changed_tensors == (len(SIZES) - 1 if version else None)
            target.check(sent)
