"""Token shards to batches. Batch k is a pure function of (seed, data, k): no iterator state, on any number of hosts.

A *batch* is a dict of numpy arrays [B, T], B rows of the global batch (all, or some), T = data.seq_len:

    tokens     int32    inputs; at the start of a document the tokenizer's bos id
    targets    int32    the token that follows each input
    weights    float32  1 where the target counts, 0 on padding
    positions  int32    from 0 in each document of the row
    segments   int32    1, 2, ... for the documents packed into the row; 0 on padding

A split is one stream of tokens, each document ended by eos where the tokenizer has one. Row w holds the targets
[w T, (w + 1) T) of that stream: every token is a target exactly once, the first of a document too. (With a tokenizer
that has no bos, such as chars, nothing precedes that first token: its weight is 0.)
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from ml_collections import ConfigDict

from jaxlm.check import mixture
from jaxlm.data.store import Store
from jaxlm.errors import DataError

ALL = slice(None)


def open_stores(config: ConfigDict, split: str) -> list[Store]:
    """One Store for each directory of config.data. Raises DataError that names every problem."""
    problems, stores = [], []
    for path, _ in mixture(config):
        if not path:
            raise DataError("config.data.path is empty: give a directory made by python -m jaxlm.data.prepare")
        try:
            stores.append(Store(path, split))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    tokenizers = {store.manifest["tokenizer"]["sha256"] for store in stores}
    if len(tokenizers) > 1:
        raise DataError(f"the directories of config.data.mixture={config.data.mixture} have different tokenizers")
    return stores


def num_rows(store: Store, seq_len: int) -> int:
    return -(-store.num_tokens // seq_len)


def read_clipped(store: Store, starts: np.ndarray, length: int) -> np.ndarray:
    """store.rows, with the first and the last token repeated beyond the ends of the stream."""
    width = min(length, store.num_tokens)
    begins = np.clip(starts, 0, store.num_tokens - width)
    window = store.rows(begins, width)
    if width == length and np.array_equal(begins, starts):
        return window
    places = np.clip(starts[:, None] + np.arange(length), 0, store.num_tokens - 1)
    return np.take_along_axis(window, places - begins[:, None], axis=1)


def read_rows(store: Store, rows: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """The batch of these row numbers, int64 [B]. Rows past the end of the stream are padding."""
    starts = rows.astype(np.int64) * seq_len
    window = read_clipped(store, starts - 1, seq_len + 1)
    tokens, targets = window[:, :-1].copy(), window[:, 1:]
    place = np.arange(seq_len, dtype=np.int32)
    first = np.zeros(tokens.shape, bool)  # where the target begins a document
    for row, start in enumerate(starts):
        first[row, store.document_starts(start, start + seq_len) - start] = True
    segments = np.cumsum(first, axis=1, dtype=np.int32)
    segments += 1 - segments[:, :1]
    positions = place - np.maximum.accumulate(np.where(first, place, 0), axis=1)
    inside = starts[:, None] + place < store.num_tokens
    counts = inside
    if store.bos_id is None:  # nothing comes before a document, so its first token cannot be predicted
        counts = inside & ~first
    else:
        tokens[first] = store.bos_id
    return {
        "tokens": np.where(inside, tokens, 0),
        "targets": np.where(inside, targets, 0),
        "weights": counts.astype(np.float32),
        "positions": positions.astype(np.int32),
        "segments": np.where(counts, segments, 0),
    }


def read_mixed(stores: list[Store], ids: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """The batch of (source, row) pairs, int64 [B, 2]."""
    batch = {}
    for source in np.unique(ids[:, 0]):
        here = ids[:, 0] == source
        for key, value in read_rows(stores[source], ids[here, 1], seq_len).items():
            batch.setdefault(key, np.zeros((len(ids), seq_len), value.dtype))[here] = value
    return batch


def train_batches(config: ConfigDict, rows: slice | np.ndarray = ALL) -> grain.MapDataset:
    """Endless: element k is these rows of global batch k. Each epoch of a source has every row exactly once."""
    stores = open_stores(config, "train")
    sources = []
    for source, store in enumerate(stores):
        if not store.num_tokens:
            raise DataError(f"{mixture(config)[source][0]}: the train split is empty")
        order = grain.MapDataset.range(num_rows(store, config.data.seq_len)).seed(config.seed + source)
        order = order.shuffle() if config.data.shuffle else order
        sources.append(order.repeat().map(lambda row, source=source: (source, row)))
    weights = [weight for _, weight in mixture(config)]
    ids = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, weights)
    batches = ids.batch(config.train.batch_size, drop_remainder=True, batch_fn=lambda ids: np.array(ids, np.int64))
    return batches.map(lambda ids: read_mixed(stores, ids[rows], config.data.seq_len))


def eval_rows(config: ConfigDict) -> int:
    """Rows of a batch of evaluation: a microbatch, which is what the memory is planned for."""
    return config.train.batch_size // config.train.grad_accumulation


def validation_batches(config: ConfigDict, rows: slice | np.ndarray = ALL) -> grain.MapDataset:
    """The validation splits once, in order, `eval_rows` at a time, the last padded: of each batch these rows.

    Raises DataError where there is no validation split.
    """
    B, stores = eval_rows(config), open_stores(config, "val")
    counts = [num_rows(store, config.data.seq_len) for store in stores]
    if not sum(counts):
        paths = ", ".join(path for path, _ in mixture(config))
        raise DataError(f"{paths}: the validation split is empty; prepare it with --val_fraction, or set eval.every=0")
    ids = np.concatenate([np.stack([np.full(n, s), np.arange(n)], 1) for s, n in enumerate(counts)])
    longest = int(np.argmax(counts))
    padding = np.tile([[longest, counts[longest]]], (-len(ids) % B, 1))  # a row past the end of a source
    ids = np.concatenate([ids, padding]).astype(np.int64)
    batches = grain.MapDataset.range(len(ids) // B).map(lambda k: ids[k * B : (k + 1) * B][rows])
    return batches.map(lambda ids: read_mixed(stores, ids, config.data.seq_len))


def fingerprint(config: ConfigDict) -> dict:
    """All that the order of data depends on. Equal fingerprints: batch k is the same batch."""
    stores = open_stores(config, "train")
    return {
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "seq_len": config.data.seq_len,
        "shuffle": config.data.shuffle,
        "weights": [weight for _, weight in mixture(config)],
        "sources": [store.fingerprint for store in stores],
        "tokenizer": stores[0].manifest["tokenizer"]["sha256"],
    }


def prefetch(batches, start: int, stop: int, depth: int, place: Callable = lambda batch: batch) -> Iterator:
    """place(batches[k]) for k in [start, stop), `depth` of them made ahead in a background thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
        make = lambda k: place(batches[k])
        ahead = deque(pool.submit(make, k) for k in range(start, min(start + depth, stop)))
        for k in range(start, stop):
            batch = ahead.popleft().result()
            if k + depth < stop:
                ahead.append(pool.submit(make, k + depth))
            yield batch
