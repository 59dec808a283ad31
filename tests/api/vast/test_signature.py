"""Verification of signatures in each generation's form, and protection against replay."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from api.vast.signature import FORMS, Verifier
from tests.api.vast.worker import URL, signer, worker

VECTORS = json.loads(Path(__file__).with_name("signature_vectors.json").read_text())
FIELDS = VECTORS["auth_data"]
SIGNATURES = {vector["name"]: vector["signature_b64"] for vector in VECTORS["vectors"]}
MESSAGES = {vector["name"]: vector["message_utf8"] for vector in VECTORS["vectors"]}
COSTS = {"A-float-cost": 242.0, "A-string-cost": "256"}
FORM_OF = {name: form for name in SIGNATURES for form in FORMS if form.generation == name[0]}


def key() -> RSAPublicKey:
    loaded = load_pem_public_key(VECTORS["public_key_pem"].encode())
    assert isinstance(loaded, RSAPublicKey)
    return loaded


def auth(name: str, **fields: Any) -> dict[str, Any]:
    cost = COSTS.get(name, FIELDS["cost"])
    return FIELDS | {"cost": cost, "signature": SIGNATURES[name]} | fields


def form_of(name: str, **fields: Any) -> str | None:
    form = Verifier().find_form(auth(name, **fields), [key()])
    return None if form is None else form.generation


@pytest.mark.parametrize("name", SIGNATURES)
def test_vasts_test_vectors_are_verified_in_their_form(name: str) -> None:
    assert form_of(name) == name[0]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signed_message_equals_the_vector_to_the_byte(name: str) -> None:
    assert FORM_OF[name].message(auth(name)) == MESSAGES[name].encode()


def test_non_ascii_is_escaped_and_keys_keep_their_order() -> None:
    message = FORM_OF["A"].message(auth("A", endpoint="é", extra=1))
    assert message is not None
    assert b'"endpoint": "\\u00e9"' in message
    assert b"extra" not in message


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize(
    "changed",
    [
        {"url": f"{URL}/"},
        {"url": "https://203.0.113.7:41235"},
        {"url": None},
    ],
)
def test_no_signature_is_valid_for_another_address(name: str, changed: dict[str, Any]) -> None:
    assert form_of(name, **changed) is None


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize(
    "changed",
    [
        {"cost": 256.0},
        {"cost": "256"},
        {"cost": 255},
        {"endpoint": "other"},
        {"reqnum": FIELDS["reqnum"] + 1},
        {"reqnum": str(FIELDS["reqnum"])},
    ],
)
def test_fields_that_older_generations_sign_cannot_be_changed(
    name: str, changed: dict[str, Any]
) -> None:
    assert form_of(name, **changed) is None


def test_only_the_middle_generation_signs_request_idx() -> None:
    assert form_of("B", request_idx=1) is None
    assert form_of("A", request_idx=1) == "A"
    assert form_of("C", request_idx=1, cost=0, endpoint="", reqnum=-1) == "C"


def test_a_signature_in_one_form_is_not_valid_in_another() -> None:
    assert FORM_OF["B"].message(auth("A")) != MESSAGES["A"].encode()
    swapped = {name: value for name, value in auth("A").items() if name != "cost"}
    assert Verifier().find_form(swapped, [key()]) is None


@pytest.mark.parametrize(
    "message",
    [
        json.dumps({"url": URL}),
        json.dumps({"url": URL}, indent=4) + "\n",
        json.dumps({"url": URL}, indent=2),
        json.dumps({"url": URL}, indent=4, separators=(",", ":")),
        "",
    ],
)
def test_a_signature_over_differently_formatted_json_is_invalid(message: str) -> None:
    own = signer()
    public = load_pem_public_key(own.pem.encode())
    assert isinstance(public, RSAPublicKey)
    assert Verifier().find_form(own.auth() | {"signature": own.sign(message)}, [public]) is None
    assert Verifier().find_form(own.auth(), [public]) is not None


def test_a_signature_by_another_key_is_invalid() -> None:
    public = load_pem_public_key(signer().pem.encode())
    assert isinstance(public, RSAPublicKey)
    assert Verifier().find_form(signer("forger").auth(), [public]) is None
    assert Verifier().find_form(signer().auth(), []) is None
    assert Verifier().find_form(signer().auth(), [key(), public]) is not None


# -- replay -------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_newest_generation_may_repeat_a_signature() -> None:
    async with worker() as served:
        body = served.envelope()
        for _ in range(3):
            assert (await served.http.post("/generate", json=body)).status_code == 200
        assert served.outcomes() == [(42, "Success")] * 3
        assert (await served.ask(reqnum=10_000)).status_code == 200
        assert (await served.ask(reqnum=1)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("form", ["A", "B"])
async def test_older_generations_may_not_repeat_a_signature(form: str) -> None:
    async with worker() as served:
        body = served.envelope(form=form)
        assert (await served.http.post("/generate", json=body)).status_code == 200
        assert (await served.http.post("/generate", json=body)).status_code == 401
        assert (await served.ask(form=form, reqnum=8)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("form", ["A", "B"])
async def test_request_numbers_of_older_generations_may_lag_by_a_hundred(form: str) -> None:
    async with worker() as served:
        assert (await served.ask(form=form, reqnum=1000)).status_code == 200
        assert (await served.ask(form=form, reqnum=900)).status_code == 200
        assert (await served.ask(form=form, reqnum=899)).status_code == 401


@pytest.mark.anyio
async def test_a_forged_request_number_does_not_lock_out_others() -> None:
    async with worker() as served:
        forged = served.envelope(form="B", reqnum=10**9)
        forged["auth_data"]["signature"] = signer("forger").auth("B", reqnum=10**9)["signature"]
        assert (await served.http.post("/generate", json=forged)).status_code == 401
        assert (await served.ask(form="B", reqnum=1)).status_code == 200


def test_a_message_is_forgotten_after_a_hundred_others() -> None:
    """This is as in Vast's stock worker, though the number may still be near enough by then."""
    verifier, form = Verifier(), FORM_OF["B"]

    def admits(idx: int) -> bool:
        return verifier.is_fresh(auth("B", request_idx=idx), form)

    assert admits(0)
    assert not admits(0)
    assert all(admits(idx) for idx in range(1, 100))
    assert not admits(0)
    assert admits(100)
    assert admits(0)
