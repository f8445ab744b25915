"""Device primitives that fused kernels are written in, beside TileLang's own."""

from importlib.resources import files


def cuda_source() -> str:
    return files(__package__).joinpath("cuda.h").read_text()
