"""`--explain`: one rank's view of one step, line by line: what it holds, sees, computes, and whom it meets in which verb."""
