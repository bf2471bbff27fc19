"""Speed: a module for each subject, and beside some of them the same in PyTorch."""
