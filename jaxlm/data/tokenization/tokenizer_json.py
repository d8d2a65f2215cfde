"""What Hugging Face's tokenizer.json, as an object, says of its tokenizer."""


def special_tokens(content: dict) -> set[str]:
    """The added tokens that a tokenizer.json marks as special."""
    added = content.get("added_tokens") or []
    return {token["content"] for token in added if token["special"]}


def around_the_text(processor: dict | None) -> tuple[str | None, str | None]:
    """The tokens that a tokenizer.json's post processor puts before and after one text, None where it puts none."""
    kind = processor["type"] if processor else None
    if kind == "TemplateProcessing":
        return _around_the_template(processor)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return processor["cls"][0], processor["sep"][0]
    before = None
    after = None
    if kind == "Sequence":
        for part in processor["processors"]:
            first, last = around_the_text(part)
            before = before or first
            after = after or last
    return before, after


def _around_the_template(processor: dict) -> tuple[str | None, str | None]:
    """The first special token on each side of the text."""
    before = []
    after = []
    side = before
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = after
        else:
            name = piece["SpecialToken"]["id"]
            side += processor["special_tokens"][name]["tokens"]
    return next(iter(before), None), next(iter(after), None)


def unknown_id(model: dict, ids: dict[str, int]) -> int | None:
    """What a tokenizer.json's model writes for text that it has no token for: by its word, or (Unigram) by its id."""
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return ids.get(model.get("unk_token"))


def drops_text(content: dict, ids: dict[str, int]) -> bool:
    """Whether a tokenizer.json's BPE leaves out, without a token, what it does not know."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or ids.get(model.get("unk_token")) is not None:
        return False
    if model.get("byte_fallback"):
        return not ids.keys() >= {f"<0x{byte:02X}>" for byte in range(256)}
    steps = _kinds(content.get("pre_tokenizer")) | _kinds(content.get("normalizer"))
    if "ByteLevel" not in steps:
        return True
    return not ids.keys() >= set(byte_level_alphabet())


def _kinds(part: dict | None) -> set[str]:
    """The types of the steps of a normalizer or a pre-tokenizer."""
    if not part:
        return set()
    steps = part.get("normalizers") or part.get("pretokenizers") or []
    return {part["type"]}.union(*map(_kinds, steps))


def without_prefix(part: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer of a tokenizer.json that puts no space before a text."""
    if not part:
        return part
    if part["type"] == "Prepend":
        return None
    edited = dict(part)
    if part["type"] == "Metaspace":
        edited["prepend_scheme"] = "never"
    if part.get("add_prefix_space"):  # of ByteLevel, and of Metaspace as older files write it
        edited["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            inner = map(without_prefix, part[name])
            edited[name] = [step for step in inner if step is not None]
    return edited


def byte_level_alphabet() -> list[str]:
    """The characters that ByteLevel writes the 256 bytes as."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()
