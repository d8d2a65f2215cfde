"""Tokenizers: text to token ids and back, and what is known of them."""
