"""What is trained on: files of rows, their text as tokens, and tasks that need no download (GSM8K, sums of digits)."""
