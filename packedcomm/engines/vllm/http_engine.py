"""`HttpEngine`: a vLLM server, called over the routes that it has with VLLM_SERVER_DEV_MODE=1."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from packedcomm.engines.vllm.handles import PauseMode
from packedcomm.engines.vllm.markers import unmarked
from packedcomm.errors import ArgumentError, DeadlineExceeded, PeerLost, RemoteError

__all__ = ["HttpEngine"]

# An answer of these routes has a few hundred bytes, an error's text some thousand.
_MOST_BYTES = 1 << 20
_SHOWN = 4000


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, and take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class HttpEngine:
    """A vLLM server (0.25 to 0.33).

    Every method raises:
        PackedCommError: a worker failed with an error of packedcomm's: of the same class.
        RemoteError: the server answered with an error otherwise; the message has status and body.
        PeerLost: the server can't be reached, or has ended the connection.
        DeadlineExceeded: it hasn't answered in time.

    Args:
        base_url: such as `"http://127.0.0.1:8000"`.
        timeout_s: deadline for one call, in seconds. `update_weights` lasts as long as the whole
            sync, and `pause` with mode "wait" as long as the requests that are under way.
        api_key: what the server was started with, if it was.

    Raises:
        ArgumentError: an argument is malformed.
    """

    def __init__(
        self, base_url: str, *, timeout_s: float = 600.0, api_key: str | None = None
    ) -> None:
        parsed = urllib.parse.urlsplit(base_url) if isinstance(base_url, str) else None
        if parsed is None or parsed.scheme not in ("http", "https") or not parsed.netloc:
            raise ArgumentError(f"base_url must be 'http://host:port', got {base_url!r:.200}")
        if not timeout_s > 0:
            raise ArgumentError(f"timeout_s must be > 0 seconds, got {timeout_s!r}")
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See `EngineHandle`."""
        self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """See `EngineHandle`."""
        self._call("POST", "/start_weight_update")

    def start_draft_weight_update(self) -> None:
        """See `EngineHandle`; needs vLLM 0.26."""
        self._call("POST", "/start_draft_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See `EngineHandle`."""
        self._call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See `EngineHandle`; vLLM notes the version from 0.27 on."""
        body = None if weight_version is None else {"weight_version": weight_version}
        self._call("POST", "/finish_weight_update", body)

    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        """See `EngineHandle`."""
        flag = "true" if clear_cache else "false"
        self._call("POST", f"/pause?mode={mode}&clear_cache={flag}")

    def resume(self) -> None:
        """See `EngineHandle`."""
        # Resumes nothing of which a part is asleep, which `/resume` would.
        self._call("POST", "/wake_up?tags=scheduling")

    def is_paused(self) -> bool | None:
        """See `EngineHandle`."""
        paused = self._call("GET", "/is_paused").get("is_paused")
        return paused if isinstance(paused, bool) else None

    def reset_prefix_cache(self) -> None:
        """See `EngineHandle`; also what the encoder of a multimodal model has computed, and what a
        KV connector keeps elsewhere.

        Raises:
            RemoteError: the server says that it couldn't, which it does from 0.33 on.
        """
        answer = self._call(
            "POST", "/reset_prefix_cache?reset_running_requests=true&reset_external=true"
        )
        if answer.get("success") is False:
            raise RemoteError(f"{self.base_url}: the prefix cache could not be reset")
        # Only then: requests that are kept begin anew, and rely on nothing in it.
        self._call("POST", "/reset_encoder_cache")

    def get_world_size(self) -> int:
        """See `EngineHandle`."""
        size = self._call("GET", "/get_world_size").get("world_size")
        if type(size) is not int or size < 1:
            raise RemoteError(f"{self.base_url}/get_world_size: expected a size, got {size!r:.80}")
        return size

    def get_version(self) -> str | None:
        """See `EngineHandle`."""
        version = self._call("GET", "/version").get("version")
        return version if isinstance(version, str) else None

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer, an empty one if it isn't a JSON object."""
        where = f"{method} {self.base_url}{path.partition('?')[0]}"
        # Only http and https pass the constructor.
        request = urllib.request.Request(  # noqa: S310
            self.base_url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers=self._headers,
            method=method,
        )
        try:
            with _OPENER.open(request, timeout=self._timeout_s) as answer:
                content = answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(where, error.code, _body_of(error)) from None
        except TimeoutError as error:
            raise self._late(where) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._late(where) from error
            text = f"{type(reason).__name__}: {reason}"
            raise PeerLost(f"{where}: the server is gone or can't be reached: {text}") from error
        try:
            found = json.loads(content)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _late(self, where: str) -> DeadlineExceeded:
        return DeadlineExceeded(f"{where}: no answer within {self._timeout_s:.3g} s")

    def __repr__(self) -> str:
        return f"HttpEngine({self.base_url!r})"


def _body_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(_MOST_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _refused(where: str, status: int, body: str) -> Exception:
    """The error of an HTTP status that isn't a success."""
    text = _message(body)
    known = unmarked(text)
    if known is not None:
        known.add_note(f"{where}: HTTP {status}")
        return known
    hint = ""
    if status in (404, 405):
        hint = " (the server needs VLLM_SERVER_DEV_MODE=1, and the URL must be its root)"
    return RemoteError(f"{where}: HTTP {status}{hint}: {text[:_SHOWN] or 'no text'}")


def _message(body: str) -> str:
    """The text in `{"error": {"message": text}}`, `{"error": text}` or `{"detail": text}`; else the
    body as it is."""
    try:
        found = json.loads(body)
    except ValueError:
        return body
    if isinstance(found, dict):
        found = found.get("error", found.get("detail", body))
    if isinstance(found, dict):
        found = found.get("message", body)
    return found if isinstance(found, str) else body
