"""What a layout costs, without running it."""
