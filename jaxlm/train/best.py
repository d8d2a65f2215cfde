"""The best evaluation of a run, which keep_best and eval.patience go by."""

import math

from jaxlm.config.tasks import less_is_better


class Best:
    """The best value of a metric so far, and the evaluations since; saved, so that a restart changes nothing."""

    def __init__(self, metric: str, value: float | None = None, since: int = 0):
        """value: as `badness` gives it; None before the first evaluation."""
        self.metric = metric
        self.value = value
        self.since = since

    def badness(self, result: dict) -> float | None:
        """The metric of an evaluation, so that less is better; None where it is missing or not finite."""
        value = result.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        if less_is_better(self.metric):
            return value
        return -value

    def why_undecided(self, result: dict) -> str:
        """In words, why an evaluation says nothing of what is best; '' where it does."""
        if self.badness(result) is not None:
            return ""
        why = "has no such figure on these data"
        if self.metric in result:
            why = f"gave {result[self.metric]}"
        if not result:
            why = "gave no figures"
        line = f"eval.metric={self.metric}: this evaluation {why}, so the choice of the best and eval.patience wait"
        others = []
        for name, value in result.items():
            if isinstance(value, (int, float)) and name != self.metric:
                others.append(name)
        if others:
            line += f"; others it gave: {', '.join(others)}"
        return line

    def update(self, result: dict) -> bool:
        """True where it is the best. An evaluation without the metric changes nothing: there is nothing to compare."""
        badness = self.badness(result)
        if badness is None:
            return False
        better = self.value is None or badness < self.value
        if better:
            self.value = badness
            self.since = 0
        else:
            self.since += 1
        return better
