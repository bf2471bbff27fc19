"""The desk: what a learner sees and types."""
