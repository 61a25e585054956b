"""Stand-in for sgl_kernel, of which SGLang publishes no CPU wheel: importable, and every use raises."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build here")

    return missing
