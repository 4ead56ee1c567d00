"""Certificates for the tests, made by openssl's own command line.

What it does: a CA of the test's own, which signs what a test asks for, with any dates. What
it does not: reuse one between tests, or keep one.

Invariant: keys are readable by their owner alone.
"""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from tools.process import clean_environment

NAMES = "DNS:localhost,IP:127.0.0.1"
CONFIG = """
[ca]
default_ca = own
[own]
database = {folder}/index.txt
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""


class Certificate(NamedTuple):
    """The PEM files of a certificate and its key."""

    cert: Path
    key: Path


def openssl(*arguments: str | Path) -> str:
    command = ["openssl", *map(str, arguments)]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


class Authority:
    """A CA; its own certificate is `cert`."""

    def __init__(self, folder: Path, name: str = "test CA") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "index.txt").touch()
        self._config = folder / "ca.conf"
        self._config.write_text(CONFIG.format(folder=folder))
        self.cert, self._key = folder / "ca.crt", folder / "ca.key"
        openssl("req", "-x509", *self._new_key(self._key), "-days", "30", "-subj", f"/CN={name}",
                "-out", self.cert)  # fmt: skip

    def issue(
        self,
        name: str,
        alternative_names: str = NAMES,
        *,
        begins: timedelta = -timedelta(days=2),
        ends: timedelta = timedelta(days=2),
    ) -> Certificate:
        """Sign a new certificate, valid between two moments from now."""
        made = Certificate(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        request = self.folder / f"{name}.csr"
        openssl("req", "-new", *self._new_key(made.key), "-subj", f"/CN={name}",
                "-addext", f"subjectAltName={alternative_names}", "-out", request)  # fmt: skip
        openssl("ca", "-batch", "-notext", "-config", self._config, "-cert", self.cert,
                "-keyfile", self._key, "-startdate", _moment(begins), "-enddate", _moment(ends),
                "-in", request, "-out", made.cert)  # fmt: skip
        return made

    def _new_key(self, key: Path) -> list[str | Path]:
        key.touch(mode=0o600)
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        return [*curve, "-nodes", "-keyout", key]


def _moment(offset: timedelta) -> str:
    return (datetime.now(UTC) + offset).strftime("%Y%m%d%H%M%SZ")
