"""Corpora, their verification and splits, and the windows cut from them; downloads come from localhost."""

import functools
import gzip
import hashlib
import http.server
import itertools
import json
import os
import threading
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import files
from data import pystdlib as pystdlib_module
from data.bytes import IGNORE_INDEX, ByteCorpus, ByteDataModule
from data.compressors import compressor_bits_per_byte
from data.enwik8 import NUM_BYTES, SHA256, enwik8
from data.files import file
from data.pystdlib import pystdlib, split_of

CPU = torch.device("cpu")
CONTENT = bytes(np.random.default_rng(0).integers(0, 256, size=1000, dtype=np.uint8))
CONTENT_SHA256 = hashlib.sha256(CONTENT).hexdigest()
HEAD = {"expected_bytes": len(CONTENT), "expected_sha256": CONTENT_SHA256}
FAILED_DOWNLOADS = {
    "absent.zip": "404",
    "cut.zip": "could not download",
    "page.zip": "not a sound .zip file",
    "short.zip": "has 999 bytes once decompressed, expected 1000",
    "other.zip": "corrupted or another file",
}


def make_corpus():
    data = np.random.default_rng(1).integers(0, 256, size=610, dtype=np.uint8)
    return ByteCorpus.cut("random", data, num_val=60, num_test=50, provenance={"source": "rng"})


def make_module(corpus=None, **changes):
    arguments = dict(seq_len=7, micro_batch_size=4, num_micro_batches=5, seed=3, eval_batch_size=2) | changes
    arguments.setdefault("accumulate", 1)
    arguments.setdefault("windows_per_step", arguments["accumulate"] * arguments["micro_batch_size"])
    return ByteDataModule(corpus or make_corpus(), **arguments)


def write_packed(folder, name, content=CONTENT):
    path = folder / name
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("enwik8", content)
    else:
        path.write_bytes(content)
    return path


def joined(corpus):
    return np.concatenate([corpus.train, corpus.val, corpus.test]).tobytes()


def test_cut_is_contiguous_and_recorded():
    data = np.arange(20, dtype=np.uint8)
    corpus = ByteCorpus.cut("c", data, num_val=3, num_test=4, provenance={"source": "here"})
    assert corpus.train.tolist() == list(range(13))
    assert corpus.val.tolist() == [13, 14, 15] and corpus.test.tolist() == [16, 17, 18, 19]
    sizes = {"bytes": 20, "train_bytes": 13, "val_bytes": 3, "test_bytes": 4}
    sha256 = hashlib.sha256(bytes(range(20))).hexdigest()
    assert json.loads(json.dumps(corpus.provenance)) == {"source": "here", "sha256": sha256, **sizes}


@pytest.mark.parametrize("wrong", [b"bytes", np.zeros(5, np.int64), np.zeros((5, 2), np.uint8)])
def test_corpus_wants_flat_uint8(wrong):
    with pytest.raises(TypeError, match="val must be a 1-D numpy array of uint8, got"):
        ByteCorpus("c", np.zeros(5, np.uint8), wrong, np.zeros(5, np.uint8), {})


def test_train_batch_is_a_pure_function_of_its_key():
    cut = {"micro_batch_size": 8, "accumulate": 2, "windows_per_step": 32}
    module = make_module(**cut)
    keys = [(step, micro_step, rank) for step in range(3) for micro_step in range(2) for rank in range(2)]
    batches = {key: module.train_batch(*key, CPU) for key in keys}
    again = make_module(**cut, on_device=False)
    for key in reversed(keys):  # neither the order of calls nor the place of the gather matters
        assert torch.equal(again.train_batch(*key, CPU), batches[key])
    other_seed = make_module(**cut, seed=4).train_batch(0, 0, 0, CPU)
    assert len({batch.numpy().tobytes() for batch in [*batches.values(), other_seed]}) == len(keys) + 1


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3), (12, 1)])
def test_a_step_has_the_same_windows_however_it_is_cut(ranks, accumulate):
    whole = make_module(micro_batch_size=12, windows_per_step=12)
    module = make_module(micro_batch_size=12 // (ranks * accumulate), accumulate=accumulate, windows_per_step=12)
    for step in range(3):
        parts = [module.train_batch(step, micro, rank, CPU) for rank in range(ranks) for micro in range(accumulate)]
        assert torch.equal(torch.cat(parts), whole.train_batch(step, 0, 0, CPU))
    for micro, rank in ((accumulate, 0), (0, ranks), (-1, 0), (0, -1)):
        with pytest.raises(IndexError, match="is not within a step of 12 windows"):
            module.train_batch(0, micro, rank, CPU)
    with pytest.raises(ValueError, match="windows_per_step must be a multiple of micro_batch_size"):
        make_module(micro_batch_size=5, windows_per_step=12)


@pytest.mark.parametrize("on_device", [True, False])
def test_every_window_is_reachable(on_device):
    corpus = ByteCorpus("c", *[np.arange(10, dtype=np.uint8)] * 3, {})
    module = make_module(corpus, micro_batch_size=64, on_device=on_device)
    batch = module.train_batch(0, 0, 0, CPU)
    assert batch.shape == (64, 8) and batch.dtype == torch.int64 and batch.device == CPU
    assert set(batch[:, 0].tolist()) == {0, 1, 2} and (batch.diff(dim=1) == 1).all()
    longest = make_module(corpus, seq_len=9).train_batch(0, 0, 0, CPU)
    assert longest.tolist() == [list(range(10))] * 4


def test_the_device_has_the_split_no_longer_than_training_takes():
    """A sweep's runs follow each other in a process, and something of each may live on until garbage is collected."""
    module = make_module(on_device=True)
    batch = module.train_batch(0, 0, 0, CPU)
    held = weakref.ref(module._train_split(CPU))
    assert held() is not None
    module.teardown("fit")
    assert held() is None
    assert torch.equal(module.train_batch(0, 0, 0, CPU), batch)


@pytest.mark.parametrize("name", ["bomb.gz", "bomb.zip", "large"])
def test_what_does_not_fit_memory_is_refused_before_it_fills_it(tmp_path, monkeypatch, name):
    path = write_packed(tmp_path, name, bytes(2**24))
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**23))
    has = "has 16,777,216 bytes" if name == "large" else "inflates to more"
    said = f"{name} {has}, and 4,194,304 bytes, half of the memory that is free, is the limit"
    with pytest.raises(ValueError, match=said):
        files.read_file(path)


@pytest.mark.parametrize("suffix, has", [("", "has 100,000 bytes"), (".gz", "inflates to more")])
def test_a_folder_that_does_not_fit_memory_is_refused_though_each_file_fits(tmp_path, monkeypatch, suffix, has):
    for number in range(10, 20):
        write_packed(tmp_path, f"{number}{suffix}", bytes(100_000))
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: SimpleNamespace(available=1_400_000))
    said = f"'1[*]' do not fit 700,000 bytes, half of the memory that is free: 700,000 are read, and .*17{suffix} {has}"
    with pytest.raises(ValueError, match=said):
        files.file(str(tmp_path), pattern="1*")
    assert files.file(str(tmp_path), pattern=f"1[0-6]{suffix}").provenance["bytes"] == 700_000


def test_a_file_that_changes_afterwards_changes_nothing(tmp_path):
    path = write_packed(tmp_path, "text")
    corpus = files.file(str(path))
    path.write_bytes(b"x" * 10)
    assert joined(corpus) == CONTENT


def test_read_only_arrays_raise_no_warning(recwarn):
    data = np.frombuffer(CONTENT, dtype=np.uint8)
    module = make_module(ByteCorpus("c", data, data, data, {}))
    module.train_batch(0, 0, 0, CPU)
    list(module.val_dataloader())
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("on_device", [True, False])
def test_train_batch_never_waits_for_the_gpu(on_device):
    module, device = make_module(on_device=on_device), torch.device("cuda", 0)
    module.train_batch(0, 0, 0, device)  # moves the split
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = module.train_batch(1, 0, 0, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch.cpu(), module.train_batch(1, 0, 0, CPU))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 160), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_every_byte_but_the_first_is_scored_once(surplus, seq_len, batch_size, world_size):
    num_bytes = seq_len + surplus
    data = np.random.default_rng(num_bytes).integers(0, 256, size=num_bytes, dtype=np.uint8)
    module = make_module(ByteCorpus("c", data, data, data, {}), seq_len=seq_len, eval_batch_size=batch_size)
    windows, lengths = {}, []
    for rank in range(world_size):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        batches = list(module.val_dataloader())
        lengths.append(len(batches))
        for index, (inputs, targets) in enumerate(batches):
            assert inputs.shape == targets.shape == (batch_size, seq_len)
            assert inputs.dtype == targets.dtype == torch.int64
            for row, window in enumerate(zip(inputs, targets, strict=True)):
                windows[(index * world_size + rank) * batch_size + row] = window
    assert len(set(lengths)) == 1 and len(windows) == lengths[0] * world_size * batch_size
    inputs, targets = (torch.cat([windows[i][part] for i in range(len(windows))]) for part in (0, 1))
    scored = targets != IGNORE_INDEX
    assert scored.sum() == module.val_scored == num_bytes - 1
    assert targets[scored].tolist() == data[1:].tolist()
    assert inputs[scored].tolist() == data[:-1].tolist()


def test_loaders_cover_what_they_name():
    assert list(make_module().train_dataloader()) == [0, 1, 2, 3, 4]
    module = make_module(val_bytes=20)
    assert module.val_scored == 19
    for loader, num_scored in ((module.val_dataloader(), 19), (module.test_dataloader(), 49)):
        assert sum((targets != IGNORE_INDEX).sum() for _, targets in loader) == num_scored
    assert make_module(val_bytes=10**9).val_scored == 59


def test_a_run_without_an_end_begins_at_once():
    loader = make_module(num_micro_batches=10**15).train_dataloader()
    assert list(itertools.islice(loader, 3)) == [0, 1, 2] and len(loader) == 10**15


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"seq_len": 50}, "got seq_len 50 and a test split of 50 bytes"),
        ({"seq_len": 60}, "got seq_len 60 and a val split of 60 bytes"),
        ({"seq_len": 500}, "got seq_len 500 and a train split of 500 bytes"),
        ({"micro_batch_size": True}, "micro_batch_size must be an integer"),
        ({"num_micro_batches": -1}, "num_micro_batches must be at least 1, got -1"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295"),
        ({"eval_batch_size": "8"}, "eval_batch_size must be an integer at least 1, got '8'"),
        ({"val_bytes": 7}, "val_bytes must be at least 8, got 7"),
        ({"on_device": "cuda"}, "on_device must be True or False, got 'cuda'"),
        ({"corpus": "enwik8"}, "corpus must have name, train, val, test and provenance, got str"),
    ],
)
def test_bad_module_arguments_are_named(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_module(**changes)


@pytest.mark.parametrize("name", ["text", "text.gz", "text.zip"])
def test_packed_and_raw_files_are_the_same_corpus(tmp_path, name):
    corpus = file(str(write_packed(tmp_path, name)), val_fraction=0.1, test_fraction=0.2)
    assert corpus.name == name and joined(corpus) == CONTENT
    assert (len(corpus.train), len(corpus.val), len(corpus.test)) == (700, 100, 200)
    assert corpus.provenance["sha256"] == CONTENT_SHA256


def test_folder_is_read_in_byte_order_without_hidden_files_and_links(tmp_path):
    a, b, c = b"1" * 20, b"2" * 20, b"3" * 20
    files = {"b.txt": b, "B.txt": a, "c/a.txt.gz": gzip.compress(c), "c/é.txt": a}
    skipped = {"empty.txt": b"", "empty.txt.gz": gzip.compress(b"")}
    skipped |= {".hidden.txt": b"x", ".git/a.txt": b"x", "a.bin": b"x"}
    for name, content in {**files, **skipped}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "d").symlink_to(tmp_path / "c")
    corpus = file(str(tmp_path), pattern="*.txt*")
    assert joined(corpus) == a + b + c + a and corpus.provenance["files"] == 4


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(OSError, match="closed"):
        files.list_files(tmp_path, lambda _: True, lambda _: True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"path": "absent"}, "^data.path='absent' does not exist"),
        ({"path": "~nobody-has-this-name/text"}, "^data.path='~nobody-has-this-name/text' does not exist"),
        ({"path": ""}, "^data.path must name a file or a folder, got ''"),
        ({"path": "void"}, "^data.path: void is empty"),
        ({"path": "void.gz"}, "void.gz holds no bytes once decompressed"),
        ({"path": "short"}, "^data.path: short: the val split must have at least 2 bytes.*got 1 of 20"),
        ({"path": "two.zip"}, r"two\.zip must hold exactly one file, got 2: \['a', 'b'\]"),
        ({"path": "short", "pattern": "*.txt"}, "^data.pattern chooses among the files of a folder.*'short' is a file"),
        ({"path": ".", "pattern": "*.md"}, r"no file with content that matches data.pattern='\*\.md'"),
        ({"path": ".", "pattern": ""}, "^data.pattern must be a file name pattern"),
        ({"path": "short", "val_fraction": 0.0}, "^data.val_fraction must be a number between 0 and 1, got 0.0"),
        ({"path": "short", "test_fraction": 0.95}, "^data.val_fraction . data.test_fraction must be less than 1"),
    ],
)
def test_unusable_files_and_arguments_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_packed(tmp_path, "void", b"")
    write_packed(tmp_path, "void.gz", b"")
    write_packed(tmp_path, "short", b"x" * 20)
    with zipfile.ZipFile("two.zip", "w") as archive:
        archive.writestr("a", b"a")
        archive.writestr("b", b"b")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        file(**arguments)


@pytest.mark.parametrize("suffix", [".gz", ".zip"])
def test_corrupted_archives_are_refused(tmp_path, suffix):
    path = write_packed(tmp_path, f"text{suffix}")
    sound = path.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    for content in (flipped, sound[: len(sound) // 2], sound[:5], b"<html>no such page</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"text\{suffix} is not a sound \{suffix} file"):
            file(str(path))


@pytest.mark.parametrize("name", ["enwik8", "enwik8.gz", "enwik8.zip"])
@pytest.mark.parametrize("argument, folder", [("path", False), ("path", True), ("cache_dir", True)])
def test_enwik8_is_found_and_split(tmp_path, name, argument, folder):
    path = write_packed(tmp_path, name)
    corpus = enwik8(**{argument: str(tmp_path if folder else path)}, **HEAD, download=False)
    assert joined(corpus) == CONTENT and corpus.name == "enwik8-custom-1000"
    assert (len(corpus.train), len(corpus.val), len(corpus.test)) == (900, 50, 50)


def test_full_enwik8_has_the_published_offsets(tmp_path):
    with open(tmp_path / "enwik8", "wb") as sparse:
        sparse.truncate(NUM_BYTES)
    corpus = enwik8(str(tmp_path), expected_sha256=None)
    assert (len(corpus.train), len(corpus.val), len(corpus.test)) == (90_000_000, 5_000_000, 5_000_000)
    assert corpus.name == "enwik8-custom-100000000"  # zeros must not pass for enwik8
    with pytest.raises(ValueError, match=f"is corrupted or another file.*expected {SHA256}"):
        enwik8(str(tmp_path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"path": "head.gz"}, "^data.path: head.gz has 1000 bytes once decompressed, expected 100000000"),
        (
            {"path": "head.gz", "expected_bytes": 1000},
            "data.expected_sha256 must be null or the hash of the 1000",
        ),
        ({"path": "flipped", **HEAD}, "corrupted or another file: its bytes have SHA-256"),
        ({"expected_bytes": 39}, "^data.expected_bytes must be an integer of at least 40"),
        ({"expected_sha256": "abc"}, "^data.expected_sha256 must be 64 lower-case hexadecimal digits or null"),
        ({"path": "absent"}, "^data.path='absent' does not exist"),
        ({"path": "."}, "^data.path=.* holds none of enwik8, enwik8.zip, enwik8.gz.*data.path="),
        (
            {"cache_dir": "new", "download": False},
            "^data.cache_dir='new' .*data.download=false.*data.path=.*=pystdlib",
        ),
        ({"cache_dir": "new", **HEAD}, "^data.expected_bytes must be 100000000 to download"),
    ],
)
def test_enwik8_refuses_what_it_cannot_verify_or_find(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_packed(tmp_path, "head.gz")
    write_packed(tmp_path, "flipped", CONTENT[:-1] + b"?")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        enwik8(**arguments)
    assert joined(enwik8("head.gz", expected_bytes=1000, expected_sha256=None)) == CONTENT


def test_a_cut_enwik8_does_not_stop_the_search(tmp_path, caplog):
    (tmp_path / "enwik8").write_bytes(CONTENT[:600])
    packed = write_packed(tmp_path, "enwik8.zip")
    for argument in ("path", "cache_dir"):
        assert joined(enwik8(**{argument: str(tmp_path)}, **HEAD, download=False)) == CONTENT
    assert f"{packed} is used, for {tmp_path / 'enwik8'} has 600 bytes" in caplog.text
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(ValueError, match="^data.path: .*enwik8 has 600 bytes.*; .*enwik8.zip is not a sound .zip file"):
        enwik8(str(tmp_path), **HEAD)


class MirrorHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a path that ends in `cut.zip` breaks off half-way."""

    def do_GET(self):
        if not self.path.endswith("cut.zip"):
            return super().do_GET()
        content = Path(self.directory, "enwik8.zip").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """URL of a server on this machine that offers the archives of FAILED_DOWNLOADS and a good one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_packed(tmp_path, "enwik8.zip")
    write_packed(tmp_path, "other.zip", CONTENT[::-1])
    write_packed(tmp_path, "short.zip", CONTENT[:-1])
    (tmp_path / "page.zip").write_bytes(b"<html>please log in</html>")
    handler = functools.partial(MirrorHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download_is_kept_decompressed_and_used_again(tmp_path, mirror):
    cache = tmp_path / "new" / "cache"
    corpus = enwik8(cache_dir=str(cache), url=f"{mirror}/enwik8.zip", **HEAD)
    assert joined(corpus) == CONTENT and corpus.provenance["source"] == f"{mirror}/enwik8.zip"
    assert [path.name for path in cache.iterdir()] == ["enwik8"]
    assert joined(enwik8(cache_dir=str(cache), download=False, **HEAD)) == CONTENT


@pytest.mark.parametrize("name, reason", FAILED_DOWNLOADS.items())
def test_failed_download_leaves_nothing_behind(tmp_path, mirror, name, reason):
    cache = tmp_path / "cache"
    with pytest.raises(ConnectionError, match=reason) as failure:
        enwik8(cache_dir=str(cache), url=f"{mirror}/{name}", **HEAD)
    assert list(cache.iterdir()) == []
    assert all(part in str(failure.value) for part in (f"{mirror}/{name}", "data.path=", "data=pystdlib"))


def test_a_host_that_is_not_found_is_said_in_one_line(tmp_path):
    with pytest.raises(ConnectionError) as failure:
        enwik8(cache_dir=str(tmp_path), url="http://host.invalid/enwik8.zip", **HEAD)
    message = str(failure.value)
    assert message.startswith("could not download enwik8 from http://host.invalid/enwik8.zip (Failed to resolve")
    assert "\n" not in message and "Pool" not in message and "object at" not in message


def test_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_self, _url, output_file, _pooch):
        Path(output_file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("pooch.HTTPDownloader.__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        enwik8(cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_pystdlib_core_is_the_same_each_time():
    first, second = pystdlib(), pystdlib("core")
    assert first.provenance == second.provenance and joined(first) == joined(second)
    assert 5e6 < len(first.train) < 20e6 and 400 < first.provenance["files"] < 1000
    assert all(1e5 < len(split) < 2e6 for split in (first.val, first.test))


def test_pystdlib_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(pystdlib_module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no .py files"):
        pystdlib()
    core = sorted([f"module{i}.py" for i in range(60)] + ["os.py", "pkg/__init__.py"])
    tests = ["pkg/test/e.py", "test/test_grammar.py"]
    skipped = ["site-packages/a.py", "pkg/__pycache__/b.py", "_sysconfigdata_x.py", "c.pyc"]
    for name in core + tests + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "zz_copy_of_module0.py").write_text("# module0.py\n")
    (tmp_path / "aa_link.py").symlink_to(tmp_path / "module1.py")
    for subset, kept in (("core", core), ("full", sorted(core + tests))):
        corpus = pystdlib(subset)
        for split in ("train", "val", "test"):  # whole files, each in the one split its path names
            expected = "".join(f"# {name}\n" for name in kept if split_of(name) == split)
            assert getattr(corpus, split).tobytes().decode() == expected
        assert corpus.provenance["files"] == len(kept)
    (tmp_path / "test" / "test_grammar.py").unlink()
    with pytest.raises(FileNotFoundError, match="^data.subset=full needs the `test` package"):
        pystdlib("full")
    with pytest.raises(ValueError, match="^data.subset must be core or full, got 'half'"):
        pystdlib("half")


def test_compressors_on_noise_repetition_and_text():
    noise = np.random.default_rng(0).integers(0, 256, size=60_000, dtype=np.uint8)
    repeated = np.full(40_000, 97, dtype=np.uint8)
    bits = compressor_bits_per_byte(ByteCorpus("c", noise[:40_000], noise[40_000:], repeated, {}))
    assert set(bits) == {"gzip_9", "gzip_9_given_train", "xz_9e", "xz_9e_given_train"}
    assert all(7.95 < value < 8.2 for value in bits.values())
    bits = compressor_bits_per_byte(ByteCorpus("c", repeated, noise, repeated, {}), split="test")
    assert all(0 <= value < 0.1 for value in bits.values())
    text = np.frombuffer(pystdlib().train[:400_000].tobytes(), dtype=np.uint8)
    train, val = text[:300_000], text[300_000:]
    literal = len(gzip.compress(text, 9)) - len(gzip.compress(train, 9))
    # Only the block of Huffman codes that spans the seam is counted otherwise.
    bits = compressor_bits_per_byte(ByteCorpus("c", train, val, val, {}))
    assert bits["gzip_9_given_train"] == pytest.approx(8 * literal / len(val), rel=0.02)
    with pytest.raises(ValueError, match="split must be 'val' or 'test', got 'train'"):
        compressor_bits_per_byte(make_corpus(), split="train")


def test_given_train_sees_as_far_as_each_window():
    noise = np.random.default_rng(0).integers(0, 256, size=40_000, dtype=np.uint8)
    near, far = noise[-8_000:], noise[:8_000]  # within 32 KiB of the end of train, and beyond
    corpus = ByteCorpus("c", noise, near, far, {})
    bits_near, bits_far = (compressor_bits_per_byte(corpus, split) for split in ("val", "test"))
    assert bits_near["gzip_9_given_train"] < 0.2 and bits_far["gzip_9_given_train"] > 7.9
    assert bits_near["xz_9e_given_train"] < 1 and bits_far["xz_9e_given_train"] < 1
