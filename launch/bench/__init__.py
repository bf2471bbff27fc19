"""Speed, a module a subject, with the same in PyTorch beside some of them."""
