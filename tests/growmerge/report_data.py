"""A run's raw results as a pipeline leaves them, with invented scores: what the report's tests are fed with."""

from typing import Any

import numpy as np

LANGUAGES = {"eng": "English", "swe": "Swedish", "est": "Estonian"}
SETUPS = ["1x", "1x-cloned", "2x"]
METHODS = ["linear", "ties"]
DOCUMENTS = 120
STEPS = (0, 75, 150, 225, 300)
TOKENS_A_STEP = 1024
PARAMETERS = {"1x": 500_000, "1x-cloned": 1_700_000, "2x": 1_700_000}


def rows(
    level: float, language: str, stage: str, *, noise: float = 0.08, documents: int = DOCUMENTS
) -> list[list[Any]]:
    """Documents of one language scored at about `level` bits per byte: how hard a document is, all models share."""
    texts = np.random.default_rng([ord(letter) for letter in language])
    sizes = texts.integers(80, 700, documents)
    hard = texts.normal(0, 0.25, documents)
    own = np.random.default_rng([ord(letter) for letter in stage + language]).normal(0, noise, documents)
    return [
        [f"part.{i}", float((level + hard[i] + own[i]) * sizes[i]), int(sizes[i]), int(sizes[i] // 3)]
        for i in range(documents)
    ]


def study() -> dict[str, Any]:
    return {
        "source_language": "eng",
        "languages": ["swe", "est"],
        "setups": SETUPS,
        "methods": METHODS,
        "seed": "seed",
        "base": {setup: f"base-{setup}" for setup in SETUPS},
        "adapted": {setup: {code: f"{setup}-{code}" for code in ("swe", "est")} for setup in SETUPS},
        "joint": {setup: f"{setup}-joint" for setup in SETUPS},
        "merged": {setup: {method: f"{setup}-{method}" for method in METHODS} for setup in SETUPS},
    }


def stages() -> list[dict[str, Any]]:
    """The graph of the quickstart."""
    found = [
        ("seed", "train", []),
        ("base-1x", "train", ["seed"]),
        ("seed-2x", "grow", ["seed"]),
        ("base-2x", "train", ["seed-2x"]),
        ("base-1x-cloned", "grow", ["base-1x"]),
    ]
    found += [(f"{s}-{data}", "train", [f"base-{s}"]) for s in SETUPS for data in ("swe", "est", "joint")]
    found += [(f"{s}-{m}", "merge", [f"{s}-swe", f"{s}-est", f"base-{s}"]) for s in SETUPS for m in METHODS]
    return [{"name": name, "verb": verb, "inputs": inputs} for name, verb, inputs in found]


def level(stage: str, language: str) -> float:
    """Bits per byte that a stage has in this invented run."""
    setup, _, part = stage.rpartition("-")
    if stage.startswith(("seed", "base")):
        return {
            "eng": 2.21 if stage.startswith("seed") else 2.15 - 0.06 * (stage == "base-2x"),
            "swe": 3.93,
            "est": 4.02,
        }[language]
    gain = {"1x": 0.0, "1x-cloned": 0.066, "2x": 0.09}[setup]
    if language == "eng":
        return {"swe": 2.62, "est": 2.66, "joint": 2.57}.get(part, 2.48) - 1.3 * gain
    if part == "joint":
        return 2.44 - gain
    if part in METHODS:
        return {"linear": 2.94, "ties": 2.93}[part] - gain
    return (2.31 if part == language else 3.42) - gain


def raw() -> dict[str, Any]:
    """The whole study: 3 setups x (2 languages + joint), 6 merges, the bases and the seed."""
    graph = stages()
    models: dict[str, Any] = {}
    for stage in graph:
        name, verb, inputs = stage["name"], stage["verb"], stage["inputs"]
        size = PARAMETERS["2x" if "2x" in name or "cloned" in name else "1x"]
        steps = {"seed": 700, "base-1x": 120, "base-2x": 120}.get(name, 300) if verb == "train" else None
        flops = 6.0 * size * steps * TOKENS_A_STEP if steps else 0.0
        parent = models[inputs[0]]["total_flops"] if inputs else 0.0
        models[name] = {
            "verb": verb,
            "parents": inputs,
            "parameters": size,
            "steps": steps,
            "tokens": steps * TOKENS_A_STEP if steps else None,
            "flops": flops,
            "total_flops": parent + flops,
            "path": f"stages/{name}",
            "method": {"grow": "exact-split", "merge": name.rpartition("-")[2]}.get(verb),
        }
    adapted = [s["name"] for s in graph if s["verb"] == "train" and s["name"].split("-")[-1] in ("swe", "est", "joint")]
    trained = [s["name"] for s in graph if s["verb"] == "train"]
    curves = {}
    for name in adapted:
        base = "base-" + name.rpartition("-")[0]
        curves[name] = [
            {
                "step": step,
                "tokens": step * TOKENS_A_STEP,
                "scores": {c: _on_the_way(base, name, c, step) for c in LANGUAGES},
            }
            for step in STEPS
        ]
    noise = np.random.default_rng(3)
    return {
        "name": "quickstart",
        "title": "Grow Up and Merge, in miniature",
        "seed": 17,
        "confidence": 0.95,
        "resamples": 200,
        "languages": LANGUAGES,
        "study": study(),
        "corpora": {code: corpus(code) for code in LANGUAGES},
        "tokenizer": {"vocab_size": 2048, "bytes_per_token": {"eng": 3.12, "swe": 2.71, "est": 2.58}},
        "models": models,
        "scores": {s["name"]: {c: rows(level(s["name"], c), c, s["name"]) for c in LANGUAGES} for s in graph},
        "pairs": {
            name: {
                c: {"swap": {"correct": 131 + i, "n": 200}, "drop": {"correct": 117 + i, "n": 200}} for c in LANGUAGES
            }
            for i, name in enumerate(models)
        },
        "baselines": {
            c: {"unigram": rows(3.04, c, "unigram"), "ngram5": rows(2.51, c, "ngram5"), "xz": 1.982} for c in LANGUAGES
        },
        "curves": curves,
        "losses": {
            name: [
                [step, float(2.4 + 4 * np.exp(-step / 60) + noise.normal(0, 0.06))]
                for step in range(1, models[name]["steps"] + 1)
            ]
            for name in trained
        },
        "growth": [
            {
                "stage": stage,
                "from": source,
                "method": "exact-split",
                "optimizer": "scaled",
                "loss_small": 4.1234567,
                "loss_grown": 4.1234569,
                "difference": 2.4e-7,
                "max_logit_difference": 3.1e-6,
            }
            for stage, source in (("seed-2x", "seed"), ("base-1x-cloned", "base-1x"))
        ],
        "checks": [
            {
                "model": "seed",
                "language": "eng",
                "baseline": "unigram",
                "by": 0.4,
                "value": 0.83,
                "low": 0.80,
                "high": 0.86,
                "passed": True,
            }
        ],
        "samples": [
            {
                "stage": f"{setup}-swe",
                "language": "swe",
                "prompt": "Enheten är",
                "text": " inte ansluten till nätverket. Kontrollera att",
            }
            for setup in SETUPS
        ],
        "graph": graph,
        "versions": {"python": "3.12.3", "torch": "2.13.0", "deepspeed": "0.19.8", "growmerge": "0.1.0"},
        "timings": {
            "wall_s": 512.4,
            "cores": 2,
            "peak_memory_gb": 3.4,
            "started": "2026-11-23T20:15:00+00:00",
            "stages": {name: 20.0 + i for i, name in enumerate(models)},
        },
    }


def _on_the_way(base: str, stage: str, language: str, step: int) -> list[list[Any]]:
    """Held-out scores during training: from the base's to the stage's."""
    left = float(np.exp(-step / 70) * (1 - step / 300))
    return rows(left * level(base, language) + (1 - left) * level(stage, language), language, stage)


def corpus(code: str) -> dict[str, Any]:
    return {
        "sources": [
            {
                "package": "homeassistant==2025.4.4",
                "files": f"homeassistant/components/*/translations/{code[:2]}.json",
                "sha256": "b7970fe3ce3a9d032a3a5dee3cbf71b227e7f23fad14a23855ee252542ef2631",
                "edition": "Home Assistant 2025.4.4, interface texts",
                "rights_holder": "The Home Assistant Authors",
                "licence": "Apache-2.0",
            }
        ],
        "documents": 812,
        "bytes": 521_340,
        "tokens": 187_210,
        "heldout_documents": DOCUMENTS,
        "heldout_bytes": 39_870,
        "dropped": {"duplicate": 3120, "13-gram shared with held-out text": 214},
    }
