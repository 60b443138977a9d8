"""Signatures of the manifest of a label set, made with OpenSSF's model-signing.

The manifest holds the hash of every other file, so a signature over `manifest.json` covers the whole set. It is stored beside
it as `manifest.json.sig`, a Sigstore bundle for a folder with only this file. `model_signing verify` checks it, too
(with `--ignore_unsigned_files`). Keys work offline; identities (Sigstore) need the network, for signing and for checking.
"""

import base64
import contextlib
import hashlib
import importlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import SignatureError, StorageError, UsageError
from pipeline.labels.format import MANIFEST_NAME, SIGNATURE_NAME, pin_of
from pipeline.labels.labelset import LabelSet
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import MAX_JSON_BYTES, read_small
from pipeline.storage.place import File, Place

MAX_SIGNATURE_BYTES = 1 << 20  # the bundle of an identity, with certificate and log entry, has about 10 kB
_SIGN_AGAIN = "Sign it again with deit-cli labels sign, or fetch manifest and signature again"

_OTHER_SIGNER = "Ask the publisher of the set for its key or identity; do not use the set until the signature matches"


def sign(folder: Path, *, private_key: Path | None = None, identity_token: str | None = None) -> Path:
    """Sign the manifest of a label set, and return the path of the signature.

    Args:
        folder: local folder of the set.
        private_key: PEM file of an elliptic curve key (P-256, P-384 or P-521). None: sign with a Sigstore identity, either
            the identity of the machine (such as a CI job) or one chosen in a browser.
        identity_token: Sigstore token, for machines without a browser.

    Raises:
        SignatureError: the key cannot be used, or Sigstore gave no signature.
    """
    LabelSet(Place(folder)).check_complete()  # refuse to sign a set that readers would refuse
    manifest = read_small(folder / MANIFEST_NAME)
    way_out = "Sigstore needs the network and an identity" if private_key is None else "Pass an EC private key in PEM"
    config = _library("signing").Config()
    with _only(manifest) as (view, signature), _named(f"{folder / MANIFEST_NAME} cannot be signed", way_out):
        if private_key is not None:
            _check_key(private_key, "--private-key")
            config.use_elliptic_key_signer(private_key=private_key)
        else:
            config.use_sigstore_signer(use_ambient_credentials=identity_token is None, identity_token=identity_token)
        config.set_hashing_config(_hashing()).sign(view, signature)
        bundle = signature.read_bytes()
    path = folder / SIGNATURE_NAME
    replace_file(path, bundle)
    return path


def check_signature(
    place: Place,
    *,
    manifest_sha256: str,
    public_key: Path | None = None,
    identity: str | None = None,
    identity_provider: str | None = None,
) -> str:
    """Check the signature of a manifest, and return the signer (key or identity) as text.

    Args:
        place: place of the label set.
        manifest_sha256: hash of the manifest that was verified; the signature must be for this manifest.
        public_key: PEM file; None: check an identity.
        identity: required signer, such as a mail address or the URL of a CI workflow.
        identity_provider: URL of the provider that confirms the identity, such as `https://accounts.google.com`.

    Raises:
        SignatureError: the signature is missing, damaged, by another key or identity, or for another manifest.
    """
    name = place / SIGNATURE_NAME
    bundle = _read(name, MAX_SIGNATURE_BYTES)
    manifest = _read(place / MANIFEST_NAME, MAX_JSON_BYTES)
    signed = _signed_sha256(bundle, name)
    found = hashlib.sha256(manifest).hexdigest()
    for sha256, what in ((found, "the manifest has"), (manifest_sha256, "the manifest that was verified has")):
        if signed != sha256:
            raise SignatureError(
                f"{name} is for another manifest: it signs {pin_of(signed)}, {what} {pin_of(sha256)}. {_SIGN_AGAIN}"
            )
    config = _library("verifying").Config().set_hashing_config(_hashing())
    with _only(manifest) as (view, signature):
        signature.write_bytes(bundle)
        if public_key is not None:
            _check_key(public_key, "--public-key")
            who = f"the key {public_key}"
            with _named(f"{name} was not made by {who}", _OTHER_SIGNER):
                config.use_elliptic_key_verifier(public_key=public_key).verify(view, signature)
        else:
            who = f"{identity} of {identity_provider}"
            with _named(f"{name} was not made by {who}, or Sigstore cannot be asked", _OTHER_SIGNER):
                config.use_sigstore_verifier(identity=identity, oidc_issuer=identity_provider).verify(view, signature)
    return who


def _read(file: File, max_bytes: int) -> bytes:
    way_out = f"{_SIGN_AGAIN}, or omit --public-key and --identity"
    try:
        data = file.read(max_bytes=max_bytes)
    except StorageError as error:
        raise SignatureError(f"{error}. {way_out}") from error
    if data is None:
        raise SignatureError(f"{file}: there is no such file", fix=way_out)
    return data


def _signed_sha256(bundle: bytes, name: object) -> str:
    """Return the SHA-256 of the signed manifest as stated in the bundle; the signature itself is not checked here.

    A signature of the same signer over other files must not pass, even if the library ignores these files.
    """
    try:
        payload = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"], validate=True))
        predicate = payload["predicate"]
        (resource,) = predicate["resources"]
        if (resource["name"], resource["algorithm"]) != (MANIFEST_NAME, "sha256"):
            raise ValueError(
                f"it signs {resource['name']!r} with {resource['algorithm']!r}, not {MANIFEST_NAME} with sha256"
            )
        return str(resource["digest"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError(
            f"{name} is not a signature of a manifest, or is damaged: {type(error).__name__}: {error}. {_SIGN_AGAIN}"
        ) from error


@contextlib.contextmanager
def _only(manifest: bytes) -> Iterator[tuple[Path, Path]]:
    """Give a folder that holds only these bytes as `manifest.json`, and a path for the signature beside it."""
    with tempfile.TemporaryDirectory(prefix="deit-cli-sign-") as root:
        view = Path(root) / "labels"
        view.mkdir()
        (view / MANIFEST_NAME).write_bytes(manifest)
        yield view, Path(root) / SIGNATURE_NAME


def _hashing() -> Any:
    return _library("hashing").Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)


def _library(part: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        raise UsageError(
            f'signatures need a package that is not installed ({error}): pip install "deit-cli[sign]"'
        ) from error


def _check_key(path: Path, option: str) -> None:
    if not path.is_file():
        raise UsageError(f"{option} {path}: no such file")


@contextlib.contextmanager
def _named(what: str, way_out: str) -> Iterator[None]:
    """Turn any exception of the signing libraries into a SignatureError of one line."""
    try:
        yield
    except (SignatureError, UsageError, KeyboardInterrupt):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise SignatureError(f"{what}: {text}. {way_out}") from error
