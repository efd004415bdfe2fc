"""Continued byte-pair encoding on numbers: words as runs of symbols, and the counts of neighbours kept up to date.

All unique words lie in one array of symbols. A merge touches every place of its pair at once, in numpy, and changes the
counts of the pairs beside those places alone; which pair is next comes from a heap.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heappop, heappush, heapreplace
from itertools import chain, pairwise

import numpy as np

Merges = Mapping[int, tuple[int, int]]
"""Pair (see `pair_key`) -> rank, and the token that it becomes; a lower rank comes first."""


def pair_key(left: int, right: int) -> int:
    """Return one number for two symbols; numbers sort as pairs do."""
    return left << 32 | right


def merge_on(symbols: Sequence[int], merges: Merges) -> list[int]:
    """Merge a word's symbols as an encoder does: the pair of the lowest rank first, the leftmost of equal ones."""
    found = list(symbols)
    while len(found) > 1:
        keys = [pair_key(left, right) for left, right in pairwise(found)]
        ranked = [(merges[key][0], at) for at, key in enumerate(keys) if key in merges]
        if not ranked:
            break
        at = min(ranked)[1]
        found[at : at + 2] = [merges[keys[at]][1]]
    return found


class Words:
    """Unique words, each with how often it occurs; symbols that a merge swallowed are -1."""

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        total = int(lengths.sum())
        ends = np.cumsum(lengths)
        self._starts = ends - lengths
        self._ends = ends
        self._times = np.array(counts, dtype=np.int64)
        self._word = np.repeat(np.arange(len(words), dtype=np.int32), lengths)
        self._symbols = np.fromiter(chain.from_iterable(words), dtype=np.int32, count=total)
        self._before = np.arange(-1, total - 1, dtype=np.int32)
        self._after = np.arange(1, total + 1, dtype=np.int32)
        self._before[self._starts[lengths > 0]] = -1
        self._after[ends[lengths > 0] - 1] = -1
        self._counts: dict[int, int] = {}
        self._places: dict[int, list[np.ndarray]] = {}
        self._heap: list[tuple[int, int]] = []
        self._add(np.flatnonzero(self._after >= 0).astype(np.int32))

    def tokens(self) -> int:
        """Return the symbols in all words, each word as often as it occurs."""
        return int(self._times[self._word[self._symbols >= 0]].sum())

    def best(self) -> tuple[int, int, int] | None:
        """Take the pair that occurs most often: its symbols and count; of equal ones that of the lowest numbers.

        It is not given again unless `merge` makes new places of it. None if no pair is left.
        """
        while self._heap:
            count, key = self._heap[0]
            now = self._counts.get(key, 0)
            if now == -count:
                heappop(self._heap)
                return key >> 32, key & 0xFFFFFFFF, now
            if now:
                heapreplace(self._heap, (-now, key))
            else:
                heappop(self._heap)
        return None

    def merge(self, left: int, right: int, token: int, merges: Merges) -> None:
        """Merge a pair wherever it stands, and what earlier merges then do with the token.

        Args:
            merges: all that there are, this one included. Where they merge the token on, since it is not new, the
                word is encoded to its end.
        """
        places = self._where(left, right)
        if len(places) and (onward := self._merged_on(places, token, merges)) is not None:
            words = np.unique(self._word[places[onward]])
            places = places[~np.isin(self._word[places], words)]
            self.rewrite({int(word): merge_on(self.symbols(int(word)), merges) for word in words})
        if not len(places):
            return
        rights = self._after[places]
        behind = self._after[rights]
        beside = np.concatenate([self._before[places], rights[behind >= 0], places])
        self._remove(np.unique(beside[beside >= 0]))
        self._symbols[places] = token
        self._symbols[rights] = -1
        self._after[places] = behind
        self._before[behind[behind >= 0]] = places[behind >= 0]
        lefts = self._before[places]
        self._add(np.unique(np.concatenate([lefts[lefts >= 0], places[behind >= 0]])))

    def symbols(self, word: int) -> list[int]:
        """Return a word's symbols as they are now."""
        part = self._symbols[self._starts[word] : self._ends[word]]
        return list(part[part >= 0].tolist())

    def rewrite(self, words: Mapping[int, Sequence[int]]) -> None:
        """Give words other symbols, no more of them than they have."""
        slots = {word: np.arange(self._starts[word], self._ends[word], dtype=np.int32) for word in words}
        alive = {word: slot[self._symbols[slot] >= 0] for word, slot in slots.items()}
        self._remove(_joined(slot[:-1] for slot in alive.values()))
        for word, symbols in words.items():
            kept = alive[word][: len(symbols)]
            self._symbols[alive[word]] = -1
            self._symbols[kept] = symbols
            self._before[kept[1:]] = kept[:-1]
            self._after[kept[:-1]] = kept[1:]
            self._after[kept[-1]] = -1
        self._add(_joined(alive[word][: len(symbols) - 1] for word, symbols in words.items()))

    def _where(self, left: int, right: int) -> np.ndarray:
        """Return where a pair stands now, the left symbols' places in order; of overlapping ones every second."""
        places = np.unique(_joined(self._places.get(pair_key(left, right), [])))
        places = places[(self._symbols[places] == left) & (self._after[places] >= 0)]
        places = places[self._symbols[self._after[places]] == right]
        if left != right or len(places) < 2:
            return places
        # In a a a a the first two become one, then the next two.
        number = np.arange(len(places))
        starts = np.append(True, self._after[places[:-1]] != places[1:])
        return places[(number - np.maximum.accumulate(np.where(starts, number, 0))) % 2 == 0]

    def _merged_on(self, places: np.ndarray, token: int, merges: Merges) -> np.ndarray | None:
        """Return at which places merges go on with the token; None if at none."""
        rights = self._after[places]
        befores, behinds = self._before[places], self._after[rights]
        left = np.where(np.isin(befores, rights), token, self._symbols[befores])
        right = np.where(np.isin(behinds, places), token, self._symbols[behinds])
        found = np.zeros(len(places), dtype=bool)
        for there, keys in ((befores >= 0, _keys(left, token)), (behinds >= 0, _keys(token, right))):
            known = [key for key in np.unique(keys[there]).tolist() if key in merges]
            if known:
                found |= there & np.isin(keys, known)
        return found if found.any() else None

    def _grouped(self, starts: np.ndarray) -> Iterable[tuple[int, int, np.ndarray]]:
        """Return, for each pair that starts at one of the places, its key, its count over them, and its places."""
        if not len(starts):
            return []
        keys = _keys(self._symbols[starts], self._symbols[self._after[starts]])
        order = np.argsort(keys, kind="stable")
        keys, starts = keys[order], starts[order]
        firsts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        totals = np.add.reduceat(self._times[self._word[starts]], firsts)
        bounds = [*firsts.tolist(), len(starts)]
        return (
            (key, total, starts[first:last])
            for key, total, first, last in zip(
                keys[firsts].tolist(), totals.tolist(), bounds[:-1], bounds[1:], strict=True
            )
        )

    def _add(self, starts: np.ndarray) -> None:
        for key, total, places in self._grouped(starts):
            count = self._counts.get(key, 0) + total
            self._counts[key] = count
            self._places.setdefault(key, []).append(places)
            heappush(self._heap, (-count, key))

    def _remove(self, starts: np.ndarray) -> None:
        for key, total, _ in self._grouped(starts):
            count = self._counts[key] - total
            assert count >= 0, f"pair {key >> 32}, {key & 0xFFFFFFFF} is counted {count} times"
            if count:
                self._counts[key] = count
            else:
                del self._counts[key], self._places[key]


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts])


def _keys(left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
    return np.asarray(left, dtype=np.int64) << 32 | np.asarray(right, dtype=np.int64)


def learn(
    words: Words, merges: dict[int, tuple[int, int]], token_of: Callable[[int, int], int | None], *, min_count: int
) -> list[tuple[int, int, int]]:
    """Learn merges until `token_of` wants no more or no pair is frequent; return (left, right, token) in order.

    The rule: the most frequent pair, of equal ones that of the lowest left number, then of the lowest right one.

    Args:
        merges: the existing ones; the new ones are put behind them.
        token_of: what a pair becomes; None to leave it out; StopIteration to end.
    """
    learned = []
    rank = max((rank for rank, _ in merges.values()), default=-1)
    while (found := words.best()) and found[2] >= min_count:
        left, right, _ = found
        if pair_key(left, right) in merges:
            continue
        try:
            token = token_of(left, right)
        except StopIteration:
            break
        if token is not None:
            rank += 1
            merges[pair_key(left, right)] = (rank, token)
            words.merge(left, right, token, merges)
            learned.append((left, right, token))
    return learned
