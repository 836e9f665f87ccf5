"""Text, its tokens, and batches of them, from the sources to the devices."""
