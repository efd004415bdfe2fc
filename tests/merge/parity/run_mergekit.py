"""Runs recipes with mergekit, in its own environment: its import takes longer than many merges.

    python run_mergekit.py JOBS.json

JOBS.json is a list of {folder, recipe, out, seed}; models are found from the folder. A line of JSON a job comes out:
the error, or null. This file imports nothing of the project.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def run(folder: str, recipe: str, out: str, seed: int) -> None:
    os.chdir(folder)
    LoaderCache().loaders.clear()  # models of other folders have the same names
    config = MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text()))
    # Without copies, layers that occur twice cannot be saved.
    options = MergeOptions(
        clone_tensors=True, copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed
    )
    run_merge(config, out, options)


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        error = None
        try:
            run(**job)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
