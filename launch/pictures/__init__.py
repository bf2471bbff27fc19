"""All that draws with matplotlib."""
