"""Downloads against a server on loopback that cuts, refuses and lies; archives that try to leave their folder."""

import hashlib
import io
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pykalm.errors import FetchError
from pykalm.graph.download import download, extract, file_digest

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes: several chunks
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


def get(server: Any, to: Path, *, size: int | None = len(CONTENT), digest: str = SHA256) -> Path:
    server.files.setdefault("/file", CONTENT)
    return download(f"{server.url}/file", to, size=size, digest=digest, pause=0.0)


def test_a_file_comes_whole_and_progress_ends_at_its_size(server: Any, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT
    seen: list[tuple[int, int | None]] = []
    to = tmp_path / "deep" / "file"
    download(f"{server.url}/file", to, size=None, digest=SHA256, progress=lambda *counts: seen.append(counts))
    assert to.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in to.parent.iterdir()] == ["file"]


def test_a_file_that_is_here_is_not_asked_for_again(server: Any, tmp_path: Path) -> None:
    get(server, tmp_path / "file")
    get(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_a_cut_download_goes_on_where_it_was_cut(server: Any, tmp_path: Path) -> None:
    server.cut_after = [200_000, 100_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=200000-", "bytes=300000-"]


def test_a_server_without_ranges_starts_again(server: Any, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = [200_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_what_an_earlier_call_left_is_used(server: Any, tmp_path: Path) -> None:
    server.cut_after = [10_000] * 5
    with pytest.raises(FetchError, match=r"no luck in 5 attempts .* 50000 bytes are kept. Run again to continue"):
        get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    get(server, tmp_path / "file")
    assert server.requests[-1][1] == "bytes=50000-"


def test_a_part_longer_than_the_file_is_thrown_away(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path / "file", size=None).read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_refusing_one_is_not(server: Any, tmp_path: Path) -> None:
    server.statuses = [503]
    get(server, tmp_path / "file")
    assert len(server.requests) == 2
    with pytest.raises(FetchError, match="/gone: the server answers 404"):
        download(f"{server.url}/gone", tmp_path / "gone", size=1, digest=SHA256)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("size", "digest"), [(len(CONTENT), "sha256:" + "0" * 64), (len(CONTENT) - 1, SHA256), (None, "git:" + "0" * 40)]
)
def test_a_wrong_file_is_removed_and_the_error_says_wanted_and_found(
    server: Any, tmp_path: Path, size: int | None, digest: str
) -> None:
    with pytest.raises(FetchError, match=rf"wanted .*{digest}, found \d+ bytes with .* It was removed. Run again"):
        get(server, tmp_path / "file", size=size, digest=digest)
    assert list(tmp_path.iterdir()) == []


def test_a_file_damaged_on_disk_is_noticed(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(FetchError, match="It was removed"):
        get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_no_server_and_no_web_address_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no luck in 5 attempts"):
        download("http://127.0.0.1:9/file", tmp_path / "file", size=1, digest=SHA256, pause=0.0)
    with pytest.raises(FetchError, match="wanted an http or https address"):
        download("file:///etc/hostname", tmp_path / "file", size=1, digest=SHA256)


def test_a_folder_that_cannot_be_written_is_no_reason_to_try_again(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pykalm.graph.download._receive_once", full)
    with pytest.raises(FetchError, match=r"cannot be written, No space left on device. Make room"):
        get(server, tmp_path / "file")


def test_the_git_digest_is_the_one_that_git_gives(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    command = ["git", "hash-object", "--no-filters", str(tmp_path / "file")]
    given = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert file_digest(tmp_path / "file", "git") == f"git:{given}"
    with pytest.raises(FetchError, match="found 'md5'"):
        file_digest(tmp_path / "file", "md5")


def tar_with(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 5 if member.isfile() else 0
            tar.addfile(member, io.BytesIO(b"hello") if member.isfile() else None)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_files_of_tar_and_zip_come_out_in_their_folders(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("inner")
    folder.type = tarfile.DIRTYPE
    tar = tar_with(tmp_path / "a.tar.gz", folder, tarfile.TarInfo("./inner/one.txt"), tarfile.TarInfo("two.txt"))
    assert extract(tar, tmp_path / "tar") == [tmp_path / "tar/inner/one.txt", tmp_path / "tar/two.txt"]
    assert (tmp_path / "tar/inner/one.txt").read_bytes() == b"hello"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("inner/", "")
        zipped.writestr("inner/one.txt", "hello")
    extract(tmp_path / "a.zip", tmp_path / "zip")
    assert (tmp_path / "zip/inner/one.txt").read_bytes() == b"hello"


ESCAPES = {
    "parent": tarfile.TarInfo("../out.txt"),
    "parent inside": tarfile.TarInfo("inner/../../out.txt"),
    "absolute": tarfile.TarInfo("/tmp/kalm_out.txt"),
    "backslash": tarfile.TarInfo("..\\out.txt"),
    "drive": tarfile.TarInfo("C:out.txt"),
    "symbolic link": link("out.txt", "/etc/hostname"),
    "hard link": link("out.txt", "good.txt", tarfile.LNKTYPE),
    "device": link("out.txt", "", tarfile.CHRTYPE),
}


@pytest.mark.parametrize("member", ESCAPES.values(), ids=ESCAPES.keys())
def test_nothing_is_written_from_an_archive_that_tries_to_escape(member: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "bad.tar.gz", tarfile.TarInfo("good.txt"), member)
    with pytest.raises(FetchError, match="Do not trust this archive"):
        extract(archive, tmp_path / "to")
    assert [path.name for path in tmp_path.rglob("*")] == ["bad.tar.gz"]


def test_a_zip_that_tries_to_escape_is_refused(tmp_path: Path) -> None:
    link_info = zipfile.ZipInfo("link")
    link_info.external_attr = (stat.S_IFLNK | 0o777) << 16
    for number, name in enumerate(["../out.txt", "/out.txt", link_info]):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as zipped:
            zipped.writestr(name, "/etc/hostname")
        with pytest.raises(FetchError, match="Do not trust this archive"):
            extract(tmp_path / f"{number}.zip", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_bomb_and_a_damaged_archive_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar_with(tmp_path / "a.tar.gz", tarfile.TarInfo("one.txt"))
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:40])
    (tmp_path / "text.tar.gz").write_text("not an archive")
    for name in ("cut.tar.gz", "text.tar.gz"):
        with pytest.raises(FetchError, match=f"{name}: cannot be unpacked, .* fetch it again"):
            extract(tmp_path / name, tmp_path / "to")
    monkeypatch.setattr("pykalm.graph.download._UNPACKED_LIMIT", 4)
    with pytest.raises(FetchError, match="would unpack to 5 bytes"):
        extract(archive, tmp_path / "to")
