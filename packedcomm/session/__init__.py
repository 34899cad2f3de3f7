"""The session: how a sender and its receivers meet, agree and talk; nothing of what they send."""

from packedcomm.session.receiver import ReceiverSession
from packedcomm.session.sender import SenderSession
from packedcomm.session.session import Session

__all__ = ["ReceiverSession", "SenderSession", "Session"]
