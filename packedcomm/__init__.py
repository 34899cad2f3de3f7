"""packedcomm moves named tensors between processes: packed, pipelined, straight into place."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from packedcomm.errors import PackedCommError
from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.secret import generate_secret
from packedcomm.settings import Settings

if TYPE_CHECKING:
    from packedcomm.communicators import Communicator, GlooCommunicator, Listener, NcclCommunicator
    from packedcomm.copying import CopyPlan
    from packedcomm.planning.engine_layouts import ModelGeometry
    from packedcomm.policy import SyncPolicy
    from packedcomm.receivers import WeightReceiver
    from packedcomm.results import ReceiverStatus, SyncResult, UnchangedWeightsWarning
    from packedcomm.senders import FullWeightSender, LoraSender
    from packedcomm.session import Session
    from packedcomm.sources import (
        Cast,
        DTensorSource,
        Filter,
        LoraSource,
        ModuleSource,
        Rename,
        RotaryPermutation,
        ShardedSource,
    )
    from packedcomm.targets import (
        AdapterTarget,
        FusedTarget,
        LoraSlots,
        LoraSlotTarget,
        StagedTarget,
        TensorTarget,
    )
    from packedcomm.transports.broadcast import broadcast_consumer, broadcast_producer
    from packedcomm.transports.slots import release_buffers

__version__ = "0.1.0"

__all__ = [
    "AdapterTarget",
    "Cast",
    "Communicator",
    "CopyPlan",
    "DTensorSource",
    "Filter",
    "FullWeightSender",
    "FusedTarget",
    "GlooCommunicator",
    "Listener",
    "LoraSender",
    "LoraSlotTarget",
    "LoraSlots",
    "LoraSource",
    "Manifest",
    "ModelGeometry",
    "ModuleSource",
    "NcclCommunicator",
    "PackedCommError",
    "ReceiverStatus",
    "Rename",
    "RotaryPermutation",
    "Session",
    "Settings",
    "ShardedSource",
    "StagedTarget",
    "SyncPolicy",
    "SyncResult",
    "TensorSpec",
    "TensorTarget",
    "UnchangedWeightsWarning",
    "WeightReceiver",
    "broadcast_consumer",
    "broadcast_producer",
    "generate_secret",
    "release_buffers",
]

# Names whose modules need torch or the extension are imported when first used: `packedcomm plan`
# needs neither, and `packedcomm doctor` must be able to say that the extension is broken.
_MODULES = {
    "Cast": "packedcomm.sources",
    "Communicator": "packedcomm.communicators",
    "CopyPlan": "packedcomm.copying",
    "DTensorSource": "packedcomm.sources",
    "Filter": "packedcomm.sources",
    "FullWeightSender": "packedcomm.senders",
    "FusedTarget": "packedcomm.targets",
    "GlooCommunicator": "packedcomm.communicators",
    "Listener": "packedcomm.communicators",
    "LoraSender": "packedcomm.senders",
    "LoraSlotTarget": "packedcomm.targets",
    "AdapterTarget": "packedcomm.targets",
    "LoraSlots": "packedcomm.targets",
    "LoraSource": "packedcomm.sources",
    "ModelGeometry": "packedcomm.planning.engine_layouts",
    "ModuleSource": "packedcomm.sources",
    "NcclCommunicator": "packedcomm.communicators",
    "ReceiverStatus": "packedcomm.results",
    "Rename": "packedcomm.sources",
    "RotaryPermutation": "packedcomm.sources",
    "Session": "packedcomm.session",
    "ShardedSource": "packedcomm.sources",
    "StagedTarget": "packedcomm.targets",
    "SyncPolicy": "packedcomm.policy",
    "SyncResult": "packedcomm.results",
    "TensorTarget": "packedcomm.targets",
    "UnchangedWeightsWarning": "packedcomm.results",
    "WeightReceiver": "packedcomm.receivers",
    "broadcast_consumer": "packedcomm.transports.broadcast",
    "broadcast_producer": "packedcomm.transports.broadcast",
    "release_buffers": "packedcomm.transports.slots",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
