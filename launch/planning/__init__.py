"""What launch.plan reads and says: questions from options and tables, answers for people and as JSON."""
