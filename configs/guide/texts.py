"""Write text as growmerge reads it, texts/<language>.jsonl, of the interface texts of Home Assistant (Apache-2.0).

And english-tokenizer/, trained on the English text: a stand-in for that of a real English model.
"""

import json
from pathlib import Path

from growmerge.schema_text import TextSource
from train.data.packages import default_cache, fetch
from train.data.readers import read_documents
from train.data.tokenizer import train_tokenizer

wheel = fetch(  # downloaded once; the demo reads the same
    "homeassistant==2025.4.4",
    sha256="b7970fe3ce3a9d032a3a5dee3cbf71b227e7f23fad14a23855ee252542ef2631",
    python_version="3.13",
    cache=default_cache(),
)
Path("texts").mkdir(exist_ok=True)
for language, code in {"eng": "en", "swe": "sv", "dan": "da"}.items():
    files = "homeassistant/components/[a-h]*/translations/{}.json"
    untranslated = None if code == "en" else files.format("en")
    source = TextSource(files=files.format(code), reader="json-strings", min_words=4, untranslated=untranslated)
    documents, _ = read_documents(source, wheel)
    texts = {document.id: document.text for document in documents if document.text}
    lines = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in texts.items()]
    Path(f"texts/{language}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"texts/{language}.jsonl: {len(lines)} documents")
    if language == "eng":
        train_tokenizer(texts.values(), vocab_size=1024, folder=Path("english-tokenizer"))
