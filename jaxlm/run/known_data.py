"""What a config's data say of the model, before a run begins: size of the vocabulary, labels, tokens."""

from ml_collections import ConfigDict

from jaxlm.config.recipe import num_labels
from jaxlm.config.tasks import task_of
from jaxlm.data.batches import describe
from jaxlm.errors import UserError


def look_at_data(config: ConfigDict) -> tuple[int, int, UserError | None]:
    """(size of the vocabulary, tokens of the training data, what is wrong with it); fills in config.data.labels."""
    try:
        vocab_size, config.data.labels, num_tokens = describe(config)
    except UserError as error:
        return 0, 0, error
    return vocab_size, num_tokens, None


def undescribed(config: ConfigDict, vocab_size: int, problem: UserError | None) -> list[str]:
    """The problem with the data, where a config leaves to the data what describes its model; [] elsewhere."""
    missing = []
    if not (config.model.vocab_size or vocab_size):
        missing.append("config.model.vocab_size")
    if task_of(config).has_head and not (config.model.num_labels or num_labels(config)):
        missing.append("config.model.num_labels")
    if problem and missing:
        return [f"{problem}; or set {' and '.join(missing)}, which the data would give"]
    return []
