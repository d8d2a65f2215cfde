"""Tokens, or examples, to batches. Batch k is a pure function of (seed, data, k): no iterator state, on any host.

A *batch* is a dict of numpy arrays [B, T], B rows of the global batch (all, or some), T = data.seq_len:

    tokens     int32    inputs; at the start of a document the tokenizer's bos id
    targets    int32    the token that follows each input; or what the task wants at its place
    weights    float32  how much the target counts, 0 on padding
    positions  int32    from 0 in each document of the row
    segments   int32    1, 2, ... for the documents packed into the row; 0 on padding

Where the task needs them also (jaxlm/data/row_layout.py): `enc_tokens enc_positions enc_segments`, the sources of the
segments, [B, data.enc_len]; `reach`, the last place that a token sees; `labels` of the row's examples, [B, M] or
[B, M, C], M = data.examples_per_row, instead of targets, and weights [B, M]; and for preferences an axis of 2, the
chosen and the rejected, before T. Of pairs of words, `negatives`, the words drawn, int32 [B, N, T], N = task.negatives;
`counts`, how often the pair stands together, float32 [B, T].

A split is one stream of tokens, each document ended by eos where the tokenizer has one. Row w holds the targets
[w T, (w + 1) T) of that stream: every token is a target exactly once, the first of a document too. (With a tokenizer
that has no bos, such as chars, nothing precedes that first token: its weight is 0.)
"""

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import grain
import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config.check import mixture
from jaxlm.config.tasks import task_of
from jaxlm.data.example_records import stamps, tokenizer_of
from jaxlm.data.examples import Examples
from jaxlm.data.labels import label_names
from jaxlm.data.pairs import Pairs
from jaxlm.data.row_layout import from_tokens, row_shapes
from jaxlm.data.store import Store
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.data.transforms import Vocabulary
from jaxlm.errors import DataError

ALL = slice(None)
READ = 1 << 24  # tokens that are counted at once
# Tokens read at once, where batches are smaller: a call of numpy costs as much as a thousand of them.
BLOCK = 16_384
# What else batches depend on, where the task is not lm.
ORDER_KEYS_OF_TASK = (
    "mask_rate whole_words span_length fim_rate window class_weights balanced_sampling".split()
)
ORDER_KEYS_OF_DATA = "enc_len pack examples_per_row word_dropout".split()
ORDER_ROUNDS = 4  # of index_shuffle, as in grain
# Fingerprint of a split -> its `count_tokens`: a run asks several times.
COUNTED: dict[str, np.ndarray] = {}


def open_stores(config: ConfigDict, split: str) -> list[Store]:
    """One Store for each directory of config.data. Raises DataError that names every problem."""
    problems = []
    stores = []
    for path, _ in mixture(config):
        if not path:
            raise DataError(
                "config.data.path is empty: give a directory made by python -m jaxlm.data.prepare"
            )
        try:
            stores.append(Store(path, split))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    refuse_unlike(stores, config.data.mixture)
    return stores


def refuse_unlike(stores: list[Store], mixture: str) -> None:
    """Raises DataError where directories have other tokenizers, or other tokens around a document."""
    hashes = {store.manifest["tokenizer"]["sha256"] for store in stores}
    if len(hashes) > 1:
        raise DataError(
            f"the directories of config.data.mixture={mixture} have different tokenizers"
        )
    ends = {(store.bos_id, store.eos_id) for store in stores}
    if len(ends) > 1:
        listed = ", ".join(f"bos {bos} and eos {eos}" for bos, eos in sorted(ends, key=str))
        raise DataError(
            f"the directories of config.data.mixture={mixture} begin and end documents with different tokens "
            f"({listed}); prepare them alike, with --bos and --eos"
        )


def num_rows(store: Store, seq_len: int) -> int:
    return -(-store.num_tokens // seq_len)


def read_clipped(store: Store, starts: np.ndarray, length: int) -> np.ndarray:
    """store.rows, with the first and the last token repeated beyond the ends of the stream."""
    width = min(length, store.num_tokens)
    begins = np.minimum(np.maximum(starts, 0), store.num_tokens - width)
    window = store.rows(begins, width)
    if width == length and (begins == starts).all():
        return window
    places = np.clip(starts[:, None] + np.arange(length), 0, store.num_tokens - 1)
    return np.take_along_axis(window, places - begins[:, None], axis=1)


def read_rows(
    store: Store, rows: np.ndarray, seq_len: int, predicted: bool = True
) -> dict[str, np.ndarray]:
    """The batch of these row numbers, int64 [B]. Rows past the end of the stream are padding.

    predicted: each token is predicted from those before it; else a document's first one counts, whatever is before it.
    """
    starts = rows.astype(np.int64) * seq_len
    shape = (len(rows), seq_len)
    window = read_clipped(store, starts - 1, seq_len + 1)
    tokens = window[:, :-1].copy()
    targets = window[:, 1:].copy()
    weights = np.ones(shape, np.float32)
    number, place = store.starts_in(starts, seq_len)
    begins = number * seq_len + place
    positions, segments = document_places(begins, shape)
    if store.bos_id is not None:
        tokens.ravel()[begins] = store.bos_id
    elif predicted:  # nothing comes before a document, so its first token cannot be predicted
        weights.ravel()[begins] = 0
        segments.ravel()[begins] = 0
    if starts.max(initial=0) + seq_len > store.num_tokens:
        past = starts[:, None] + np.arange(seq_len) >= store.num_tokens
        for array in (tokens, targets, weights, segments):
            array[past] = 0
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "positions": positions,
        "segments": segments,
    }


def document_places(begins: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segments) of rows in which documents begin at these places, int32 [B, T].

    begins: int64, in the rows one after the other. A document that goes on in another row begins anew there.
    """
    num_rows, seq_len = shape
    size = num_rows * seq_len
    begin_of_row = np.arange(0, size, seq_len)
    is_edge = np.zeros(size + 1, bool)
    is_edge[begins] = True
    is_edge[begin_of_row] = True
    is_edge[-1] = True
    edges = np.flatnonzero(is_edge).astype(np.int32)
    lengths = np.diff(edges)
    edges = edges[:-1]
    first = np.searchsorted(edges, begin_of_row).astype(np.int32)  # the first piece of each row
    segment = np.arange(1, len(edges) + 1, dtype=np.int32) - first[edges // seq_len]
    positions = np.arange(size, dtype=np.int32) - np.repeat(edges, lengths)
    segments = np.repeat(segment, lengths)
    return positions.reshape(shape), segments.reshape(shape)


class Documents:
    """The rows of a store as a source of batches, in the shape that config.task asks for."""

    def __init__(self, config: ConfigDict, store: Store, tokenizer, shares: np.ndarray | None):
        """shares: see `Vocabulary`."""
        self.config = config
        self.store = store
        self.num_tokens = store.num_tokens
        self.length = config.data.seq_len
        if task_of(config).reads_source:
            self.length = config.data.enc_len
        self.num_rows = num_rows(store, self.length)
        self.fingerprint = store.fingerprint
        self.vocab = None
        if not task_of(config).is_plain_lm:
            self.vocab = Vocabulary(tokenizer, config.task.name, shares)

    def read(self, rows: np.ndarray, keys: list[tuple]) -> dict[str, np.ndarray]:
        """The batch of these row numbers; one past the end is padding. keys: of what is random in each row."""
        batch = read_rows(self.store, rows, self.length, not task_of(self.config).learns_vectors)
        if self.vocab:
            return from_tokens(batch, keys, self.config, self.vocab)
        return batch


def open_sources(config: ConfigDict, split: str, tokenizer=None) -> list:
    """What config.data names: objects with num_rows, num_tokens, fingerprint and read(rows, keys).

    tokenizer: a model's, where it is not the data's own; then examples of labels that it doesn't know are left out.
    Raises DataError that names every problem.
    """
    if task_of(config).from_examples:
        if tokenizer:
            return [Examples(config, split, tokenizer, only_known_labels=True)]
        files = stamps(config.data.train)
        if split == "val":
            files += stamps(config.data.val)
        return [_examples(FrozenConfigDict(config), split, files)]
    stores = open_stores(config, split)
    if task_of(config).transform == "pairs":
        return [Pairs(config, store) for store in stores]
    if tokenizer is None and not task_of(config).is_plain_lm:
        tokenizer = load_tokenizer(config)
    shares = None
    if config.task.negatives or config.task.subsample:
        shares = token_shares(config)
    return [Documents(config, store, tokenizer, shares) for store in stores]


def token_shares(config: ConfigDict) -> np.ndarray:
    """float64 [vocabulary]: how much of the training text each token is, of a mixture by its weights."""
    shares = 0
    for (_, weight), store in zip(mixture(config), open_stores(config, "train"), strict=True):
        counts = count_tokens(store)
        shares = shares + weight * counts / max(counts.sum(), 1)
    return shares


def count_tokens(store: Store) -> np.ndarray:
    """int64 [vocabulary]: how often each token is there."""
    if store.fingerprint not in COUNTED:
        counts = np.zeros(store.vocab_size, np.int64)
        for start in range(0, store.num_tokens, READ):
            ids = store.read(start, min(READ, store.num_tokens - start))
            counts += np.bincount(ids, minlength=store.vocab_size)
        COUNTED[store.fingerprint] = counts
    return COUNTED[store.fingerprint]


@lru_cache(maxsize=2)
def _examples(config: FrozenConfigDict, split: str, stamps: tuple) -> Examples:
    """A run asks for the same examples several times."""
    return Examples(config, split)


def describe(config: ConfigDict) -> tuple[int, tuple[str, ...], int]:
    """(size of the vocabulary, names of the labels, tokens of the training data).

    Raises DataError where the data are missing or can't be read, ConfigError for options that don't fit them.
    """
    if task_of(config).from_examples:
        if not config.data.train:
            raise DataError(
                f"config.data.train is empty: give the examples of task {config.task.name}"
            )
        tokenizer = load_tokenizer(config)
        labels = label_names(config)
        return Vocabulary(tokenizer, config.task.name).size, labels, 0
    stores = open_stores(config, "train")
    num_ids = stores[0].vocab_size
    if not task_of(config).is_plain_lm:
        num_ids = Vocabulary(load_tokenizer(config), config.task.name).size
    tokens = 0
    if task_of(config).transform != "pairs":  # it learns from pairs
        tokens = sum(store.num_tokens for store in stores)
    return num_ids, config.data.labels, tokens


def load_tokenizer(config: ConfigDict):
    """The tokenizer of config.data. Raises DataError where it can't be read."""
    if task_of(config).from_examples:
        return tokenizer_of(FrozenConfigDict(config.data), config.task.name)
    return tokenizers.load(mixture(config)[0][0])


def read_mixed(
    sources: list, ids: np.ndarray, keys: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """The batch of (source, row) pairs, int64 [B, 2]. keys: int64 [B], a number for what is random in each."""
    present = np.unique(ids[:, 0]).tolist()
    if len(present) == 1:
        return sources[present[0]].read(ids[:, 1], row_keys(seed, keys))
    batch = {}
    for source in present:
        here = ids[:, 0] == source
        rows = sources[source].read(ids[here, 1], row_keys(seed, keys[here]))
        for name, value in rows.items():
            if name not in batch:
                batch[name] = np.zeros((len(ids), *value.shape[1:]), value.dtype)
            batch[name][here] = value
    return batch


def row_keys(seed: int, keys: np.ndarray) -> list[tuple[int, int]]:
    """What the random numbers of each row follow from."""
    return [(seed, key) for key in keys.tolist()]


def order_of(num_rows: int, seed: int | None) -> Callable[[int], int]:
    """The row at each place of an endless order that has all rows in every epoch, as they are or (seed) shuffled.

    What grain.MapDataset.range(num_rows).seed(seed).shuffle() holds there, in a third of the time.
    """
    if seed is None:
        return lambda place: place % num_rows
    first = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])  # of the first epoch

    def row(place: int) -> int:
        epoch, index = divmod(place, num_rows)
        return index_shuffle(index, num_rows - 1, (first + epoch) % 2**32, ORDER_ROUNDS)

    return row


def train_batches(config: ConfigDict, rows: slice | np.ndarray = ALL) -> grain.MapDataset:
    """Endless: element k is these rows of global batch k. Each epoch of a source has every row exactly once.

    Raises DataError where a train split is empty.
    """
    sources = open_sources(config, "train")
    pick = picker(config, sources)
    B = config.train.batch_size
    place = np.arange(B)[rows]
    num_here = len(place)
    together = 1
    # Only rows of plain tokens are so cheap that a call costs more than a row; other waits would add up.
    if task_of(config).is_plain_lm:
        together = max(1, BLOCK // max(1, num_here * config.data.seq_len))

    @lru_cache(maxsize=2)
    def block(number: int) -> dict[str, np.ndarray]:
        """`together` batches, one after the other."""
        steps = np.arange(number * together, (number + 1) * together)
        keys = (steps[:, None] * B + place).ravel()
        found = read_mixed(sources, pick(keys.tolist()), keys, config.seed)
        for value in found.values():
            value.setflags(write=False)  # batches are parts of it, also when asked for again
        return found

    def batch(k: int) -> dict[str, np.ndarray]:
        number, part = divmod(k, together)
        here = slice(part * num_here, (part + 1) * num_here)
        return {name: value[here] for name, value in block(number).items()}

    return grain.MapDataset.range(sys.maxsize).map(batch)


def picker(config: ConfigDict, sources: list) -> Callable[[list[int]], np.ndarray]:
    """keys -> int64 [keys, 2]: the source and its row that stand at each place of the endless mixture.

    Raises DataError where a source has no rows.
    """
    weights = []
    orders = []
    turns = []
    for number, (source, (path, weight)) in enumerate(zip(sources, mixture(config), strict=True)):
        if not source.num_rows:
            raise DataError(f"{path or config.data.train}: the train split is empty")
        seed = config.seed + number if config.data.shuffle else None
        orders.append(order_of(source.num_rows, seed))
        weights.append(weight)
        endless = grain.MapDataset.range(sys.maxsize)
        turns.append(endless.map(lambda turn, number=number: (number, turn)))
    mixed = grain.MapDataset.mix(turns, weights)

    def pick(keys: list[int]) -> np.ndarray:
        ids = []
        for key in keys:
            source, turn = mixed[key] if len(orders) > 1 else (0, key)
            ids.append((source, orders[source](turn)))
        return np.array(ids, np.int64)

    return pick


def eval_rows(config: ConfigDict) -> int:
    """Rows of a batch of evaluation: a microbatch, which is what the memory is planned for."""
    return config.train.batch_size // config.train.grad_accumulation


def validation_batches(
    config: ConfigDict, rows: slice | np.ndarray = ALL, sources: list | None = None
) -> grain.MapDataset:
    """The validation splits once, in order, `eval_rows` at a time, the last padded: of each batch these rows.

    sources: `open_sources` of them, where they are open. Raises DataError where there is no validation split.
    """
    if task_of(config).from_examples and not config.data.val:
        raise DataError(
            "config.data.val is empty: give examples to measure on, or set eval.every=0"
        )
    B = eval_rows(config)
    sources = sources or open_sources(config, "val")
    counts = [source.num_rows for source in sources]
    if not sum(counts):
        paths = ", ".join(path for path, _ in mixture(config))
        raise DataError(
            f"{paths}: the validation split is empty; prepare it with --val_fraction, or set eval.every=0"
        )
    ids = []
    for number, count in enumerate(counts):
        ids.append(np.stack([np.full(count, number), np.arange(count)], 1))
    ids = np.concatenate(ids)
    longest = int(np.argmax(counts))
    past_the_end = [[longest, counts[longest]]]
    padding = np.tile(past_the_end, (-len(ids) % B, 1))
    ids = np.concatenate([ids, padding]).astype(np.int64)
    keys = np.arange(len(ids))

    def batch(k: int) -> dict[str, np.ndarray]:
        here = slice(k * B, (k + 1) * B)
        # What is masked does not depend on the run's seed: every model is asked the same.
        return read_mixed(sources, ids[here][rows], keys[here][rows], 0)

    return grain.MapDataset.range(len(ids) // B).map(batch)


def fingerprint(config: ConfigDict) -> dict:
    """All that the order of data depends on. Equal fingerprints: batch k is the same batch."""
    known = {
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "seq_len": config.data.seq_len,
        "shuffle": config.data.shuffle,
        "weights": [weight for _, weight in mixture(config)],
        "sources": [source.fingerprint for source in open_sources(config, "train")],
        "tokenizer": load_tokenizer(config).fingerprint,
    }
    if not task_of(config).is_plain_lm:
        known["task"] = config.task.name
        for key in ORDER_KEYS_OF_TASK:
            known[key] = config.task[key]
        for key in ORDER_KEYS_OF_DATA:
            known[key] = config.data[key]
        for key in ("negatives", "subsample"):
            if config.task[key]:  # left out else, so that older runs without these keys go on
                known[key] = config.task[key]
    return known


def batch_shapes(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], type]]:
    """{key: (shape, dtype)} of a global batch. config: resolved."""
    shapes = {}
    for key, (shape, dtype) in row_shapes(config).items():
        shapes[key] = ((config.train.batch_size, *shape), dtype)
    return shapes


class Prefetch:
    """place(batches[k]) for k in [start, stop), `depth` of them made ahead in a background thread.

    A loop of steps takes one, sends the step off, and then refills: in Python only one thread works at a time, and
    what the loop has to do before the devices can go on must not wait for the next batch.
    """

    def __init__(self, batches, start: int, stop: int, depth: int, place: Callable | None = None):
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self.ahead = deque()
        self.numbers = iter(range(start, stop))
        self.batches = batches
        self.place = place
        for _ in range(depth):
            self.refill()

    def refill(self) -> None:
        for k in itertools.islice(self.numbers, 1):
            self.ahead.append(self.pool.submit(self.make, k))

    def make(self, k: int) -> dict:
        if self.place:
            return self.place(self.batches[k])
        return self.batches[k]

    def take(self) -> dict:
        """The next; `waited` is then the seconds that it was not there yet. Raises what making it has raised."""
        began = time.perf_counter()
        batch = self.ahead.popleft().result()
        self.waited = time.perf_counter() - began
        return batch

    def __iter__(self) -> Iterator[dict]:
        try:
            while self.ahead:
                yield self.take()
                self.refill()
        finally:
            self.close()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
