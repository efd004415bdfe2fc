"""From an order of samples and token files to the samples that a run sees; both front doors of training share it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from train import measure
from train.batch import Sample, SampleAt
from train.data.order import Mixture, sample_at
from train.data.staged import Staged
from train.data.tokens import TokenFile, open_tokens


def open_corpora(folder: Path, names: Iterable[str], *, vocab_size: int | None = None) -> dict[str, TokenFile]:
    """Open the token files of corpora by name.

    Raises:
        InputError: see `train.data.tokens.open_tokens`.
    """
    return {name: open_tokens(folder / name, vocab_size=vocab_size) for name in names}


def sequences_of(files: Mapping[str, TokenFile], length: int) -> dict[str, int]:
    """Return the whole sequences of `length` tokens that each corpus has, by name."""
    return {name: file.sequences(length) for name, file in files.items()}


def samples(
    order: Mixture | Staged, files: Mapping[str, TokenFile], *, length: int, documents: str
) -> tuple[SampleAt, tuple[str, ...]]:
    """Return the samples by number, and the names that their losses are logged by, which `Sample.corpus` counts.

    A part of a corpus has a name of its own; where two stages take different parts, they share it.

    Args:
        files: those of all corpora of the order, by name.
        length: tokens in a sample (T of `Sample`).
        documents: packed, or masked: then a sample says where documents start in it.
    """
    assert documents in ("packed", "masked"), documents
    names = tuple(dict.fromkeys(order.names))
    numbers = [names.index(name) for name in order.names]
    sources = [files[corpus] for corpus in order.corpora]

    def sample(at: int) -> Sample:
        stream, sequence, _ = sample_at(order, at)
        file = sources[stream]
        starts = file.starts(sequence, length) if documents == "masked" else None
        return Sample(ids=file.sequence(sequence, length), starts=starts, corpus=numbers[stream])

    return sample, names


def bytes_seen(order: Mixture | Staged, files: Mapping[str, TokenFile], *, length: int) -> Callable[[int], int] | None:
    """Return a function from a number of samples to the UTF-8 bytes of text that the first so many hold.

    A corpus' bytes a token are those of the whole of it; None where a corpus does not say (Megatron's tools do not).
    """
    known = {corpus: files[corpus].metadata for corpus in order.corpora}
    if not all(about.get("bytes") for about in known.values()):
        return None
    # Streams of one name are parts of one corpus.
    sizes = {
        name: (known[corpus]["bytes"], known[corpus]["tokens"])
        for name, corpus in zip(order.names, order.corpora, strict=True)
    }

    def seen(samples: int) -> int:
        tokens = {name: usage.tokens for name, usage in order.usage(samples, length).items()}
        return sum(measure.bytes_seen(tokens, sizes).values())

    return seen


def languages_of(corpora: Iterable[str]) -> tuple[str, ...]:
    """Return the languages of corpora and splits (`eng` of `eng.first`), each once."""
    return tuple(dict.fromkeys(corpus.partition(".")[0] for corpus in corpora))
