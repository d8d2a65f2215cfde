"""Bits per byte of a text, and which texts have none: those that hold what their tokenizer can't write.

One unknown token may stand for a whole text. It is predicted at almost no cost, so that bits per byte would flatter.
"""

from jaxlm.data.batches import count_tokens
from jaxlm.data.store import Store
from jaxlm.data.tokenization import tokenizer as tokenizers


def predicted_bytes(store: Store, path: str) -> int:
    """UTF-8 bytes of a split's text, without the first tokens of documents where nothing precedes them."""
    if store.bos_id is not None:
        return store.num_bytes
    first = store.rows(store.document_starts(0, store.num_tokens), 1)
    return store.num_bytes - len(tokenizers.load(path).decode(first).encode())


def count_unknown(store: Store, tokenizer) -> int:
    """How many tokens of a split are the tokenizer's unknown token.

    The tokens themselves are counted, unless the manifest says that there are none: that of data which an earlier
    version prepared says nothing.
    """
    unknown = tokenizer.unknown_id
    if unknown is None or store.manifest["counts"].get("unknown_tokens") == 0:
        return 0
    found = int(count_tokens(store)[unknown])
    if unknown == store.eos_id:  # one token may be both: each document ends with it
        found -= store.num_documents
    return max(found, 0)


def why_none(unknown: int, total: int, where: str) -> str:
    """In words, why there are no bits per byte; empty where there are. where: the tokens' text, such as a path."""
    if not unknown:
        return ""
    share = f"{unknown:,} of {total:,} tokens ({100 * unknown / total:.3g}%)"
    return f"bits per byte is left out: {share} of {where} are the tokenizer's unknown token, whose text is lost"


def why_dropped(characters: int, where: str) -> str:
    """As why_none, of characters that a tokenizer without an unknown token passes over."""
    if not characters:
        return ""
    return (
        f"bits per byte is left out: the tokenizer has no tokens for {characters:,} characters of {where}, which are "
        "lost"
    )


def why_none_of(stores: list[Store], tokenizer) -> str:
    """why_none of the splits of prepared directories, which have one tokenizer.

    What a tokenizer without an unknown token drops leaves no trace in the tokens: the manifests are asked.
    """
    if tokenizer.unknown_id is None:
        dropped = sum(store.manifest["counts"].get("unknown_characters", 0) for store in stores)
        return why_dropped(dropped, "the prepared text")
    unknown = sum(count_unknown(store, tokenizer) for store in stores)
    total = sum(store.num_tokens for store in stores)
    return why_none(unknown, total, "the validation text")
