"""Who may take part: CURVE keys from the job's secret, and the gate that admits only their holders.

Both key pairs follow from the secret, so whoever has it can be the sender or a receiver, and nobody
else can be either. CURVE encrypts and authenticates every control message; the data itself travels
over NCCL or Gloo in the clear.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from packedcomm.errors import ArgumentError
from packedcomm.secret import check_length

__all__ = ["Gate", "Keys", "check_secret"]

SENDER_LABEL = b"packedcomm control sender 1"
RECEIVER_LABEL = b"packedcomm control receiver 1"


def check_secret(secret: str | None, hosts: list[str]) -> None:
    """Check that a secret is one, or isn't needed.

    Args:
        secret: the job's secret, or None.
        hosts: the IP addresses that are listened on or connected to.

    Raises:
        ArgumentError: it is no text or too short, or there is none and a host isn't a loopback
            address. The secret isn't in the message.
    """
    if secret is not None:
        if type(secret) is not str:
            raise ArgumentError(f"secret must be a string or None, got {type(secret).__name__}")
        check_length(secret)
        return
    for host in hosts:
        if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            raise ArgumentError(
                f"{host} is not a loopback address: between machines a session needs a secret"
            )


@dataclass(frozen=True, slots=True)
class Keys:
    """One side's CURVE key pair, in z85."""

    public: bytes
    private: bytes = field(repr=False)

    @classmethod
    def of_sender(cls, secret: str) -> Keys:
        """The sender's pair."""
        return cls._derive(secret, SENDER_LABEL)

    @classmethod
    def of_receivers(cls, secret: str) -> Keys:
        """The pair that all receivers share."""
        return cls._derive(secret, RECEIVER_LABEL)

    @classmethod
    def _derive(cls, secret: str, label: bytes) -> Keys:
        # Any 32 bytes are a Curve25519 private key. `surrogatepass`: no text must fail with its
        # content in a message.
        digest = hmac.new(secret.encode("utf-8", "surrogatepass"), label, hashlib.sha256).digest()
        private = z85.encode(digest)
        return cls(zmq.curve_public(private), private)


class Gate:
    """Answers ZeroMQ's question, for each connection of a context, whether its key may come in.

    Runs a thread of its own, so that receivers can connect while the sender's is busy.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], admitted: bytes) -> None:
        """Begin to answer.

        Args:
            context: the context whose sockets ask.
            admitted: the public key that may come in.
        """
        self._admitted = admitted
        self._authenticator: Any = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self)

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002  (ZeroMQ's signature)
        """Whether the holder of a public key may come in; called by ZeroMQ's authenticator."""
        return hmac.compare_digest(key, self._admitted)

    def close(self) -> None:
        """Stop answering; everybody is refused from then on. Idempotent."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
