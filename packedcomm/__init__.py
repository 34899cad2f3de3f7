"""packedcomm moves named tensors between processes: packed, pipelined, straight into place."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from packedcomm.errors import PackedCommError
from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.settings import Settings

if TYPE_CHECKING:
    from packedcomm.communicators import (
        Communicator,
        GlooCommunicator,
        Listener,
        NcclCommunicator,
    )
    from packedcomm.copying import CopyPlan
    from packedcomm.targets import TensorTarget
    from packedcomm.transports.broadcast import broadcast_consumer, broadcast_producer
    from packedcomm.transports.slots import release_buffers

__version__ = "0.1.0"

__all__ = [
    "Communicator",
    "CopyPlan",
    "GlooCommunicator",
    "Listener",
    "Manifest",
    "NcclCommunicator",
    "PackedCommError",
    "Settings",
    "TensorSpec",
    "TensorTarget",
    "broadcast_consumer",
    "broadcast_producer",
    "release_buffers",
]

# Names whose modules need torch or the extension are imported when first used: `packedcomm plan`
# needs neither, and `packedcomm doctor` must be able to say that the extension is broken.
_MODULES = {
    "Communicator": "packedcomm.communicators",
    "CopyPlan": "packedcomm.copying",
    "GlooCommunicator": "packedcomm.communicators",
    "Listener": "packedcomm.communicators",
    "NcclCommunicator": "packedcomm.communicators",
    "TensorTarget": "packedcomm.targets",
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
