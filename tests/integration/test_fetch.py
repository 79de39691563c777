"""Fetching published models, from a real HTTP server on this machine that misbehaves as real ones do."""

import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from bdense_core import checkpoints
from bdense_core.checkpoints import load_network
from bdense_core.errors import BadValue, CheckpointError, EvaluationError, UnsafePickle
from bdense_core.files import HashedFile
from bdense_core.frechet import load_statistics
from bdense_core.network_config import NetworkConfig
from search import catalogue, download, fetch
from search.errors import FetchError

VECTORS = Path(os.environ.get("BDENSE_VECTORS", Path(__file__).resolve().parents[3] / "shared" / "vectors"))
PICKLES = VECTORS / "sfd" / "pickle"
TINY = NetworkConfig.ddpmpp(
    img_resolution=8, model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(4,), augment_dim=9
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- a server -------------------------------------------------------------------------------------------


@dataclass
class Site:
    """What the server has, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    url: str = ""
    ranges: bool = True
    tag: str | None = '"one"'
    cuts: list[int] = field(default_factory=list)
    """The next answers break off after so many bytes."""
    failures: list[int] = field(default_factory=list)
    """The next answers are these statuses."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def requests(self, name: str) -> list[str | None]:
        return [wanted for path, wanted in self.asked if path.endswith(name)]


def handler_of(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            content = site.files.get(self.path.lstrip("/"))
            if site.failures or content is None:
                self.send_response(site.failures.pop(0) if site.failures else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = 0
            if wanted and site.ranges and self.headers.get("If-Range") == site.tag:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if site.tag:
                self.send_header("ETag", site.tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[: site.cuts.pop(0)] if site.cuts else body)
            self.close_connection = True

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture
def site(monkeypatch, published) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_S", 0)
    monkeypatch.setattr(download, "_PIECE", 10_000)
    site = Site({source.path: content for source, content in published})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(site))
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


# --- what it has ----------------------------------------------------------------------------------------

FEATURES = bytes(range(256)) * 4000


@pytest.fixture(scope="session")
def reference_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(3))
    return path.read_bytes()


@pytest.fixture(scope="session")
def teacher_bytes() -> bytes:
    path = PICKLES / "edm_song_uncond.pkl"
    if not path.exists():
        pytest.skip(f"{path} does not exist; set BDENSE_VECTORS to the folder of the vectors")
    return path.read_bytes()


@pytest.fixture
def published(teacher_bytes, reference_bytes):
    return [
        (catalogue.Source(path="edm/tiny.pkl", sha256=sha256(teacher_bytes)), teacher_bytes),
        (catalogue.Source(path="edm/tiny.npz"), reference_bytes),
        (catalogue.Source(path="metrics/tiny.pt", sha256=sha256(FEATURES), size=len(FEATURES)), FEATURES),
    ]


@pytest.fixture
def entry(published) -> catalogue.Entry:
    teacher, reference, features = (source for source, _ in published)
    return catalogue.Entry(
        name="tiny",
        teacher=teacher,
        reference=reference,
        reference_images=50,
        features=features,
        network=TINY,
        terms="none",
    )


@pytest.fixture
def models(tmp_path) -> Path:
    return tmp_path / "models"


def get(entry, models, site=None, **options):
    said: list[str] = []
    base_url = None if site is None else site.url
    return fetch.fetch_entry(entry, models, say=said.append, base_url=base_url, **options), said


def names(models: Path) -> set[str]:
    return {str(path.relative_to(models)) for path in models.rglob("*") if path.is_file()} - {".fetch.lock"}


WHOLE = {"inception/features.pt", "tiny/teacher.safetensors", "tiny/reference.safetensors", "tiny/origin.json"}


def refused(entry, models, site, match, kind=FetchError, **options) -> str:
    with pytest.raises(kind, match=match) as refusal:
        get(entry, models, site, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- the catalogue --------------------------------------------------------------------------------------


def test_the_catalogue_names_whole_addresses_and_its_entries():
    cifar = catalogue.entry("cifar10")
    assert cifar.teacher.url() == f"{catalogue.BASE_URL}/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl"
    assert cifar.teacher.url("http://mirror/x/") == "http://mirror/x/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl"
    assert (cifar.network.augment_dim, catalogue.entry("imagenet64").network.label_dim) == (9, 1000)
    with pytest.raises(BadValue, match="did you mean cifar10"):
        catalogue.entry("cifar-10")
    with pytest.raises(BadValue, match="known are cifar10, imagenet64"):
        fetch.fetch("xyz", Path("nowhere"), say=print)


@pytest.mark.parametrize(
    ("name", "stored"), [("cifar10", "cifar10_uncond_ddpmpp_vp"), ("imagenet64", "imagenet64_cond_adm")]
)
def test_the_networks_of_the_catalogue_are_the_published_ones(name, stored):
    path = VECTORS / "sfd" / "networks" / f"full_size_{stored}.json"
    if not path.exists():
        pytest.skip(f"{path} does not exist; set BDENSE_VECTORS to the folder of the vectors")
    meta = json.loads(path.read_text())
    assert catalogue.entry(name).network == NetworkConfig.from_edm_kwargs(meta["wrapper"], meta["kwargs"])


# --- fetching -------------------------------------------------------------------------------------------


def test_everything_is_fetched_converted_and_recorded(entry, models, site, published):
    seen = []
    results, said = get(entry, models, site, progress=lambda *now: seen.append(now))
    assert names(models) == WHOLE
    assert [(result.role, result.fresh) for result in results] == [
        ("features", True),
        ("teacher", True),
        ("reference", True),
    ]
    for result in results:
        assert sha256(result.path.read_bytes()) == result.sha256
    teacher = load_network(HashedFile(path=str(results[1].path), sha256=results[1].sha256))
    assert teacher.config.augment_dim == 9
    statistics = load_statistics(results[2].path, sha256=results[2].sha256)
    assert (statistics.n_samples, statistics.features) == (50, f"inception@{sha256(FEATURES)[:16]}")
    origin = json.loads((models / "tiny" / "origin.json").read_text())
    for role, (source, content) in zip(("teacher", "reference", "features"), published, strict=True):
        record = origin["files"][role]
        assert (record["url"], record["from"]) == (source.url(), source.url(site.url))
        assert (record["sha256"], record["bytes"]) == (sha256(content), len(content))
    assert ("features.pt", len(FEATURES), len(FEATURES)) in seen
    assert any(sha256(published[1][1]) in line for line in said)


def test_what_is_here_and_intact_stays(entry, models, site):
    get(entry, models, site)
    times = {name: (models / name).stat().st_mtime_ns for name in WHOLE}
    site.asked.clear()
    results, said = get(entry, models, site)
    assert not site.asked
    assert not any(result.fresh for result in results)
    assert sum("is here and intact" in line for line in said) == 3
    assert {name: (models / name).stat().st_mtime_ns for name in WHOLE} == times


@pytest.mark.parametrize("name", sorted(WHOLE - {"tiny/origin.json"}))
def test_a_damaged_file_is_fetched_again_and_only_that(entry, models, site, name):
    before, _ = get(entry, models, site)
    with (models / name).open("r+b") as file:
        file.seek(100)
        file.write(b"!")
    results, said = get(entry, models, site)
    assert [str(result.path.relative_to(models)) for result in results if result.fresh] == [name]
    assert [result.sha256 for result in results] == [result.sha256 for result in before]
    assert any("is damaged" in line for line in said)


def test_another_entry_shares_the_features(entry, models, site):
    get(entry, models, site)
    site.asked.clear()
    results, _ = get(replace(entry, name="second"), models, site)
    assert not site.requests("tiny.pt")
    assert not results[0].fresh
    assert "features" in json.loads((models / "second" / "origin.json").read_text())["files"]


# --- connections that break -----------------------------------------------------------------------------


def test_a_connection_that_breaks_goes_on_where_it_stopped(entry, models, site):
    site.cuts = [400_000, 10, 100_000]
    get(entry, models, site)
    assert site.requests("tiny.pt") == [None, "bytes=400000-", "bytes=400000-", "bytes=500000-"]
    assert (models / "inception" / "features.pt").read_bytes() == FEATURES
    assert names(models) == WHOLE


def test_a_server_that_gives_up_leaves_what_came_for_the_next_run(entry, models, site):
    site.cuts = [300_000] + [0] * 20
    refused(entry, models, site, "connection breaks off.*goes on from byte 300000")
    assert names(models) == {"inception/features.pt.part", "inception/features.pt.part.json"}
    site.cuts.clear()
    site.asked.clear()
    get(entry, models, site)
    assert site.requests("tiny.pt") == ["bytes=300000-"]
    assert names(models) == WHOLE


def test_an_interrupted_run_goes_on_where_it_stopped(entry, models, site, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_PIECE", 100_000)
    with pytest.raises(KeyboardInterrupt):
        get(entry, models, site, progress=interrupt)
    assert names(models) == {"inception/features.pt.part", "inception/features.pt.part.json"}
    get(entry, models, site)
    assert site.requests("tiny.pt") == [None, "bytes=100000-"]
    assert names(models) == WHOLE


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError])
def test_a_run_ended_while_it_converts_does_not_fetch_again(entry, models, site, monkeypatch, error):
    def ends(*_):
        raise error

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(checkpoints, "import_edm", ends)
        get(entry, models, site)
    assert "tiny/tiny.pkl" in names(models)
    get(entry, models, site)
    assert site.requests("tiny.pkl") == [None]
    assert names(models) == WHOLE


def test_another_file_in_the_downloads_place_is_fetched_anew(entry, models, site):
    (models / "tiny").mkdir(parents=True)
    (models / "tiny" / "tiny.pkl").write_bytes(b"something else")
    _, said = get(entry, models, site)
    assert any("is not the file that is wanted" in line for line in said)
    assert names(models) == WHOLE


def test_a_whole_part_is_not_fetched_again(entry, models, site):
    site.cuts = [300_000] + [0] * 20
    refused(entry, models, site, "breaks off")
    site.cuts.clear()
    (models / "inception" / "features.pt.part").write_bytes(FEATURES)
    get(entry, models, site)
    assert names(models) == WHOLE


@pytest.mark.parametrize("change", ["no ranges", "new version", "longer part", "other address", "no validator"])
def test_a_part_that_does_not_fit_is_fetched_anew(entry, models, site, change):
    site.tag = None if change == "no validator" else site.tag
    site.cuts = [300_000] + [0] * 20
    refused(entry, models, site, "breaks off")
    site.cuts.clear()
    part = models / "inception" / "features.pt.part"
    part.write_bytes(b"?" * (2_000_000 if change == "longer part" else 300_000))
    if change == "no ranges":
        site.ranges = False
    if change == "new version":
        site.tag = '"two"'
    if change == "other address":
        part.with_name("features.pt.part.json").write_text('{"url": "http://other", "validator": "\\"one\\""}')
    get(entry, models, site)
    assert names(models) == WHOLE
    assert (models / "inception" / "features.pt").read_bytes() == FEATURES


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(entry, models, site):
    site.ranges = False
    site.cuts = [1000] * 50
    refused(entry, models, site, "breaks off")
    assert len(site.asked) < 10


def test_passing_errors_of_the_server_are_tried_again(entry, models, site):
    site.failures = [503, 502, 500]
    get(entry, models, site)
    assert names(models) == WHOLE


@pytest.mark.parametrize("status", [503, 403, 404])
def test_lasting_errors_of_the_server_are_named(entry, models, site, status):
    site.failures = [status] * 50
    message = refused(entry, models, site, f"answers {status} ")
    assert entry.features.url(site.url) in message
    assert "--from" in message
    assert names(models) == set()


def test_without_a_connection_the_reason_is_said(entry, models, site):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        site.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        refused(entry, models, site, r"cannot reach the server of .* \(Connection refused\).*--from")
    site.url = "no address"
    refused(entry, models, site, "cannot fetch no address/metrics/tiny.pt")


def test_a_full_disk_is_said_and_what_came_is_kept(entry, models, site, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_PIECE", 100_000)
    refused(entry, models, site, "disk of .* is full; make room", progress=full)
    assert (models / "inception" / "features.pt.part").stat().st_size == 100_000
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: _Usage(free=1000))
    refused(entry, models, site, r"has 0 MB left, but features.pt needs 1 MB more")
    monkeypatch.undo()
    get(entry, models, site)
    assert names(models) == WHOLE


@dataclass
class _Usage:
    free: int


def test_a_folder_that_cannot_be_written_is_said(entry, tmp_path, site):
    (tmp_path / "file").write_text("in the way")
    refused(entry, tmp_path / "file" / "models", site, "cannot fetch into .*Not a directory")


def test_two_commands_do_not_fetch_at_once(entry, models, site):
    inner = []

    def meanwhile(*_):
        if not inner:
            inner.append(refused(entry, models, site, "another command is fetching"))

    get(entry, models, site, progress=meanwhile)
    assert inner
    assert names(models) == WHOLE


# --- wrong content --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics/tiny.pt", "edm/tiny.pkl"])
def test_a_wrong_checksum_is_refused_and_nothing_of_the_file_stays(entry, models, site, name):
    right = site.files[name]
    site.files[name] = right[:-1] + b"?"
    message = refused(entry, models, site, f"has sha256 {sha256(site.files[name])}, expected {sha256(right)}")
    assert Path(name).name in message
    assert names(models) <= {"inception/features.pt", "tiny/origin.json"}
    site.files[name] = right
    get(entry, models, site)
    assert names(models) == WHOLE


def test_what_was_recorded_must_come_again_unless_it_is_allowed(entry, models, site, tmp_path):
    get(entry, models, site)
    kept = (models / "tiny" / "reference.safetensors").read_bytes()
    (models / "tiny" / "reference.safetensors").unlink()
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    site.files["edm/tiny.npz"] = (tmp_path / "other.npz").read_bytes()
    new = sha256(site.files["edm/tiny.npz"])
    refused(entry, models, site, f"an earlier fetch brought .*--sha256 reference={new}")
    assert names(models) == WHOLE - {"tiny/reference.safetensors"}
    results, _ = get(entry, models, site, sha256={"reference": new})
    assert results[2].source_sha256 == new
    assert results[2].path.read_bytes() != kept
    assert not any(result.fresh for result in get(entry, models, site)[0])


def test_a_checksum_given_is_kept_to(entry, models, site):
    refused(entry, models, site, f"expected {'0' * 64}", sha256={"reference": "0" * 64})
    refused(entry, models, site, "64 hexadecimal digits", BadValue, sha256={"reference": "abc"})
    refused(entry, models, site, "known are features, teacher, reference", BadValue, sha256={"weights": "0" * 64})
    refused(entry, models, site, "is known to be", BadValue, sha256={"teacher": "0" * 64})


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"<html>log in</html>", CheckpointError), (b"cposix\nsystem\n(S'true'\ntR.", UnsafePickle)],
)
def test_a_teacher_that_is_no_checkpoint_is_refused_and_not_kept(entry, models, site, content, kind):
    site.files["edm/tiny.pkl"] = content
    unknown = replace(entry, teacher=replace(entry.teacher, sha256=None))
    refused(unknown, models, site, r"tiny\.pkl is ", kind)
    assert names(models) == {"inception/features.pt", "tiny/origin.json"}


def test_another_network_than_the_catalogue_means_is_refused(entry, models, site):
    other = replace(entry, network=NetworkConfig.ddpmpp(img_resolution=32))
    refused(other, models, site, "another network than the teacher of tiny: its img_resolution is 8, not 32")
    assert names(models) == {"inception/features.pt", "tiny/origin.json", "tiny/tiny.pkl"}


def test_statistics_that_are_none_are_refused(entry, models, site):
    site.files["edm/tiny.npz"] = b"PK no archive"
    refused(entry, models, site, r"tiny\.npz cannot be read", EvaluationError)
    assert names(models) == WHOLE - {"tiny/reference.safetensors"}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other", "files": {}}', '{"format": 1, "files": [1]}'])
def test_a_damaged_record_is_named(entry, models, site, content):
    get(entry, models, site)
    (models / "tiny" / "origin.json").write_text(content)
    refused(entry, models, site, r"origin\.json is damaged .*delete it")


# --- without internet -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, published) -> Path:
    folder = tmp_path / "copied"
    folder.mkdir()
    for source, content in published:
        (folder / source.name).write_bytes(content)
    return folder


def test_a_folder_of_published_files_is_enough(entry, models, folder):
    results, _ = get(entry, models, source=folder)
    assert names(models) == WHOLE
    assert all(result.fresh for result in results)
    assert {path.name for path in folder.iterdir()} == {"tiny.pkl", "tiny.npz", "tiny.pt"}
    assert json.loads((models / "tiny" / "origin.json").read_text())["files"]["teacher"]["from"] == str(
        folder / "tiny.pkl"
    )


def test_a_file_missing_in_the_folder_is_named_with_its_address(entry, models, folder):
    (folder / "tiny.npz").unlink()
    message = refused(entry, models, None, r"the folder of --from lacks .*tiny\.npz", source=folder)
    assert entry.reference.url() in message
    assert names(models) == WHOLE - {"tiny/reference.safetensors"}


def test_one_file_brings_only_itself(entry, models, folder):
    renamed = (folder / "tiny.pkl").rename(folder / "any-name.pkl")
    results, _ = get(entry, models, source=renamed)
    assert [result.role for result in results] == ["teacher"]
    assert renamed.exists()
    get(entry, models, source=folder / "tiny.npz")
    assert names(models) == WHOLE - {"inception/features.pt"}


def test_a_wrong_local_file_is_refused_and_stays(entry, models, folder, tmp_path):
    (folder / "tiny.pt").write_bytes(b"damaged")
    refused(entry, models, None, "has sha256 .*, expected", source=folder)
    assert (folder / "tiny.pt").read_bytes() == b"damaged"
    assert names(models) == set()
    refused(entry, models, None, "does not exist", BadValue, source=tmp_path / "gone")
    (tmp_path / "other.bin").write_bytes(b"")
    refused(entry, models, None, "is none of the files of tiny", BadValue, source=tmp_path / "other.bin")
