"""Speculative decoding: the rule, where drafts come from, what it gains, and the generator that does it."""
