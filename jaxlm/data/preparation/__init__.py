"""What jaxlm.data.prepare does beside reading and writing text: its output directory, and what it says at the end."""
