"""What the files of users hold: their formats, encodings and layouts, and the examples in them."""
