"""A rank's life: how it is started and kept, and how its end is the end of all."""
