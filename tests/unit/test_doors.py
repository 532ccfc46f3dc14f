"""What is said of files that cannot guard a door, and which addresses stand open."""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from outrider.common.doors import Allowances, Doors, UnknownKeyError, is_local
from outrider.common.keys import Key, Limits
from outrider.common.reread import Reread
from outrider.common.tls import ClientFiles
from tests.certificates import Authority, Pem, doors_of, write_keys

LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path)


def encrypted(pem: Pem) -> Pem:
    key = serialization.load_pem_private_key(Path(pem.key).read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    Path(pem.key).write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    return pem


def garbled(path: str) -> str:
    """Damage what is between the lines of PEM."""
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join([lines[0], "AAAA", *lines[2:]]))
    return path


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda pem, ca: Pem("nowhere", pem.key), r"--tls-cert is 'nowhere', which cannot be read \(no such file"),
        (lambda pem, ca: Pem(pem.cert, "/"), r"--tls-key is '/', which cannot be read \(is a directory\): give"),
        (lambda pem, ca: Pem("\0", pem.key), "--tls-cert is '.x00', which cannot be read"),
        (lambda pem, ca: Pem(pem.key, pem.key), "--tls-cert is .*, which holds no certificate: give"),
        (lambda pem, ca: Pem(pem.cert, pem.cert), "--tls-key is .*, which holds no private key: give"),
        (lambda pem, ca: Pem(pem.cert, ca.issue("other").key), "which does not belong to the certificate in .*: give"),
        (lambda pem, ca: encrypted(pem), "--tls-key is .*, which is encrypted: give one without a password"),
        (lambda pem, ca: Pem(garbled(pem.cert), pem.key), "--tls-key is .*, which cannot be used with .*: give"),
        (lambda pem, ca: ca.issue("old", expires=LONG_AGO), "--tls-cert is .*, and its certificate has expired: renew"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_a_server_is_told_in_a_sentence(authority, damage, sentence):
    pem = damage(authority.issue("server"), authority)
    with pytest.raises(ValueError, match=sentence):
        doors_of(pem)


def test_a_certificate_that_is_not_valid_yet_cannot_serve(authority, tmp_path):
    made = authority._ca.issue_cert("localhost", not_before=datetime.now(timezone.utc) + timedelta(days=2))
    pem = Pem(str(tmp_path / "c"), str(tmp_path / "k"))
    made.cert_chain_pems[0].write_to_path(pem.cert)
    made.private_key_pem.write_to_path(pem.key)
    with pytest.raises(ValueError, match="its certificate is not valid yet"):
        doors_of(pem)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tls_cert": "a"}, "--tls-cert and --tls-key go together"),
        ({"tls_key": "a"}, "--tls-cert and --tls-key go together"),
        ({"tls_client_ca": "a"}, "--tls-client-ca needs --tls-cert"),
        ({"api_keys": "nowhere"}, r"--api-keys is 'nowhere', which cannot be read \(No such file"),
        ({"api_keys": sys.executable}, "--api-keys is .*, which holds no text"),
        ({"api_keys": __file__}, "--api-keys is .*: line 1 of the keys is no key"),
    ],
)
def test_options_that_do_not_fit_are_told_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Doors.of(**options)


def test_authorities_that_are_none_are_told_in_a_sentence(authority, tmp_path):
    pem = authority.issue("server")
    with pytest.raises(ValueError, match=r"--tls-client-ca is .*, which holds no certificate"):
        doors_of(pem, tls_client_ca=pem.key)
    with pytest.raises(ValueError, match=r"tls_ca is .*, which cannot be used"):
        ClientFiles(ca=garbled(authority.ca)).read()


def test_a_server_without_a_file_of_keys_lets_everyone_in():
    assert Doors().owner_of("") is Doors().owner_of("Bearer anything") is None


@pytest.mark.parametrize(
    "shown", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic {ann}", "{ann}", "Bearer {ann}x", "Bearer é"]
)
def test_who_shows_no_known_key_is_told_what_to_send_and_not_what_was_sent(tmp_path, shown):
    secret = write_keys(tmp_path / "keys", ann={})["ann"]
    with pytest.raises(UnknownKeyError, match="send one that is known here, as `Authorization: Bearer KEY`") as error:
        Doors.of(api_keys=str(tmp_path / "keys")).owner_of(shown.format(ann=secret))
    assert secret not in str(error.value)


def test_keys_are_read_again_and_a_wrong_file_leaves_what_was(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = tmp_path / "keys"
    ann = write_keys(file, ann={"sessions": 2})["ann"]
    doors = Doors.of(api_keys=str(file))
    assert doors.owner_of(f"Bearer {ann}") == Key("ann", doors.keys.current[0].digest, Limits(sessions=2))
    bob = write_keys(file, bob={})["bob"]
    assert doors.owner_of(f"bearer  {bob}").name == "bob"
    with pytest.raises(UnknownKeyError):
        doors.owner_of(f"Bearer {ann}")
    file.write_text(f"bob {bob}")  # a key where its digest should be
    assert doors.owner_of(f"Bearer {bob}").name == "bob"
    file.unlink()
    assert doors.owner_of(f"Bearer {bob}").name == "bob"
    assert doors.owner_of(f"Bearer {bob}").name == "bob"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2  # once for each change
    assert bob not in caplog.text


def test_certificates_are_read_again_when_another_file_takes_their_name(authority, tmp_path, caplog):
    pem = authority.issue("server")
    doors = doors_of(pem)
    first = doors.tls.current
    assert doors.tls.current is first
    other = authority.issue("other")
    Path(other.cert).replace(pem.cert)  # whose key is still the old one
    assert doors.tls.current is first
    assert "does not belong to the certificate" in caplog.text
    Path(other.key).replace(pem.key)
    assert doors.tls.current.cert != first.cert


def test_files_that_change_while_they_are_read_are_read_again(tmp_path):
    file = tmp_path / "value"
    file.write_text("a")

    def read() -> str:
        found = file.read_text()
        if found == "b":
            file.write_text("later")
        return found

    value = Reread([str(file)], read)
    file.write_text("b")
    assert [value.current, value.current] == ["b", "later"]


# Tokens a minute.


def test_a_key_may_go_into_debt_and_waits_until_it_is_paid():
    now = 100.0
    key = Key("ann", b"", Limits(tokens_per_minute=60))
    allowances = Allowances(clock=lambda: now)
    assert allowances.wait_s(key) == 0
    allowances.spend(key, 90)
    assert allowances.wait_s(key) == pytest.approx(31)  # 30 tokens of debt, and one to begin with
    now += 32
    assert allowances.wait_s(key) == 0
    now += 3600
    allowances.spend(key, 61)
    assert allowances.wait_s(key) == pytest.approx(2)  # an hour saved no more than a minute's tokens
    assert allowances.wait_s(Key("bob", b"", Limits(tokens_per_minute=1))) == 0
    for unlimited in (None, Key("carl", b"")):
        allowances.spend(unlimited, 10**9)
        assert allowances.wait_s(unlimited) == 0


# Addresses.


LOCAL = (
    "127.0.0.1:1 127.8.8.8:1 localhost:0 [::1]:1 unix:/run/a.sock unix:a unix-abstract:a ipv4:127.0.0.1:1 "
    "ipv6:[::1]:1 dns:///localhost:1"
)
OPEN = (
    "0.0.0.0:1 [::]:1 10.0.0.1:1 example.org:1 :1 1 *:1 vsock:1:1 ipv4:0.0.0.0:1 localhost.example.org:1 "
    "127.0.0.1.example.org:1"
)


@pytest.mark.parametrize("listen", LOCAL.split())
def test_what_other_machines_cannot_reach_needs_no_guard(listen):
    assert is_local(listen)
    Doors().check("--listen", listen)


@pytest.mark.parametrize("listen", OPEN.split())
def test_what_they_can_reach_needs_tls_or_an_operators_word(listen, authority, tmp_path):
    write_keys(tmp_path / "keys", ann={})
    for doors in (Doors(), Doors.of(api_keys=str(tmp_path / "keys"))):  # a key in the clear is anyone's
        with pytest.raises(
            ValueError, match=r"--listen .* is open to other machines.*--tls-cert.*127\.0\.0\.1.*--insecure"
        ):
            doors.check("--listen", listen)
    doors_of(authority.issue("server")).check("--listen", listen)
    Doors.of(insecure=True).check("--listen", listen)


@pytest.mark.parametrize("module", ["outrider_target", "outrider_draft", "outrider_gateway"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen=0.0.0.0:0"], "is open to other machines"),
        (["--tls-cert=nowhere", "--tls-key=nowhere"], "--tls-cert is 'nowhere', which cannot be read"),
        (["--api-keys=nowhere"], "--api-keys is 'nowhere', which cannot be read"),
    ],
)
def test_a_server_that_must_not_start_says_why_and_ends(module, arguments, sentence):
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("Error: ")
    assert sentence in line
