"""Symmetric memory: memory of every rank of a group that its peers can read, write and signal through.

`heap.py` is the interface that templates and the runtime see; `shm.py` provides it for CPU ranks of one host. `device.py` is the
heap of a group of GPUs: its regions come from NVSHMEM (`provider.py`: one `world.py`, entered after a `muster.py`, through
`host.py`, shared out by `arena.py`) or from torch's symmetric memory (`p2p.py`).
"""
