"""Two self-contained tasks for examples and the demo: GSM8K with a sample shipped, and sums of digits made on the fly."""
