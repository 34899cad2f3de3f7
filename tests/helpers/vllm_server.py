"""A stand-in for a vLLM server: real HTTP, its routes and their order, and real receivers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch

from packedcomm import Session, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.engines.vllm.markers import marked
from packedcomm.errors import PackedCommError, SessionStateError
from tests.helpers.sessions import QUICK


class VllmServer:
    """A server with some workers. A context manager; it listens on a port of its own.

    `refuse` maps a route to what happens there instead: a status and a text, or a function that is
    called with the request's body and may raise, wait, or return None to go on as usual.
    """

    def __init__(self, weights: dict[str, torch.Tensor], workers: int = 1) -> None:
        self.workers = [
            {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
            for _ in range(workers)
        ]
        self.drafts = [{name: t.clone() for name, t in held.items()} for held in self.workers]
        """What the workers' draft models hold."""
        self.world_size = workers
        self.refuse: dict[str, tuple[int, str] | Callable[[Any], Any]] = {}
        self.came: list[str] = []
        self.bodies: dict[str, Any] = {}
        self.queries: dict[str, dict[str, str]] = {}
        self.headers: dict[str, str] = {}
        self.paused = False
        self.asleep = False
        """Whether a part of its memory is."""
        self.active = False
        self.receiving = 0
        """How many requests are inside of update_weights."""
        self.version: str | None = None
        self.receivers: list[WeightReceiver] = []
        self._draft_receivers: list[WeightReceiver] = []
        self._receiving = self.receivers
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> VllmServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._leave()

    def stop(self) -> None:
        """Listen no more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def answer(self, route: str, body: Any) -> tuple[int, Any]:
        """Status and JSON for a request."""
        self.came.append(route)
        self.bodies[route] = body
        refusal = self.refuse.get(route)
        try:
            if isinstance(refusal, tuple):
                status, text = refusal
                return status, {"error": {"message": text, "code": status}}
            if refusal is not None:
                refusal(body)
            return 200, getattr(self, f"_{route}")(body) or {"message": "done"}
        except Exception as error:  # noqa: BLE001 - as the server's handler does
            status = 400 if isinstance(error, ValueError) else 500
            return status, {"error": {"message": str(error), "code": status}}

    def _get_world_size(self, body: Any) -> Any:
        return {"world_size": self.world_size}

    def _version(self, body: Any) -> Any:
        return {"version": "0.32.0"}

    def _pause(self, body: Any) -> None:
        self.paused = True

    def _wake_up(self, body: Any) -> Any:
        # Of nothing but scheduling, as vLLM does it.
        assert self.queries["wake_up"] == {"tags": "scheduling"}
        self.paused = self.asleep
        return {"status": "sleeping" if self.asleep else "awake"}

    def _is_paused(self, body: Any) -> Any:
        return {"is_paused": self.paused}

    def _reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def _reset_encoder_cache(self, body: Any) -> None:
        pass

    def _init_weight_transfer_engine(self, body: Any) -> None:
        self._leave()
        for weights, drafts in zip(self.workers, self.drafts, strict=True):
            session = _as_worker(
                lambda: Session.connect(body["init_info"]["address"], device="cpu", settings=QUICK)
            )
            self.receivers.append(WeightReceiver(StagedTarget(TensorTarget(weights)), session))
            self._draft_receivers.append(WeightReceiver(TensorTarget(drafts), session))

    def _start_weight_update(self, body: Any) -> None:
        if self.active:
            raise RuntimeError("a weight update is already active. Call finish_weight_update first")
        self.active = True
        self._receiving = self.receivers

    def _start_draft_weight_update(self, body: Any) -> None:
        self._start_weight_update(body)
        self._receiving = self._draft_receivers

    def _update_weights(self, body: Any) -> None:
        if not self.active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        info = body["update_info"]
        timeout_s, since = info["timeout_s"], info["since"]
        self.receiving += 1
        try:
            if self.receivers and self.receivers[0].session.epoch != info["epoch"]:
                _as_worker(self._refuse_stranger)
            with ThreadPoolExecutor(len(self.receivers)) as pool:
                each = pool.map(
                    lambda receiver: _as_worker(lambda: receiver.receive(timeout_s, since=since)),
                    self._receiving,
                )
                for _ in each:
                    pass
        except Exception:
            self.active = False
            raise
        finally:
            self.receiving -= 1

    def _refuse_stranger(self) -> None:
        raise SessionStateError("another trainer has connected this engine")

    def _finish_weight_update(self, body: Any) -> None:
        if not self.active:
            raise RuntimeError("finish_weight_update called without a matching start")
        self.active = False
        self.receiving = 0
        """How many requests are inside of update_weights."""
        self.version = (body or {}).get("weight_version")

    def _leave(self) -> None:
        for receiver in self.receivers:
            receiver.session.close()
        self.receivers.clear()
        self._draft_receivers.clear()


def _as_worker(call: Callable[[], Any]) -> Any:
    """What fails in a worker reaches its server as text only."""
    try:
        return call()
    except PackedCommError as error:
        raise Exception(f"Call to collective_rpc method failed: {marked(error)}") from error


def _handler(server: VllmServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            url = urlsplit(self.path)
            route = url.path.strip("/")
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.headers = dict(self.headers)
            server.queries[route] = dict(parse_qsl(url.query))
            status, answer = server.answer(route, json.loads(content) if content else None)
            data = json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the caller has gone

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
