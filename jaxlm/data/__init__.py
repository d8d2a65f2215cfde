"""Text to batches, in numpy: prepare a corpus once, then read it at random."""
