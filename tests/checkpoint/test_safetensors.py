"""Safetensors folders, judged by transformers and by the safetensors library."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from checkpoint import manifest
from checkpoint.files import read_json
from checkpoint.memory import ScratchSource
from checkpoint.open import open_checkpoint
from checkpoint.safetensors import SafetensorsLayout, read_header
from checkpoint.source import read_tensor
from checkpoint.writer import write_checkpoint
from parallel.errors import InputError


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", [10**9, 15_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_we_write_and_we_read_what_it_wrote(tiny_folder, tmp_path, tied, shard_size, dtype):
    theirs = tiny_folder(dtype=dtype, tie_word_embeddings=tied)
    source = open_checkpoint(theirs)
    write_checkpoint(source, tmp_path / "ours", SafetensorsLayout(shard_size=shard_size), workers=2)
    a, b = AutoModelForCausalLM.from_pretrained(theirs), AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert a.dtype == b.dtype == dtype
    for (name, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert torch.equal(read_tensor(source, name, dtype=dtype), one), name
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_size == 15_000)


def test_bytes_do_not_depend_on_workers_and_the_header_is_the_formats(tiny_folder, tmp_path):
    source = open_checkpoint(tiny_folder())
    hashes = {write_checkpoint(source, tmp_path / str(n), SafetensorsLayout(), workers=n) for n in (1, 2, 5)}
    assert len(hashes) == 1
    held = load_file(tmp_path / "1" / "model.safetensors")
    assert list(held) and "lm_head.weight" not in held
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (tmp_path / "5" / "model.safetensors").read_bytes()


def test_scratch_is_the_same_whatever_box_is_read():
    source = ScratchSource(config=tiny_config(), seed=5)
    name = "model.layers.1.mlp.down_proj.weight"
    whole = read_tensor(source, name)
    part = torch.empty(3, 7)
    source.read(name, (slice(4, 7), slice(10, 17)), {"weight": part})
    assert torch.equal(part, whole[4:7, 10:17])
    assert abs(whole.std() - 1 / (32 * 4) ** 0.5) < 0.01  # 1/sqrt(hidden) / sqrt(2 * layers)
    other = ScratchSource(config=tiny_config(), seed=6)
    assert not torch.equal(read_tensor(other, name), whole)


def damage_truncate(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)


def damage_garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"x" * 64)


def damage_empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def damage_gone(folder):
    (folder / "model.safetensors").unlink()


def damage_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))


def damage_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))


def damage_escape(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, ["model.safetensors: truncated"]),
        (damage_garbage, ["model.safetensors: not a safetensors file"]),
        (damage_empty, ["model.safetensors: truncated"]),
        (damage_gone, ["not a checkpoint of a known format (safetensors, "]),
        (damage_config, ["model.safetensors: model.layers.0.mlp.gate_proj.weight has shape (48, 32)", "(50, 32)"]),
        (damage_type, ["config.json: unknown model_type 'lama'", "did you mean 'llama'?"]),
        (damage_escape, ["leaves its folder"]),
    ],
)
def test_a_damaged_folder_is_one_line_that_names_the_file(tiny_folder, damage, words):
    folder = tiny_folder()
    damage(folder)
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(folder).infos
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("read", "name", "method"),
    [
        (read_header, "model.safetensors", "stat"),
        (read_header, "model.safetensors", "open"),
        (read_json, "config.json", "read_bytes"),
    ],
)
def test_a_file_that_may_not_be_read_is_one_line_that_names_it(tiny_folder, monkeypatch, read, name, method):
    """Tests may run as root, who may read everything: the error is made here."""
    path = tiny_folder() / name
    real = getattr(Path, method)

    def refused(self, *args, **options):
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, method, refused)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: cannot be read (Permission denied)"


def test_a_folder_in_a_file_s_place_is_one_line(tmp_path):
    for read in (read_json, read_header):
        with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}: cannot be read \\(Is a directory\\)$"):
            read(tmp_path)


def test_a_dtype_has_one_name_in_the_config(tiny_folder, tmp_path):
    folder = tiny_folder()
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    write_checkpoint(open_checkpoint(folder), tmp_path / "copy", SafetensorsLayout(dtype=torch.bfloat16))
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written


def test_a_flipped_bit_is_found_and_named(tiny_folder, tmp_path):
    folder = tmp_path / "copy"
    write_checkpoint(open_checkpoint(tiny_folder()), folder, SafetensorsLayout())
    manifest.check(folder, deep=True)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    stat = path.stat()
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model.safetensors: damaged \(checksum of block 0"):
        manifest.check(folder)  # its time has changed, so it is read
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    manifest.check(folder)  # size and time as they were: only a deep look can tell
    with pytest.raises(InputError, match="damaged"):
        manifest.check(folder, deep=True)


def test_a_manifest_of_another_format_says_so(tiny_folder, tmp_path):
    write_checkpoint(open_checkpoint(tiny_folder()), tmp_path / "copy", SafetensorsLayout())
    path = tmp_path / "copy" / manifest.NAME
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(InputError, match=r"manifest.json: of format 1, this version of growmerge knows 2"):
        manifest.check(tmp_path / "copy")


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_is_one_line_and_never_looks_complete(tiny_folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(InputError, match="no space left") as caught:
            write_checkpoint(open_checkpoint(tiny_folder()), small / "model", SafetensorsLayout())
        assert str(small) in str(caught.value)
        assert not manifest.is_complete(small / "model")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_reading_touches_no_more_than_it_needs(tmp_path):
    """A 200 MB folder is opened and one tile read within 30 MB of further memory."""
    config = tiny_config(vocab_size=400_000, hidden_size=128, head_dim=32, num_hidden_layers=1, intermediate_size=16)
    folder = tmp_path / "wide"
    write_checkpoint(ScratchSourceOfZeros(config), folder, SafetensorsLayout())
    code = (
        "import resource, sys, torch\n"
        "from checkpoint.open import open_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = open_checkpoint(sys.argv[1])\n"
        "out = torch.empty(8192, 128)\n"
        "source.read('model.embed_tokens.weight', (slice(9000, 17192), slice(0, 128)), {'weight': out})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 30_000


class ScratchSourceOfZeros(ScratchSource):
    """As large as a real one and quick to make."""

    def __init__(self, config):
        super().__init__(config=config, seed=0)

    def read(self, name, box, out, stats=None):
        for tensor in out.values():
            tensor.zero_()
