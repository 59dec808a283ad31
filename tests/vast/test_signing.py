"""The stand-in signs like Vast. The test vectors were made and verified by independent code."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.vast.signing import SIGNED_FIELDS, Signer, canonical_message

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors.json").read_text())
FIELDS = VECTORS["auth_data_fields"]
COSTS = {"A-float-cost": 242.0, "A-string-cost": "256"}
BY_NAME = {vector["name"]: vector for vector in VECTORS["vectors"]}


@pytest.fixture
def signer() -> Signer:
    key = load_pem_private_key(VECTORS["private_key_pem"].encode(), None)
    assert isinstance(key, RSAPrivateKey)
    return Signer(key)


def form_of(name: str) -> str:
    return {"C": "C2"}.get(name, name[0])


@pytest.mark.parametrize("name", BY_NAME)
def test_message_and_signature_are_vasts_to_the_byte(signer: Signer, name: str) -> None:
    fields = FIELDS | {"cost": COSTS.get(name, FIELDS["cost"])}
    assert canonical_message(form_of(name), fields) == BY_NAME[name]["message_utf8"]
    assert signer.sign(form_of(name), fields) == BY_NAME[name]["signature_b64"]


def test_the_public_key_belongs_to_the_private_key(signer: Signer) -> None:
    assert signer.public_pem() == VECTORS["public_key_pem"]
    assert Signer().public_pem() != signer.public_pem()


@pytest.mark.parametrize("form", SIGNED_FIELDS)
def test_fields_that_a_form_does_not_name_are_not_signed(signer: Signer, form: str) -> None:
    assert signer.sign(form, FIELDS) == signer.sign(form, FIELDS | {"__request_id": "x"})
    for name, value in FIELDS.items():
        other = FIELDS | {name: f"{value}0"}
        same = signer.sign(form, FIELDS) == signer.sign(form, other)
        assert same is (name not in SIGNED_FIELDS[form])
