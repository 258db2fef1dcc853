"""How many prompt tokens a step may take, so that the answers beside them wait for no longer than a set time."""

from dataclasses import dataclass

_LEAST = 16
"""Prompt tokens that a step takes at least, so that prompts are read however slow the answers are."""
_WITHOUT_ANSWERS = 4
"""A step that holds up no answer may take this many times as long: small steps read the weights more often."""
_NEWEST = 0.3
"""Weight of the newest step in the running means."""


@dataclass
class StepBudget:
    """A cost model, fitted while decoding: a step takes `answer_seconds` + `token_seconds` per prompt token.

    target: seconds that a step should take at most.
    """

    target: float
    answer_seconds: float = 0.0
    token_seconds: float = 2e-3

    def prompt_tokens(self, *, are_answers_waiting: bool) -> int:
        """Return how many prompt tokens the next step may take."""
        seconds = self.target - self.answer_seconds if are_answers_waiting else _WITHOUT_ANSWERS * self.target
        return max(_LEAST, int(seconds / self.token_seconds))

    def measured(self, *, answers: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if not answers and not prompt_tokens:
            return
        if not prompt_tokens:
            self.answer_seconds += _NEWEST * (seconds - self.answer_seconds)
            return
        known = min(self.answer_seconds, seconds / 2) if answers else 0.0
        self.token_seconds += _NEWEST * ((seconds - known) / prompt_tokens - self.token_seconds)
