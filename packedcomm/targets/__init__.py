"""Targets: where received tensors are written."""

from packedcomm.targets.tensors import TensorTarget

__all__ = ["TensorTarget"]
