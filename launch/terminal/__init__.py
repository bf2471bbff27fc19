"""What commands say in a terminal, and where they write."""
