"""Our tasks and verdicts in the shapes of lm-evaluation-harness, so that numbers can be checked both ways."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from checkpoint.files import write_bytes
from eval.tasks import PairsTask, Task, TextTask

FOLDER = "lm_eval"


def export_tasks(tasks: Mapping[str, Task], folder: Path) -> list[Path]:
    """Write tasks as lm-eval's YAML with their data beside it; return the YAML files.

    `lm_eval --include_path FOLDER --tasks NAME` then scores them: the accuracies by sums and, of texts that fit into a
    window, the bits per byte are those of a verdict. Pairs that no sum is fair to are left out.
    """
    written = []
    for name, task in tasks.items():
        about: dict[str, Any] = {"task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0}
        data = folder / f"{name}.jsonl"
        about["dataset_kwargs"] = {"data_files": {"test": str(data.absolute())}}
        if isinstance(task, PairsTask):
            rows = [
                {"good": pair.good, "bad": pair.bad, "phenomenon": pair.kind}
                for pair in task.pairs
                if pair.kind not in task.shortened
            ]
            about |= {
                "output_type": "multiple_choice",
                "doc_to_text": "",
                "target_delimiter": "",
                "doc_to_choice": "{{[good, bad]}}",
                "doc_to_target": 0,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        else:
            assert isinstance(task, TextTask), task
            rows = [{"id": document.id, "text": document.text} for document in task.documents]
            metrics = {"bits_per_byte": "bits_per_byte", "byte_perplexity": "weighted_perplexity"}
            about |= {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "text",
                "metric_list": [
                    {"metric": metric, "aggregation": how, "higher_is_better": False} for metric, how in metrics.items()
                ],
            }
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_bytes(data, lines.encode())
        write_bytes(folder / f"{name}.yaml", yaml.safe_dump(about, sort_keys=False, allow_unicode=True).encode())
        written.append(folder / f"{name}.yaml")
    return written


def as_results(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a verdict's numbers as lm-eval's results.json has them; of its own tasks they are its own."""
    results: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    also: dict[str, Any] = {"versions": {}, "n-shot": {}}
    for name, task in verdict["tasks"].items():
        if task["kind"] == "harness":
            results |= task["results"]
            counts |= task["n-samples"]
            for key, found in also.items():
                found |= task.get(key, {})
        elif "bits_per_byte" in task:
            bits = task["bits_per_byte"]["value"]
            results[name] = {"alias": name, "bits_per_byte,none": bits, "byte_perplexity,none": 2**bits}
            counts[name] = dict.fromkeys(("original", "effective"), task["documents"])
        elif "sum" in task:
            micro = task["sum"]["micro"]
            share, count = micro["value"], micro["count"]
            error = (share * (1 - share) / (count - 1)) ** 0.5 if count > 1 else "N/A"
            results[name] = {"alias": name, "acc,none": share, "acc_stderr,none": error}
            counts[name] = dict.fromkeys(("original", "effective"), count)
    config = {"model": "growmerge", "model_args": verdict["model"]["name"]}
    return {"results": results, "n-samples": counts, **also, "config": config}
