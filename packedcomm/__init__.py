"""packedcomm moves named tensors between processes: packed, pipelined, straight into place."""

from packedcomm.communicators import Communicator, GlooCommunicator, Listener, NcclCommunicator
from packedcomm.copying import CopyPlan
from packedcomm.errors import PackedCommError
from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.settings import Settings
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
