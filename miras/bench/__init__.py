"""How fast layers and models are on this machine, beside peers and beside the machine's own limits.

`run.bench` measures, `command.measure` is the command line's. Nothing is imported here: peak memory is measured in
processes of their own, which shall hold little but PyTorch.
"""
