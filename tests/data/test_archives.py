"""Downloads check themselves and go on; archives give their members and nothing else."""

import hashlib
import tarfile

import numpy as np
import pytest

from data.archive_helpers import served, tar
from rootflow.data.archives import Published, cache_folder, extract, obtain
from rootflow.errors import DataError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5, SHA = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "file.bin").write_bytes(CONTENT)
    return folder


def fetch(source, folder, checksum=MD5, verify=True, name="file.bin"):
    lines = []
    file = Published(name, checksum)
    return obtain(str(source), file, folder, verify=verify, say=lines.append), lines


def refused(match, *arguments, **options):
    with pytest.raises(DataError, match=match) as caught:
        fetch(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checksum", [MD5, SHA, None])
def test_a_download_arrives_whole_and_only_once(home, tmp_path, checksum):
    new = tmp_path / "new"
    with served(home) as server:
        path, lines = fetch(server.url + "/", new, checksum)
        assert path.read_bytes() == CONTENT
        assert [file.name for file in new.iterdir()] == ["file.bin"]
        assert "3 MB" in lines[0]
        assert lines[-1] == "100%"
        fetch(server.url, new, checksum)
    assert server.asked == [("/file.bin", None)]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(home, tmp_path, ranges):
    with served(home, ranges) as server:
        server.cut = 1_700_000
        refused("after 1,700,000 of 3,000,000 bytes; repeat", server.url, tmp_path)
        assert (tmp_path / "file.bin.part").stat().st_size == 1_700_000
        assert not (tmp_path / "file.bin").exists()
        server.cut = None
        assert fetch(server.url, tmp_path)[0].read_bytes() == CONTENT
    assert server.asked[1] == ("/file.bin", "bytes=1700000-")
    assert not (tmp_path / "file.bin.part").exists()


def test_a_part_that_is_whole_already_is_taken(home, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    with served(home) as server:
        assert fetch(server.url, tmp_path)[0].read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(home, tmp_path):
    new = tmp_path / "new"
    with served(home) as server:
        refused(f"its MD5 is {MD5}, not 0000", server.url, new, "0" * 32)
        assert list(new.iterdir()) == []
        refused(f"its SHA256 is {SHA}, not 0000", server.url, new, "0" * 64)
        assert fetch(server.url, new, "0" * 32, verify=False)[0].exists()
        refused("MD5", server.url, new, "0" * 32)  # kept by somebody who did not verify
    refused("MD5", home, new, "0" * 32)
    assert (home / "file.bin").exists()


def test_a_part_of_another_file_is_found_out_and_removed(home, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    with served(home) as server:
        refused("MD5", server.url, tmp_path)
        assert fetch(server.url, tmp_path)[0].read_bytes() == CONTENT


def test_servers_and_files_that_are_not_there(home, tmp_path):
    with served(home) as server:
        refused("404", server.url, tmp_path, name="other")
        url = server.url
    refused("refused after 0 bytes", url, tmp_path)
    refused("no such file", tmp_path / "none", tmp_path)
    assert fetch(home, tmp_path)[0] == home / "file.bin"
    assert fetch(home / "file.bin", tmp_path)[0] == home / "file.bin"


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rootflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "rootflow"


# Members of archives


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_members_come_by_exact_name_in_the_order_asked(tmp_path):
    path = tar(tmp_path / "a.tar.gz", {"d/._b": b"junk", "./d/a": b"1", "d/b": b"2", "d/c": b"3"})
    found = extract(path, ["d/b", "d/a"], tmp_path)
    assert [file.read_bytes() for file in found] == [b"2", b"1"]
    assert {file.parent for file in found} == {tmp_path}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"../d/a": b"1", "d/a": b"2"}, "leads out"),
        ({"d/../../a": b"1", "d/a": b"2"}, "leads out"),
        ({"/d/a": b"1"}, "leads out"),
        ({"d/a": link("d/a")}, "link"),
        ({"d/a": link("d/a", tarfile.LNKTYPE)}, "link"),
        ({"d/a": link("d/a", tarfile.FIFOTYPE)}, "special"),
        ({"d/A": b"1"}, "no member d/a"),
    ],
)
def test_archives_that_are_not_what_they_should_be(tmp_path, members, match):
    path = tar(tmp_path / "a.tar", members, "w")
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(DataError, match=match):
        extract(path, ["d/a"], target)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_cut_archives(tmp_path, mode):
    path = tar(tmp_path / "a.tar", {"d/a": CONTENT[:100_000]}, mode)
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(DataError, match="damaged or cut short"):
        extract(path, ["d/a"], tmp_path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match="damaged or cut short"):
        extract(path, ["d/a"], tmp_path)
