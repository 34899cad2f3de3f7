"""The copy engine in Python: batched copies between tensors, one native call for all of them.

Unless a cast or a scale is asked for, copies are of bytes, never of values: NaN payloads, -0.0 and
denormals arrive as they are. Whatever the shapes and strides, a batch is normalised into a table of
contiguous runs, cut into tiles, and executed by threads on a CPU (the GIL released) or by one
kernel on a GPU.
"""

from packedcomm._native import TensorRecord
from packedcomm.copying.arrays import as_destination, as_tensor, describe_tensors
from packedcomm.copying.buffers import BufferPlan, Part
from packedcomm.copying.packing import contiguous_copy, pack, pack_into, unpack_from
from packedcomm.copying.plans import CASTABLE, CopyPlan
from packedcomm.copying.tables import Names

__all__ = [
    "CASTABLE",
    "BufferPlan",
    "CopyPlan",
    "Names",
    "Part",
    "TensorRecord",
    "as_destination",
    "as_tensor",
    "contiguous_copy",
    "describe_tensors",
    "pack",
    "pack_into",
    "unpack_from",
]
