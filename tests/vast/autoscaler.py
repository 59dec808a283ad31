"""A stand-in for Vast's autoscaler, console and web server, for testing workers.

It registers workers by their reports, routes clients to ready workers, signs requests like Vast,
and records everything that workers report (`tests/vast/ledger.py`). In a test:

    with running() as autoscaler:
        start_a_worker(report_addr=autoscaler.url, console_url=autoscaler.url)
        autoscaler.wait_until_ready(timeout_s=60)
        call_it(autoscaler.envelope({"inputs": "Hi", "parameters": {"max_new_tokens": 5}}))
        assert autoscaler.settled() == []

By hand, and for processes: `python -m tests.vast.autoscaler --help`.
"""

import argparse
import asyncio
import itertools
import json
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router

from tests.vast.certificates import Authority, RequestRefused
from tests.vast.ledger import Attempt, Deletion, Ledger, Report
from tests.vast.signing import SIGNED_FIELDS, Signer

Json = dict[str, Any]
Handler = Callable[[Request], Awaitable[Response]]

ENDPOINT: Json = {
    "id": 5,
    "endpoint_name": "skiff",
    "api_key": "endpoint-key",
    "user_id": 1,
    "created_at": 1.0,
}
"""The only endpoint. Requests may name any endpoint and are routed all the same."""
NO_PEM = "<html><body>502 Bad Gateway</body></html>"
"""The error page of a proxy, where a key or certificate is expected."""
KEYS = ("right", "wrong", "page", "none")
ROUTES = (
    "pubkey",
    "worker_status",
    "delete_requests",
    "route",
    "get_endpoint_workers",
    "endptjobs",
    "sign_cert",
    "static",
)
"""Names of the routes for `fail` and `slow`."""
CERTIFICATES = ("right", "other_key", "page")


@dataclass
class Worker:
    """A worker, as known from its latest report."""

    id: int
    last: Report
    loaded_at: float = 0.0
    reqnums: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    num_sent: int = 0

    def update(self, report: Report) -> None:
        """Record a report. Workers repeat their loadtime in each report, except the oldest ones,
        whose reports have no version.
        """
        if report.loaded:
            self.loaded_at = self.loaded_at or report.at
        elif "version" in report.body:
            self.loaded_at = 0.0
        self.last = report

    def state(self) -> str:
        """Return the state in words, for the console."""
        body = self.last.body
        if self.status == "error":
            return f"is in error: {body['error_msg']}"
        if self.status == "loading":
            return "is loading"
        return (
            f"is ready at {body.get('url')}: loaded in {body['loadtime']} s, "
            f"max_perf {self.last.number('max_perf'):.1f}"
        )

    @property
    def status(self) -> str:
        if self.last.body.get("error_msg"):
            return "error"
        return "ready" if self.loaded_at else "loading"

    def summary(self) -> Json:
        """Return the worker's entry in /get_endpoint_workers/."""
        return {
            "id": self.id,
            "status": self.status,
            "cur_load": self.last.number("cur_load"),
            "new_load": self.last.number("new_load"),
            "cur_load_rolling_avg": self.last.number("cur_load"),
            "cur_perf": self.last.number("cur_perf"),
            "perf": self.last.number("max_perf"),
            "measured_perf": self.last.number("max_perf"),
            "dlperf": 0.0,
            "reliability": 1.0,
            "reqs_working": self.last.number("num_requests_working"),
            "disk_usage": self.last.number("disk_usage"),
            "loaded_at": self.loaded_at,
            "started_at": 0.0,
        }


@dataclass
class Fault:
    """A fault of a route: a delay, and then possibly an error status instead of the answer."""

    delay_s: float = 0.0
    status: int | None = None
    times: int | None = None

    def is_spent(self) -> bool:
        return self.times is not None and self.times <= 0

    async def apply(self) -> Response | None:
        if self.times is not None:
            self.times -= 1
        await asyncio.sleep(self.delay_s)
        return Response(status_code=self.status) if self.status is not None else None


class Autoscaler:
    """The state behind the routes, and the controls for tests and people.

    form                 protocol generation whose signatures clients get
    certificate_address  address for which workers' certificates are valid
    say                  called with a line for each event
    """

    def __init__(
        self,
        form: str = "C2",
        certificate_address: str = "127.0.0.1",
        say: Callable[[str], None] = lambda _: None,
        signer: Signer | None = None,
    ) -> None:
        self.form = form
        self.ledger = Ledger()
        self.workers: dict[int, Worker] = {}
        self.certificate_requests: list[int] = []
        self.listeners: list[Listener] = []
        self.authority = Authority()
        self._certificate_address = certificate_address
        self._say = say
        self._signer = signer or Signer()
        self._key, self._certificate = "right", "right"
        self._faults: dict[str, Fault] = {}
        self._request_idxs = itertools.count(1)
        self._changed = threading.Condition()

    # --- controls: methods here, POST /_control/<name> with their arguments as JSON over HTTP

    def sign_as(self, form: str) -> None:
        """Sign in another form from now on: A, B, C1 or C2."""
        self.form = _one_of(form, tuple(SIGNED_FIELDS))

    def rotate_key(self) -> None:
        """Sign with a new key from now on, and serve it."""
        self._signer = Signer()

    def serve_key(self, which: str = "right") -> None:
        """Choose what /pubkey/ answers: the right key, a wrong key, an error page with 200, or a
        404.
        """
        self._key = _one_of(which, KEYS)

    def issue(self, which: str = "right") -> None:
        """Choose what /sign_cert/ answers with 200: the right certificate, one for another key, or
        an error page.
        """
        self._certificate = _one_of(which, CERTIFICATES)

    def certify(self, address: str) -> None:
        """Issue certificates for this address from now on."""
        self._certificate_address = address

    def fail(self, route: str, status: int = 500, times: int | None = None) -> None:
        """Answer a route (see ROUTES) with an error, always or a number of times."""
        self._faults[_one_of(route, ROUTES)] = Fault(status=status, times=times)

    def slow(self, route: str, seconds: float, times: int | None = None) -> None:
        """Delay a route. Its requests are recorded only after the delay."""
        self._faults[_one_of(route, ROUTES)] = Fault(delay_s=seconds, times=times)

    def heal(self) -> None:
        """Remove all faults; serve the right key and certificate again."""
        self._faults.clear()
        self._key, self._certificate = "right", "right"

    def down(self, seconds: float, address: int = 0) -> None:
        """Refuse connections at one of the addresses for a while, starting now."""
        threading.Thread(target=self.listeners[address].pause, args=[seconds]).start()

    # --- for tests

    @property
    def url(self) -> str:
        """All addresses, separated by commas: the value for REPORT_ADDR."""
        return ",".join(listener.url for listener in self.listeners)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
        """Wait until `condition` holds. It is checked whenever something is recorded."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                raise TimeoutError(f"not within {timeout_s} s; complaints: {self.complaints()}")

    def wait_until_ready(self, timeout_s: float = 10.0) -> None:
        self.wait_for(self._ready_workers, timeout_s)

    def complaints(self, in_sessions: float = 0.0, unused: float = 0.0) -> list[str]:
        return self.ledger.complaints(in_sessions, unused)

    def settled(self, timeout_s: float = 10.0, in_sessions: float = 0.0) -> list[str]:
        """Give workers time to report, and return the complaints that remain."""
        with self._changed:
            self._changed.wait_for(lambda: not self.complaints(in_sessions), timeout_s)
            return self.complaints(in_sessions)

    def envelope(self, payload: Json, cost: float | None = None) -> Json:
        """Route a client and return the body that it sends to its worker. The default cost is the
        number of new tokens, as in Vast's worker. Raises LookupError if no worker is ready.
        """
        if cost is None:
            cost = payload.get("parameters", {}).get("max_new_tokens", 100)
        auth_data = self.route({"endpoint": ENDPOINT["endpoint_name"], "cost": cost})
        if "url" not in auth_data:
            raise LookupError(auth_data["status"])
        return {"auth_data": auth_data, "session_id": None, "payload": payload}

    # --- for the routes

    def public_key(self) -> str | None:
        """Return what /pubkey/ serves; None for a 404."""
        match self._key:
            case "right":
                return self._signer.public_pem()
            case "wrong":
                return Signer().public_pem()
            case "page":
                return NO_PEM
            case _:
                return None

    def certificate(self, request: bytes, worker_id: int) -> str:
        self._say(f"worker {worker_id} asks for a certificate")
        self.certificate_requests.append(worker_id)
        match self._certificate:
            case "page":
                return NO_PEM
            case "other_key":
                return self.authority.root_pem()
            case _:
                return self.authority.sign(request, self._certificate_address)

    def take_report(self, body: Json, address: str) -> None:
        report = Report(time.time(), address, body)
        with self._changed:
            worker = self.workers.get(report.worker_id)
            before = worker.state() if worker else None
            if worker is None:
                worker = self.workers[report.worker_id] = Worker(report.worker_id, report)
            worker.update(report)
            self.ledger.reports.append(report)
            if worker.state() != before:
                self._say(f"worker {worker.id} {worker.state()}")
            for fault in report.faults():
                self._say(f"worker {worker.id}: invalid report: {fault}")
            self._changed.notify_all()

    def take_deletions(self, body: Json, address: str) -> None:
        """Record deletions in either format: `requests`, or `request_idxs` with one `success`."""
        entries = body.get("requests")
        if entries is None:
            entries = [{"request_idx": x, "success": body["success"]} for x in body["request_idxs"]]
        worker_id = body["worker_id"]
        made = [Deletion(time.time(), address, worker_id, **entry) for entry in entries]
        if not all(isinstance(deletion.request_idx, int) for deletion in made):
            raise ValueError("request_idx is no number")
        with self._changed:
            worker = self.workers.get(worker_id)
            if body["mtoken"] != (worker.last.body.get("mtoken") if worker else None):
                raise ValueError(f"worker {worker_id} has not reported with this mtoken")
            self.ledger.deletions += made
            for deletion in made:
                self._say(deletion.summary())
            self._changed.notify_all()

    def refuse(self, route: str, reason: str) -> None:
        with self._changed:
            self.ledger.refusals.append(f"{route}: {reason}")
            self._say(f"refused: {route}: {reason}")
            self._changed.notify_all()

    def route(self, asked: Json) -> Json:
        """Send a client to the ready worker that has received the fewest clients. If none is ready,
        the answer has no url, and the client asks again with the request_idx from the answer.
        """
        request_idx = asked.get("request_idx") or next(self._request_idxs)
        with self._changed:
            worker = min(self._ready_workers(), key=lambda worker: worker.num_sent, default=None)
            if worker is None:
                return {
                    "endpoint": asked["endpoint"],
                    "status": f"no worker is ready: {[x.status for x in self.workers.values()]}",
                    "request_idx": request_idx,
                }
            return self._send(worker, asked["endpoint"], asked.get("cost", 100), request_idx)

    def _send(self, worker: Worker, endpoint: str, cost: float, request_idx: int) -> Json:
        fields = {
            "cost": cost,
            "endpoint": endpoint,
            "reqnum": next(worker.reqnums),
            "request_idx": request_idx,
            "url": worker.last.body["url"],
        }
        signature = self._signer.sign(self.form, fields)
        if self.form == "A":
            del fields["request_idx"]
        worker.num_sent += 1
        self.ledger.attempts.append(
            Attempt(time.time(), worker.id, fields["reqnum"], fields.get("request_idx"), cost)
        )
        self._say(f"request {request_idx} goes to worker {worker.id} as reqnum {fields['reqnum']}")
        return fields | {
            "signature": signature,
            "status": "READY",
            "__request_id": str(uuid.uuid4()),
        }

    def fault(self, route: str) -> Fault | None:
        found = self._faults.get(route)
        return None if found is None or found.is_spent() else found

    def _ready_workers(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.status == "ready"]


def _one_of(value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value


CONTROLS = (
    "sign_as",
    "rotate_key",
    "serve_key",
    "issue",
    "certify",
    "fail",
    "slow",
    "heal",
    "down",
)


class Routes:
    """The HTTP routes of an `Autoscaler`."""

    def __init__(self, autoscaler: Autoscaler) -> None:
        self._autoscaler = autoscaler

    def app(self) -> Starlette:
        """Return the application. The autoscaler's routes also exist under /api/v0, since an
        address in REPORT_ADDR may have a path.
        """
        own: list[BaseRoute] = [
            self._route("/pubkey/", self.pubkey, "GET"),
            self._route("/worker_status/", self.worker_status),
            self._route("/delete_requests/", self.delete_requests),
            self._route("/route/", self.route),
            self._route("/get_endpoint_workers/", self.get_endpoint_workers),
        ]
        console: list[BaseRoute] = [
            self._route("/endptjobs/", self.endptjobs, "GET"),
            self._route("/endptjobs/{id:int}/", self.endptjob, "GET"),
            self._route("/sign_cert/", self.sign_cert),
        ]
        ours: list[BaseRoute] = [
            Route("/_ledger", self.ledger),
            Route("/_complaints", self.complaints),
            Route("/_envelope", self.envelope, methods=["POST"]),
            Route("/_control/{name}", self.control, methods=["POST"]),
        ]
        root = self._route("/static/jvastai_root.cer", self.root_certificate, "GET")
        under_path = Mount("/api/v0", app=Router([*own, *console], redirect_slashes=False))
        app = Starlette(routes=[*own, under_path, root, *ours])
        app.router.redirect_slashes = False
        return app

    def _route(self, path: str, handler: Handler, method: str = "POST") -> Route:
        name = path.strip("/").split("/")[0]

        async def answer(request: Request) -> Response:
            fault = self._autoscaler.fault(name)
            spoilt = await fault.apply() if fault else None
            try:
                return spoilt or await handler(request)
            except (KeyError, TypeError, ValueError, RequestRefused) as error:
                reason = f"{type(error).__name__}: {error}"
                self._autoscaler.refuse(path, reason)
                return PlainTextResponse(reason, status_code=400)

        return Route(path, answer, methods=[method])

    async def pubkey(self, _: Request) -> Response:
        key = self._autoscaler.public_key()
        return PlainTextResponse(key) if key else Response(status_code=404)

    async def worker_status(self, request: Request) -> Response:
        self._autoscaler.take_report(await request.json(), _address(request))
        return JSONResponse({})

    async def delete_requests(self, request: Request) -> Response:
        if self._autoscaler.form == "A":
            return Response(status_code=404)  # the oldest generation had no such route
        self._autoscaler.take_deletions(await request.json(), _address(request))
        return JSONResponse({})

    async def route(self, request: Request) -> Response:
        return JSONResponse(self._autoscaler.route(await request.json()))

    async def get_endpoint_workers(self, _: Request) -> Response:
        return JSONResponse([worker.summary() for worker in self._autoscaler.workers.values()])

    async def endptjobs(self, _: Request) -> Response:
        return JSONResponse({"results": [ENDPOINT]})

    async def endptjob(self, _: Request) -> Response:
        return JSONResponse({"result": ENDPOINT})

    async def sign_cert(self, request: Request) -> Response:
        worker_id = int(request.query_params["instance_id"])
        return PlainTextResponse(self._autoscaler.certificate(await request.body(), worker_id))

    async def root_certificate(self, _: Request) -> Response:
        return PlainTextResponse(self._autoscaler.authority.root_pem())

    async def ledger(self, _: Request) -> Response:
        return JSONResponse(
            asdict(self._autoscaler.ledger)
            | {"workers": [worker.summary() for worker in self._autoscaler.workers.values()]}
            | {"certificate_requests": self._autoscaler.certificate_requests}
        )

    async def complaints(self, request: Request) -> Response:
        asked = request.query_params
        in_sessions, unused = (float(asked.get(name, 0)) for name in ("in_sessions", "unused"))
        return JSONResponse(self._autoscaler.complaints(in_sessions, unused))

    async def envelope(self, request: Request) -> Response:
        try:
            return JSONResponse(self._autoscaler.envelope(await request.json()))
        except LookupError as error:
            return PlainTextResponse(str(error), status_code=503)

    async def control(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in CONTROLS:
            return PlainTextResponse(f"a control is one of {', '.join(CONTROLS)}", status_code=404)
        arguments = json.loads(await request.body() or b"{}")
        try:
            await run_in_threadpool(getattr(self._autoscaler, name), **arguments)
        except (TypeError, ValueError, IndexError) as error:
            return PlainTextResponse(str(error), status_code=400)
        return JSONResponse({})


def _address(request: Request) -> str:
    """Return the address that the worker used, including its path."""
    return f"{request.url.scheme}://{request.url.netloc}{request.scope['root_path']}"


class Listener:
    """One address: uvicorn in a thread, which can stop and come back at the same port."""

    def __init__(self, app: Starlette, port: int = 0) -> None:
        self._app = app
        self.port = port
        self._over = threading.Event()
        self._pausing = threading.Lock()
        self._open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pause(self, seconds: float) -> None:
        """Refuse connections for this long. Returns when they are accepted again."""
        with self._pausing:
            self._close()
            if not self._over.wait(seconds):
                self._open()

    def end(self) -> None:
        self._over.set()
        with self._pausing:
            self._close()

    def _open(self) -> None:
        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            log_level="error",
            lifespan="off",
            timeout_keep_alive=60,  # a connection that is closed as it is used fails a request
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=[[listening]], daemon=True)
        self._thread.start()

    def _close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def running(autoscaler: Autoscaler | None = None, *ports: int) -> Iterator[Autoscaler]:
    """Run an autoscaler, on the given ports (0: any free port), by default on one."""
    autoscaler = autoscaler or Autoscaler()
    app = Routes(autoscaler).app()
    autoscaler.listeners = [Listener(app, port) for port in ports or (0,)]
    try:
        yield autoscaler
    finally:
        for listener in autoscaler.listeners:
            listener.end()


EPILOG = """\
Try a worker against it, with the port that it prints:

  A=http://127.0.0.1:8200
  CONTAINER_ID=1 MASTER_TOKEN=t REPORT_ADDR=$A VAST_CONSOLE_URL=$A TLS_DIRECTORY=/tmp/tls \\
    PUBLIC_IPADDR=127.0.0.1 WORKER_PORT=3000 VAST_TCP_PORT_3000=3000 USE_SSL=false python -m api

  curl -s $A/_envelope -d '{"inputs":"The sea","parameters":{"max_new_tokens":20}}' |
    curl -s 127.0.0.1:3000/generate -d @-

/_envelope returns a signed request as a client would send it. /_ledger returns everything that
was reported, and /_complaints everything in it that does not add up when nothing is in flight.

Cause faults (the arguments are JSON, see the methods of the same names):

  curl -X POST $A/_control/down -d '{"seconds": 20}'           # refuses connections
  curl -X POST $A/_control/fail -d '{"route": "worker_status", "status": 500, "times": 3}'
  curl -X POST $A/_control/slow -d '{"route": "pubkey", "seconds": 12}'
  curl -X POST $A/_control/rotate_key
  curl -X POST $A/_control/serve_key -d '{"which": "none"}'    # right, wrong, page, none
  curl -X POST $A/_control/issue -d '{"which": "page"}'        # right, other_key, page
  curl -X POST $A/_control/certify -d '{"address": "0.0.0.0"}'
  curl -X POST $A/_control/sign_as -d '{"form": "A"}'          # A, B, C1, C2
  curl -X POST $A/_control/heal
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vast.autoscaler",
        description="A stand-in for Vast's autoscaler, console and web server, on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=8200, help="0 for any (default: 8200)")
    parser.add_argument(
        "--addresses",
        type=int,
        default=1,
        help="number of ports to listen on, for a list in REPORT_ADDR",
    )
    parser.add_argument(
        "--form", choices=list(SIGNED_FIELDS), default="C2", help="form of signatures (default: C2)"
    )
    parser.add_argument(
        "--certificate-address",
        default="127.0.0.1",
        help="address for which workers' certificates are valid (default: 127.0.0.1)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not print events")
    options = parser.parse_args(argv)
    _serve(options)
    return 0


def _serve(options: argparse.Namespace) -> None:
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    say = (lambda _: None) if options.quiet else (lambda event: print(event, flush=True))
    autoscaler = Autoscaler(options.form, options.certificate_address, say)
    with running(autoscaler, options.port, *[0] * (options.addresses - 1)):
        print(f"Autoscaler on {autoscaler.url}", flush=True)
        over.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
