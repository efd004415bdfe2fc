"""Tasks of lm-evaluation-harness, asked of a model in memory. It needs lm-eval."""

import difflib
import json
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from eval.samples import continue_greedily
from eval.score import Request, greedy_logprobs, token_logprobs, total
from eval.text import prefix_token
from growmerge.eval_tasks import Harness
from parallel.errors import InputError
from parallel.ranks import Ranks
from train.data.tokenizer import TextTokenizer

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is kept of what lm-eval returns."""


def run_harness(
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    task: Harness,
    *,
    batch_tokens: int,
    resamples: int,
    seed: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """Return what lm-eval says of a model; of several ranks it tells one of each machine alone, the others get nothing.

    Args:
        resamples: of its bootstrap, for metrics without a formula of their error.
        seed: of what it draws, such as examples.

    Raises:
        InputError: lm-eval knows no such task, or cannot read its data.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(task.include, tuple(task.names))
    for name in task.names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise InputError(f"lm-eval knows no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        found = lm_eval.simple_evaluate(
            HarnessModel(model, tokenizer, batch_tokens, ranks),
            tasks=[*task.names],
            num_fewshot=task.shots,
            limit=task.limit,
            task_manager=manager,
            bootstrap_iters=resamples,
            log_samples=False,
            **seeds,
        )
    except InputError:
        raise
    except Exception as error:  # lm-eval, datasets and the network raise errors of many kinds
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"lm-eval: {line}") from error
    found = found or {}
    return {key: json.loads(json.dumps(found[key], default=str)) for key in KEPT if key in found}


@cache
def _manager(include: str | None, names: tuple[str, ...]) -> TaskManager:
    """Return what finds tasks; lm-eval's own, 14,000 files, are read where they are needed alone."""
    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if {*names} <= {*own.all_subtasks}:
            return own
        return TaskManager(include_path=include)
    return _known()


@cache
def _known() -> TaskManager:
    return TaskManager()


class HarnessModel(TemplateLM):
    """A model in memory as lm-eval wants it. No special token is added but BOS, else EOS, where there is no context."""

    def __init__(self, model: PreTrainedModel, tokenizer: TextTokenizer, batch_tokens: int, ranks: Ranks) -> None:
        super().__init__()
        self._model = model
        self._words = tokenizer
        self._how: dict[str, Any] = {
            "batch_tokens": batch_tokens,
            "rank": ranks.rank,
            "world": ranks.world_size,
            "gather": ranks.gather,
        }
        self._positions = int(model.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        return prefix_token(self._words) if self._words.eos is None else self._words.eos

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self._words)

    @property
    def max_length(self) -> int:
        return self._positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._words.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; what is longer than the model's positions loses the beginning of its context."""
        made = []
        for (context, continuation), before, tokens in requests:
            whole = [*before, *tokens][-(self._positions + 1) :]
            if len(tokens) >= len(whole):
                raise InputError(f"{(context + continuation)[:40]!r}: {len(tokens)} tokens leave no room for a context")
            made.append(Request(name=repr(continuation[:40]), tokens=whole, context=len(whole) - len(tokens)))
        found = greedy_logprobs(self._model, made, **self._how)
        return [(total(logprobs), best) for logprobs, best in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score texts as a whole, in lm-eval's windows."""
        made: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens = self._words.encode(text)
            windows = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self._positions, context_len=1)
            ]
            counts.append(len(windows))
            made += [
                Request(name=repr(text[:40]), tokens=[*context, *rest], context=len(context))
                for context, rest in windows
            ]
        scored = iter(token_logprobs(self._model, made, **self._how))
        return [sum(total(next(scored)) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write the likeliest tokens until one of the texts that end an answer."""
        found = []
        for context, how in (request.args for request in requests):
            if how.get("do_sample") and how.get("temperature", 1.0) > 0:
                raise InputError("the task wants samples; only the likeliest tokens are written")
            until = how.get("until") or []
            stops = [until] if isinstance(until, str) else [*until]
            most = int(how.get("max_gen_toks", 256))
            found.append(continue_greedily(self._model, self._words, context, tokens=most, until=stops))
        return found
