"""Symmetric memory: memory of every rank of a group that its peers can read, write and signal through.

`heap.py` is the interface that templates and the runtime see; `shm.py` provides it for CPU ranks of one host.
"""
