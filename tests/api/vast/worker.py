"""A worker in the test's own process, wired as in `api.vast.worker`: the application behind
`WorkerApp` and `AuthGateway`, a fake autoscaler, and a signer with the autoscaler's key.
"""

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import httpx2
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr

from api.generation.state import AppState, build_state
from api.settings.config import Settings
from api.vast.active_errors import ActiveErrors
from api.vast.auth_gateway import AuthGateway, GatewayConfig
from api.vast.public_key import PublicKeys
from api.vast.sessions import Sessions
from api.vast.worker_app import WorkerApp
from api.vast.workload import Workload
from tests.api.client import make_app
from tests.api.scripted import ScriptedEngine

URL = "https://203.0.113.7:41234"
ADDRESS = "https://run.example"
TOKEN = "master-token"
AUTH = {"cost": 256, "endpoint": "ep", "reqnum": 7, "request_idx": 42, "url": URL}
PAYLOAD = {"inputs": "x", "parameters": {"max_new_tokens": 8}}
_SIGNED_FIELDS = {
    "A": ("cost", "endpoint", "reqnum", "url"),
    "B": ("cost", "endpoint", "reqnum", "request_idx", "url"),
    "C": ("url",),
}


class Signer:
    """Signs with an RSA key of its own."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(65537, 2048)
        public = self._key.public_key()
        self.pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        self.pkcs1_pem = public.public_bytes(Encoding.PEM, PublicFormat.PKCS1).decode()

    def sign(self, message: str) -> str:
        signature = self._key.sign(message.encode(), PKCS1v15(), SHA256())
        return base64.b64encode(signature).decode()

    def auth(self, form: str = "C", **fields: object) -> dict[str, Any]:
        """Return signed `auth_data` of the protocol generation `form`."""
        auth = AUTH | fields
        if form == "A":
            del auth["request_idx"]
        signed = {name: auth[name] for name in _SIGNED_FIELDS[form]}
        return auth | {"signature": self.sign(json.dumps(signed, indent=4))}


def signer(name: str = "autoscaler") -> Signer:
    """Return the signer of that name, made once: generating a key takes a while."""
    return _signer(name)


@cache
def _signer(_: str) -> Signer:
    return Signer()


Answers = dict[str, list[int | Exception]]
"""Status codes or errors to answer with, by part of the URL. The last entry of a list repeats."""


class Autoscaler:
    """Records what the worker sends, and answers as `answers` says, else with success."""

    def __init__(self, pem: str) -> None:
        self.pem = pem
        self.answers: Answers = {}
        self.requests: list[tuple[str, Any]] = []
        self.on_request: Callable[[str], None] = lambda _: None

    def client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.MockTransport(self._answer))

    def urls(self, route: str = "") -> list[str]:
        return [url for url, _ in self.requests if route in url]

    def bodies(self, route: str) -> list[Any]:
        return [body for url, body in self.requests if route in url]

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        url = str(request.url)
        self.requests.append((url, json.loads(request.content) if request.content else None))
        self.on_request(url)
        for part, answers in self.answers.items():
            if part in url:
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if isinstance(answer, Exception):
                    raise answer
                if answer != 200:
                    return httpx2.Response(answer)
        return httpx2.Response(200, text=self.pem if url.endswith("/pubkey/") else "")


def make_state(engine: ScriptedEngine, **settings: Any) -> AppState:
    return build_state(cast(Any, engine), Settings(**settings))


@dataclass
class Worker:
    """The parts of a worker, and a client of it."""

    engine: ScriptedEngine
    http: httpx2.AsyncClient
    autoscaler: Autoscaler
    workload: Workload
    errors: ActiveErrors
    keys: PublicKeys
    sessions: Sessions
    app: WorkerApp
    signer: Signer

    async def ask(
        self,
        payload: object = PAYLOAD,
        path: str = "/generate",
        form: str = "C",
        session_id: object = None,
        **fields: object,
    ) -> httpx2.Response:
        """Send a correctly signed request."""
        body = self.envelope(payload, form, session_id=session_id, **fields)
        return await self.http.post(path, content=json.dumps(body).encode())

    def envelope(
        self,
        payload: object = PAYLOAD,
        form: str = "C",
        session_id: object = None,
        **fields: object,
    ) -> dict[str, Any]:
        auth = self.signer.auth(form, **fields)
        return {"auth_data": auth, "payload": payload, "session_id": session_id}

    def outcomes(self) -> list[tuple[object, str]]:
        """Return the request_idx and outcome of each ended request."""
        return [(ended.request_idx, str(ended.outcome)) for ended in self.workload.ended]


@asynccontextmanager
async def worker(
    engine: ScriptedEngine | None = None,
    *,
    unsecured: bool = False,
    with_key: bool = True,
    wait_s: Callable[[], float] = lambda: 0.0,
    max_queue_time_s: float | None = 60.0,
    max_sessions: int = 10,
    **settings: Any,
) -> AsyncIterator[Worker]:
    """A worker that is ready and, unless `with_key` is False, has the autoscaler's key."""
    engine = engine or ScriptedEngine()
    autoscaler, errors, workload = Autoscaler(signer().pem), ActiveErrors(), Workload()
    application = make_app(engine, **settings)
    serving = application.state.serving.settings
    key = serving.api_key
    async with autoscaler.client() as reports:
        keys = PublicKeys(reports, [ADDRESS], errors)
        sessions = Sessions(workload, max_sessions)
        app = WorkerApp(sessions, SecretStr(TOKEN))
        app.application = application
        app.gateway = AuthGateway(
            application,
            GatewayConfig(
                unsecured=unsecured,
                api_key=None if key is None else key.get_secret_value(),
                payload_limit=serving.payload_limit,
                max_queue_time_s=max_queue_time_s,
                wait_s=wait_s,
            ),
            keys,
            workload,
            sessions,
        )
        if with_key:
            await keys.obtain()
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
            yield Worker(engine, http, autoscaler, workload, errors, keys, sessions, app, signer())
