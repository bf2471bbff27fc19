"""MPI and arrays: meshes of ranks, shards, counted collectives. Knows nothing of transformers."""
