"""Where tensors to send come from.

| source | what it sends |
|---|---|
| `ModuleSource` | a module, a mapping of tensors, or what a function makes |
| `DTensorSource` | a trainer sharded by FSDP2, tensor parallelism or both |
| `ShardedSource` | explicit lists of FSDP and TP shards in one process |
| `LoraSource` | one LoRA adapter of a PEFT model |

They take declared transforms: `Cast`, `Filter`, `Rename`, `RotaryPermutation`.
"""

from packedcomm.sources.base import BoundedSource, Snapshot, Source
from packedcomm.sources.dtensor import DTensorSource, holds_dtensors
from packedcomm.sources.lora import LoraSource
from packedcomm.sources.module import ModuleSource
from packedcomm.sources.sharded import ShardedSource
from packedcomm.sources.transforms import Cast, Filter, Rename, RotaryPermutation

__all__ = [
    "BoundedSource",
    "Cast",
    "DTensorSource",
    "Filter",
    "LoraSource",
    "ModuleSource",
    "Rename",
    "RotaryPermutation",
    "ShardedSource",
    "Snapshot",
    "Source",
    "holds_dtensors",
]
