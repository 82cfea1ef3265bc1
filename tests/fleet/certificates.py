"""Certificates of a lab's own: one authority and one certificate that all its members show, by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

__all__ = ["Certificates", "made"]

_CONFIG = """\
[req]
prompt = no
distinguished_name = name
[name]
CN = hostpart lab
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[member]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


class Certificates(NamedTuple):
    """Paths of PEM files."""

    authority: Path
    certificate: Path
    key: Path

    def options(self, ca: str = "--tls-ca", cert: str = "--tls-cert", key: str = "--tls-key") -> list[str]:
        """Give the words of a command line that names them."""
        return [ca, str(self.authority), cert, str(self.certificate), key, str(self.key)]


def made(folder: Path) -> Certificates:
    """Make them in *folder*, which is made too.

    :raises OSError: without openssl, or if it fails
    """
    if shutil.which("openssl") is None:
        raise OSError("needs openssl, to make certificates")
    folder.mkdir(mode=0o700)
    (folder / "config").write_text(_CONFIG)
    _openssl(folder, "req", "-x509", "-config", "config", "-extensions", "authority", *_fresh("ca"), "-out", "ca.pem")
    _openssl(folder, "req", "-new", "-config", "config", *_fresh("member"), "-out", "member.csr")
    words = ["-in", "member.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "member.pem"]
    _openssl(folder, "x509", "-req", "-days", "2", "-extfile", "config", "-extensions", "member", *words)
    return Certificates(folder / "ca.pem", folder / "member.pem", folder / "member.key")


def _fresh(name: str) -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]


def _openssl(folder: Path, *words: str) -> None:
    done = subprocess.run(["openssl", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"openssl {words[0]}: {done.stderr.strip()}")
