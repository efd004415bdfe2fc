"""The parts that stages play in the paper's study, and the sides that its questions compare."""

from collections.abc import Mapping, Sequence
from typing import Any

from growmerge.report.estimates import Side, Term, mean, minus


class Study:
    """Looks up a run's scores by part: the base, adapted, joint and merged models of each setup.

    Every look-up returns None where the run has no such model or score.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw, self.roles = raw, raw["study"]
        self.source: str = self.roles["source_language"]
        self.languages: Sequence[str] = self.roles["languages"]
        self.methods: Sequence[str] = self.roles.get("methods") or []
        self.setups: Sequence[str] = self.roles["setups"]
        self.small = self.setups[0]
        # Grown after the last training in the source language: the setup's base is itself the product of growth.
        bases = self.roles.get("base", {})
        late = [s for s in self.setups[1:] if raw["models"].get(bases.get(s), {}).get("verb") == "grow"]
        early = [s for s in self.setups[1:] if s not in late]
        self.late = late[0] if late else "late-grown"
        self.early = early[0] if early else "early-grown"
        self.grown = [*early, *late] or ["grown"]

    def name(self, language: str) -> str:
        """Return a language's name, such as `Swedish`."""
        return self.raw["languages"].get(language, language)

    def adapted(self, setup: str, language: str) -> str | None:
        return self.roles.get("adapted", {}).get(setup, {}).get(language)

    def side(self, stage: str | None, language: str) -> Side | None:
        """Return the bits per byte of a stage on a language."""
        rows = self.raw["scores"].get(stage, {}).get(language)
        return [Term(factor=1.0, language=language, rows=rows)] if rows else None

    def new(self, setup: str, language: str) -> Side | None:
        """Return what the model adapted to a language reaches on it."""
        return self.side(self.adapted(setup, language), language)

    def end(self, setup: str, language: str) -> Side | None:
        """Return what the running model adapted to a language reached at its end, as `equal_compute` has it."""
        curve = self.raw.get("curves", {}).get(self.adapted(setup, language), [])
        rows = curve[-1]["scores"].get(language) if curve else None
        return [Term(factor=1.0, language=language, rows=rows)] if rows else None

    def joint(self, setup: str) -> Side | None:
        """Return what the joint model reaches, on average over the languages."""
        stage = self.roles.get("joint", {}).get(setup)
        return mean(self.side(stage, language) for language in self.languages)

    def merged(self, setup: str, method: str) -> Side | None:
        """Return what a merge reaches, on average over the languages."""
        stage = self.roles.get("merged", {}).get(setup, {}).get(method)
        return mean(self.side(stage, language) for language in self.languages)

    def forgot(self, setup: str, stage: str | None) -> Side | None:
        """Return what a stage forgot of the source language: its bits per byte minus those of its setup's base."""
        return minus(self.side(stage, self.source), self.side(self.roles.get("base", {}).get(setup), self.source))

    def members(self) -> dict[str, tuple[str, str]]:
        """Return setup and part (base, a language's code, joint, a method) of every stage that has one."""
        found: dict[str, tuple[str, str]] = {}
        for setup in self.setups:
            parts = {"base": self.roles.get("base", {}).get(setup), "joint": self.roles.get("joint", {}).get(setup)}
            parts |= self.roles.get("adapted", {}).get(setup, {}) | self.roles.get("merged", {}).get(setup, {})
            found |= {stage: (setup, part) for part, stage in parts.items() if stage}
        return found

    def equal_compute(self, setup: str, language: str) -> dict[str, Any] | None:
        """Return a model's last evaluation at no more FLOPs of adaptation than the small model's whole adaptation.

        Beside the evaluation (`step`, `tokens`, `scores`): `share` of the small model's tokens, `flops` and
        `flops_share` of the small model's FLOPs.
        """
        stage, small = self.adapted(setup, language), self.adapted(self.small, language)
        run, budget = (self.raw["models"].get(name, {}) for name in (stage, small))
        if not all(one.get(key) for one in (run, budget) for key in ("tokens", "flops")):
            return None
        rate = run["flops"] / run["tokens"]
        curve = [point for point in self.raw.get("curves", {}).get(stage, []) if language in point["scores"]]
        within = [point for point in curve if 0 < point["tokens"] * rate <= budget["flops"]]
        if not within:
            return None
        point = max(within, key=lambda one: one["tokens"])
        flops = point["tokens"] * rate
        shares = {"share": point["tokens"] / budget["tokens"], "flops_share": flops / budget["flops"]}
        return {**point, "flops": flops, **shares}
