"""What a person types: one module a command, `mpirun -n 4 python -m launch.tp_mlp`."""
