"""Learning by doing: exercises, an examiner that names the mistake, and what is due for practice again."""
