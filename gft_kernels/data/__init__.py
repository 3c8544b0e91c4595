"""Two self-contained tasks for examples and the demo: GSM8K (a sample ships) and sums of digits made on the fly."""
