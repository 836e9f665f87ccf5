"""Text, its tokens, and batches of them: from sources to devices, a file for each."""
