"""The indexed dataset, judged by Megatron-Core itself in both directions, and what can be wrong with an index."""

import json
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from checkpoint.manifest import block_hashes
from parallel.errors import InputError
from train.data import indexed
from train.data.indexed import Writer, open_index
from train.data.tokens import open_tokens

DOCUMENTS = {
    "uint16": [[5, 1], [65535, 2, 3, 1], [7], [1, 1, 1, 1, 1, 1]],
    "int32": [[100_000, 1], [2**31 - 1] * 5, [3, 1]],
}
SEQUENCES = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8], [9, 10]]]
"""Documents of several sequences, as Megatron writes with --split-sentences."""

MEGATRON = """
import json, sys
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

folder, documents = sys.argv[1], json.loads(sys.argv[2])
found = {}
for dtype, texts in documents["flat"].items():
    ours = IndexedDataset(f"{folder}/ours.{dtype}")
    found[dtype] = {
        "sequences": [ours[number].tolist() for number in range(len(ours))],
        "documents": ours.document_indices.tolist(),
        "dtype": ours.index.dtype.__name__,
    }
    theirs = IndexedDatasetBuilder(f"{folder}/theirs.{dtype}.bin", dtype=getattr(np, dtype))
    for text in texts:
        theirs.add_item(torch.tensor(text, dtype=torch.int64))
        theirs.end_document()
    theirs.finalize(f"{folder}/theirs.{dtype}.idx")
cut = IndexedDatasetBuilder(f"{folder}/cut.bin", dtype=np.int32)
for document in documents["cut"]:
    for sequence in document:
        cut.add_item(torch.tensor(sequence))
    cut.end_document()
cut.finalize(f"{folder}/cut.idx")
print(json.dumps(found))
"""


def write(path: Path, documents: list[list[int]], dtype: str) -> Writer:
    with Writer(path, np.dtype(dtype).newbyteorder("<")) as writer:
        for document in documents:
            writer.add(np.array(document), [len(document)])
    return writer


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    """What Megatron-Core reads of our files, beside the files that it wrote."""
    if find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    folder = tmp_path_factory.mktemp("megatron")
    for dtype, documents in DOCUMENTS.items():
        write(folder / f"ours.{dtype}", documents, dtype)
    given = json.dumps({"flat": DOCUMENTS, "cut": SEQUENCES})
    command = [sys.executable, "-W", "ignore", "-c", MEGATRON, str(folder), given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("dtype", list(DOCUMENTS))
def test_megatron_reads_what_we_write(megatron, dtype: str) -> None:
    _, found = megatron
    documents = list(range(len(DOCUMENTS[dtype]) + 1))
    assert found[dtype] == {"sequences": DOCUMENTS[dtype], "documents": documents, "dtype": dtype}


@pytest.mark.parametrize("dtype", list(DOCUMENTS))
def test_our_bytes_are_megatrons(megatron, dtype: str) -> None:
    folder, _ = megatron
    for ending in ("bin", "idx"):
        assert (folder / f"ours.{dtype}.{ending}").read_bytes() == (folder / f"theirs.{dtype}.{ending}").read_bytes()


def test_we_read_what_megatron_wrote(megatron) -> None:
    folder, _ = megatron
    for dtype, documents in DOCUMENTS.items():
        file = open_tokens(folder / f"theirs.{dtype}")
        assert file.tokens.tolist() == [token for document in documents for token in document]
        assert file.metadata == {"dtype": dtype, "documents": len(documents), "tokens": sum(map(len, documents))}
    file = open_tokens(folder / "cut")
    assert file.tokens.tolist() == list(range(1, 11))
    assert file.offsets.tolist() == [0, 4, 6, 10]
    assert [file.offsets[at] for at in (0, 1, 2, 3, -1)] == [0, 4, 6, 10, 10]
    assert file.starts(0, 5).tolist() == [0, 4] and file.starts(1, 4).tolist() == [0, 2]


def packed(lengths: list[int], *, code: int = 8, item: int = 2) -> bytes:
    """Return an index, made by hand from the format."""
    pointers = [sum(lengths[:at]) * item for at in range(len(lengths))]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    counts = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    return head + counts + struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_an_index_that_is_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    lengths = [3, 0, 1, 7, 2, 0, 5]
    with Writer(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(np.arange(4), [3, 0, 1])
        writer.add(np.arange(14), [7, 2, 0, 5])
    assert (tmp_path / "x.idx").read_bytes() == packed(lengths)
    assert (writer.documents, writer.tokens) == (7, 18)
    assert open_tokens(tmp_path / "x").offsets.tolist() == [0, 3, 3, 4, 11, 13, 13, 18]


def test_no_documents_at_all(tmp_path: Path) -> None:
    with Writer(tmp_path / "x", np.dtype("<u2")):
        pass
    assert (tmp_path / "x.bin").read_bytes() == b"" and (tmp_path / "x.idx").read_bytes() == packed([])
    assert (len(open_index(tmp_path / "x").lengths), open_index(tmp_path / "x").tokens) == (0, 0)


def test_checksums_are_those_of_a_manifest_over_blocks_of_16_mib(tmp_path: Path) -> None:
    tokens = np.arange(9 << 20, dtype=np.uint16)
    with Writer(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(tokens[:1001], [1001])
        writer.add(tokens[1001:], [len(tokens) - 1001])
    assert (tmp_path / "x.bin").read_bytes() == tokens.tobytes()
    for name, size in (("x.bin", 18 << 20), ("x.idx", len(packed([1, 2])))):
        assert writer.files[name]["size"] == size
        assert writer.files[name]["xxh3"] == block_hashes(tmp_path / name)
    assert len(writer.files["x.bin"]["xxh3"]) == 2


def test_after_an_error_the_old_files_are_there_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2]], "uint16")
    with pytest.raises(KeyError), Writer(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(np.arange(5), [5])
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert open_tokens(tmp_path / "x").tokens.tolist() == [1, 2]


def test_a_document_that_the_format_cannot_hold(tmp_path: Path) -> None:
    message = "x: a document of 2147483648 tokens; the format holds 2147483647"
    with pytest.raises(InputError, match=message), Writer(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(np.arange(1), [2**31])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"x\.idx: cannot be read"),
        (b"MMIDIDX", r"x\.idx: not an index of a Megatron-Core dataset \(version 1\)"),
        (b"X" + packed([2, 1])[1:], r"x\.idx: not an index of a Megatron-Core dataset \(version 1\)"),
        (packed([2, 1], code=7, item=4), r"x\.idx: its dtype has the code 7; tokens are integers"),
        (packed([2, 1], code=99), r"x\.idx: its dtype has the code 99; tokens are integers"),
        (packed([2, 1])[:-1], r"x\.idx: has 81 bytes, its header says 82$"),
        (packed([2, 1]) + b"\0\0", r"has 84 bytes, its header says 82 \(of a multimodal dataset, which is not read\)"),
        (packed([2, 1])[:-8] + bytes(8), r"x\.idx: damaged \(its documents are not of its 2 sequences\)"),
        (packed([2, 1])[:42] + bytes(16) + packed([2, 1])[58:], r"x\.idx: its sequences do not follow one another"),
    ],
)
def test_what_is_wrong_with_an_index(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.idx").write_bytes(data)
    (tmp_path / "x.bin").write_bytes(bytes(6))
    with pytest.raises(InputError, match=message):
        open_tokens(tmp_path / "x")
