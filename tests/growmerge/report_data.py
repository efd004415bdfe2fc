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
                "flops": 6.0 * models[name]["parameters"] * step * TOKENS_A_STEP,
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
        "tokenizer": {
            "vocab_size": 2048,
            "bytes_per_token": {"eng": 3.12, "swe": 2.71, "est": 2.58},
            "tokens_per_word": {"eng": 1.83, "swe": 2.34, "est": 2.97},
        },
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
        "searches": searches(),
        "tasks": asked(),
        "fertility": [
            {"model": model, "task": task, "tokens_per_word": 2.1 + 0.4 * i, "bytes_per_token": 2.9 - 0.3 * i}
            for model in TASK_MODELS
            for i, task in enumerate(("swe-news", "est-news"))
        ],
        "comparisons": compared(),
        "heat": heat(),
        "graph": graph,
        "versions": {"python": "3.12.3", "torch": "2.13.0", "deepspeed": "0.19.8", "growmerge": "0.1.0"},
        "timings": {
            "wall_s": 512.4,
            "cores": 2,
            "peak_memory_gb": 3.4,
            "started": "2026-11-23T20:15:00+00:00",
            "stages": {name: 20.0 + i for i, name in enumerate(models)},
            "curves": {name: [[step, 0.4 * step * (1 + ("2x" in name))] for step in STEPS] for name in adapted},
            "cost": cost(graph),
            "incidents": [
                {"stage": "2x-est", "event": "error", "times": 2, "text": "OSError: no space left on device"},
                {"stage": "2x-est", "event": "requeued", "times": 2, "text": ""},
                {"stage": "1x-joint", "event": "stopped", "times": 1, "text": "asked to stop; saved at step 140"},
            ],
            "searches": {"1x-ties": 31.4, "2x-ties": 70.2},
        },
    }


def cost(graph: list[dict[str, Any]]) -> dict[str, Any]:
    """Training on 2 GPUs, the rest on 4 cores."""
    rows = []
    for i, stage in enumerate(graph):
        gpus = 2 if stage["verb"] == "train" else 0
        seconds = 20.0 + i
        about = {"stage": stage["name"], "verb": stage["verb"], "seconds": seconds, "ranks": 2, "gpus": gpus}
        rows.append({**about, "memory_gb": 1.5 + 0.1 * i, "hours": seconds * (gpus or 4) / 3600})
    sums = {on: sum(row["hours"] for row in rows if (row["gpus"] > 0) == on) for on in (True, False)}
    return {"rows": rows, "core_hours": sums[False], "gpu_hours": sums[True]}


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


def evaluation() -> dict[str, Any]:
    """What a folder of `growmerge eval` has: models that were asked tasks, and merges of subsets; no pipeline."""
    whole = raw()
    kept = ("seed", "confidence", "resamples", "samples", "versions", "tasks", "fertility", "comparisons", "heat")
    models = {
        name: {"verb": "train", "parents": [], "parameters": PARAMETERS["1x"]}
        | dict.fromkeys(("steps", "tokens", "flops", "total_flops", "path", "method"))
        for name in TASK_MODELS
    }
    nothing = {"languages": {}, "scores": {}, "baselines": {}, "graph": [], "models": models}
    return {"name": "verdicts", "title": "", **nothing, **{key: whole[key] for key in kept}}


def single_run() -> dict[str, Any]:
    """What one training run's workdir has: no study, two languages held out, one stage."""
    whole, run = raw(), "2x-swe"
    found = {key: whole[key] for key in ("seed", "confidence", "resamples", "versions", "tokenizer")}
    found |= {"name": "swedish", "title": "", "languages": {c: LANGUAGES[c] for c in ("swe", "eng")}}
    found |= {"scores": {}, "baselines": {}, "graph": [{"name": run, "verb": "train", "inputs": []}]}
    found |= {key: {run: whole[key][run]} for key in ("models", "curves", "losses")}
    found["models"][run] = {**found["models"][run], "parents": []}
    for point in found["curves"][run]:
        del point["scores"]["est"]
    timings = whole["timings"]
    found["timings"] = {"wall_s": 61.2, "cores": 2, "cost": cost(found["graph"])}
    found["timings"]["curves"] = {run: timings["curves"][run]}
    return found


def unfinished(done: int = 9) -> dict[str, Any]:
    """The study after its first stages: the next one runs, the one behind it has failed, all others wait."""
    found = raw()
    names = [stage["name"] for stage in found["graph"]]
    states = ["done"] * done + ["running", "failed", "stopped", "waiting"]
    notes = {
        "running": "step 140 of 300",
        "failed": "OSError: no space left on device",
        "waiting": "for base-1x-cloned",
    }
    rows = [
        {"stage": name, "state": state, "note": notes.get(state, "")}
        for name, state in zip(names, states + ["not started"] * (len(names) - len(states)), strict=True)
    ]
    found["progress"] = {"done": done, "stages": len(names), "rows": rows}
    for key in ("scores", "pairs", "curves", "losses"):
        found[key] = {name: one for name, one in found[key].items() if name in names[:done]}
    found["curves"][names[done]] = raw()["curves"][names[done]][:2]
    known = ("verb", "parents", "parameters")
    for name in names[done:]:
        found["models"][name] = {key: one if key in known else None for key, one in found["models"][name].items()}
    gone = {key: [] for key in ("heat", "tasks", "comparisons", "fertility", "samples", "checks")}
    found["timings"]["cost"]["rows"] = found["timings"]["cost"]["rows"][:done]
    return {**found, **gone, "searches": {}}


def searches() -> dict[str, Any]:
    """Two searches' outcomes: 60 tries each, the best of which is the 48th; the 10th went wrong."""
    found = {}
    for stage, mean in (("1x-ties", 2.93), ("2x-ties", 2.84)):
        noise = np.random.default_rng(len(found)).uniform(0, 0.05, 60)
        curve = [round(float(mean - 0.3 * (1 - np.exp(-i / 15)) + noise[i]), 6) for i in range(60)]
        curve[0], curve[9], curve[47] = mean, mean + 3, mean - 0.31
        groups = ["outside", *(f"block {i + 1}, {kind}" for i in range(2) for kind in ("attention", "feed-forward"))]
        found[stage] = {
            "search": {"method": "ties", "blocks": 2, "kinds": True, "evaluations": 60, "texts": {}},
            "start": {
                "mean": mean,
                "bits_per_byte": {"swe": mean - 0.04, "est": mean + 0.04},
                "factors": {group: [1.0, 1.0] for group in groups},
            },
            "best": {
                "mean": mean - 0.31,
                "bits_per_byte": {"swe": mean - 0.32, "est": mean - 0.3},
                "factors": {group: [0.8 + 0.1 * i, 1.4 - 0.05 * i] for i, group in enumerate(groups)},
            },
            "curve": curve,
            "merges": 60,
        }
    return found


TASK_MODELS = ["base-2x", "2x-swe", "2x-est", "2x-joint", "2x-ties"]


def asked() -> list[dict[str, Any]]:
    """Tasks of three units: what the i-th model has is a step better than the one before."""

    def estimates(first: float, step: float, half: float) -> dict[str, Any]:
        return {
            model: {"value": (at := first + step * i), "low": at - half, "high": at + half}
            for i, model in enumerate(TASK_MODELS)
        }

    def task(name: str, kind: str, language: str, unit: str, *numbers: float) -> dict[str, Any]:
        about = {"name": name, "kind": kind, "language": language, "domain": None, "unit": unit}
        return {**about, "less_is_better": unit == "bits per byte", "values": estimates(*numbers)}

    found = [
        task("swe-news", "text", "swe", "bits per byte", 1.402, -0.021, 0.012),
        task("multiblimp-swe", "pairs", "swe", "accuracy", 0.712, 0.031, 0.05),
        task("est-news", "text", "est", "bits per byte", 1.533, -0.017, 0.011),
        task("blimp", "pairs", "eng", "accuracy", 0.781, -0.004, 0.006),
        task("swe-drop", "corrupt", "swe", "accuracy a token", 0.601, 0.02, 0.03),
    ]
    for one, phenomena in ((found[1], ["SV-#", "SV-P", "SP-G"]), (found[3], ["anaphor_agreement", "npi_licensing"])):
        one["parts"] = {model: {} for model in TASK_MODELS}
        for i, phenomenon in enumerate(phenomena):
            for model, estimate in estimates(0.6 + 0.07 * i, 0.03, 0.06).items():
                one["parts"][model][phenomenon] = estimate
    return found


def compared() -> list[dict[str, Any]]:
    about = ("task", "unit", "kind", "model", "against", "value", "low", "high", "p", "adjusted", "outcome")
    rows = [
        ("blimp", "accuracy", "forgetting", "2x-swe", "base-2x", -0.004, -0.007, -0.001, 0.0021, 0.0063, "worse"),
        ("blimp", "accuracy", "forgetting", "2x-est", "base-2x", -0.008, -0.011, -0.005, 2.1e-7, 8.4e-7, "worse"),
        (
            "multiblimp-swe",
            "accuracy",
            "retention",
            "2x-ties",
            "2x-swe",
            0.093,
            -0.01,
            0.2,
            0.081,
            0.162,
            "not resolved",
        ),
        ("swe-news", "bits per byte", "base", "2x-swe", "base-2x", -0.021, -0.024, -0.018, 1e-9, 5e-9, "better"),
        ("est-news", "bits per byte", "base", "2x-ties", "base-2x", None, None, None, None, None, None),
    ]
    found = [dict(zip(about, row, strict=True)) for row in rows]
    return [one | {"why": None if one["outcome"] else "other data or another window"} for one in found]


SUBSETS = ["swe + est", "swe + isl", "swe + fao", "est + isl", "swe + est + isl", "swe + est + isl + fao"]


def heat(groups: int = 4) -> list[dict[str, Any]]:
    """A heat map of merges by languages: the more languages, the worse each; one merge has not been scored on fao."""
    columns = ["Swedish", "Estonian", "Icelandic", "Faroese", "English"]
    codes = ["swe", "est", "isl", "fao", "eng"]
    methods = [f"{method} {setup}" for setup in ("2x", "1x", "1x-cloned") for method in ("linear", "ties", "slerp")]
    rows = []
    for g, group in enumerate(methods[:groups]):
        for subset in SUBSETS:
            known = subset.split(" + ")
            values: list[float | None] = [
                2.1 + 0.13 * i + 0.06 * len(known) + 0.04 * g + (0.9 if code not in known else 0)
                for i, code in enumerate(codes)
            ]
            if subset == "swe + fao":
                values[3] = None
            rows.append({"label": subset, "group": group, "values": values})
    about = {"title": "Merges of language models", "unit": "bits per byte", "less_is_better": True}
    return [{**about, "columns": columns, "rows": rows}]
