"""Which language and which script a text is in."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from train.data.extra import optional

SAMPLE = 600
"""Characters read at each of three places of a long text: its start, its middle and its end."""

_TABLE = """
ace:ace af:afr am:amh an:arg ar:ara,arb ary:ary arz:arz as:asm az:aze,azj ba:bak bcl:bcl be:bel bg:bul bn:ben br:bre
bs:bos ca:cat crh:crh cs:ces cy:cym da:dan de:deu dz:dzo el:ell en:eng eo:epo es:spa et:est,ekk eu:eus ext:ext
fa:fas,pes fi:fin fo:fao fr:fra fuv:fuv fy:fry ga:gle gcf:gcf gcr:gcr gd:gla gl:glg gom:gom grc:grc gu:guj gug:grn,gug
guw:guw ha:hau hbo:hbo he:heb hi:hin hr:hrv ht:hat hu:hun hy:hye id:ind ig:ibo is:isl it:ita ja:jpn jv:jav ka:kat
kab:kab kik:kik kk:kaz km:khm kn:kan ko:kor ku:kur,kmr ky:kir la:lat lb:ltz lg:lug lij:lij ln:lin lo:lao lt:lit
ltg:ltg lv:lav,lvs mg:mlg,plt mk:mkd ml:mal mn:mon,khk mr:mar ms:msa,zsm mt:mlt my:mya ne:nep,npi nl:nld nn:nno
no:nob,nor nso:nso oc:oci om:orm,gaz or:ori,ory pa:pan pcm:pcm pl:pol ps:pus,pbt pt:por qu:que ro:ron ru:rus rw:kin
sa:san sdh:sdh se:sme si:sin sk:slk sl:slv sn:sna so:som sq:sqi,als sr:srp st:sot sv:swe sw:swa,swh ta:tam te:tel
tg:tgk th:tha tk:tuk tl:tgl tr:tur tt:tat ug:uig uk:ukr ur:urd uz:uzb,uzn uzs:uzs vec:vec vi:vie vo:vol wa:wln wuu:wuu
xh:xho yo:yor yue:yue zh:zho,cmn zu:zul
"""
CODES: Mapping[str, str] = {
    code: label for entry in _TABLE.split() for label, _, codes in [entry.partition(":")] for code in codes.split(",")
}
"""ISO 639-3 -> py3langid's label; where it has one model for a macrolanguage and its main member, both codes."""
_NAMES = {label: code for code, label in reversed(list(CODES.items()))}

COMPOSED: Mapping[str, tuple[str, ...]] = {
    "Hans": ("Hani",),
    "Hant": ("Hani",),
    "Jpan": ("Hani", "Hira", "Kana"),
    "Kore": ("Hang", "Hani"),
}
"""ISO 15924 codes that stand for several of Unicode's scripts, or for a part of one."""
_SINGLE = """
Arab Armn Beng Cans Cher Copt Cyrl Deva Ethi Geor Grek Gujr Guru Hang Hani Hebr Hira Java Kana Khmr Knda Laoo Latn Mlym
Mong Mymr Nkoo Olck Orya Sinh Sund Syrc Taml Telu Tfng Thaa Thai Tibt Yiii
"""
SCRIPTS = (*_SINGLE.split(), *COMPOSED)
"""ISO 15924 codes that can be asked for."""


def identify(text: str) -> tuple[str, float]:
    """Return the language (ISO 639-3; `zxx`: none) that py3langid finds in a text, and its probability.

    Of a long text three samples are read. Raises an InputError where py3langid is not installed.
    """
    label, probability = _identifier().classify(sample(text))
    return _NAMES.get(label, label), probability


def sample(text: str) -> str:
    """Return a text, or of a long one its start, middle and end in lines of their own."""
    if len(text) <= 3 * SAMPLE:
        return text
    middle = (len(text) - SAMPLE) // 2
    return "\n".join((text[:SAMPLE], text[middle : middle + SAMPLE], text[-SAMPLE:]))


@cache
def _identifier() -> Any:
    module = optional("py3langid.langid")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def script_share(text: str, script: str) -> float:
    """Return the share of a text's letters that are of a script (ISO 15924); 0 if it has no letters.

    Raises:
        InputError: regex is not installed.
    """
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    counts = np.bincount(_letters(script)[codes], minlength=3)
    return float(counts[2] / max(1, counts[1] + counts[2]))


@cache
def _letters(script: str) -> np.ndarray:
    """Return by code point: 2 for letters of the script, 1 for other letters, 0 for all else [0x110000], uint8."""
    regex = optional("regex")
    everything = "".join(map(chr, range(0x110000)))
    table = np.zeros(len(everything), dtype=np.uint8)
    inner = "".join(rf"\p{{Script={one}}}" for one in COMPOSED.get(script, (script,)))
    for value, pattern in ((1, r"\p{L}+"), (2, rf"[\p{{L}}&&[{inner}]]+")):
        for match in regex.finditer(pattern, everything, flags=regex.VERSION1):
            table[match.start() : match.end()] = value
    return table
