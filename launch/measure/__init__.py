"""What is run to be counted or timed."""
