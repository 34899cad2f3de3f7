"""`Session.listen` and `Session.connect`: how a sender and its receivers come together."""

from __future__ import annotations

from typing import get_args

import torch

from packedcomm.errors import ArgumentError
from packedcomm.planning.chunks import WireFormat
from packedcomm.session.agreement import choose_device
from packedcomm.session.receiver import ReceiverSession
from packedcomm.session.sender import MOST_RECEIVERS, SenderSession
from packedcomm.settings import DEFAULTS, Settings

__all__ = ["Session"]


class Session:
    """Makes the two ends of a session: one sender, any number of receivers.

    A session compares both sides' devices and versions, connects a communicator (NCCL between GPUs,
    Gloo between CPUs) and carries control messages beside it. Sessions share no state: several in
    one process don't see each other. Nothing is read from the environment.
    """

    @staticmethod
    def listen(
        address: str,
        *,
        receivers: int,
        secret: str | None = None,
        device: torch.device | str | int | None = None,
        settings: Settings = DEFAULTS,
        wire_format: WireFormat = "native",
    ) -> SenderSession:
        """The sender's end. Listens at once; waits for the receivers at its first use.

        Receivers that come later take part from the next sync on.

        Args:
            address: "host:port" of this machine, bound exactly; port 0 lets the system choose, and
                the session's `address` says what it chose.
            receivers: how many to wait for before the first sync.
            secret: what receivers prove to have, at least 16 characters; None means that of
                `settings`. None at all only on loopback addresses, where every process of the
                machine is trusted then.
            device: where the data is; None is the current GPU if there is one, else the CPU.
            settings: deadlines, `buffer_size_bytes` and limits.
            wire_format: byte format of the data, for all receivers.

        Raises:
            ArgumentError: an argument is malformed or out of range.
            AddressInUse: another socket listens there.
            TooManyOpenFiles: fewer descriptors are free than a session needs.
            CudaError: there is no such GPU.
        """
        if type(receivers) is not int or not 1 <= receivers <= MOST_RECEIVERS:
            raise ArgumentError(
                f"receivers must be an integer in 1..{MOST_RECEIVERS}, got {receivers!r}"
            )
        if wire_format not in get_args(WireFormat):
            raise ArgumentError(f"wire_format must be 'vllm' or 'native', got {wire_format!r}")
        chosen = choose_device(device)
        secret = settings.secret or None if secret is None else secret
        return SenderSession(address, receivers, secret, chosen, settings, wire_format)

    @staticmethod
    def connect(
        address: str,
        *,
        secret: str | None = None,
        device: torch.device | str | int | None = None,
        settings: Settings = DEFAULTS,
    ) -> ReceiverSession:
        """A receiver's end. Returns once the sender has taken it in.

        The communicator is connected later, by `receive`, when the sender begins its next sync.

        Args:
            address: the sender's, "host:port"; the sender may come later, and its name too.
            secret, device, settings: as for `listen`; byte format and buffer size are the sender's.

        Raises:
            ArgumentError: an argument is malformed or out of range.
            CudaError: there is no such GPU.
            RendezvousTimeout: the sender didn't come within `Settings.connect_timeout_s`.
            AuthenticationError: the sender has another secret.
            ConfigMismatch: the sender is on a GPU and this end on a CPU, or the other way round; or
                heartbeats or caps on messages of the settings don't go together.
            VersionMismatch: versions of packedcomm or NCCL differ.
            TooManyOpenFiles: fewer descriptors are free than a session needs.
            PeerLost: the sender ended meanwhile.
            NcclError: no usable NCCL library.
            ProtocolError: what listens there isn't a sender of packedcomm's.
        """
        secret = settings.secret or None if secret is None else secret
        return ReceiverSession(address, secret, choose_device(device), settings)
