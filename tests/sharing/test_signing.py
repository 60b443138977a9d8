"""Signatures over the manifest, with real keys and the real library; identities need a network, and are not tried here."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.label_sets import make_label_set, seal_again, write_source
from support.signing import write_key
from support.web_server import web_server

import cli
from pipeline.errors import LabelSetError, SignatureError, UsageError
from pipeline.settings.configs import VerifyConfig
from pipeline.sharing.signing import check_signature, sign
from pipeline.storage.place import open_place
from pipeline.verify.verify import verify

pytest.importorskip("model_signing")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries below it

SIGNATURE = "manifest.json.sig"


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_key(folder, name) for name in ("team", "other")}


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_label_set(write_source(root / "tars"), root / "set")
    sign(root / "set", private_key=keys["team"][0])
    return root / "set"


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def problems(folder: Path | str, key: Path) -> list[str]:
    report = verify(str(folder), VerifyConfig(probes=False, public_key=key))
    return [f"{problem.rule}: {problem}" for problem in report.problems]


def test_a_signed_set_verifies_and_says_who_signed_it(made, keys):
    report = verify(str(made), VerifyConfig(probes=False, public_key=keys["team"][1]))
    assert report.problems == []
    assert report.signed_by == f"the key {keys['team'][1]}"


def test_the_library_s_own_command_agrees(made, keys):
    """Nobody needs this project to check a signature."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(made), "--ignore_unsigned_files"]
    command += ["--signature", str(made / SIGNATURE), "--public_key"]
    assert subprocess.run([*command, str(keys["team"][1])], capture_output=True).returncode == 0
    assert subprocess.run([*command, str(keys["other"][1])], capture_output=True).returncode != 0


def test_another_key_is_refused_by_name(made, keys):
    (problem,) = problems(made, keys["other"][1])
    assert problem.startswith(f"signature: {made / SIGNATURE} was not made by the key {keys['other'][1]}: ")
    assert problem.endswith("do not use the set until the signature matches")


def test_a_flipped_byte_of_the_manifest_is_found_by_hash_and_by_signature(copied, keys):
    data = bytearray((copied / "manifest.json").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "manifest.json").write_bytes(bytes(data))
    found = problems(copied, keys["team"][1])
    assert [problem.partition(":")[0] for problem in found] == ["manifest", "signature"]
    assert f"{SIGNATURE} is for another manifest: it signs sha256:" in found[1]


def test_a_manifest_that_was_sealed_again_is_found_by_the_signature_alone(copied, keys):
    """What hashes cannot show: somebody changed the set and made all of them fit."""
    seal_again(copied, lambda manifest: manifest["environments"][0].update(device="abacus"))
    assert verify(str(copied), VerifyConfig(probes=False)).problems == []
    (problem,) = problems(copied, keys["team"][1])
    assert "is for another manifest" in problem


DAMAGED = [
    # what becomes of the signature, what is said
    (lambda data: data[:-40], "is not a signature of a manifest, or is damaged: JSONDecodeError"),
    (lambda data: b"", "is not a signature of a manifest, or is damaged: JSONDecodeError"),
    (lambda data: b"[" * 200_000, "is not a signature of a manifest, or is damaged: RecursionError"),
    (lambda data: b"\xff\xff", "is not a signature of a manifest, or is damaged: UnicodeDecodeError"),
    (lambda data: b"{}", "is not a signature of a manifest, or is damaged: KeyError: 'dsseEnvelope'"),
    (lambda data: b" " * (2**20 + 1), ": such a file may have at most 1048576 bytes, this one has 1048577"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGED)
def test_a_damaged_signature_is_refused_by_name(copied, keys, damage, text):
    (copied / SIGNATURE).write_bytes(damage((copied / SIGNATURE).read_bytes()))
    (problem,) = problems(copied, keys["team"][1])
    assert f"{SIGNATURE}{text if text.startswith(':') else ' ' + text}" in problem


def test_no_flipped_bit_of_a_signature_passes(copied, keys):
    good, accepted = (copied / SIGNATURE).read_bytes(), 0
    sha256 = verify(str(copied), VerifyConfig(probes=False)).manifest_sha256 or ""
    for bit in range(3, len(good) * 8, 131):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        (copied / SIGNATURE).write_bytes(bytes(data))
        try:
            check_signature(open_place(copied), manifest_sha256=sha256, public_key=keys["team"][1])
            accepted += json.loads(data) != json.loads(good)
        except SignatureError:
            pass
    assert accepted == 0


def test_a_missing_signature_is_refused_and_the_way_out_is_said(copied, keys):
    (copied / SIGNATURE).unlink()
    (problem,) = problems(copied, keys["team"][1])
    assert f"{copied / SIGNATURE}: there is no such file. Sign it again with deit-cli labels sign" in problem


def test_a_signature_by_the_same_key_over_something_else_does_not_pass(copied, keys, tmp_path):
    """The statement says which files it is over, and which were left out: only one over this manifest alone counts."""
    from model_signing import signing

    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.bin").write_bytes(b"other")
    config = signing.Config().use_elliptic_key_signer(private_key=keys["team"][0])
    config.sign(tmp_path / "model", copied / SIGNATURE)
    (problem,) = problems(copied, keys["team"][1])
    assert "it signs 'weights.bin' with 'sha256', not manifest.json with sha256" in problem


def test_a_statement_that_was_written_anew_is_not_believed(copied, keys):
    """The statement names the right hash, but no key has signed it."""
    seal_again(copied, lambda manifest: manifest["environments"][0].update(device="abacus"))
    sha256 = verify(str(copied), VerifyConfig(probes=False)).manifest_sha256
    bundle = json.loads((copied / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = sha256
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (copied / SIGNATURE).write_text(json.dumps(bundle))
    (problem,) = problems(copied, keys["team"][1])
    assert "was not made by the key" in problem


def test_a_remote_set_is_checked_too(copied, keys):
    with web_server(copied) as server:
        assert problems(server.url, keys["team"][1]) == []
        (problem,) = problems(server.url, keys["other"][1])
        assert f"{server.url}/{SIGNATURE} was not made by" in problem
        (copied / SIGNATURE).unlink()
        (problem,) = problems(server.url, keys["team"][1])
        assert f"{server.url}/{SIGNATURE}: there is no such file" in problem


def test_signing_again_replaces_the_signature(copied, keys):
    sign(copied, private_key=keys["other"][0])
    assert problems(copied, keys["other"][1]) == []
    assert len(problems(copied, keys["team"][1])) == 1


def test_keys_that_are_none_are_named(copied, keys, tmp_path):
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(SignatureError, match=r"manifest.json cannot be signed: .*Pass an EC private key in PEM"):
        sign(copied, private_key=tmp_path / "junk.pem")
    with pytest.raises(UsageError, match=r"--private-key .*none.pem: no such file"):
        sign(copied, private_key=tmp_path / "none.pem")
    with pytest.raises(UsageError, match=r"--public-key .*none.pub: no such file"):
        problems(copied, tmp_path / "none.pub")
    (problem,) = problems(copied, tmp_path / "junk.pem")
    assert "was not made by the key" in problem


def test_only_a_whole_label_set_is_signed(copied, keys):
    (copied / "manifest.json").write_text("{}")
    with pytest.raises(LabelSetError, match=r"manifest\.json says"):
        sign(copied, private_key=keys["team"][0])


def test_the_command_line_signs_and_verifies(copied, keys):
    private, public = map(str, keys["team"])
    (copied / SIGNATURE).unlink()
    signed = CliRunner().invoke(cli.commands, ["labels", "sign", str(copied), "--private-key", private])
    assert signed.stdout == f"{copied / SIGNATURE}\n"
    verified = CliRunner().invoke(
        cli.commands, ["labels", "verify", str(copied), "--no-probes", "--public-key", public]
    )
    assert f", signed by the key {public}\n" in verified.stdout
    both = ["--public-key", public, "--identity", "a@b.c", "--identity-provider", "https://x"]
    for options, text in (
        (both, "pass --public-key or --identity"),
        (["--identity", "a@b.c"], "--identity and --identity-provider belong together"),
    ):
        refused = CliRunner().invoke(cli.commands, ["labels", "verify", str(copied), *options])
        assert text in str(refused.exception)


def test_without_the_library_the_extra_is_named(copied, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(UsageError, match=r'pip install "deit-cli\[sign\]"'):
        sign(copied, private_key=keys["team"][0])
