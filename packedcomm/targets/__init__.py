"""Targets: where received tensors are written.

| target | where |
|---|---|
| `TensorTarget` | tensors of the same names and shapes, in place |
| `FusedTarget` | an engine's fused and tensor-parallel parameters, in place |
| `AdapterTarget` | the adapter of a live PEFT model, in place |
| `LoraSlotTarget` | one slot of an engine's stacked LoRA tensors, in place |
| `StagedTarget` | any of these, but aside first and then all at once |
"""

from packedcomm.targets.adapter import AdapterTarget
from packedcomm.targets.fused import FusedTarget
from packedcomm.targets.lora_slots import LoraSlots, LoraSlotTarget
from packedcomm.targets.staged import StagedTarget
from packedcomm.targets.tensors import TensorTarget

__all__ = [
    "AdapterTarget",
    "FusedTarget",
    "LoraSlotTarget",
    "LoraSlots",
    "StagedTarget",
    "TensorTarget",
]
