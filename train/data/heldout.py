"""What is held out, and that training text does not repeat it: pure functions on documents."""

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from train.data.readers import Document

Gram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A document as the choice of held-out text sees it."""

    id: str
    source: int
    """Number of its source in the corpus."""
    size: int
    """Bytes (UTF-8)."""
    allowed: bool
    """May it be held out?"""


def rank(seed: int, purpose: str, name: str) -> tuple[bytes, str]:
    """Return a key whose order shuffles names; it depends on seed, purpose and name alone."""
    key = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return hashlib.blake2b(name.encode(), key=key, digest_size=16).digest(), name


def choose_heldout(
    candidates: Mapping[str, Sequence[Candidate]], *, share: float, max_bytes: int, seed: int
) -> dict[str, frozenset[str]]:
    """Return the ids held out of each language.

    Ids are ranked by a hash that knows no language. First come ids that every language has: each is taken where it
    fits in all of them, up to half of `max_bytes` in a language that has other text too (more if less of its text is
    other). The rest of `max_bytes` is divided among a language's sources by size, and filled in the same ranking. No
    source gives more than `share` of its documents (rounded up).
    """
    by_id = {language: {item.id: item for item in items} for language, items in candidates.items()}
    left = {
        (language, source): math.ceil(share * count - 1e-9)
        for language, items in candidates.items()
        for source, count in Counter(item.source for item in items).items()
    }
    chosen: dict[str, set[str]] = {language: set() for language in candidates}
    used = dict.fromkeys(candidates, 0)

    def take(language: str, item: Candidate) -> None:
        chosen[language].add(item.id)
        used[language] += item.size
        left[language, item.source] -= 1

    if len(candidates) > 1:
        common = set.intersection(*({item.id for item in items if item.allowed} for items in candidates.values()))
        limit = {}
        for language, items in candidates.items():
            shared = sum(item.size for item in items if item.id in common)
            limit[language] = int(max_bytes * max(0.5, shared / max(1, sum(item.size for item in items))))
        for name in sorted(common, key=lambda name: rank(seed, "heldout", name)):
            items_of = {language: by_id[language][name] for language in candidates}
            if all(
                left[language, item.source] > 0 and used[language] + item.size <= limit[language]
                for language, item in items_of.items()
            ):
                for language, item in items_of.items():
                    take(language, item)
    for language, items in candidates.items():
        sizes = Counter[int]()
        for item in items:
            sizes[item.source] += item.size if item.allowed else 0
        total, rest = sum(sizes.values()), max_bytes - used[language]
        quota = {source: rest * size // max(1, total) for source, size in sizes.items()}
        for item in sorted(items, key=lambda item: rank(seed, "heldout", item.id)):
            fits = item.size <= quota[item.source] and left[language, item.source] > 0
            if item.allowed and fits and item.id not in chosen[language]:
                take(language, item)
                quota[item.source] -= item.size
    return {language: frozenset(ids) for language, ids in chosen.items()}


def align(held: Mapping[str, Sequence[Document]], ids: Iterable[str]) -> dict[str, list[Document]]:
    """Keep of documents that all languages hold out the passages that all of them have, by the passages' keys.

    Documents whose passages have no keys are kept whole, as are those that have no passage in common.
    """
    by_id = {language: {document.id: document for document in documents} for language, documents in held.items()}
    for name in ids:
        same = [documents[name] for documents in by_id.values()]
        common = frozenset.intersection(*(frozenset(document.keys) for document in same))
        for documents in by_id.values() if common else ():
            pairs = zip(documents[name].keys, documents[name].passages, strict=True)
            kept = {key: passage for key, passage in pairs if key in common}
            documents[name] = Document(id=name, passages=tuple(kept.values()), keys=tuple(kept))
    return {language: list(documents.values()) for language, documents in by_id.items()}


def normalise(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def grams(words: Sequence[str], n: int) -> Iterable[Gram]:
    """Return the n-grams of a text in order."""
    return (tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def shared_ngrams(training: Iterable[str], heldout: Iterable[str], n: int) -> set[Gram]:
    """Return the word n-grams that texts of both kinds hold, over line breaks too; none after `decontaminate`."""
    wanted = {gram for text in heldout for gram in grams(normalise(text), n)}
    return {gram for text in training for gram in grams(normalise(text), n) if gram in wanted}


def decontaminate(
    training: Iterable[Document], heldout: Iterable[Document], n: int
) -> tuple[list[Document], dict[str, int]]:
    """Leave out training passages that share a word n-gram with held-out text or equal a held-out passage.

    Case, punctuation and line breaks do not count, so an n-gram may run over several passages: all of them are left
    out. Returns the training documents that still hold text, and how many passages went for which reason.
    """
    held = [[normalise(passage) for passage in document.passages] for document in heldout]
    wanted = {gram for passages in held for gram in grams([word for words in passages for word in words], n)}
    whole = {tuple(words) for passages in held for words in passages}
    kept, dropped = [], {"equal": 0, "shared_ngram": 0}
    for document in training:
        pairs = [(passage, normalise(passage)) for passage in document.passages]
        clean = [(passage, words) for passage, words in pairs if tuple(words) not in whole]
        dropped["equal"] += len(pairs) - len(clean)
        while bad := _touching([words for _, words in clean], wanted, n):
            dropped["shared_ngram"] += len(bad)
            clean = [pair for at, pair in enumerate(clean) if at not in bad]
        if clean:
            kept.append(Document(id=document.id, passages=tuple(passage for passage, _ in clean)))
    return kept, dropped


def _touching(passages: Sequence[Sequence[str]], wanted: set[Gram], n: int) -> set[int]:
    """Return the numbers of the passages that hold a word of a wanted n-gram."""
    words = [word for passage in passages for word in passage]
    owner = [at for at, passage in enumerate(passages) for _ in passage]
    bad: set[int] = set()
    for at, gram in enumerate(grams(words, n)):
        if gram in wanted:
            bad.update(owner[at : at + n])
    return bad


def split_documents(ids: Iterable[str], shares: Mapping[str, float], *, seed: int) -> dict[str, str]:
    """Return the split of each document: ids in the order of a keyed hash, cut at the cumulative shares."""
    order = sorted(ids, key=lambda name: rank(seed, "split", name))
    found, start, total = {}, 0, 0.0
    for name, share in shares.items():
        total += share
        stop = round(total * len(order))
        found.update(dict.fromkeys(order[start:stop], name))
        start = stop
    return found
