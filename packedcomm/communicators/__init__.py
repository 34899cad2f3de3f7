"""Stateless communicators: NCCL between GPUs, Gloo between CPUs, behind one protocol."""

from packedcomm.communicators.base import Communicator
from packedcomm.communicators.gloo import GlooCommunicator
from packedcomm.communicators.nccl import NcclCommunicator
from packedcomm.communicators.rendezvous import Listener

__all__ = ["Communicator", "GlooCommunicator", "Listener", "NcclCommunicator"]
