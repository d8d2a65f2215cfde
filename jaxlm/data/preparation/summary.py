"""What a person wants to know about a prepared directory, and what to type next."""

import shlex
from pathlib import Path

from jaxlm.data.tokenization import fidelity, specials
from jaxlm.data.tokenization.tokenizer import load

COUNTS = {
    "empty_documents": "empty documents dropped",
    "bad_records": "bad records skipped",
    "broken_files": "broken files kept as far as they go",
    "replaced_bytes": "U+FFFD written for invalid UTF-8",
    "replaced_surrogates": "U+FFFD written for lone surrogates",
    "byte_order_marks": "byte order marks stripped",
}
UNKNOWN = "unknown_tokens"  # of the counts, the one that the second pass makes
GIVEN = ("huggingface", "sentencepiece")  # kinds of tokenizers that are given as files
# The recipe to begin with, by the tokenizer: words are for word vectors.
RECIPES = {"words": "configs/vectors.py"}
FIRST_RECIPE = "configs/quickstart.py"


def summary(manifest: dict, output: str | Path) -> str:
    """Lines on the sizes, the tokenizer, what was odd and what is lost, and the command that trains on the output."""
    splits = manifest["splits"]
    tokenizer = manifest["tokenizer"]
    lines = [f"{'':10}{'documents':>14}{'bytes':>18}{'tokens':>18}{'bytes/token':>14}"]
    for name, split in splits.items():
        ratio = split["bytes"] / max(1, split["tokens"])
        lines.append(
            f"{name:10}{split['documents']:14,}{split['bytes']:18,}{split['tokens']:18,}{ratio:14.3f}"
        )
    lines.append(f"tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens")
    lines.append(begin_and_end(tokenizer, special_tokens(tokenizer, output)))
    wanted = manifest["options"]["vocab_size"]
    if wanted and wanted > tokenizer["vocab_size"]:
        lines.append(f"note: the text has no pieces for the {wanted:,} tokens that were asked for")
    if manifest["options"]["val_fraction"] and not splits["val"]["tokens"]:
        lines.append(
            "note: val is empty, since no two documents differ; --val_split=tail would cut one in two"
        )
    lines += what_is_lost(manifest)
    for key, name in COUNTS.items():
        if manifest["counts"][key]:
            lines.append(f"note: {manifest['counts'][key]:,} {name}")
    return "\n".join(
        [*lines, f"written to {output}", "next:", f"  {next_command(manifest, output)}"]
    )


def next_command(manifest: dict, output: str | Path) -> str:
    """A command that trains on the output as it stands."""
    recipe = RECIPES.get(manifest["tokenizer"]["name"], FIRST_RECIPE)
    words = ["python", "-m", "jaxlm.train", f"--config={recipe}", f"--config.data.path={output}"]
    words.append(f"--workdir=runs/{Path(output).resolve().name}")
    if not manifest["splits"]["val"]["tokens"]:
        words.append("--config.eval.every=0")
    return shlex.join(words)


def special_tokens(tokenizer: dict, output: str | Path) -> list[str]:
    """The special tokens of the tokenizer in the output, where it was given and lacks an end or a begin."""
    if tokenizer["name"] in GIVEN and None in (tokenizer["bos_id"], tokenizer["eos_id"]):
        return specials.special_tokens_of(load(output))
    return []


def begin_and_end(tokenizer: dict, special: list[str]) -> str:
    """One line on the tokens around a document. tokenizer: the manifest's entry; special: its special tokens."""
    bos = _one_end(tokenizer, "bos")
    eos = _one_end(tokenizer, "eos")
    if tokenizer["eos_id"] is None:
        hint = ""
        if tokenizer["name"] in GIVEN:
            hint = _hint(tokenizer, "eos", special)
        return f"note: {bos}, {eos}: documents have no end, so that generation goes on to max_tokens{hint}"
    if tokenizer["bos_id"] is None:
        hint = _hint(tokenizer, "bos", special)
        return f"note: {bos}, so that a prompt can't be empty, {eos}{hint}"
    return f"{bos}, {eos}"


def _hint(tokenizer: dict, role: str, special: list[str]) -> str:
    """Which flag chooses a token, and which tokens there are to choose from."""
    if tokenizer.get(f"{role}_from") == f"--{role}":
        return ""
    if special:
        return f"; --{role}=TOKEN chooses one of {specials.listed(special)}"
    return f"; --{role}=TOKEN chooses one"


def _one_end(tokenizer: dict, role: str) -> str:
    """In words, the token that is the tokenizer's bos or eos, and where that is from."""
    id_ = tokenizer[f"{role}_id"]
    origin = tokenizer.get(f"{role}_from")
    source = f" ({origin})" if origin else ""
    if id_ is None:
        return f"no {role}{source}"
    token = f" {tokenizer[f'{role}_token']}" if source else ""
    return f"{role}{token} is token {id_}{source}"


def what_is_lost(manifest: dict) -> list[str]:
    """Lines on the text that the tokens don't hold."""
    if "kept" not in manifest:  # of an earlier version, which counted tokens, or nothing
        unknown = manifest["counts"].get(UNKNOWN, 0)
        if not unknown:
            return []
        return [f"note: {unknown:,} tokens are the tokenizer's unknown token: their text is lost"]
    kept = manifest["kept"]
    lines = []
    if kept["unknown_tokens"] or kept["unknown_characters"]:
        lines.append(f"note: {fidelity.unknown_in_words(kept)}")
    if kept["give_back"]:
        lines.append(f"note: {kept['give_back']}")
    return lines
