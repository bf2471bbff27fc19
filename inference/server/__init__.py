"""HTTP round an engine: OpenAI's API, and a page that shows the batch."""
