"""Keys that say what of a corpus is cleaned out, as a frozen dataclass; what they do stands in docs/cleaning.md."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Clean:
    """What is left out of a corpus. Exact duplicates and what evaluation tests go by default, all else when asked."""

    exact_duplicates: bool = True
    """Leave out documents whose text equals an earlier one's, but for white space and Unicode form."""
    repeated_paragraphs: int | None = None
    """Leave out paragraphs (lines) of at least so many words that an earlier place of the corpus has."""
    near_duplicates: float | None = None
    """Leave out documents as similar as this (Jaccard of word shingles, such as 0.8) to an earlier one."""
    shingle: int = 5
    """near_duplicates: words in a shingle."""
    permutations: int = 128
    """near_duplicates: numbers in a document's signature (4 bytes each); more estimate the similarity closer."""
    language: str | None = None
    """Keep documents in this language (ISO 639-3, such as swe)."""
    min_confidence: float = 0.5
    """language: probability that it has to have; at 0.5 it is likelier than all others together."""
    script: str | None = None
    """Keep documents in this script (ISO 15924, such as Latn)."""
    min_script_share: float = 0.8
    """script: share of a document's letters that have to be of it."""
    min_words: int | None = None
    """Leave out documents of fewer words (50 in Gopher)."""
    max_words: int | None = None
    """Leave out documents of more words (100,000 in Gopher)."""
    min_characters: int | None = None
    """Leave out documents of fewer characters: for languages that write no spaces."""
    max_characters: int | None = None
    """Leave out documents of more characters."""
    max_repeated_lines: float | None = None
    """Share of a document's lines that may repeat earlier lines of it (0.3 in Gopher)."""
    max_symbols: float | None = None
    """Hash signs, or ellipses, that a document may have a word (0.1 in Gopher)."""
    min_alphabetic_words: float | None = None
    """Share of a document's words that have to hold a letter (0.8 in Gopher): no tables, digits and symbols."""
    decontaminate: bool = True
    """Leave out passages that share an n-gram of words with held-out or evaluation text."""
    ngram: int = 13
    """decontaminate: words in an n-gram."""
    evaluation: tuple[str, ...] = ()
    """decontaminate: globs of further files to keep clear of (.jsonl, .tsv, .txt), relative to this YAML file."""
