"""Models that exist: what they are made of, and their files."""
