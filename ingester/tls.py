"""TLS to the broker: what is checked of it, and what is wrong with it, in plain words.

What it does: makes the context from the variables' files, and turns what OpenSSL says of a
failed connection into a line that names the fix. What it does not: connect.

Invariant: a context verifies the broker's certificate and its name, with TLS 1.2 or newer.
Nothing can switch that off.
"""

import base64
import re
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime

from ingester.secret import read_file

# What OpenSSL's verify code (x509_vfy.h) says of the broker's certificate, and the fix.
_WRONG_NAME = "is not for this name: set MQTT_HOST to a name in it, or make it again for this name"
_VERIFY_CODES = {
    9: "is not valid yet: set the clock of this machine, or of the one that made it",
    10: "has expired, or its CA's has: make it again, or set the clock of this machine",
    62: _WRONG_NAME,
    64: _WRONG_NAME,
}

_CLOSED = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)
_TLS_PORT = "MQTT_PORT is not that of its TLS listener"
# Of OpenSSL's words for an alert from the other side (RFC 8446, section 6.2), those that are
# about a client's certificate. A broker with TLS 1.2 says that it fails in the handshake.
_CLIENT_CERTIFICATE_WORDS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "HANDSHAKE_FAILURE")
# OpenSSL's words for an answer that is no TLS record.
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "RECORD_LAYER_FAILURE")


def make_context(env: Mapping[str, str], problems: list[str]) -> ssl.SSLContext | None:
    """Return what the MQTT_ variables say of TLS; None is none."""
    word = (env.get("MQTT_TLS") or "false").lower()
    if word not in ("true", "false"):
        problems.append(f"MQTT_TLS: expected true or false, got {env['MQTT_TLS']!r}")
    ca, cert, key = (env.get(f"MQTT_{name}_FILE") for name in ("CA", "CERT", "KEY"))
    if word == "false" and not ca:
        if cert or key:
            problems.append("MQTT_CERT_FILE, MQTT_KEY_FILE: set MQTT_CA_FILE or MQTT_TLS too")
        return None
    # Not create_default_context(): from Python 3.13 on it refuses many a home-made CA.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which verifies certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not ca:
        context.load_default_certs()
    elif read_file("MQTT_CA_FILE", ca, problems):
        try:
            context.load_verify_locations(ca)
        except OSError:
            problems.append(f"MQTT_CA_FILE: {ca!r} holds no certificate in PEM; export it so")
    if cert and key:
        _load_own(context, cert, key, problems)
    elif cert or key:
        problems.append("MQTT_CERT_FILE, MQTT_KEY_FILE: set both, or neither")
    return context


def _load_own(context: ssl.SSLContext, cert: str, key: str, problems: list[str]) -> None:
    """Let the context show the broker this certificate."""
    cert_pem = read_file("MQTT_CERT_FILE", cert, problems)
    if not (read_file("MQTT_KEY_FILE", key, problems, is_secret=True) and cert_pem):
        return
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(cert, key, password="")
    except OSError as error:
        problem = "or one of them is not PEM, or asks for a passphrase (openssl pkey takes it off)"
        if "MISMATCH" in str(error):
            problem = "but of another one; make both again"
        problems.append(
            f"MQTT_KEY_FILE: {key!r} is not the key of MQTT_CERT_FILE {cert!r}, {problem}"
        )
        return
    # Of the first certificate the end of its validity, RFC 5280, section 4.1.2.5. From 2050 on
    # it is written otherwise, and found by nobody here.
    body = cert_pem.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END")[0]
    ends = re.search(rb"\x17\x0d\d{12}Z\x17\x0d(\d{12})Z", base64.b64decode(body))
    if ends and ends[1].decode() < datetime.now(UTC).strftime("%y%m%d%H%M%S"):
        problems.append(f"MQTT_CERT_FILE: {cert!r} has expired; make it again")


def explain(error: OSError, host: str, port: int) -> str:
    """Say why there is no connection: what was seen, and which settings are worth a look."""
    where, reason = f"{host}:{port}", getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        unknown_ca = (
            f"is not accepted ({error.verify_message}): set MQTT_CA_FILE to the certificate of"
            " the CA that signed it"
        )
        return f"the certificate of {where} {_VERIFY_CODES.get(error.verify_code, unknown_ca)}"
    if isinstance(error, TimeoutError) and "handshake" in str(error):
        return (
            f"{where} takes the connection and does not answer in the TLS handshake: it hangs or"
            f" is overloaded, or {_TLS_PORT}"
        )
    if isinstance(error, _CLOSED):
        return (
            f"{where} closes the connection in the TLS handshake: it is being stopped or refuses"
            f" us, which its log tells, or {_TLS_PORT}"
        )
    if not isinstance(error, ssl.SSLError):
        return f"cannot connect to {where}: {error}"
    if "PROTOCOL" in reason:
        return f"{where} has no TLS 1.2 or newer: update the broker, or fix its tls_version"
    if "ALERT" in reason and any(word in reason for word in _CLIENT_CERTIFICATE_WORDS):
        return f"{where} wants a client certificate (MQTT_CERT_FILE), or refuses ours: {reason}"
    if reason in _NOT_TLS:
        return f"{where} does not answer in TLS: set MQTT_PORT to the broker's TLS listener"
    return f"the TLS handshake with {where} fails: {reason or error}"
